"""Training starts soon: nothing that needs the whole source is read before the first update, and nothing unchecked is used."""

import pickle
import re
import shutil
from pathlib import Path

import pytest
from support.builders import encoded, make_labels, photo, small_recipe, write_tars
from support.label_sets import seal_again
from support.training import TINY, assert_same_state
from webdataset import TarWriter

from pipeline.errors import DeitCliError, LabelSetCorrupt, LabelSetMismatch, SourceError, UsageError
from pipeline.images.source import open_source
from pipeline.images.tars import TarShard
from pipeline.labels.checked_files import CheckedFiles
from pipeline.labels.labelset import LabelSet
from pipeline.labels.replay import check_replay
from pipeline.views.pairs import count_pairs
from trainer.config import TrainConfig
from trainer.evaluate import replayed_batches
from trainer.loop import make_order, open_data, train
from trainer.parallel import Running, World
from trainer.stream import BatchRenderer, Catalogue
from trainer.student import create_student

SIZES = (5,) * 10  # of which the eight shards at most that have a probe in the manifest are a part
CHANGED = "train-000004"  # has no probe


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_tars(tmp_path_factory.mktemp("data"), SIZES, unlabelled=7)


@pytest.fixture(scope="module")
def made(data, tmp_path_factory) -> LabelSet:
    made = make_labels(tmp_path_factory.mktemp("labels") / "set", data, views=(0, 2), views_per_shard=1)
    assert CHANGED not in {probe.shard for probe in made.manifest.probes}
    return made


def config(labels: LabelSet | Path, output: Path | str = "none", **changes) -> TrainConfig:
    values = {"batch_size": 10, "epochs": 1, "warmup_epochs": 0, "lr": 1e-3, "repeated_aug": 1, "model_ema": False}
    values |= {"workers": 0, "device": "cpu", "shuffle_window": 1}
    folder = labels.folder if isinstance(labels, LabelSet) else labels
    return TrainConfig(labels=folder, output=output, **(TINY | values | changes))


def renderer_of(settings: TrainConfig) -> BatchRenderer:
    data = open_data(settings)
    return BatchRenderer(Catalogue(data.source, data.label_set), data.recipe, make_order(settings, data))


def refusal_of(renderer: BatchRenderer, error: type[DeitCliError]) -> tuple[str, set[str]]:
    """Return the text of the error that ends an epoch, and the keys of all batches before it."""
    seen: set[str] = set()
    try:
        for index in range(100):
            seen |= set(renderer.render_here(index).keys)
    except error as refused:
        return str(refused), seen
    raise AssertionError("nothing was refused")


def keys_of_shard(data: str, name: str) -> set[str]:
    return set(open_source(data).shard(name).keys)


def rewrite(tar: Path, **changes) -> None:
    """Write a tar of the source again: `rename`, `relabel`, `drop` or `image` of a row, or without any class label."""
    first = 5 * int(tar.stem.rpartition("-")[2])
    with TarWriter(str(tar), mtime=0) as out:  # pyright: ignore[reportArgumentType]
        for row, number in enumerate(range(first, first + 5)):
            if changes.get("drop") == row:
                continue
            key = "other" if changes.get("rename") == row else f"img-{number:04}"
            sample = {"__key__": key, "jpg": encoded(photo(99 if changes.get("image") == row else number))}
            label = (number + (changes.get("relabel") == row)) % 3
            if number % 7 and not changes.get("unlabelled"):
                sample["cls"] = str(label).encode()
            out.write(sample)


# Soon.


@pytest.fixture
def looked_at(monkeypatch) -> dict[str, set[str]]:
    """The source shards whose index was built, and those whose samples file was read."""
    found: dict[str, set[str]] = {"indexed": set(), "samples": set()}
    index, samples = TarShard.build_index, CheckedFiles.samples

    def build(shard):
        found["indexed"].add(shard.name)
        return index(shard)

    def read(files, entry):
        found["samples"].add(entry.shard)
        return samples(files, entry)

    monkeypatch.setattr(TarShard, "build_index", build)
    monkeypatch.setattr(CheckedFiles, "samples", read)
    return found


def test_the_start_looks_only_at_the_source_shards_that_have_probes(made, looked_at):
    settings = config(made)
    make_order(settings, open_data(settings))
    probed = {probe.shard for probe in made.manifest.probes}
    assert looked_at == {"indexed": probed, "samples": probed}
    assert len(probed) < len(SIZES)


def test_a_run_that_goes_on_looks_at_no_more(made, looked_at, tmp_path):
    train(config(made, tmp_path / "run"))
    for names in looked_at.values():
        names.clear()
    train(config(made, tmp_path / "run", resume="auto"))
    assert looked_at["indexed"] == {probe.shard for probe in made.manifest.probes}


def test_an_evaluation_on_labels_looks_only_at_the_source_shards_that_it_uses(made, looked_at):
    student = create_student("deit-ti", num_classes=3, img_size=16, **{k: v for k, v in TINY.items() if k != "model"})
    running = Running(world=World(0, 1, "cpu", 0), dtype="float32", batch_size=2)  # pyright: ignore[reportArgumentType]
    assert len(list(replayed_batches(student, made, made.open_source(), running, limit=2))) == 1
    assert 0 < len(looked_at["indexed"]) <= 2


# The order.


@pytest.mark.parametrize("changes", [{}, {"mixup": 0.0, "cutmix": 0.0}], ids=["pairs", "single samples"])
def test_the_units_of_the_manifest_are_those_of_the_samples_files(tmp_path, changes, looked_at):
    data = write_tars(tmp_path / "data", (13, 10, 1, 8), bad=(1, 2, 9, 24))
    label_set = make_labels(tmp_path / "set", data, on_bad_image="skip", recipe=small_recipe(**changes))
    slow = tuple(count_pairs(label_set.recipe, label_set.samples(name).usable) for name in label_set.shards)
    looked_at["samples"].clear()
    assert Catalogue(open_source(data), label_set).units(label_set.recipe) == slow
    assert looked_at["samples"] == {"train-000000", "train-000003"}  # which have bad images
    assert label_set.partly_usable == looked_at["samples"]


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_the_units_without_a_label_set_are_those_of_the_tables(data, fraction):
    catalogue, recipe = Catalogue(open_source(data), None, fraction), small_recipe()
    slow = tuple(count_pairs(recipe, catalogue.table(shard).usable) for shard in range(len(SIZES)))
    assert catalogue.units(recipe) == slow


LIES = [
    # rows of each label shard of the first source shard, usable rows in truth: 11 of 13
    ("all usable", 13, r"the manifest promises rows for 7 units of train-000000, its samples file has 6"),
    ("as many units, other rows", 12, r"train-000000\.parquet has 11 rows per view, the manifest says 12 in total"),
]


@pytest.mark.parametrize(("what", "rows", "text"), LIES, ids=[lie[0] for lie in LIES])
def test_a_manifest_that_lies_about_rows_is_refused_before_a_label_is_used(tmp_path, what, rows, text):
    data = write_tars(tmp_path / "data", (13, 5), bad=(1, 9))
    label_set = make_labels(tmp_path / "set", data, on_bad_image="skip", views=(0, 1))

    def lie(manifest):
        for entry in manifest["files"]:
            if (entry["kind"], entry["shard"]) == ("labels", "train-000000"):
                entry["rows"] = rows

    seal_again(label_set.folder, lie)
    renderer = renderer_of(config(label_set, batch_size=4))
    refusal, seen = refusal_of(renderer, LabelSetCorrupt)
    assert re.search(text, refusal)
    assert not seen & keys_of_shard(data, "train-000000")


def test_a_manifest_that_hides_usable_rows_is_refused_too(made, data, tmp_path):
    copy = Path(shutil.copytree(made.folder, tmp_path / "set"))
    seal_again(
        copy, lambda m: [e.update(rows=4) for e in m["files"] if e["kind"] == "labels" and e["shard"] == CHANGED]
    )
    renderer = renderer_of(config(copy))
    refusal, seen = refusal_of(renderer, LabelSetCorrupt)
    assert "has 5 rows per view, the manifest says 4 in total" in refusal
    assert not seen & keys_of_shard(data, CHANGED)


def test_a_share_of_the_class_labels_is_sought_in_the_label_set_alone(made, looked_at):
    settings = config(made, labelled_fraction=0.5)
    data = open_data(settings)
    looked_at["indexed"].clear()
    make_order(settings, data)
    assert looked_at["indexed"] == set()
    with pytest.raises(UsageError, match="leaves no image with a class label"):
        make_order(config(made, labelled_fraction=1e-9), data)


# As safe as before.


CHANGES = [
    # what is changed in a source shard that has no probe, what the error says
    ({"rename": 2}, rf"1 sample is missing: 'img-0022' of {CHANGED}; 1 sample is new: 'other' of {CHANGED}\. Pass"),
    (
        {"relabel": 2},
        rf"1 sample is with another class label: 'img-0022' of {CHANGED} \(class 2, labelled as class 1\)",
    ),
    ({"drop": 4}, rf"1 sample is missing: 'img-0024' of {CHANGED}"),
    ({"drop": 0}, rf"1 sample is missing: 'img-0020' of {CHANGED}"),
    ({"image": 3}, rf"image 'img-0023' of {CHANGED} has other bytes than the one that was labelled"),
]


@pytest.mark.parametrize(("change", "text"), CHANGES, ids=[str(change) for change, _ in CHANGES])
def test_a_changed_source_is_refused_before_a_batch_that_uses_it(made, data, tmp_path, change, text):
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    rewrite(copy / f"{CHANGED}.tar", **change)
    refusal, seen = refusal_of(renderer_of(config(made, data=str(copy))), LabelSetMismatch)
    assert re.search(text, refusal)
    if "image" in change:  # only bytes that are used are compared
        assert "img-0023" not in seen
    else:
        assert not seen & keys_of_shard(data, CHANGED)  # the comparison of the whole source refuses the same
        with pytest.raises(LabelSetMismatch, match=text.removesuffix(r"\. Pass")):
            check_replay(made, open_source(copy))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_changed_source_stops_training_in_any_process(made, data, tmp_path, workers):
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    rewrite(copy / f"{CHANGED}.tar", relabel=2)
    with pytest.raises(LabelSetMismatch, match=r"was made from source .* is another: 1 sample is with another class"):
        train(config(made, tmp_path / "run", data=str(copy), workers=workers))


def test_exchanged_tars_and_missing_tars_are_refused(made, data, tmp_path):
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    shutil.copy(copy / "train-000005.tar", copy / f"{CHANGED}.tar")
    refusal, _ = refusal_of(renderer_of(config(made, data=str(copy))), LabelSetMismatch)
    assert f"5 samples are missing: 'img-0020' of {CHANGED}" in refusal
    assert f"5 samples are new: 'img-0025' of {CHANGED}" in refusal
    (copy / f"{CHANGED}.tar").unlink()
    with pytest.raises(LabelSetMismatch, match=f"the copy lacks the shard '{CHANGED}'"):
        open_data(config(made, data=str(copy)))


def test_a_changed_source_shard_with_a_probe_is_refused_at_the_start(made, data, tmp_path):
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    name = made.manifest.probes[0].shard
    rewrite(copy / f"{name}.tar", drop=4)
    with pytest.raises(LabelSetMismatch, match=rf"1 sample is missing: .* of {name}.*labels verify --data lists all"):
        open_data(config(made, data=str(copy)))


def test_a_copy_without_class_labels_trains_the_same(made, data, tmp_path):
    """The class labels are those of the label set. A copy may have lost its own; it may not have others."""
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    for tar in copy.glob("*.tar"):
        rewrite(tar, unlabelled=True)
    assert {label for shard in open_source(copy).shards for label in shard.class_labels} == {None}
    train(config(made, tmp_path / "a", data=data))
    train(config(made, tmp_path / "b", data=str(copy)))
    assert_same_state(tmp_path / "a", tmp_path / "b")


def test_a_folder_with_an_image_more_is_refused_by_the_name_of_that_image(tmp_path):
    """It moves all later images, so the first source shard that differs does not show which image it is."""
    folder = tmp_path / "images"
    for number in range(30):
        path = folder / f"class{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photo(number), "PNG"))
    label_set = make_labels(tmp_path / "set", str(folder), views=(0, 1))
    (folder / "class0" / "more.png").write_bytes(encoded(photo(77), "PNG"))
    with pytest.raises(LabelSetMismatch, match=r"is another: 1 sample is new: 'class0/more' of images-000000\. Pass"):
        open_data(config(label_set))


# Plumbing.


def test_shards_are_found_by_name_and_the_table_of_names_is_not_sent_to_other_processes(made, data):
    source = open_source(data)
    before = len(pickle.dumps(source)), len(pickle.dumps(made.plan))
    assert [source.shard(shard.name) for shard in source.shards] == list(source.shards)
    assert [made.plan.shard(record.name) for record in made.plan.source.shards] == list(made.plan.source.shards)
    assert (len(pickle.dumps(source)), len(pickle.dumps(made.plan))) == before
    assert pickle.loads(pickle.dumps(made.plan)) == made.plan
    assert pickle.loads(pickle.dumps(source)).shard(CHANGED).keys == source.shard(CHANGED).keys
    with pytest.raises(SourceError, match="has no source shard 'nowhere'"):
        source.shard("nowhere")
    with pytest.raises(DeitCliError, match="the plan has no source shard 'nowhere'"):
        made.plan.shard("nowhere")


def test_other_units_than_the_order_was_made_with_are_refused(made, data):
    settings = config(made)
    opened = open_data(settings)
    order = make_order(settings, opened)
    for label_set, error, text in (
        (made, LabelSetCorrupt, "the manifest promises rows for 4 units"),
        (None, SourceError, "has 3 units, it had 4 at the start"),
    ):
        changed = BatchRenderer(
            Catalogue(opened.source, label_set),
            opened.recipe,
            type(order)(**{**vars(order), "shard_units": tuple(units + 1 for units in order.shard_units)}),
        )
        with pytest.raises(error, match=text):
            changed.render_here(0)
