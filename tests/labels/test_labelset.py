"""A label set opens when it is whole and its own, and every mismatch is an error that names it.

What is checked when: `open` reads plan and manifest, and compares the length of every file. The SHA-256 of a file is
checked when the first row of it is asked for. `verify` does all of it at once.
"""

import dataclasses
import json
import os
import pickle
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from support.builders import teacher_from
from support.label_sets import (
    CLASSES,
    RECIPE,
    MeanColour,
    colour_teacher,
    coloured_png,
    config_of,
    files_of,
    make_label_set,
    problems_in,
    read_everything,
    seal_again,
    write_source,
    write_tar,
)

from pipeline.errors import (
    LabelSetCorrupt,
    LabelSetError,
    LabelSetIncomplete,
    LabelSetMismatch,
    SourceError,
    TeacherError,
    UsageError,
)
from pipeline.images.source import open_source
from pipeline.labels.checked_files import check_length, check_lengths, checked_samples
from pipeline.labels.comparing import check_source, record_of
from pipeline.labels.encoding import LabelRows, codec_of
from pipeline.labels.labelset import LabelSet
from pipeline.labels.manifest import FileEntry, samples_path
from pipeline.labels.tables import (
    LabelsFooter,
    read_all_views,
    read_labels_footer,
    read_samples,
    read_samples_footer,
    write_labels,
    write_samples,
)
from pipeline.stage1.plan import plan_work
from pipeline.storage.place import Place, open_place
from pipeline.views.recipe import Recipe

FIRST = "labels/views-00000-00001/train-0.parquet"
SECOND = "labels/views-00000-00001/train-1.parquet"
LATER = "labels/views-00002-00003/train-0.parquet"
SAMPLES = "samples/train-0.parquet"


# A sound set.


def test_a_sound_set_says_what_it_is(made, images):
    opened = LabelSet.open(made)
    assert problems_in(opened) == []
    assert (opened.shards, opened.views, opened.num_classes) == (("train-0", "train-1"), range(4), 3)
    assert (opened.class_names, opened.recipe) == (CLASSES, RECIPE)
    assert opened.plan.source.location == str(images)


def test_samples_are_those_of_the_source(made, images):
    opened, source = LabelSet.open(made), open_source(images)
    for shard in source.shards:
        samples = opened.samples(shard.name)
        assert (samples.key, samples.class_label) == (shard.keys, shard.class_labels)
        assert samples.image_bytes.tolist() == [len(shard[row].image) for row in range(len(shard))]


def test_every_view_has_a_label_for_every_usable_sample(made):
    opened = LabelSet.open(made)
    for shard in opened.shards:
        for view in opened.views:
            rows = opened.read(shard, view)
            assert rows.row.tolist() == opened.samples(shard).usable.tolist()
            assert rows.topk_index.shape == (len(rows), 2)
            assert (rows.hard == rows.topk_index[:, 0]).all()


def test_views_differ(made):
    opened = LabelSet.open(made)
    assert len({opened.read("train-0", view).topk_prob.tobytes() for view in opened.views}) == 4


def test_a_pickled_set_reads_the_same(made):
    opened = LabelSet.open(made)
    again = pickle.loads(pickle.dumps(opened))
    assert list(read_everything(again)) == list(read_everything(opened))


def test_a_moved_set_is_the_same_set(copied, made):
    assert list(read_everything(LabelSet.open(copied))) == list(read_everything(LabelSet.open(made)))


def test_files_that_the_manifest_does_not_list_are_ignored(copied, made):
    (copied / "README.md").write_text("# labels")
    (copied / "labels/views-00000-00001/.tmp-host-1-0123456789abcdef").write_bytes(b"half")
    (copied / "labels/views-00004-00005").mkdir()
    shutil.copy(copied / FIRST, copied / "labels/views-00004-00005/train-0.parquet")
    shutil.copy(copied / FIRST, copied / "labels/views-00000-00001/train-9.parquet")
    opened = LabelSet.open(copied)
    assert (opened.views, opened.shards) == (range(4), ("train-0", "train-1"))
    assert list(read_everything(opened)) == list(read_everything(LabelSet.open(made)))
    assert problems_in(opened) == []


def test_hard_labels_alone_take_no_columns(images, tmp_path):
    opened = make_label_set(images, tmp_path / "set", topk=0)
    rows = opened.read("train-0", 0)
    assert (rows.topk_index.shape, rows.topk_prob.shape, rows.tail_mass.shape) == ((5, 0), (5, 0), (0,))
    assert problems_in(opened) == []


def test_every_class_kept_leaves_no_tail(images, tmp_path):
    rows = make_label_set(images, tmp_path / "set", topk=3, precision="float32").read("train-0", 0)
    assert rows.tail_mass.max() < 1e-6
    np.testing.assert_allclose(rows.topk_prob.sum(axis=1), 1, atol=1e-6)


# Not there, or not complete.


def test_a_folder_without_a_plan_is_no_label_set(tmp_path):
    for folder in (tmp_path, tmp_path / "nothing", tmp_path / "nothing\0"):
        with pytest.raises(LabelSetError, match=r"is not a label set: it has no plan\.json\. Make one with"):
            LabelSet.open(folder)


def test_a_folder_name_that_is_too_long_is_an_error_of_ours(tmp_path):
    with pytest.raises(LabelSetError):
        LabelSet.open(tmp_path / ("a" * 300))


def test_a_set_without_manifest_is_incomplete(copied):
    (copied / "manifest.json").unlink()
    with pytest.raises(LabelSetIncomplete, match=r"has no manifest\.json\. .*run the same deit-cli precompute again"):
        LabelSet.open(copied)


def test_a_set_that_is_not_sealed_is_incomplete(copied):
    seal_again(copied, lambda manifest: manifest.update(sealed=False))
    with pytest.raises(LabelSetIncomplete, match="is not sealed: some of its labels do not exist yet"):
        LabelSet.open(copied)


def test_views_with_a_gap_are_incomplete(copied):
    def forget(manifest):
        manifest["view_blocks"] = [[0, 2], [4, 6]]

    seal_again(copied, forget)
    with pytest.raises(LabelSetIncomplete, match=re.escape("its views 0:2, 4:6 have a gap")):
        LabelSet.open(copied)


def test_a_set_without_views_is_incomplete(copied):
    seal_again(copied, lambda manifest: manifest.update(view_blocks=[]))
    with pytest.raises(LabelSetIncomplete, match="holds no views"):
        LabelSet.open(copied)


def entries(manifest, **wanted):
    return [e for e in manifest["files"] if all(e[name] == value for name, value in wanted.items())]


COVERAGE = [
    # what is done to the manifest, what the error says
    (lambda m: m["files"].remove(entries(m, kind="samples")[0]), "lacks samples file of 'train-0'"),
    (lambda m: m["files"].remove(entries(m, shard="train-1", view_start=2)[0]), "lacks labels file of 'train-1'"),
    (lambda m: m["files"].append({**m["files"][0], "shard": "train-2"}), "has an unknown samples file of 'train-2'"),
    (lambda m: m["files"].append({**m["files"][-1], "view_start": 4, "view_stop": 6}), "has an unknown labels file"),
    (lambda m: m["view_blocks"].append([4, 6]), "lacks labels file of 'train-0'"),
    (lambda m: m["view_blocks"].remove([2, 4]), "has an unknown labels file of 'train-0'"),
]


@pytest.mark.parametrize(("change", "text"), COVERAGE, ids=[text for _, text in COVERAGE])
def test_a_manifest_that_does_not_cover_the_set_is_refused(copied, change, text):
    seal_again(copied, change)
    with pytest.raises(LabelSetCorrupt, match=f"the sealed manifest {text}"):
        LabelSet.open(copied)


# Files that are not the listed ones.


@pytest.mark.parametrize("name", [FIRST, LATER, SAMPLES])
def test_a_missing_file_is_named(copied, name):
    (copied / name).unlink()
    with pytest.raises(LabelSetCorrupt, match=f"{name} is missing, but the manifest promises it"):
        LabelSet.open(copied)


@pytest.mark.parametrize("name", [FIRST, LATER, SAMPLES])
def test_a_cut_file_is_named_with_both_lengths(copied, name):
    data = (copied / name).read_bytes()
    (copied / name).write_bytes(data[:-1])
    with pytest.raises(LabelSetCorrupt, match=f"{name} has {len(data) - 1} bytes, the manifest says {len(data)}"):
        LabelSet.open(copied)


@pytest.mark.parametrize("name", [FIRST, SAMPLES])
def test_an_appended_byte_is_named(copied, name):
    with (copied / name).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(LabelSetCorrupt, match=f"{name} has .* bytes, the manifest says .*: it was cut or changed"):
        LabelSet.open(copied)


def flip(path: Path, at: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


def test_a_changed_byte_is_found_when_the_first_row_is_asked_for(copied):
    flip(copied / FIRST)
    opened = LabelSet.open(copied)
    assert len(opened.read("train-0", 2)) == 5
    for _ in range(2):
        with pytest.raises(LabelSetCorrupt, match=f"{FIRST} has SHA-256 .*, the manifest says .*: it is damaged"):
            opened.read("train-0", 1)


def test_a_samples_file_is_read_once_so_that_its_footer_and_its_rows_are_of_the_same_bytes(made, monkeypatch):
    label_set, read = LabelSet.open(made), Counter()
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read.update([path.name]), real(path))[1])
    for shard in label_set.shards:
        checked_samples(made / samples_path(shard), label_set.plan, shard)
    assert read == Counter(f"{shard}.parquet" for shard in label_set.shards)


def test_a_changed_byte_of_the_samples_is_found_when_they_are_asked_for(copied):
    flip(copied / SAMPLES)
    opened = LabelSet.open(copied)
    assert len(opened.samples("train-1")) == 4
    with pytest.raises(LabelSetCorrupt, match=f"{SAMPLES} has SHA-256"):
        opened.samples("train-0")


def test_a_file_that_changes_while_it_is_used_is_found_by_its_length(copied):
    opened = LabelSet.open(copied)
    opened.read("train-0", 0)
    (copied / FIRST).write_bytes((copied / FIRST).read_bytes()[:-1])
    with pytest.raises(LabelSetCorrupt, match="it was cut or changed"):
        opened.read("train-0", 1)
    (copied / FIRST).unlink()
    with pytest.raises(LabelSetCorrupt, match="is missing"):
        opened.read("train-0", 1)


def test_verify_names_every_damaged_file_and_no_other(copied):
    flip(copied / FIRST)
    flip(copied / "samples/train-1.parquet")
    (copied / LATER).write_bytes(b"short")
    problems = problems_in(LabelSet(open_place(copied)))
    names = [str(path.relative_to(copied)) for path in files_of(copied)]
    named = {name for name in names if any(name in text for text in problems)}
    assert named == {FIRST, LATER, "samples/train-1.parquet"}
    assert len(problems) == 3  # the samples file spoils two label shards, and is named once


def swap(a: Path, b: Path) -> None:
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


@pytest.mark.parametrize(("a", "b"), [(FIRST, SECOND), (FIRST, LATER), (SAMPLES, "samples/train-1.parquet")])
def test_two_files_that_were_exchanged_are_refused(copied, a, b):
    swap(copied / a, copied / b)
    with pytest.raises(LabelSetCorrupt, match=r"bytes, the manifest says|has SHA-256"):
        list(read_everything(LabelSet.open(copied)))


def test_two_shards_that_were_exchanged_are_refused_whatever_the_manifest_says(copied):
    swap(copied / FIRST, copied / SECOND)
    seal_again(copied)
    opened = LabelSet.open(copied)
    with pytest.raises(LabelSetMismatch, match=f"{FIRST} belongs to 'train-1' of label set .*, not to 'train-0'"):
        opened.read("train-0", 0)
    assert len(problems_in(opened)) == 2


def test_two_samples_files_that_were_exchanged_are_refused_whatever_the_manifest_says(copied):
    swap(copied / SAMPLES, copied / "samples/train-1.parquet")
    seal_again(copied)
    with pytest.raises(LabelSetMismatch, match=f"{SAMPLES} belongs to 'train-1' of label set"):
        LabelSet.open(copied).samples("train-0")


def test_two_blocks_that_were_exchanged_are_not_read_as_each_other(copied):
    swap(copied / FIRST, copied / LATER)
    seal_again(copied)
    opened = LabelSet.open(copied)
    with pytest.raises(
        LabelSetMismatch, match=rf"{FIRST} says \(views, .*\) \(2, 4, .*, its path and the plan say \(0, 2, "
    ):
        opened.read("train-0", 0)
    assert len(problems_in(opened)) == 2


def test_a_shard_of_another_set_is_refused_whatever_the_manifest_says(copied, images, tmp_path):
    other = make_label_set(images, tmp_path / "other", teacher=colour_teacher(2.0))
    shutil.copy(other.folder / FIRST, copied / FIRST)
    seal_again(copied)
    mine, theirs = LabelSet.open(copied).plan.labelset_id[:12], other.plan.labelset_id[:12]
    with pytest.raises(
        LabelSetMismatch, match=f"belongs to 'train-0' of label set {theirs}, not to 'train-0' of {mine}"
    ):
        LabelSet.open(copied).read("train-0", 0)


def test_the_plan_of_another_set_is_refused(copied, images, tmp_path):
    other = make_label_set(images, tmp_path / "other", topk=1)
    shutil.copy(other.folder / "plan.json", copied / "plan.json")
    with pytest.raises(
        LabelSetMismatch, match=r"manifest\.json belongs to another plan\.json: it says SHA-256 \w{12}…"
    ):
        LabelSet.open(copied)
    seal_again(copied)
    with pytest.raises(LabelSetMismatch, match=r"plan\.json belongs to label set \w{12}, manifest\.json to \w{12}"):
        LabelSet.open(copied)


@pytest.mark.parametrize("name", [FIRST, SAMPLES])
def test_a_link_to_the_outside_is_refused(copied, tmp_path, name):
    """The very bytes, but anybody may change them there."""
    outside = tmp_path / "outside.parquet"
    (copied / name).rename(outside)
    (copied / name).symlink_to(outside)
    with pytest.raises(LabelSetCorrupt, match=f"{name} points outside the label set"):
        LabelSet.open(copied)


def as_it_is(copied: Path) -> None:
    pass


def is_gone(copied: Path) -> None:
    (copied / FIRST).unlink()


def is_cut(copied: Path) -> None:
    os.truncate(copied / FIRST, 100)


def is_a_folder(copied: Path) -> None:
    (copied / FIRST).unlink()
    (copied / FIRST).mkdir()


def is_a_link_inside(copied: Path) -> None:
    (copied / FIRST).rename(copied / "other")
    (copied / FIRST).symlink_to(copied / "other")


def is_a_link_to_nothing(copied: Path) -> None:
    (copied / FIRST).unlink()
    (copied / FIRST).symlink_to(copied / "nothing")


def is_in_a_folder_linked_inside(copied: Path) -> None:
    (copied / "labels").rename(copied / "other")
    (copied / "labels").symlink_to("other")


@pytest.mark.parametrize(
    "change",
    [as_it_is, is_gone, is_cut, is_a_folder, is_a_link_inside, is_a_link_to_nothing, is_in_a_folder_linked_inside],
)
def test_all_files_are_checked_together_as_each_is_alone(copied, monkeypatch, change):
    """The text of an error is that of the file alone, in a set whose path has a link and is relative, too."""
    label_set = LabelSet.open(copied)
    change(copied)
    (copied.parent / "link").symlink_to(copied)
    monkeypatch.chdir(copied.parent)
    for folder in (copied, copied.parent / "link", Path(copied.name)):
        assert error_of(check_lengths, label_set, open_place(folder)) == error_of(
            one_by_one, label_set, open_place(folder)
        )


def one_by_one(entries: Sequence[FileEntry], place: Place) -> None:
    for entry in entries:
        check_length(place.file(entry.path), entry, place)


def error_of(check: Callable[[Sequence[FileEntry], Place], None], label_set: LabelSet, place: Place) -> str | None:
    try:
        check(label_set.manifest.files, place)
    except LabelSetError as error:
        return str(error)
    return None


def test_a_linked_folder_that_lies_outside_is_refused(copied, tmp_path):
    (copied / "labels").rename(tmp_path / "elsewhere")
    (copied / "labels").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LabelSetCorrupt, match="points outside the label set"):
        LabelSet.open(copied)


def test_a_set_may_be_reached_through_a_link(copied, tmp_path):
    (tmp_path / "link").symlink_to(copied)
    assert problems_in(LabelSet.open(tmp_path / "link")) == []


@pytest.mark.parametrize("name", ["plan.json", "manifest.json"])
def test_a_folder_in_place_of_a_file_is_refused(copied, name):
    (copied / name).unlink()
    (copied / name).mkdir()
    with pytest.raises(LabelSetError):
        LabelSet.open(copied)


def test_a_view_or_shard_that_the_set_does_not_hold_is_refused(made):
    opened = LabelSet.open(made)
    for view in (-1, 4, 10**12):
        with pytest.raises(LabelSetMismatch, match=rf"holds views 0\.\.3, not {view}"):
            opened.read("train-0", view)
    with pytest.raises(LabelSetCorrupt, match="the manifest lists no labels of 'train-7'"):
        opened.read("train-7", 0)
    with pytest.raises(LabelSetCorrupt, match=r"the manifest lists no samples of '\.\./plan'"):
        opened.samples("../plan")


# Sound files that do not say what plan and manifest say: an attacker can make every hash agree.


def rewrite(path: Path, change, **footer) -> None:
    """Replace a label shard by changed rows under a changed footer, sound in itself."""
    views = [change(rows) for rows in read_all_views(path)]
    values = read_labels_footer(path).model_copy(update=footer)
    values = values.model_copy(update={"content_xxh3": values.codec.content_xxh3(views)})
    with path.open("wb") as file:
        write_labels(file, views, values)


def recoded(rows: LabelRows, *, topk=2, classes=3, precision="float16") -> LabelRows:
    index, prob = rows.topk_index[:, :topk].astype(int), rows.topk_prob[:, :topk].astype(np.float32)
    kept = (rows.row.astype(int), rows.hard.astype(int), index, prob)
    return codec_of(precision, classes, prob.shape[1]).encode(*kept)


def first_three(rows: LabelRows) -> LabelRows:
    return rows.part(slice(3))


FOOTERS = [
    # what the rows become, what the footer says
    (lambda rows: rows, {"recipe_id": "0" * 64}),
    (lambda rows: rows, {"teacher_id": "0" * 64}),
    (lambda rows: rows, {"source_id": "0" * 64}),
    (lambda rows: recoded(rows, classes=70_000), {"num_classes": 70_000}),
    (lambda rows: recoded(rows, topk=1), {"topk": 1}),
    (lambda rows: recoded(rows, topk=0), {"topk": 0}),
    (lambda rows: recoded(rows, precision="float32"), {"precision": "float32"}),
    (first_three, {"rows_per_view": 3}),
]


@pytest.mark.parametrize(
    ("change", "footer"), FOOTERS, ids=[next(iter(footer)) + str(i) for i, (_, footer) in enumerate(FOOTERS)]
)
def test_a_footer_that_is_not_the_plan_s_is_refused(copied, change, footer):
    rewrite(copied / FIRST, change, **footer)
    seal_again(copied)
    opened = LabelSet.open(copied)
    with pytest.raises(LabelSetError, match=FIRST):
        opened.read("train-0", 0)
    assert len(problems_in(opened)) == 1


def last_row_moved(rows: LabelRows) -> LabelRows:
    return dataclasses.replace(rows, row=np.array([0, 1, 2, 3, 77], np.uint32))


ROWS = [
    # what the rows become, how many the manifest names, what verify says
    (first_three, 10, "has 3 rows per view, the manifest says 10 in total"),
    (first_three, 6, "view 0 does not have the usable rows of its samples file"),
    (last_row_moved, 10, "view 0 does not have the usable rows of its samples file"),
]


@pytest.mark.parametrize(("change", "count", "text"), ROWS)
def test_labels_of_other_rows_are_found_by_verify(copied, change, count, text):
    rewrite(copied / FIRST, change, rows_per_view=len(change(read_all_views(copied / FIRST)[0])))
    seal_again(copied, lambda m: entries(m, kind="labels", shard="train-0")[0].update(rows=count))
    opened = LabelSet.open(copied)
    (problem,) = problems_in(opened)
    assert problem.startswith((f"{copied / FIRST}: {text}. Fetch it", f"{copied / FIRST} {text}. Fetch it"))
    with pytest.raises(LabelSetCorrupt, match=f"{copied / FIRST}:? {text}"):
        opened.read("train-0", 0)


def test_a_footer_whose_probes_are_none_is_refused(copied):
    rewrite(copied / FIRST, lambda rows: rows, probes=[{"row": 1}])
    seal_again(copied)
    (problem,) = problems_in(LabelSet.open(copied))
    assert "a probe in its footer" in problem


def rewrite_samples(path: Path, **changes) -> None:
    rows = dataclasses.replace(read_samples(path), **changes)
    footer = read_samples_footer(path).model_copy(update={"rows": len(rows)})
    with path.open("wb") as file:
        write_samples(file, rows, footer)


@pytest.mark.parametrize(
    "changes",
    [
        {"class_label": (2, 2, 2, 2, 2)},  # the student would learn these
        {"class_label": (-7, 99, 0, 0, 0)},
        {"key": ("a", "b", "c", "d", "e")},
        {"key": ("a", "a", "a", "a", "a")},
    ],
)
def test_samples_that_are_not_the_plan_s_are_refused(copied, changes):
    rewrite_samples(copied / SAMPLES, **changes)
    seal_again(copied)
    with pytest.raises(LabelSetError, match=SAMPLES):
        LabelSet.open(copied).samples("train-0")


def test_a_wrong_number_of_rows_in_the_manifest_is_refused(copied):
    def lie(manifest):
        for entry in manifest["files"]:
            entry["rows"] += 1

    seal_again(copied, lie)
    opened = LabelSet.open(copied)
    assert len(problems_in(opened)) == 6
    with pytest.raises(LabelSetCorrupt, match=f"{SAMPLES} has 5 rows, the manifest says 6"):
        opened.samples("train-0")


def test_a_wrong_number_of_rows_of_one_label_shard_is_refused_when_it_is_read(copied):
    seal_again(copied, lambda m: entries(m, kind="labels", shard="train-0")[0].update(rows=9))
    with pytest.raises(LabelSetCorrupt, match=f"{FIRST} has 5 rows per view, the manifest says 9 in total"):
        LabelSet.open(copied).read("train-0", 0)


# Another source.


def other_source(folder: Path, change: str) -> Path:
    """Write the images again with one thing changed."""
    write_source(folder, classes=("red", "green", "grey") if change == "class names" else CLASSES)
    key = "n9" if change == "key" else "n000"
    label = b"1" if change == "class label" else b"0"
    image = coloured_png(77) if change == "image" else coloured_png(0)
    members = [(f"{key}.png", image), (f"{key}.cls", label)]
    for number in range(1, 4 if change == "number" else 5):
        members += [(f"n{number:03}.png", coloured_png(number)), (f"n{number:03}.cls", b"%d" % (number % 3))]
    write_tar(folder / "train-0.tar", members[2:] + members[:2] if change == "order" else members)
    if change == "shards":
        (folder / "train-1.tar").unlink()
    if change == "name":
        (folder / "train-1.tar").rename(folder / "train-2.tar")
    return folder


SOURCES = [
    # what differs, what the error names
    ("key", "1 sample is missing: 'n000' of train-0; 1 sample is new: 'n9' of train-0. Pass"),
    ("class label", "1 sample is with another class label: 'n000' of train-0 (class 1, labelled as class 0). Pass"),
    ("order", "1 sample is in another place (same keys, other order): 'n000' of train-0. Pass"),
    ("number", "1 sample is missing: 'n004' of train-0. Pass"),
    ("name", "the copy lacks the shard 'train-1' and has the new shard 'train-2'; 4 samples are in another place"),
    (
        "shards",
        "the copy lacks the shard 'train-1'; 4 samples are missing: 'n005' of train-1, 'n006' of train-1, 'n007' of",
    ),
    ("class names", "the copy lacks the class 'blue' and has the new class 'grey'. Pass"),
]


@pytest.mark.parametrize(("change", "names"), SOURCES, ids=[change for change, _ in SOURCES])
def test_another_source_is_refused_with_the_names_of_what_differs(made, tmp_path, change, names):
    source = open_source(other_source(tmp_path / "other", change))
    with pytest.raises(LabelSetMismatch) as caught:
        check_source(LabelSet.open(made), source)
    assert f"{made} was made from source" in str(caught.value)
    assert f"is another: {names}" in str(caught.value)
    assert str(caught.value).endswith("Pass the --data that was labelled")


def test_the_same_source_elsewhere_is_accepted(made, tmp_path):
    check_source(LabelSet.open(made), open_source(other_source(tmp_path / "copy", "nothing")))


def test_a_shard_name_that_the_format_cannot_hold_is_an_error_of_ours(tmp_path):
    write_tar(tmp_path / ("a" * 210 + ".tar"), [("k.png", coloured_png(0)), ("k.cls", b"0")])
    with pytest.raises(SourceError, match=r"cannot be recorded in a label set: .*at most 200"):
        record_of(open_source(tmp_path))


def test_a_location_that_is_not_utf8_is_an_error_of_ours(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    folder.mkdir()
    (folder / "a.png").write_bytes(coloured_png(0))
    with pytest.raises(SourceError, match="cannot be recorded in a label set"):
        record_of(open_source(folder))


# Another run on the same folder.


def test_the_same_run_again_has_nothing_to_label(made, images):
    work = plan_work(config_of(images, made), RECIPE, colour_teacher(), open_source(images))
    assert (work.views_to_label, [(b.start, b.stop) for b in work.blocks]) == (0, [(0, 2), (2, 4)])


VIEWS = [
    # --views of a run on a set of views 0:4 in blocks of two; its blocks
    ((4, 6), [(4, 6)]),
    ((4, 9), [(4, 6), (6, 8), (8, 9)]),
    ((3, 6), [(2, 4), (4, 6)]),
    ((0, 1), [(0, 2)]),
]


@pytest.mark.parametrize(("views", "blocks"), VIEWS)
def test_views_are_cut_into_blocks_beside_those_that_are_sealed(made, images, views, blocks):
    work = plan_work(config_of(images, made, views=views), RECIPE, colour_teacher(), open_source(images))
    assert [(b.start, b.stop) for b in work.blocks] == blocks
    assert work.views_to_label == len(set(range(*views)) - set(range(4)))


@pytest.mark.parametrize("views", [(5, 6), (6, 8), (2**20 - 1, 2**20)])
def test_views_that_would_leave_a_gap_are_a_misuse(made, images, views):
    text = re.escape(f"--views {views[0]}:{views[1]} would leave a gap: the set holds 0:4")
    with pytest.raises(UsageError, match=text):
        plan_work(config_of(images, made, views=views), RECIPE, colour_teacher(), open_source(images))


def test_views_before_those_of_the_set_may_be_added_without_a_gap(images, tmp_path):
    out = make_label_set(images, tmp_path / "set", views=(4, 6)).folder
    with pytest.raises(UsageError, match="would leave a gap: the set holds 4:6"):
        make_label_set(images, out, views=(0, 2))
    assert make_label_set(images, out, views=(2, 4)).views == range(2, 6)


def test_k_beyond_the_format_is_a_misuse(images, tmp_path):
    many = colour_teacher().identity.model_copy(update={"num_classes": 5000, "class_names": None})
    wide = teacher_from(MeanColour(1.0), many)
    folder = write_source(tmp_path / "tars")
    (folder / "classes.txt").unlink()
    source = open_source(folder)
    assert plan_work(config_of(folder, tmp_path / "a", topk=4096), RECIPE, wide, source).plan.topk == 4096
    with pytest.raises(UsageError, match=r"--topk must be in 0\.\.4096, got 4097"):
        plan_work(config_of(folder, tmp_path / "a", topk=4097), RECIPE, wide, source)


@pytest.mark.parametrize(
    ("recipe", "gain", "settings", "text"),
    [
        (RECIPE.with_fields(seed=1), 8.0, {}, r"was made with recipe \w{12}, this run asks for \w{12} \(seed: 0, not 1\)"),
        (RECIPE, 2.0, {}, r"was made with teacher \w{12}, this run asks for \w{12} \(weights_sha256: "),
        (RECIPE, 8.0, {"topk": 1}, r"was made with --topk 2, this run asks for 1"),
        (RECIPE, 8.0, {"precision": "float32"}, r"was made with --precision float16, this run asks for float32"),
    ],
)  # fmt: skip
def test_another_run_on_the_same_folder_is_refused_before_anything_is_written(made, images, recipe: Recipe, gain, settings, text):  # fmt: skip
    before = [(path, path.stat().st_mtime_ns) for path in files_of(made)]
    with pytest.raises(LabelSetMismatch, match=text):
        make_label_set(images, made, recipe=recipe, teacher=colour_teacher(gain), **settings)
    assert [(path, path.stat().st_mtime_ns) for path in files_of(made)] == before


@pytest.mark.parametrize("change", ["key", "class label", "number"])
def test_another_source_on_the_same_folder_is_refused(made, tmp_path, change):
    with pytest.raises(LabelSetMismatch, match=r"was made with source .*\(shards\.0\."):
        make_label_set(other_source(tmp_path / "other", change), made)


def test_other_class_names_are_the_teacher_s_business_first(made, tmp_path):
    with pytest.raises(TeacherError, match="class 2 is 'grey' in the source and 'blue' for teacher"):
        make_label_set(other_source(tmp_path / "other", "class names"), made)


def test_another_image_under_the_same_key_is_refused_on_the_same_folder(copied, tmp_path):
    """Its labels are those of another picture."""
    (copied / "manifest.json").unlink()
    (copied / FIRST).unlink()
    with pytest.raises(
        LabelSetMismatch, match="image 'n000' of train-0 has other bytes than the one that was labelled"
    ):
        make_label_set(other_source(tmp_path / "other", "image"), copied)


def test_a_folder_with_other_things_in_it_is_left_alone(images, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(LabelSetMismatch, match="is not empty and holds no label set: choose another --out"):
        make_label_set(images, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.fixture(scope="module")
def footer(made) -> LabelsFooter:
    return read_labels_footer(made / FIRST)


def test_a_file_found_alone_explains_itself(footer, made):
    plan = json.loads((made / "plan.json").read_text())
    for name in ("labelset_id", "recipe_id", "teacher_id", "source_id", "topk", "precision"):
        assert getattr(footer, name) == plan[name]
    assert (footer.shard, footer.view_start, footer.view_stop, footer.rows_per_view) == ("train-0", 0, 2, 5)
    assert {"device", "dtype", "torch"} <= set(footer.environment)


def test_a_url_in_a_plan_is_not_opened_unasked(copied):
    label_set = LabelSet.open(copied)
    source = label_set.plan.source.model_copy(update={"location": "http://169.254.169.254/latest"})
    label_set.plan = label_set.plan.model_copy(update={"source": source})
    with pytest.raises(
        UsageError, match=r"its URLs are opened only on request: pass --data http://169\.254\.169\.254/latest"
    ):
        label_set.open_source()
