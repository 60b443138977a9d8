"""What must hold in stage 2, a test for each fault; a fault is a number, and tests say which they cover.

18  SIGKILL of the trainer, or of a rank: test_kill, test_parallel
19  other ranks, workers, batches: test_parallel, and below
20  a continuation on changed labels, settings, teacher
21  label shards that go or change in the middle
22  read-only and odd places
23  a loss that is no number: test_train
24  few file descriptors, many shards
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.builders import before_update, make_labels, small_recipe, teacher_of, with_checkout, write_tars

from pipeline.errors import (
    CheckpointError,
    DeitCliError,
    LabelSetCorrupt,
    LabelSetError,
    LabelSetMismatch,
    StoppedError,
    UsageError,
)
from pipeline.images.source import open_source
from pipeline.labels.labelset import LabelSet
from trainer import loop
from trainer.checkpoint import load_state
from trainer.config import TrainConfig
from trainer.loop import train
from trainer.run import only_run_in

TINY = {"model": "deit-ti", "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_tars(tmp_path_factory.mktemp("data"), (24, 16))


@pytest.fixture(scope="module")
def made(data, tmp_path_factory) -> LabelSet:
    return make_labels(tmp_path_factory.mktemp("labels") / "set", data, views=(0, 6), views_per_shard=3)


@pytest.fixture
def labels(made, tmp_path) -> Path:
    return Path(shutil.copytree(made.folder, tmp_path / "labels"))


def config(labels: Path, output: Path, **changes) -> TrainConfig:
    values = {"batch_size": 12, "epochs": 6, "warmup_epochs": 0, "lr": 1e-3, "repeated_aug": 1, "log_interval": 1}
    values |= {"model_ema": False, "recovery_interval": 1, "workers": 0, "device": "cpu"}
    return TrainConfig(labels=labels, output=output, **(TINY | values | changes))


def state_of(run: Path) -> dict[str, torch.Tensor]:
    return load_state(run / "state.safetensors")[0]


def stop_after(config: TrainConfig, updates: int) -> None:
    """Train so many updates and stop as a scheduler would make it."""
    with before_update(updates - 1, lambda: os.kill(os.getpid(), signal.SIGTERM)), pytest.raises(StoppedError):
        train(config)


# --- 19 -------------------------------------------------------------------------------------------------------


def test_fault_19_a_run_goes_on_with_other_workers_and_other_parts_of_the_same_batch(made, tmp_path):
    train(config(made.folder, tmp_path / "whole", drop_path=0.0))
    cut = config(made.folder, tmp_path / "cut", drop_path=0.0, resume="auto", workers=1)
    stop_after(cut, 4)
    stop_after(replace(cut, workers=2), 3)
    train(replace(cut, batch_size=6, grad_accum_steps=2, workers=0))
    whole, found = state_of(tmp_path / "whole"), state_of(tmp_path / "cut")
    apart = [float((whole[n] - found[n]).abs().max()) for n in whole if n.startswith("model.") and "qkv.bias" not in n]
    assert max(apart) < 1e-6


# --- 20 -------------------------------------------------------------------------------------------------------


def other_teacher(labels: Path, data: str) -> None:
    shutil.rmtree(labels)
    make_labels(
        labels, data, views=(0, 6), teacher=teacher_of("test_resnet", pretrained=False, img_size=16, num_classes=3)
    )


def other_recipe(labels: Path, data: str) -> None:
    shutil.rmtree(labels)
    make_labels(labels, data, views=(0, 6), recipe=small_recipe().with_fields(hflip=0.25))


def more_views(labels: Path, data: str) -> None:
    make_labels(labels, data, views=(6, 9), views_per_shard=3)


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        (other_teacher, CheckpointError, "labelset_id"),
        (other_recipe, CheckpointError, "labelset_id|recipe_id"),
    ],
)
def test_fault_20_a_continuation_on_other_labels_is_refused_with_what_differs(
    labels, data, tmp_path, change, error, names
):
    asked = config(labels, tmp_path / "run", resume="auto")
    stop_after(asked, 2)
    before = (tmp_path / "run/state.safetensors").read_bytes()
    change(labels, data)
    with pytest.raises(error, match=rf"belongs to a run with other settings.*({names})"):
        train(asked)
    assert (tmp_path / "run/state.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"lr": 2e-3}, r"\(--lr: 0.001, not 0.002\)"),
        ({"seed": 1, "lr": 2e-3}, r"\(--lr: 0.001, not 0.002; --seed: 0, not 1\)"),
        ({"distillation_alpha": 0.4}, "--distillation-alpha: 0.5, not 0.4"),
        (
            {
                "lr": 1.0,
                "seed": 1,
                "smoothing": 0.3,
                "weight_decay": 0.7,
                "min_lr": 0.01,
                "warmup_lr": 0.02,
                "drop_path": 0.3,
            },
            "; 2 more",
        ),
    ],
)
def test_fault_20_a_continuation_with_other_settings_is_refused_with_what_differs(made, tmp_path, changes, names):
    asked = config(made.folder, tmp_path / "run", resume="auto")
    stop_after(asked, 2)
    with pytest.raises(CheckpointError, match=rf"other settings.*{names}"):
        train(replace(asked, **changes))


def test_fault_20_a_set_that_has_grown_is_gone_on_with_by_the_views_of_before(labels, data, tmp_path):
    train(config(labels, tmp_path / "whole"))
    asked = config(labels, tmp_path / "run", resume="auto")
    stop_after(asked, 2)
    more_views(labels, data)
    with pytest.raises(
        CheckpointError, match=r"belongs to a run on views 0:6, this one has \[0, 9\]\. Pass --views 0:6"
    ):
        train(asked)
    train(replace(asked, views=(0, 6)))
    whole, found = state_of(tmp_path / "whole"), state_of(tmp_path / "run")
    assert [name for name in whole if not torch.equal(whole[name], found[name])] == []


@pytest.mark.parametrize("views", [(0, 7), (3, 3)])
def test_views_that_are_not_labelled_are_refused(made, tmp_path, views):
    with pytest.raises(
        UsageError, match=r"--views must be START:STOP within the labelled views.*: the label set has 0:6"
    ):
        train(config(made.folder, tmp_path / "run", views=views))


def test_fault_20_one_byte_of_the_manifest_is_enough(labels, tmp_path):
    asked = config(labels, tmp_path / "run", resume="auto")
    stop_after(asked, 2)
    manifest = labels / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"rows": 72', b'"rows": 73', 1))
    with pytest.raises(LabelSetError):
        train(asked)


# --- 21 -------------------------------------------------------------------------------------------------------


def removed(path: Path) -> None:
    path.unlink()


def replaced_by_its_neighbour(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(next(p for p in sorted(path.parent.glob("*.parquet")) if p != path).read_bytes())
    os.replace(other, path)


def changed_in_place(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    with path.open("r+b") as file:
        file.write(data)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", [removed, replaced_by_its_neighbour, changed_in_place])
def test_fault_21_a_label_shard_that_goes_or_changes_in_the_middle_stops_the_run_by_name(
    labels, tmp_path, damage, workers
):
    """The second file of views is read from the fourth epoch on; the run has opened the set by then."""
    later = sorted((labels / "labels").glob("views-00003-*/*.parquet"))
    with (
        before_update(0, lambda: [damage(path) for path in later[:1]]),
        pytest.raises(LabelSetCorrupt, match=later[0].name),
    ):
        train(config(labels, tmp_path / "run", workers=workers))
    done = load_state(tmp_path / "run/state.safetensors")[1]["next_update"]
    assert 3 * 3 <= done < 4 * 3  # all updates of the views before it, none of the epoch that lacks it whole


def test_fault_21_a_shard_that_was_read_and_then_changes_is_refused_at_the_next_reading(labels, tmp_path, monkeypatch):
    """Views repeat after six epochs; by then the file is another one, and nobody believes what was checked before."""
    first = next(iter(sorted((labels / "labels").glob("views-00000-*/*.parquet"))))
    monkeypatch.setattr("trainer.stream._Recent.get", lambda self, key, make: make())  # nothing is remembered
    with before_update(12, lambda: changed_in_place(first)), pytest.raises(LabelSetCorrupt, match=first.name):
        train(config(labels, tmp_path / "run", epochs=12))


# --- 22 -------------------------------------------------------------------------------------------------------


def test_fault_22_a_run_folder_that_cannot_be_written_is_named(made, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DeitCliError, match="file"):
        train(config(made.folder, tmp_path / "file" / "run"))


@pytest.mark.parametrize("name", ["a" * 200, "ein Lauf mit Leerzeichen und Ümlaut", "UPPER/lower"])
def test_fault_22_odd_names_of_a_run_work(made, tmp_path, name):
    train(config(made.folder, tmp_path / name, epochs=1))
    assert (tmp_path / name / "last/model.safetensors").is_file()


def test_fault_22_a_strict_umask_leaves_what_the_user_can_read(made, tmp_path):
    before = os.umask(0o077)
    try:
        train(config(made.folder, tmp_path / "run", epochs=1))
        train(config(made.folder, tmp_path / "run", epochs=1, resume="auto"))
    finally:
        os.umask(before)
    assert (tmp_path / "run/state.safetensors").stat().st_mode & 0o777 == 0o600


# --- evaluation and folders -----------------------------------------------------------------------------------


def evaluations(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["index"], line["top1"]) for line in lines if line["kind"] == "eval"]


def test_an_epoch_is_saved_before_it_is_evaluated_and_the_continuation_evaluates_it(made, data, tmp_path, monkeypatch):
    train(config(made.folder, tmp_path / "whole", eval_data=data))
    asked = config(made.folder, tmp_path / "run", eval_data=data, resume="auto", recovery_interval=0)

    def dies(*args: object, **how: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", dies)
        with pytest.raises(KeyboardInterrupt):
            train(asked)
    assert load_state(tmp_path / "run/state.safetensors")[1]["next_update"] == 3
    train(asked)
    train(asked)  # over: nothing is evaluated twice
    assert evaluations(tmp_path / "run") == evaluations(tmp_path / "whole")
    assert len(evaluations(tmp_path / "run")) == 6
    best = [(tmp_path / name / "best/model.safetensors").read_bytes() for name in ("run", "whole")]
    assert best[0] == best[1]


def test_images_that_cannot_be_evaluated_are_refused_before_the_first_update(made, tmp_path):
    unlabelled = write_tars(tmp_path / "unlabelled", (4,), unlabelled=1)
    with pytest.raises(UsageError, match="no class labels to evaluate on"):
        train(config(made.folder, tmp_path / "run", eval_data=unlabelled))
    assert not (tmp_path / "run").exists()


def test_two_processes_never_train_in_one_folder(made, tmp_path):
    with only_run_in(tmp_path / "run"), pytest.raises(UsageError, match="another process trains in"):
        train(config(made.folder, tmp_path / "run"))
    train(config(made.folder, tmp_path / "run", epochs=1))


def test_a_run_that_cannot_begin_gives_its_folder_free(made, tmp_path, monkeypatch):
    def refused(*_, **__):
        raise UsageError("--log-wandb: nobody is logged in")

    monkeypatch.setattr(loop, "open_recorder", refused)
    with pytest.raises(UsageError, match="nobody is logged in") as caught:
        train(config(made.folder, tmp_path / "run", epochs=1))
    monkeypatch.undo()
    train(config(made.folder, tmp_path / "run", epochs=1))
    assert caught.tb is not None  # whatever the error still refers to


def test_a_run_that_another_process_ended_meanwhile_is_not_overwritten(made, tmp_path, monkeypatch):
    """Between the first look and the lock there is the time in which data and student are prepared."""
    theirs = config(made.folder, tmp_path / "run", epochs=1)
    build = loop.build_state

    def while_another_trains(*args):
        with monkeypatch.context() as patch:
            patch.setattr(loop, "build_state", build)
            train(theirs)
        return build(*args)

    monkeypatch.setattr(loop, "build_state", while_another_trains)
    with pytest.raises(UsageError, match="already holds a run"):
        train(config(made.folder, tmp_path / "run", epochs=1, seed=5))
    assert json.loads((tmp_path / "run/config.json").read_text())["config"]["seed"] == 0


def test_a_run_whose_state_is_gone_is_not_replaced_unasked(made, tmp_path):
    train(config(made.folder, tmp_path / "run", epochs=1))
    (tmp_path / "run/state.safetensors").unlink()
    kept = (tmp_path / "run/last/model.safetensors").read_bytes()
    with pytest.raises(UsageError, match=r"holds last/ of a run whose state.safetensors is missing"):
        train(config(made.folder, tmp_path / "run", epochs=1, seed=5))
    assert (tmp_path / "run/last/model.safetensors").read_bytes() == kept


def test_a_run_is_not_written_to_a_web_server(made):
    with pytest.raises(DeitCliError, match="https://host/run: a web server takes no files"):
        train(config(made.folder, "https://host/run"))


def test_a_run_goes_on_without_the_weights_that_it_started_from(made, tmp_path):
    train(config(made.folder, tmp_path / "first", epochs=1))
    start = Path(shutil.copytree(tmp_path / "first/last", tmp_path / "start"))
    asked = config(made.folder, tmp_path / "run", init=start, resume="auto")
    stop_after(asked, 2)
    shutil.rmtree(start)
    train(asked)
    train(config(made.folder, tmp_path / "whole", init=tmp_path / "first/last"))
    whole, found = state_of(tmp_path / "whole"), state_of(tmp_path / "run")
    assert [name for name in whole if not torch.equal(whole[name], found[name])] == []


@pytest.mark.parametrize(("sizes", "changes"), [((4,), {}), ((3, 1), {}), ((8,), {"grad_accum_steps": 2})])
def test_few_images_are_enough_for_every_epoch(tmp_path, sizes, changes):
    data = write_tars(tmp_path / "data", sizes)
    few = config(tmp_path, tmp_path / "run", distillation_type="none", **({"repeated_aug": None} | changes))
    train(replace(few, labels=None, data=data), small_recipe())
    assert load_state(tmp_path / "run/state.safetensors")[1]["next_update"] >= 6


# --- 24 -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fault_24_few_file_descriptors_and_many_shards_are_enough(tmp_path):
    """64 descriptors for each process, 300 tars and as many files of labels, two loader processes."""
    data = write_tars(tmp_path / "data", (2,) * 300)
    labels = make_labels(tmp_path / "labels", data, views=(0, 1)).folder
    words = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    words += [f"--labels={labels}", f"--output={tmp_path / 'run'}", "--epochs=1", "--batch-size=60", "--workers=2"]
    run = subprocess.run(
        [sys.executable, "-m", "cli", "train", *words, "--no-model-ema", "--device=cpu", "--repeated-aug=1"],
        capture_output=True,
        text=True,
        timeout=300,
        env=with_checkout(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)),
    )
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["step"] == 9


def test_another_copy_of_the_images_is_refused_before_step_one_with_the_keys(made, tmp_path):
    """Labels are of one source: others with another key, or another class label, are refused when the set is opened."""
    other = write_tars(tmp_path / "other", (24, 15))
    with pytest.raises(
        LabelSetMismatch,
        match=r"was made from source .* is another: .* is missing|was made from source .* with another class label",
    ):
        train(config(made.folder, tmp_path / "run", data=other))
    assert not (tmp_path / "run").exists()
    assert open_source(other).num_samples == 39
