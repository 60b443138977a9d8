"""A set of some source shards or views is a label set: it opens, trains on what is in it, and says what it lacks."""

import json
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support.label_sets import (
    RECIPE,
    colour_teacher,
    config_of,
    make_label_set,
    problems_in,
    read_everything,
    seal_again,
    write_source,
)

from cli import commands
from pipeline.errors import LabelSetCorrupt, LabelSetIncomplete, LabelSetMismatch, UsageError
from pipeline.images.source import open_source
from pipeline.labels.comparing import check_source, labelled_part
from pipeline.labels.labelset import LabelSet
from pipeline.labels.manifest import Manifest
from pipeline.labels.replay import check_replay
from pipeline.overview.sheet import contact_sheet
from pipeline.overview.summary import info_table, summarise
from pipeline.sharing import manifests as sharing_manifests
from pipeline.sharing.manifests import choose_blocks, choose_shards, probes_in, subset_manifest
from pipeline.stage1.precompute import precompute
from pipeline.storage.json import pretty_json
from trainer.config import TrainConfig
from trainer.loop import train
from trainer.order import Share
from trainer.run import make_order, open_data
from trainer.stream import BatchRenderer, Catalogue

SHARDS = (5, 4, 7)
NAMES = ("train-0", "train-1", "train-2")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("images") / "tars", SHARDS)


@pytest.fixture(scope="module")
def made(images, tmp_path_factory) -> LabelSet:
    """Three source shards, three blocks of two views."""
    return make_label_set(images, tmp_path_factory.mktemp("made") / "set", views=(0, 6))


def cut(made: LabelSet, *, views=None, shards=None) -> Manifest:
    return subset_manifest(
        made.manifest,
        made.plan,
        views=views,
        shards=shards,
        probes_of=lambda entry: probes_in(made.read_file(entry), entry),
    )


def write_subset(made: LabelSet, out: Path, **chosen) -> LabelSet:
    """Copy what a subset's manifest lists, and nothing else."""
    manifest = cut(made, **chosen)
    out.mkdir()
    shutil.copy(made.folder / "plan.json", out)
    for entry in manifest.files:
        (out / entry.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made.folder / entry.path, out / entry.path)
    (out / "manifest.json").write_bytes(pretty_json(manifest.to_json()))
    return LabelSet.open(out)


@pytest.fixture(scope="module")
def subset(made, tmp_path_factory) -> LabelSet:
    """The first and the last source shard, with the last four views."""
    return write_subset(made, tmp_path_factory.mktemp("subset") / "set", views=(2, 6), shards=["train-0", "train-2"])


def copy_of(subset: LabelSet, tmp_path: Path) -> Path:
    return Path(shutil.copytree(str(subset.folder), tmp_path / "copy"))


def only_tars(images: Path, folder: Path, *names: str) -> Path:
    """Copy some tars of the source, and its class names."""
    folder.mkdir()
    for name in ("classes.txt", *(f"{name}.tar" for name in names)):
        shutil.copy(images / name, folder)
    return folder


# What a subset is.


def test_a_subset_holds_what_was_chosen_and_nothing_else(made, subset):
    assert problems_in(subset) == []
    assert (subset.shards, subset.views, subset.num_samples) == (("train-0", "train-2"), range(2, 6), 12)
    assert subset.manifest.blocks == [range(2, 4), range(4, 6)]
    chosen = [row for row in read_everything(made) if row[0] in subset.shards and row[1] in subset.views]
    rows = [row for row in read_everything(subset) if row[0] in subset.shards]
    assert [*map(repr, rows)] == [*map(repr, chosen)]
    assert len(rows) == 8


def test_a_subset_has_the_plan_and_the_files_of_the_whole_to_the_byte(made, subset):
    for path in subset.folder.rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            assert path.read_bytes() == (made.folder / path.relative_to(subset.folder)).read_bytes()


def test_a_whole_set_does_not_name_its_shards(made):
    assert "shards" not in json.loads((made.folder / "manifest.json").read_text())
    assert "shards" not in cut(made, shards=["*"]).to_json()
    assert cut(made).to_json() == made.manifest.to_json()


def test_a_subset_of_a_subset_is_one(made, subset):
    again = cut(subset, shards=["train-2"], views=(4, 6))
    assert again.to_json() == cut(made, shards=["train-2"], views=(4, 6)).to_json() | {
        "probes": [probe.model_dump(mode="json") for probe in again.probes],
        "content_sha256": again.to_json()["content_sha256"],
    }
    assert (again.shards, again.view_blocks, len(again.files)) == (("train-2",), ((4, 6),), 2)


def test_probes_are_those_of_the_subset(made, subset):
    assert subset.manifest.probes
    assert {probe.shard for probe in subset.manifest.probes} <= set(subset.shards)
    assert {probe.view for probe in subset.manifest.probes} <= set(subset.views)
    assert set(subset.manifest.probes) <= set(made.manifest.probes)


def test_where_the_manifest_has_no_probe_of_a_subset_the_files_give_some(made):
    bare = made.manifest.model_copy(update={"probes": ()})
    read = []

    def probes_of(entry):
        read.append(entry.path)
        return probes_in(made.read_file(entry), entry)

    found = subset_manifest(bare, made.plan, views=(0, 2), shards=["train-1"], probes_of=probes_of)
    assert [(probe.shard, probe.view) for probe in found.probes] == [("train-1", 0), ("train-1", 1)]
    assert [str(path) for path in read] == ["labels/views-00000-00001/train-1.parquet"]


def test_a_subset_without_any_probe_is_refused(made):
    bare = made.manifest.model_copy(update={"probes": ()})
    with pytest.raises(LabelSetIncomplete, match="none of these source shards has an image that can be decoded"):
        subset_manifest(bare, made.plan, views=None, shards=["train-1"], probes_of=lambda entry: ())


def test_an_unsealed_set_has_no_subsets(made):
    opened = made.manifest.model_copy(update={"sealed": False})
    with pytest.raises(LabelSetIncomplete, match="only a sealed label set has subsets"):
        subset_manifest(opened, made.plan, views=None, shards=None, probes_of=lambda entry: ())


@pytest.mark.parametrize(
    ("views", "blocks"),
    [
        ((0, 6), [range(2), range(2, 4), range(4, 6)]),  # all
        ((2, 4), [range(2, 4)]),  # one whole block
        ((1, 3), [range(2), range(2, 4)]),  # parts of two blocks bring both
        ((5, 6), [range(4, 6)]),  # the last view
    ],
)
def test_whole_blocks_come_for_the_views_that_are_asked(views, blocks):
    assert choose_blocks([range(4, 6), range(2), range(2, 4)], views) == blocks


@pytest.mark.parametrize("views", [(0, 7), (6, 8), (3, 3), (4, 2)], ids=str)
def test_views_that_are_not_there_are_refused_with_those_that_are(views):
    with pytest.raises(UsageError, match=rf"--views {views[0]}:{views[1]} must be within .* in blocks 0:2, 2:4, 4:6"):
        choose_blocks([range(2), range(2, 4), range(4, 6)], views)


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        (["train-1"], ["train-1"]),  # a name
        (["train-2", "train-0"], ["train-0", "train-2"]),  # in the plan's order, whatever was written first
        (["train-[01]"], ["train-0", "train-1"]),  # a pattern
        (["*"], [*NAMES]),  # all
        (["train-1", "*-1"], ["train-1"]),  # twice is once
    ],
)
def test_source_shards_are_chosen_by_name_or_pattern(patterns, chosen):
    assert choose_shards(NAMES, patterns) == chosen


def test_listed_names_are_looked_up_and_only_patterns_are_compared_with_all_names(monkeypatch):
    """With 14,000 source shards, comparing every listed name with every name would take hours."""
    compared = []
    monkeypatch.setattr(sharing_manifests, "fnmatchcase", lambda *pair: compared.append(pair) or fnmatchcase(*pair))
    names = [f"train-{number:06}" for number in range(1000)]
    assert choose_shards(names, [*names[::-3], "train-00050?"]) == sorted({*names[::-3], *names[500:510]})
    assert len(compared) == len(names)


def test_a_name_of_no_source_shard_is_refused_with_those_that_are():
    with pytest.raises(
        UsageError, match=r"--shards 'train-7' matches none of the 3 source shards.*: train-0, train-1, train-2"
    ):
        choose_shards(NAMES, ["train-0", "train-7"])
    with pytest.raises(UsageError, match=r"--shards must name at least one of 3 source shards"):
        choose_shards(NAMES, [])


# What a manifest may not say.


@pytest.mark.parametrize(
    ("shards", "error"),
    [
        (["train-2", "train-0"], "must be source shards of the plan, .* they are not in that order"),
        (["train-0", "train-0"], "must be source shards of the plan, each once"),
        (["train-0", "train-9"], "'train-9' is not one of them"),
        ([*NAMES], "names all 3 source shards: it must be absent"),
        ([], "shards: .*at least 1"),
        (None, "must be a list of names, or absent"),
        (["../train-0"], "shards.0: String should match pattern"),
        ("train-0", "shards: .*valid"),
        (["train-0"], "has an unknown labels file of 'train-2'"),
        (["train-0", "train-1"], "lacks labels file of 'train-1'"),
    ],
    ids=str,
)
def test_a_manifest_that_names_other_shards_is_refused(subset, tmp_path, shards, error):
    folder = copy_of(subset, tmp_path)
    seal_again(folder, lambda manifest: manifest.update(shards=shards))
    with pytest.raises(LabelSetCorrupt, match=error):
        LabelSet.open(folder)


def test_a_set_that_lost_a_shard_and_does_not_say_so_is_refused(subset, tmp_path):
    folder = copy_of(subset, tmp_path)
    seal_again(folder, lambda manifest: manifest.pop("shards"))
    with pytest.raises(LabelSetCorrupt, match="lacks labels file of 'train-1'"):
        LabelSet.open(folder)


# Images.


def test_the_whole_source_or_the_shards_that_are_here_will_do(images, subset, tmp_path):
    for source in (images, only_tars(images, tmp_path / "part", "train-0", "train-2")):
        opened = open_source(source)
        assert check_replay(subset, opened) == 0
        assert [shard.name for shard in labelled_part(subset, opened).shards] == ["train-0", "train-2"]


def test_a_source_that_lacks_a_shard_is_refused(images, subset, tmp_path):
    part = only_tars(images, tmp_path / "part", "train-0", "train-1")
    with pytest.raises(LabelSetMismatch, match=r"has 2 source shards, and .*part lacks 1 of them, such as 'train-2'"):
        check_source(subset, open_source(part))


def test_other_images_under_the_name_of_a_shard_are_refused(images, subset, tmp_path):
    part = only_tars(images, tmp_path / "part", "train-0", "train-2")
    shutil.copy(images / "train-1.tar", part / "train-2.tar")
    with pytest.raises(
        LabelSetMismatch, match=r"7 samples are missing: 'n009' of train-2, .* 4 samples are new: 'n005' of train-2"
    ):
        check_source(subset, open_source(part))


def test_a_change_in_a_shard_that_is_not_here_does_not_matter(images, subset, tmp_path):
    part = only_tars(images, tmp_path / "part", "train-0", "train-1", "train-2")
    shutil.copy(images / "train-0.tar", part / "train-1.tar")
    assert check_replay(subset, open_source(part)) == 0


def test_a_whole_set_still_needs_the_whole_source(images, made, tmp_path):
    part = only_tars(images, tmp_path / "part", "train-0", "train-2")
    with pytest.raises(LabelSetMismatch, match="the copy lacks the shard 'train-1'; 4 samples are missing"):
        check_source(made, open_source(part))


# Everything that walks the shards.


def test_info_counts_what_is_here(subset):
    summary = summarise(subset)
    assert (summary["source"]["images"], summary["views"], summary["labels"]) == (12, [2, 6], 48)
    assert "12 images in 2 of 3 shards (a subset)" in info_table(summary)


def test_verify_and_show_take_a_subset(images, subset, tmp_path):
    verified = CliRunner().invoke(commands, ["labels", "verify", str(subset.folder)], catch_exceptions=False)
    assert "6 files: lengths, hashes, schemas and rows match the manifest" in verified.output
    contact_sheet(subset, open_source(images), tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 1000


def batches(label_set: LabelSet, source: Path):
    """Return all batches of two epochs, as they are made for training."""
    config = TrainConfig(labels=str(label_set.folder), data=str(source), output=Path("run"), batch_size=4, epochs=2)
    data = open_data(config)
    order = make_order(config, data)
    renderer = BatchRenderer(Catalogue(data.source, data.label_set), data.recipe, order, Share())
    return [renderer.render_here(index) for index in range(2 * order.steps_per_epoch)], order


def test_training_takes_the_samples_of_a_subset_and_the_same_whichever_source_is_given(images, subset, tmp_path):
    part = only_tars(images, tmp_path / "part", "train-0", "train-2")
    whole, order = batches(subset, images)
    alone, same_order = batches(subset, part)
    assert (order.shard_units, order.views) == ((3, 4), range(2, 6))  # pairs in blocks of 4: 2 + 1, 2 + 2
    assert order == same_order
    keys = set()
    for mine, theirs in zip(whole, alone, strict=True):
        assert mine.keys == theirs.keys
        assert torch.equal(mine.images, theirs.images)
        assert torch.equal(mine.teacher.topk_prob, theirs.teacher.topk_prob)
        keys |= set(mine.keys)
    here = {key for shard in subset.shards for key in subset.samples(shard).key}
    assert keys <= here
    assert any(key in subset.samples("train-2").key for key in keys)


def test_labels_of_a_batch_are_those_of_its_images(images, made, subset):
    """Source shard 1 of the subset is shard 2 of the source: a wrong join would give the labels of other images."""
    found, _ = batches(subset, images)
    for batch in found:
        for at, key in enumerate(batch.keys):
            shard = next(name for name in NAMES if key in made.samples(name).key)
            row = made.samples(shard).key.index(key)
            stored = [made.read(shard, view) for view in batch.views]
            assert int(batch.teacher.hard[at]) in {int(rows.hard[rows.row.tolist().index(row)]) for rows in stored}


def test_a_run_on_a_subset_is_not_continued_on_the_whole_set(images, made, subset, tmp_path, caplog):
    settings = {
        "output": tmp_path / "run",
        "data": str(images),
        "model": "deit_tiny_distilled_patch16_224",
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 1,
        "num_heads": 2,
        "batch_size": 4,
        "epochs": 1,
        "views": (2, 6),
        "workers": 0,
        "device": "cpu",
    }
    train(TrainConfig(labels=str(subset.folder), **settings))
    assert "holds 2 of 3 source shards: the student trains only on their images" in caplog.text
    train(TrainConfig(labels=str(subset.folder), resume="auto", **settings))  # it is complete
    with pytest.raises(Exception, match=r"other settings \(shards: \['train-0', 'train-2'\], not None\)"):
        train(TrainConfig(labels=str(made.folder), resume="auto", **settings))


# More views.


def test_precompute_in_a_subset_labels_its_source_shards_alone(images, made, subset, tmp_path):
    folder = copy_of(subset, tmp_path)
    whole = make_label_set(images, tmp_path / "whole", views=(0, 8))
    part = only_tars(images, tmp_path / "part", "train-0", "train-2")
    grown = precompute(config_of(part, folder, views=(0, 8)), RECIPE, colour_teacher(), open_source(part))
    assert grown is not None
    assert (grown.shards, grown.views) == (("train-0", "train-2"), range(8))
    assert problems_in(grown) == []
    for entry in grown.manifest.files:
        assert (folder / entry.path).read_bytes() == (whole.folder / entry.path).read_bytes()


def test_precompute_makes_a_lost_file_of_a_subset_again(images, subset, tmp_path):
    folder = copy_of(subset, tmp_path)
    (folder / "labels/views-00002-00003/train-2.parquet").unlink()
    made_again = precompute(config_of(images, folder, views=(2, 4)), RECIPE, colour_teacher(), open_source(images))
    assert made_again is not None
    assert made_again.manifest.files == subset.manifest.files
    assert problems_in(made_again) == []


def test_precompute_in_a_subset_refuses_other_images(images, subset, tmp_path):
    folder = copy_of(subset, tmp_path)
    part = only_tars(images, tmp_path / "part", "train-0", "train-1")
    with pytest.raises(LabelSetMismatch, match="lacks 1 of them, such as 'train-2'"):
        precompute(config_of(part, folder, views=(0, 8)), RECIPE, colour_teacher(), open_source(part))
