"""One label set of what several machines made of one identity, and one that gets more views."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from support.builders import (
    make_labels,
    named_files,
    small_recipe,
    small_teacher,
    teacher_of,
    with_checkout,
    write_tars,
)
from support.label_sets import problems_in
from support.web_server import web_server

import cli
from pipeline.errors import LabelSetCorrupt, LabelSetMismatch, UsageError
from pipeline.images.source import open_source
from pipeline.labels.labelset import LabelSet
from pipeline.labels.manifest import label_blocks
from pipeline.settings.configs import PrecomputeConfig
from pipeline.sharing.merging import merge, merged_lines
from pipeline.sharing.transfer import pull
from pipeline.stage1 import loop as labelling
from pipeline.stage1.plan import extension
from pipeline.stage1.precompute import precompute

SETTINGS: dict[str, Any] = {"views": (0, 4), "views_per_shard": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_tars(tmp_path_factory.mktemp("data"), (9, 8, 7), bad=(3,))


def label(out: Path, data: str, **changes: Any) -> LabelSet | None:
    torch.set_num_threads(1)
    source = open_source(data)
    values = {"topk": 2, "workers": 0, "batch_size": 8, "accuracy_samples": 0, "on_bad_image": "skip"}
    config = PrecomputeConfig(data=data, out=os.fspath(out), **(values | SETTINGS | changes))
    return precompute(config, small_recipe(), small_teacher(source), source)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "set"
    label(folder, data)
    return folder


def same_files(found: Path, whole: Path) -> None:
    mine, theirs = named_files(found), named_files(whole)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if mine[name] != theirs[name]] == []


def test_views_of_two_machines_are_the_set_that_was_made_at_once(data, whole, tmp_path):
    label(tmp_path / "a", data, views=(0, 2))
    label(tmp_path / "b", data, views=(2, 4))
    before = named_files(tmp_path / "a"), named_files(tmp_path / "b")
    merged = merge(tmp_path / "set", [str(tmp_path / "a"), str(tmp_path / "b")])
    same_files(tmp_path / "set", whole)
    assert (named_files(tmp_path / "a"), named_files(tmp_path / "b")) == before
    assert merged.label_set is not None
    assert merged.label_set.views == range(4)
    assert (merged.files, merged.found) == (9, 3)  # the samples files are in both
    assert problems_in(tmp_path / "set") == []


def test_ranks_without_a_common_folder_are_merged(data, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert label(tmp_path / rank, data) is None  # never sealed
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    merged = merge(tmp_path / "set", [str(tmp_path / "0"), str(tmp_path / "1")])
    assert merged.label_set is not None
    same_files(tmp_path / "set", whole)


def test_a_part_may_be_behind_a_url(data, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    label(tmp_path / "a", data, views=(0, 2))
    label(tmp_path / "b", data, views=(2, 4))
    with web_server(tmp_path) as server:
        merge(tmp_path / "set", [str(tmp_path / "a"), f"{server.url}/b"])
    same_files(tmp_path / "set", whole)


def test_source_shards_of_two_machines_are_merged_and_a_part_is_sealed_as_one(whole, tmp_path):
    pull(str(whole), tmp_path / "a", shards=["train-000000"])
    pull(str(whole), tmp_path / "b", shards=["train-000002"])
    merged = merge(tmp_path / "set", [str(tmp_path / "a"), str(tmp_path / "b")])
    assert merged.label_set is not None
    assert merged.label_set.shards == ("train-000000", "train-000002")
    assert merged_lines(tmp_path / "set", merged).endswith("views 0:4 of 2 of 3 source shards, sealed")
    pull(str(whole), tmp_path / "c", shards=["train-000001"])
    merge(tmp_path / "set", [str(tmp_path / "c")])  # a set that is there grows
    same_files(tmp_path / "set", whole)


def test_what_is_incomplete_is_kept_unsealed_and_says_what_is_missing(data, whole, tmp_path):
    label(tmp_path / "a", data, views=(0, 2))
    pull(str(whole), tmp_path / "b", shards=["train-000001"])
    merged = merge(tmp_path / "set", [str(tmp_path / "a"), str(tmp_path / "b")])
    assert merged.label_set is None
    assert merged.missing == (("train-000000", range(2, 4)), ("train-000002", range(2, 4)))
    text = merged_lines(tmp_path / "set", merged)
    assert "not sealed, it lacks views 2:4 of train-000000, views 2:4 of train-000002." in text
    assert text.endswith(f"deit-cli labels extend {tmp_path / 'set'} --views 0:4")
    config, _, recipe = extension(str(tmp_path / "set"), {"workers": 0, "accuracy_samples": 0, "on_bad_image": "skip", "teacher": (MINE,)}, data=None, views=(0, 4))  # fmt: skip
    source = open_source(data)
    precompute(config, recipe, small_teacher(source), source)  # what the line advises
    same_files(tmp_path / "set", whole)


def test_a_gap_between_views_is_named(data, tmp_path):
    label(tmp_path / "a", data, views=(0, 2))
    label(tmp_path / "b", data, views=(4, 6))
    merged = merge(tmp_path / "set", [str(tmp_path / "a"), str(tmp_path / "b")])
    assert merged.missing == (("", range(2, 4)),)
    assert "it lacks views 2:4. Merge the sets" in merged_lines(tmp_path / "set", merged)


def test_labels_that_two_machines_made_alike_but_for_their_bytes_are_taken_once(data, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(labelling, "device_name", lambda device: "another processor")
    label(tmp_path / "b", data)
    merge(tmp_path / "set", [str(whole), str(tmp_path / "b")])
    same_files(tmp_path / "set", whole)
    assert problems_in(tmp_path / "set") == []


def test_other_images_under_the_same_keys_are_not_merged(whole, tmp_path):
    other = write_tars(tmp_path / "other", (9, 8, 7), bad=(4,))
    label(tmp_path / "b", other)
    with pytest.raises(
        LabelSetMismatch, match=r"samples/train-000000.parquet: another machine has labelled other images"
    ):
        merge(tmp_path / "set", [str(whole), str(tmp_path / "b")])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"topk": 1}, "has topk 2, .*b has topk 1|has topk 2"),
        ({"views": (0, 4), "views_per_shard": 4}, r"divide the same views into different blocks, 0:2 and 0:4"),
    ],
)
def test_sets_of_another_identity_or_cut_are_refused_before_anything_is_written(data, whole, tmp_path, changes, text):
    label(tmp_path / "b", data, **changes)
    with pytest.raises(LabelSetMismatch, match=text):
        merge(tmp_path / "set", [str(whole), str(tmp_path / "b")])
    assert not (tmp_path / "set").exists()


def test_a_damaged_part_is_refused_and_nothing_of_it_is_taken(whole, tmp_path):
    for name, sealed in (("sealed", True), ("open", False)):
        part = tmp_path / name
        shutil.copytree(whole, part)
        path = part / "labels/views-00000-00001/train-000001.parquet"
        content = bytearray(path.read_bytes())
        content[200] ^= 1  # in the rows
        path.write_bytes(content)
        if not sealed:
            (part / "manifest.json").unlink()
        with pytest.raises(LabelSetCorrupt):
            merge(tmp_path / f"{name}-set", [str(part)])
        assert not (tmp_path / f"{name}-set/labels/views-00000-00001/train-000001.parquet").exists()


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_set_that_changed_since_it_was_sealed_does_not_grow(data, whole, tmp_path):
    label(tmp_path / "set", data, views=(0, 2))
    flip(tmp_path / "set/labels/views-00000-00001/train-000001.parquet", 200)
    before = named_files(tmp_path / "set")
    with pytest.raises(LabelSetCorrupt, match=r"train-000001.parquet was changed after it was sealed"):
        merge(tmp_path / "set", [str(whole)])
    assert named_files(tmp_path / "set") == before


def rank_folders(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[Path, Path]:
    """Let two ranks label into folders of their own; neither is sealed."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert label(tmp_path / rank, data, **changes) is None
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    return tmp_path / "0", tmp_path / "1"


def test_a_rank_merges_the_other_into_its_own_folder(data, whole, tmp_path, monkeypatch):
    mine, theirs = rank_folders(data, tmp_path, monkeypatch)
    merge(mine, [str(theirs)])
    same_files(mine, whole)


@pytest.mark.parametrize("name", ["labels/views-00000-00001/train-000000.parquet", "samples/train-000000.parquet"])
def test_what_lay_in_the_result_is_checked_before_it_is_sealed(data, tmp_path, monkeypatch, name):
    mine, theirs = rank_folders(data, tmp_path, monkeypatch)
    flip(mine / name, 200)
    with pytest.raises(LabelSetCorrupt, match=name.rpartition("/")[2]):
        merge(mine, [str(theirs)])
    assert not json.loads((mine / "manifest.json").read_bytes())["sealed"]


def test_labels_of_an_open_folder_must_have_the_rows_of_its_samples(data, whole, tmp_path):
    """As they would where a samples file was brought from another run, which left out other images."""
    label(tmp_path / "b", write_tars(tmp_path / "other", (9, 8, 7), bad=(4,)))
    shutil.copy(whole / "samples/train-000000.parquet", tmp_path / "b/samples/train-000000.parquet")
    (tmp_path / "b/manifest.json").unlink()
    with pytest.raises(
        LabelSetCorrupt, match=r"train-000000.parquet: view 0 does not have the usable rows of its samples file"
    ):
        merge(tmp_path / "set", [str(tmp_path / "b")])


def test_labels_without_samples_are_not_taken(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "b")
    (tmp_path / "b/manifest.json").unlink()
    (tmp_path / "b/samples/train-000001.parquet").unlink()
    merged = merge(tmp_path / "set", [str(tmp_path / "b")])
    assert merged.label_set is not None
    assert merged.label_set.shards == ("train-000000", "train-000002")
    assert not list((tmp_path / "set").rglob("train-000001.parquet"))


def test_misuse_is_refused(whole, tmp_path):
    with pytest.raises(UsageError, match="is both the result and an input"):
        merge(whole, [str(whole)])
    for out in (whole / "inner", whole.parent):
        with pytest.raises(UsageError, match="contains the other: choose a result outside"):
            merge(out, [str(whole)])
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file is a file: the first folder is the result"):
        merge(tmp_path / "file", [str(whole)])
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    with pytest.raises(LabelSetMismatch, match="is not empty and holds no label set"):
        merge(tmp_path / "full", [str(whole)])


def test_a_self_contained_set_keeps_its_images(data, tmp_path):
    label(tmp_path / "a", data, views=(0, 2), include_images="original")
    label(tmp_path / "b", data, views=(2, 4), include_images="original")
    merged = merge(tmp_path / "set", [str(tmp_path / "a"), str(tmp_path / "b")])
    assert merged.label_set is not None
    assert merged.label_set.has_images
    assert problems_in(tmp_path / "set") == []


def test_images_that_some_parts_lack_are_left_out_or_refused(data, tmp_path, caplog):
    label(tmp_path / "a", data, include_images="original")
    pull(str(tmp_path / "a"), tmp_path / "b", shards=["train-000000"])
    label(tmp_path / "plain", data)
    pull(str(tmp_path / "plain"), tmp_path / "c", shards=["train-000001"])
    merged = merge(tmp_path / "set", [str(tmp_path / "c"), str(tmp_path / "b")])
    assert merged.label_set is not None
    assert not merged.label_set.has_images
    assert "the images of train-000001 are in none of these sets, so the result has no images" in caplog.text
    with pytest.raises(LabelSetMismatch, match="those of 'train-000001' are missing: merge only sets with images"):
        merge(tmp_path / "b", [str(tmp_path / "c")])


def test_a_tar_that_was_damaged_in_the_result_is_not_sealed(data, tmp_path):
    label(tmp_path / "a", data, include_images="original")
    pull(str(tmp_path / "a"), tmp_path / "set")
    (tmp_path / "set/manifest.json").unlink()
    flip(tmp_path / "set/images/train-000001.tar", 700)
    with pytest.raises(LabelSetMismatch, match=r"images/train-000001.tar has other bytes than the one in"):
        merge(tmp_path / "set", [str(tmp_path / "a")])


KILLED = """
import sys
from pathlib import Path
from pipeline.sharing import merging
real, left = merging.publish_file, [int(sys.argv[2])]
def publish(path, write):
    left[0] -= 1
    if left[0] < 0:
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
    return real(path, write)
merging.publish_file = publish
merging.merge(Path(sys.argv[1]), sys.argv[3:])
"""


@pytest.mark.parametrize("after", [0, 2, 7])
def test_fault_1_a_killed_merge_is_continued_by_the_same_command(data, whole, tmp_path, after):
    label(tmp_path / "a", data, views=(0, 2))
    label(tmp_path / "b", data, views=(2, 4))
    parts = [str(tmp_path / "a"), str(tmp_path / "b")]
    command = [sys.executable, "-c", KILLED, str(tmp_path / "set"), str(after), *parts]
    assert subprocess.run(command, env=with_checkout(), cwd=tmp_path).returncode == -signal.SIGKILL
    assert not (tmp_path / "set/manifest.json").exists() or not json.loads((tmp_path / "set/manifest.json").read_bytes())["sealed"]  # fmt: skip
    merged = merge(tmp_path / "set", parts)
    assert merged.label_set is not None
    same_files(tmp_path / "set", whole)


def test_the_command_says_what_it_did(data, whole, tmp_path):
    label(tmp_path / "a", data, views=(0, 2))
    result = CliRunner().invoke(
        cli.commands, ["labels", "merge", str(tmp_path / "set"), str(tmp_path / "a"), str(whole)]
    )
    assert result.exit_code == 0, result.output
    assert f"{tmp_path / 'set'}: 9 files copied, 6 existed already; views 0:4, sealed" in result.output
    same_files(tmp_path / "set", whole)


# Extend


MINE = "support.builders:confident_cnn"


def extend(folder: Path, *arguments: str, teacher: str | None = MINE) -> Any:
    options = ["--views", "2:4", "-j", "0", "--device", "cpu", "--on-bad-image", "skip", *arguments]
    options += ["--teacher", teacher] if teacher else []
    return CliRunner().invoke(cli.commands, ["labels", "extend", str(folder), *options])


def test_more_views_are_those_of_a_set_that_was_made_at_once(data, whole, tmp_path):
    label(tmp_path / "set", data, views=(0, 2))
    result = extend(tmp_path / "set")
    assert result.exit_code == 0, result.output
    assert "views 0:4 of 23 images (1 more cannot be decoded), sealed" in result.output
    same_files(tmp_path / "set", whole)


def test_a_subset_is_extended_and_stays_one(whole, tmp_path):
    pull(str(whole), tmp_path / "set", views=(0, 2), shards=["train-000001"])
    result = extend(tmp_path / "set")
    assert result.exit_code == 0, result.output
    assert "views 0:4 of 8 images, sealed" in result.output
    extended = LabelSet.open(tmp_path / "set")
    assert (extended.shards, extended.views) == (("train-000001",), range(4))
    for entry in extended.manifest.files:
        assert (tmp_path / "set" / entry.path).read_bytes() == (whole / entry.path).read_bytes()


def test_blocks_that_were_begun_are_completed_in_their_own_cut(data, tmp_path, monkeypatch):
    mine, _ = rank_folders(data, tmp_path, monkeypatch, views_per_shard=3)  # the last block is shorter
    merged = merge(tmp_path / "set", [str(mine)])
    assert merged.missing
    blocks = label_blocks(tmp_path / "set")
    result = extend(tmp_path / "set", "--views", "0:4")
    assert result.exit_code == 0, result.output
    assert label_blocks(tmp_path / "set") == blocks
    assert problems_in(tmp_path / "set") == []
    label(tmp_path / "once", data, views_per_shard=3)
    same_files(tmp_path / "set", tmp_path / "once")


def test_blocks_of_several_lengths_are_kept(data, tmp_path):
    label(tmp_path / "set", data, views=(0, 3), views_per_shard=3)
    label(tmp_path / "set", data, views=(3, 4))
    (tmp_path / "set/labels/views-00003-00003/train-000001.parquet").unlink()
    (tmp_path / "set/manifest.json").unlink()
    label(tmp_path / "set", data, views=(0, 6))  # asks for two views in a block
    assert label_blocks(tmp_path / "set") == [range(0, 3), range(3, 4), range(4, 6)]
    assert problems_in(tmp_path / "set") == []


def test_another_teacher_is_refused_before_anything_is_written(data, tmp_path):
    label(tmp_path / "set", data, views=(0, 2))
    before = named_files(tmp_path / "set")
    result = extend(tmp_path / "set", "--no-pretrained", teacher="test_resnet")
    assert isinstance(result.exception, LabelSetMismatch)
    assert "was made with teacher" in str(result.exception)
    assert named_files(tmp_path / "set") == before


def test_a_teacher_whose_name_does_not_say_where_its_weights_are_must_be_passed_again(data, tmp_path):
    teacher = teacher_of("test_resnet", pretrained=False, img_size=16, num_classes=3)
    make_labels(tmp_path / "set", data, teacher=teacher, **(SETTINGS | {"views": (0, 2), "on_bad_image": "skip"}))
    result = extend(tmp_path / "set", teacher=None)
    assert isinstance(result.exception, UsageError)
    assert "teacher test_resnet came from a folder or a file: pass it again with --teacher FOLDER" in str(
        result.exception
    )
    assert extend(tmp_path / "set", "--no-pretrained", teacher=None).exit_code == 0  # it was a trial


def test_a_function_that_a_label_set_names_is_not_imported_unasked(data, tmp_path, monkeypatch):
    """The set may be a stranger's, and a module of that name may stand in the current folder."""
    (tmp_path / "strange.py").write_text("from support.builders import confident_cnn\nopen('ran', 'a').close()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    teacher = teacher_of("strange:confident_cnn")
    make_labels(tmp_path / "set", data, teacher=teacher, **(SETTINGS | {"views": (0, 2), "on_bad_image": "skip"}))
    (tmp_path / "ran").unlink()
    del sys.modules["strange"]
    result = extend(tmp_path / "set", teacher=None)
    assert isinstance(result.exception, UsageError)
    assert "this set's teacher is the Python function strange:confident_cnn" in str(result.exception)
    assert not (tmp_path / "ran").exists()
    assert extend(tmp_path / "set", teacher="strange:confident_cnn").exit_code == 0
    assert (tmp_path / "ran").exists()


def test_a_set_behind_a_url_is_extended(data, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = open_source(data)
    url = f"memory://{tmp_path.name}/set"
    config = PrecomputeConfig(data=data, out=url, topk=2, workers=0, accuracy_samples=0, on_bad_image="skip", views=(0, 2), views_per_shard=2)  # fmt: skip
    precompute(config, small_recipe(), small_teacher(source), source)
    config, asked, recipe = extension(url, {"workers": 0, "accuracy_samples": 0, "on_bad_image": "skip", "teacher": (MINE,)}, data=None, views=(2, 4))  # fmt: skip
    assert (config.topk, config.views_per_shard, config.data, asked.teacher) == (
        2,
        2,
        data,
        ("support.builders:confident_cnn",),
    )
    assert recipe.id == small_recipe().id
    label_set = precompute(config, recipe, teacher_of(*asked.teacher), source)
    assert label_set is not None
    same_files(Path(label_set.folder), whole)


def test_a_set_with_its_own_images_needs_no_other(data, tmp_path):
    elsewhere = write_tars(tmp_path / "elsewhere", (9, 8, 7))
    make_labels(tmp_path / "set", elsewhere, **(SETTINGS | {"views": (0, 2), "include_images": "original"}))
    shutil.rmtree(elsewhere)
    result = extend(tmp_path / "set")
    assert result.exit_code == 0, result.output
    assert LabelSet.open(tmp_path / "set").views == range(4)
    assert problems_in(tmp_path / "set") == []


def test_names_of_block_folders_that_are_none_are_passed_over(tmp_path):
    for name in ("views-00000-00001", "views-a-b", "views-1", "views-00004-00005", "views-٣-٤"):
        (tmp_path / "labels" / name).mkdir(parents=True)
    assert label_blocks(tmp_path) == [range(0, 2), range(4, 6)]
