"""Training on several label sets: what a batch holds, what a run records, and what it refuses."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.builders import before_update, files_of, interrupt, make_labels, small_teacher, write_tars
from support.training import TINY, assert_same_state, content
from support.web_server import web_server

from pipeline.errors import CheckpointError, LabelSetMismatch, UsageError
from pipeline.images.source import open_source
from pipeline.labels.encoding import Answers
from pipeline.labels.labelset import LabelSet
from pipeline.storage.yaml import read_yaml
from pipeline.views.recipe import PRESETS
from trainer.bench import bench_training
from trainer.checkpoint import load_state, save_state
from trainer.config import TrainConfig
from trainer.loop import train
from trainer.order import Share
from trainer.run import make_order, open_data
from trainer.stream import Batch, BatchRenderer, Catalogue, stream_batches


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_tars(tmp_path_factory.mktemp("data"), (24, 16), unlabelled=5)


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory) -> Path:
    """Label sets of the same views: a and b of two teachers, `c` with another K, and `hard` with hard labels only."""
    folder = tmp_path_factory.mktemp("sets")
    source = open_source(data)
    make_labels(folder / "a", data, topk=2)
    make_labels(folder / "b", data, topk=2, teacher=small_teacher(source, num_classes=3))
    make_labels(folder / "c", data, topk=1, teacher=small_teacher(source, num_classes=3))
    make_labels(folder / "hard", data, topk=0, teacher=small_teacher(source, num_classes=3))
    return folder


def config(folder: Path, *names: str, output: Path = Path("run"), **changes: Any) -> TrainConfig:
    values = {
        "labels": [folder / name for name in names],
        "output": output,
        "batch_size": 12,
        "epochs": 3,
        "warmup_epochs": 1,
        "lr": 1e-3,
        "workers": 0,
        "log_interval": 1,
        "distillation_type": "soft",
        "distillation_tau": 2.0,
    }
    return TrainConfig(**(values | TINY | changes))


def renderer_of(asked: TrainConfig) -> tuple[BatchRenderer, int]:
    data = open_data(asked)
    order = make_order(asked, data)
    renderer = BatchRenderer(Catalogue(data.source, data.label_set), data.recipe, order)
    return renderer, order.steps_per_epoch * asked.epochs


def batches_of(asked: TrainConfig, *, workers: int = 0) -> list[Batch]:
    renderer, updates = renderer_of(asked)
    return list(stream_batches(renderer, range(updates), workers=workers, held=updates))


# --- batches ------------------------------------------------------------------------------------------------------------


def views_of(batches: list[Batch]) -> list[tuple[str, int]]:
    """The key and view of each place in the batches: of a pair first one view of both, then the next."""
    found: list[tuple[str, int]] = []
    for batch in batches:
        seen: Counter[str] = Counter()
        for key in batch.keys:
            found.append((key, batch.views[seen[key]]))
            seen[key] += 1
    return found


def dense_target(answers: Answers, row: int, classes: int = 3) -> np.ndarray:
    """The loss's target at temperature 1, with the tail spread."""
    index, prob = answers.topk_index[row], answers.topk_prob[row].astype(np.float64)
    rest = float(answers.tail_mass[row]) / (classes - len(index)) if len(index) < classes else 0.0
    target = np.full(classes, rest)
    target[index] = prob
    return target / target.sum()


def stored(labels: Path, source) -> dict[tuple[str, int], tuple[int, np.ndarray]]:
    """Hard label and dense target of every (key, view) of a label set."""
    label_set = LabelSet.open(labels)
    return {
        (source.shard(shard).keys[row], view): (int(rows.hard[at]), dense_target(rows.answers, at))
        for shard in label_set.shards
        for view in label_set.views
        for rows in [label_set.read(shard, view)]
        for at, row in enumerate(rows.row.tolist())
    }


def targets(batches: list[Batch]) -> list[tuple[int, np.ndarray]]:
    found = []
    for batch in batches:
        assert batch.teacher is not None
        answers = Answers(*(tensor.numpy() for tensor in vars(batch.teacher).values()))
        found += [(int(answers.hard[at]), dense_target(answers, at)) for at in range(len(batch.keys))]
    return found


@pytest.mark.parametrize("names", [("a", "b"), ("c", "a")])
@pytest.mark.parametrize("repeats", [1, 3])
def test_a_batch_holds_the_mean_of_what_the_sets_hold(folder, data, names, repeats):
    batches = batches_of(config(folder, *names, label_weights=(0.7, 0.3), repeated_aug=repeats))
    one, other = (stored(folder / name, open_source(data)) for name in names)
    for place, (hard, target) in zip(views_of(batches), targets(batches), strict=True):
        np.testing.assert_allclose(target, 0.7 * one[place][1] + 0.3 * other[place][1], rtol=1e-6)
        assert hard == one[place][0]
    assert batches[0].teacher is not None
    assert batches[0].teacher.topk_index.shape == (12, 3)


def test_a_batch_of_random_holds_the_answers_of_one_set_for_each_view(folder, data):
    batches = batches_of(config(folder, "a", "b", label_mode="random", label_weights=(3, 1), epochs=9))
    one, other = (stored(folder / name, open_source(data)) for name in "ab")
    taken: dict[tuple[str, int], set[str]] = {}
    for place, (_, target) in zip(views_of(batches), targets(batches), strict=True):
        name = next(
            name for name, found in (("a", one), ("b", other)) if np.allclose(target, found[place][1], rtol=1e-6)
        )
        taken.setdefault(place, set()).add(name)
    assert len(taken) == 3 * 40
    assert all(len(names) == 1 for names in taken.values())  # the same when a view comes again
    share = sum(names == {"a"} for names in taken.values()) / len(taken)
    assert share == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / len(taken)) ** 0.5)


@pytest.mark.parametrize("mode", ["mean", "random"])
def test_loader_processes_do_not_change_the_batches(folder, mode):
    asked = config(folder, "a", "b", label_mode=mode, epochs=1)
    here, there = batches_of(asked), batches_of(asked, workers=2)
    assert [content(batch) for batch in here] == [content(batch) for batch in there]


@pytest.mark.parametrize("mode", ["mean", "random"])
def test_ranks_have_the_answers_that_one_process_has(folder, mode):
    asked = config(folder, "a", "b", label_mode=mode)
    data = open_data(asked)
    order = make_order(asked, data)
    catalogue = Catalogue(data.source, data.label_set)

    def told(*shares: Share) -> list[tuple]:
        batches = [BatchRenderer(catalogue, data.recipe, order, share).render_here(2) for share in shares]
        return sorted(zip(views_of(batches), [tuple(target) for _, target in targets(batches)], strict=True))

    assert told(Share(0, 2), Share(1, 2)) == told(Share())


def test_the_seed_decides_what_random_draws(folder):
    def hard(seed: int) -> list[tuple]:
        asked = config(folder, "a", "b", label_mode="random", seed=seed, epochs=1, batch_size=40)
        batches = batches_of(asked)
        return sorted(zip(views_of(batches), [tuple(target) for _, target in targets(batches)], strict=True))

    assert hard(1) == hard(1)
    assert hard(1) != hard(2)


# --- runs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["mean", "random"])
@pytest.mark.parametrize("stop_after", [1, 4])
def test_a_resumed_run_equals_an_uninterrupted_one(folder, tmp_path, mode, stop_after):
    more = {"label_mode": mode, "label_weights": (0.7, 0.3), "recovery_interval": 1, "repeated_aug": 1}
    train(config(folder, "a", "b", output=tmp_path / "whole", **more))
    with before_update(stop_after, interrupt), pytest.raises(KeyboardInterrupt):
        train(config(folder, "a", "b", output=tmp_path / "cut", **more))
    train(config(folder, "a", "b", output=tmp_path / "cut", resume="auto", workers=2, **more))
    assert_same_state(tmp_path / "whole", tmp_path / "cut")
    assert files_of(tmp_path / "whole/last") == files_of(tmp_path / "cut/last")


def test_a_run_says_and_records_its_teachers(folder, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="deit_cli")
    run = train(config(folder, "a", "b", output=tmp_path / "run", label_weights=(7, 3), epochs=1))
    assert "teachers support.builders:confident_cnn (0.7) and test_resnet (0.3), averaged" in caplog.messages
    assert f"{sum(len(LabelSet.open(folder / name).manifest.probes) for name in 'ab')} replay probes" in caplog.text
    saved = json.loads((run / "config.json").read_text())
    plans = [LabelSet.open(folder / name).plan for name in "ab"]
    assert saved["labelset_id"] == [plan.labelset_id for plan in plans]
    assert [teacher["name"] for teacher in saved["teacher"]] == [plan.teacher.name for plan in plans]
    assert (saved["label_weights"], saved["label_mode"]) == ([0.7, 0.3], "mean")
    assert saved["config"]["labels"] == [str(folder / name) for name in "ab"]
    meta = load_state(run / "state.safetensors")[1]
    assert {name: meta[name] for name in ("labelset_id", "label_weights", "label_mode")} == {
        name: saved[name] for name in ("labelset_id", "label_weights", "label_mode")
    }
    settings = read_yaml(run / "config.yaml")
    assert isinstance(settings, dict)
    assert (settings["labels"], settings["label_weights"]) == ([str(folder / name) for name in "ab"], [7, 3])


def test_a_run_of_one_set_records_what_it_always_did(folder, tmp_path):
    run = train(config(folder, "a", output=tmp_path / "run", epochs=1))
    saved, meta = json.loads((run / "config.json").read_text()), load_state(run / "state.safetensors")[1]
    plan = LabelSet.open(folder / "a").plan
    assert (saved["labelset_id"], saved["teacher"]["name"]) == (plan.labelset_id, plan.teacher.name)
    of_order = {"views", "views_per_update", "updates_per_epoch"}
    assert {*saved} == {"config", "recipe", "recipe_id", "labelset_id", "teacher"} | of_order
    assert {name: saved[name] for name in of_order - {"updates_per_epoch"}} == {
        name: meta[name] for name in of_order - {"updates_per_epoch"}
    }
    assert saved["updates_per_epoch"] == meta["next_update"]  # it had one epoch
    assert saved["config"]["labels"] == str(folder / "a")
    assert {*meta} == {
        *("version", "config", "views_per_update", "recipe_id", "labelset_id", "expect_manifest"),
        *("repeated_aug", "views", "source_id", "shards", "next_update"),
    }
    assert (meta["labelset_id"], meta["expect_manifest"]) == (plan.labelset_id, None)
    assert not {"labels", "label_weights", "label_mode"} & {*meta["config"]}
    settings = read_yaml(run / "config.yaml")
    assert isinstance(settings, dict)
    assert settings["labels"] == str(folder / "a")
    assert "label_weights" not in settings


def test_a_run_of_one_set_may_say_weight_and_mode(folder, tmp_path):
    train(config(folder, "a", output=tmp_path / "run", epochs=1))
    train(config(folder, "a", output=tmp_path / "run", epochs=1, resume="auto", label_weights=[2], label_mode="random"))


def ids(folder: Path, *names: str) -> list[str]:
    return [LabelSet.open(folder / name).plan.labelset_id[:12] for name in names]


OTHERS = [
    # sets and settings of the resumed run, what it is on
    (("b", "a"), {"label_weights": (0.7, 0.3)}, "label sets {b} (0.7) and {a} (0.3), averaged"),
    (("a", "c"), {"label_weights": (0.7, 0.3)}, "label sets {a} (0.7) and {c} (0.3), averaged"),
    (("a", "b"), {}, "label sets {a} (0.5) and {b} (0.5), averaged"),
    (
        ("a", "b"),
        {"label_weights": (0.7, 0.3), "label_mode": "random"},
        "label sets {a} (0.7) and {b} (0.3), one drawn for each view",
    ),
    (("a",), {}, "label set {a}"),
    (("a", "b", "c"), {}, "label sets {a} (0.333), {b} (0.333) and {c} (0.333), averaged"),
]


@pytest.fixture(scope="module")
def begun(folder, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "run"
    return train(config(folder, "a", "b", output=output, label_weights=(0.7, 0.3), epochs=1))


@pytest.mark.parametrize(("names", "changes", "now"), OTHERS, ids=[text for _, _, text in OTHERS])
def test_a_run_does_not_continue_on_other_label_sets(folder, begun, names, changes, now):
    a, b, c = ids(folder, "a", "b", "c")
    with pytest.raises(CheckpointError) as caught:
        train(config(folder, *names, output=begun, epochs=1, resume="auto", **changes))
    assert str(caught.value) == (
        f"{begun / 'state.safetensors'} belongs to a run on label sets {a} (0.7) and {b} (0.3), averaged,"
        f" this one is on {now.format(a=a, b=b, c=c)}."
        " Pass --labels, --label-weights and --label-mode as that run had them, or another --output"
    )


def test_a_run_of_one_set_does_not_continue_on_two(folder, tmp_path):
    run = train(config(folder, "a", output=tmp_path / "run", epochs=1))
    (a,) = ids(folder, "a")
    with pytest.raises(
        CheckpointError, match=rf"belongs to a run on label set {a}, this one is on label sets {a} \(0\.5\)"
    ):
        train(config(folder, "a", "b", output=run, epochs=1, resume="auto"))


def test_weights_that_differ_a_little_are_other_weights(folder, begun):
    with pytest.raises(CheckpointError, match=r"with other settings \(label_weights\.0: 0\.7, not 0\.70001\)"):
        train(config(folder, "a", "b", output=begun, label_weights=(0.70001, 0.29999), epochs=1, resume="auto"))


def test_a_damaged_state_says_what_it_holds(folder, begun, tmp_path):
    tensors, meta = load_state(begun / "state.safetensors")
    for name, value in {"label_mode": "loud", "label_weights": ["x", None], "labelset_id": [1, 2]}.items():
        save_state(tmp_path / "state.safetensors", tensors, meta | {name: value})
        with pytest.raises(CheckpointError, match="belongs to a run on label sets"):
            train(config(folder, "a", "b", output=tmp_path, label_weights=(0.7, 0.3), epochs=1, resume="auto"))


def test_the_weights_may_be_said_in_another_scale(folder, begun):
    train(config(folder, "a", "b", output=begun, label_weights=(7, 3), epochs=1, resume="auto"))


def test_pins_of_several_sets_stay(folder, tmp_path):
    pins = [f"sha256:{LabelSet.open(folder / name).manifest_sha256}" for name in "ab"]
    run = train(config(folder, "a", "b", output=tmp_path / "run", epochs=1, expect_manifest=pins))
    assert json.loads((run / "config.json").read_text())["config"]["expect_manifest"] == pins
    with pytest.raises(CheckpointError, match=f"Pass --expect-manifest {pins[0]} --expect-manifest {pins[1]}, or"):
        train(config(folder, "a", "b", output=run, epochs=1, resume="auto"))
    train(config(folder, "a", "b", output=run, epochs=1, resume="auto", expect_manifest=pins))
    with pytest.raises(LabelSetMismatch, match="is not the pinned manifest"):
        train(config(folder, "b", "a", output=tmp_path / "new", epochs=1, expect_manifest=pins))


# --- refusals -------------------------------------------------------------------------------------------------------------

REFUSED = [
    ({"expect_manifest": ["sha256:" + "0" * 64]}, "--expect-manifest must have one value for each of the 2 --labels"),
    ({"label_weights": (1.0,)}, "--label-weights must have one value for each of the 2 --labels, in the same order"),
    ({"label_weights": (1.0, 2.0, 3.0)}, "or be left out; got 3"),
    ({"label_weights": (1.0, 0.0)}, "--label-weights must be in 1e-06..1e+06, got 0"),
    ({"label_weights": (1.0, -1.0)}, "--label-weights must be in 1e-06..1e+06, got -1"),
    ({"label_weights": (1.0, float("nan"))}, "--label-weights must be in 1e-06..1e+06, got nan"),
    ({"label_mode": "vote"}, "--label-mode must be one of mean, random, got 'vote'"),
    ({"expect_manifest": ["sha256:" + "0" * 64, "x"]}, "--expect-manifest must be sha256: and 64 hex digits"),
]


@pytest.mark.parametrize(("changes", "text"), REFUSED, ids=range(len(REFUSED)))
def test_settings_that_do_not_fit_are_refused(changes, text):
    with pytest.raises(UsageError) as caught:
        TrainConfig(labels=["a", "b"], **changes)
    assert text in str(caught.value)


def test_labels_may_be_one_or_several():
    assert TrainConfig(labels="a").labels == TrainConfig(labels=Path("a")).labels == TrainConfig(labels=["a"]).labels
    assert TrainConfig(labels=(Path("a"), "b")).labels == ("a", "b")
    assert TrainConfig(labels=None, data="x", distillation_type="none").labels == ()
    with pytest.raises(UsageError, match="--distillation-type hard needs --labels"):
        TrainConfig(labels=[])


def test_soft_distillation_needs_probabilities_of_every_set(folder, tmp_path):
    asked = config(folder, "a", "hard", output=tmp_path / "run")
    with pytest.raises(UsageError) as caught:
        train(asked)
    assert str(caught.value) == (
        f"soft distillation needs top-k labels (K >= 1), and {folder / 'hard'} holds only hard labels (K = 0)."
        " Train with hard distillation, or leave out this --labels"
    )


@pytest.mark.parametrize("mode", ["mean", "random"])
def test_hard_distillation_takes_sets_with_hard_labels_only(folder, data, mode):
    asked = config(folder, "a", "hard", label_mode=mode, label_weights=(1, 3), distillation_type="hard", epochs=1)
    batches = batches_of(asked)
    one = stored(folder / "a", open_source(data))
    other = stored(folder / "b", open_source(data))  # of the same teacher as `hard`
    hard_labels = [hard for batch in batches if batch.teacher for hard in batch.teacher.hard.tolist()]
    for place, hard in zip(views_of(batches), hard_labels, strict=True):
        assert hard in ({other[place][0]} if mode == "mean" else {one[place][0], other[place][0]})


def test_the_views_must_lie_within_those_of_all_sets(folder):
    asked, more = (config(folder, "a", "b", views=views) for views in ((1, 3), (0, 4)))
    data = open_data(asked)
    assert make_order(asked, data).views == range(1, 3)
    with pytest.raises(UsageError, match="within the labelled views, got 0:4: all label sets have 0:3"):
        make_order(more, data)


def test_another_recipe_is_refused_with_all_sets(folder):
    with pytest.raises(LabelSetMismatch) as caught:
        open_data(config(folder, "a", "b"), PRESETS["deit"])
    assert str(caught.value).startswith(f"{folder / 'a'} + {folder / 'b'} was made with another recipe (")


# --- elsewhere ------------------------------------------------------------------------------------------------------------


def test_sets_behind_urls_are_fetched_before_they_are_needed(folder, data, tmp_path):
    near = [content(batch) for batch in batches_of(config(folder, "a", "b"))]
    with web_server(folder) as server:
        asked = config(
            folder,
            labels=[f"{server.url}/a", f"{server.url}/b"],
            data=data,
            cache_dir=tmp_path / "cache",
        )
        renderer, updates = renderer_of(asked)
        files = [file.url for file in renderer.remote_files(range(updates))]
        for name in "ab":
            for shard in ("train-000000", "train-000001"):
                for kind in ("samples", "labels/views-00000-00002"):
                    assert f"{server.url}/{name}/{kind}/{shard}.parquet" in files
        assert [content(batch) for batch in batches_of(asked, workers=1)] == near


@pytest.mark.parametrize("mode", ["mean", "random"])
def test_bench_takes_several_sets(folder, tmp_path, mode):
    found = bench_training(config(folder, "a", "b", label_mode=mode, output=tmp_path / "run"), seconds=0.1)
    assert found.parts.labels_s is not None
    assert found.parts.labels_s > 0
