"""Labels that others published come in as they were stored, damage and code are refused, and what is lost is said.

The writers below follow the public generators, in their own few lines:
github.com/szq0214/FKD, FKD/FKD_SLG/generate_soft_label.py (`generate_soft_labels`, `label_quantization`), and
github.com/microsoft/Cream, TinyViT/save_logits.py (`save_logits_one_epoch`), TinyViT/data/augmentation/manager.py.
"""

import codecs
import io
import json
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.builders import files_of
from support.imports import CLASSES, CROPS, fkd_state, probabilities, write_fkd, write_tinyvit

import cli
from pipeline.errors import DeitCliError, ImportedLabelsError, LabelSetMismatch, UsageError
from pipeline.exchange import imports
from pipeline.exchange.fkd import read_file
from pipeline.exchange.import_record import import_table
from pipeline.exchange.imports import import_labels
from pipeline.labels.labelset import LabelSet

ROOT = Path(__file__).parents[2]


FKD_KEYS = ["n01/n01_12", "n01/n01_7", "n02/n02_3", "n02/n02_4"]  # in the order of their names
FKD_SEEDS = [1, 0, 2, 3]


def run(kind: Any, path: Path, out: Path, **options: Any):
    return import_labels(kind, path, out, **({"num_classes": CLASSES} | options))


def rows_of(out: Path) -> dict[str, Any]:
    """Return all rows of an import, columns as NumPy has them."""
    names = [file["path"] for file in json.loads((out / "import.json").read_text())["files"]]
    table = pa.concat_tables([pq.read_table(out / name) for name in names])
    columns: dict[str, Any] = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        is_list = pa.types.is_fixed_size_list(column.type)
        columns[name] = (
            column.flatten().to_numpy().reshape(len(column), -1) if is_list else column.to_numpy(zero_copy_only=False)
        )
    return columns


# --- FKD -----------------------------------------------------------------------------------------------------------

KINDS = [
    # what FKD calls it, stored in float16, K
    ("marginal_smoothing_k5", False, 5),
    ("marginal_smoothing_k5", True, 5),
    ("smoothing", False, 1),
    ("hard", False, 0),
    ("full", False, CLASSES),
    ("full", True, CLASSES),
]


@pytest.mark.parametrize(("kind", "half", "topk"), KINDS, ids=[f"{k}-{'half' if h else 'single'}" for k, h, _ in KINDS])
def test_fkd_labels_come_in_as_they_were_stored(kind, half, topk, tmp_path):
    record = run("fkd", write_fkd(tmp_path / "fkd", kind, half=half), tmp_path / "out")
    found = rows_of(tmp_path / "out")
    assert (record.topk, record.rows, record.views) == (topk, 4 * CROPS, (0, CROPS - 1))
    assert found["key"].tolist() == [key for key in FKD_KEYS for _ in range(CROPS)]
    assert found["view"].tolist() == [*range(CROPS)] * 4
    states = [fkd_state(seed, kind, half) for seed in FKD_SEEDS]
    prob = np.concatenate([probabilities(seed) for seed in FKD_SEEDS])
    order = np.argsort(-(np.float16(prob) if half else prob), axis=1, kind="stable")
    np.testing.assert_array_equal(found["hard"], order[:, 0])
    boxes = np.stack([found[f"crop_{side}"] for side in ("top", "left", "height", "width")], axis=1)
    np.testing.assert_array_equal(boxes, np.concatenate([np.float32(state[0]) for state in states]))
    np.testing.assert_array_equal(found["flip"], np.concatenate([state[1] for state in states]))
    if topk:
        stored = np.take_along_axis(prob, order[:, :topk], 1).astype(np.float16 if half else np.float32)
        np.testing.assert_array_equal(found["topk_prob"], stored)
        assert (np.take_along_axis(prob, found["topk_index"].astype(int), 1).astype(stored.dtype) == stored).all()
        tail = np.clip(1 - stored.astype(np.float64).sum(1), 0, 1)
        np.testing.assert_array_equal(found["tail_mass"], tail.astype(stored.dtype))
    else:
        assert "topk_prob" not in found


def test_the_columns_have_the_types_of_label_shards(tmp_path):
    run("fkd", write_fkd(tmp_path / "fkd"), tmp_path / "out")
    schema = pq.read_schema(tmp_path / "out" / "labels" / "part-000000.parquet")
    found = {field.name: str(field.type) for field in schema}
    assert found == {
        "key": "string",
        "view": "uint32",
        "hard": "uint16",
        "topk_index": "fixed_size_list<element: uint16 not null>[5]",
        "topk_prob": "fixed_size_list<element: float not null>[5]",
        "tail_mass": "float",
        **dict.fromkeys(("crop_top", "crop_left", "crop_height", "crop_width"), "float"),
        "flip": "bool",
    }
    assert not any(field.nullable for field in schema)
    run("fkd", tmp_path / "fkd", tmp_path / "many", num_classes=70_000)
    assert str(pq.read_schema(tmp_path / "many" / "labels" / "part-000000.parquet").field("hard").type) == "uint32"


def test_arrays_of_numpy_one_and_of_other_byte_orders_are_read(tmp_path):
    folder = write_fkd(tmp_path / "fkd")
    expected = read_file(folder / "n01" / "n01_7.tar", folder, num_classes=CLASSES)
    path = folder / "n01" / "n01_7.tar"
    coords, flip, labels = fkd_state(0)
    torch.save([coords.astype(">f4"), flip.astype(np.int64), np.asfortranarray(labels)], path)
    change_pickle(path, lambda program: program.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    found = read_file(path, folder, num_classes=CLASSES)
    for name in ("hard", "topk_index", "topk_prob"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    for name, column in expected.more.items():
        np.testing.assert_array_equal(found.more[name], column)


def test_links_are_followed_but_not_round_in_a_circle_and_other_files_are_named(tmp_path, caplog):
    folder = write_fkd(tmp_path / "fkd")
    (folder / "n02").rename(tmp_path / "elsewhere")
    (folder / "n02").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "again").symlink_to(folder)
    (folder / "n01" / "n01_99.tar.part").write_bytes(b"half")
    record = run("fkd", folder, tmp_path / "out")
    assert (record.source_files, record.rows) == (4, 4 * CROPS)
    assert sorted(set(rows_of(tmp_path / "out")["key"])) == FKD_KEYS
    assert f"{folder}/n01/n01_99.tar.part is not a .tar file and is left out" in caplog.text


def change_pickle(path: Path, change) -> None:
    """Write a file of torch.save again, with another program in it."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)


def test_topk_keeps_the_most_probable_and_says_so(tmp_path):
    folder = write_fkd(tmp_path / "fkd", "full")
    record = run("fkd", folder, tmp_path / "out", topk=3)
    whole = rows_of_import(folder, tmp_path / "whole")
    found = rows_of(tmp_path / "out")
    np.testing.assert_array_equal(found["topk_index"], whole["topk_index"][:, :3])
    assert f"--topk kept 3 of {CLASSES} classes a view, the others are in tail_mass" in record.lost
    run("fkd", folder, tmp_path / "hard", topk=0)
    assert "topk_prob" not in rows_of(tmp_path / "hard")


def rows_of_import(folder: Path, out: Path) -> dict[str, Any]:
    run("fkd", folder, out)
    return rows_of(out)


class Evil:
    """What a pickle does when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("owned",)


def hostile_pickles() -> dict[str, tuple[bytes, str]]:
    """Programs in the place of FKD's, and what must be said of each."""
    encode = [pickle.GLOBAL + b"_codecs\nencode\n", unicode("ab"), unicode("hex"), pickle.TUPLE2, pickle.REDUCE]
    return {
        "runs a command": (pickle.dumps(Evil(), 2), "its pickle names posix.mkdir"),
        "makes much memory": (b"\x80\x02cbuiltins\nbytearray\n(J\x00\x00\x00\x7ftR.", "its pickle names builtins.bytearray"),
        "doubles what it has": (b"\x80\x02" + b"".join(encode) + b".", "its pickle encodes with hex"),
        "reads a storage": (b"\x80\x02(X\x07\x00\x00\x00storagetQ.", "its pickle uses BINPERSID, which arrays do not need"),
        "makes an object": (b"\x80\x02cnumpy\nndarray\n)\x81.", "its pickle uses NEWOBJ"),
        "imports by stack": (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", "its pickle uses SHORT_BINUNICODE"),
        "holds objects": (pickle.dumps([np.array([None, 1], object)], 2), "arrays must be of plain numbers, got 'O8'"),
        "has half an array": (pickle.dumps([np.arange(9.0)], 2).replace(struct.pack("<B", 9) + pickle.TUPLE1, struct.pack("<B", 200) + pickle.TUPLE1), "cannot reshape array"),
        "ends early": (pickle.dumps([np.arange(9.0)], 2)[:-40], "damaged"),
        "has no end": (pickle.dumps([np.arange(9.0)], 2)[:-1], "damaged"),
    }  # fmt: skip


def unicode(text: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(text)) + text.encode()


def test_arrays_of_nothing_are_refused(tmp_path):
    folder = write_fkd(tmp_path / "fkd")
    path = folder / "n02" / "n02_3.tar"
    coords, flip, _ = fkd_state(2)
    torch.save([coords, flip, np.zeros((CROPS, 2, 1), np.float32)], path)
    empty = unicode("\0" * (CROPS * 8))

    def change(program: bytes) -> bytes:
        assert empty in program
        shape = pickle.BININT1 + b"\x02" + pickle.BININT1 + b"\x01" + pickle.TUPLE3
        assert shape in program
        program = program.replace(shape, pickle.BININT1 + b"\x02" + pickle.BININT1 + b"\x00" + pickle.TUPLE3)
        return program.replace(empty, unicode(""))

    change_pickle(path, change)
    with pytest.raises(ImportedLabelsError, match=r"they are float32 \[6, 2, 0\]"):
        run("fkd", folder, tmp_path / "out")


@pytest.mark.parametrize("name", hostile_pickles())
def test_a_hostile_pickle_is_refused_and_nothing_of_it_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program, why = hostile_pickles()[name]
    folder = write_fkd(tmp_path / "fkd")
    change_pickle(folder / "n02" / "n02_3.tar", lambda _: program)
    with pytest.raises(ImportedLabelsError, match=re.escape(why)) as caught:
        run("fkd", folder, tmp_path / "out")
    assert str(caught.value).startswith(f"{folder}/n02/n02_3.tar: ")
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "out" / "import.json").exists()


def bad_states() -> dict[str, tuple[Any, str]]:
    """Values that torch.save wrote, and no teacher answered."""

    def state(**changes: Any) -> list[Any]:
        coords, flip, labels = fkd_state(2)
        for name, (at, value) in changes.items():
            {"coords": coords, "flip": flip, "labels": labels}[name][at] = value
        return [coords, flip, labels]

    coords, flip, labels = fkd_state(2)
    return {
        "NaN": (state(labels=((3, 1, 2), np.nan)), "crop 3: a probability is NaN or infinite"),
        "infinity": (state(labels=((3, 1, 0), np.inf)), "crop 3: a probability is NaN or infinite"),
        "negative": (state(labels=((1, 1, 4), -0.1)), "crop 1: a probability is not in 0..1"),
        "unsorted": (state(labels=((0, 1), [0.1, 0.2, 0.1, 0, 0])), "crop 0: probabilities are not in descending order"),
        "too much": (state(labels=((0, 1), [0.9, 0.8, 0.1, 0, 0])), "crop 0: probabilities add up to more than 1"),
        "past C": (state(labels=((5, 0, 1), CLASSES)), f"crop 5: a class is not in 0..{CLASSES - 1}"),
        "below 0": (state(labels=((5, 0, 1), -1)), "crop 5: a class is not in 0..39"),
        "twice": (state(labels=((5, 0), [1, 2, 3, 4, 1])), "crop 5: a class occurs twice"),
        "half a class": (state(labels=((5, 0, 1), 1.5)), "classes must be whole numbers"),
        "NaN class": (state(labels=((5, 0, 1), np.nan)), "classes must be whole numbers"),
        "a box outside": (state(coords=(4, [0.5, 0.5, 0.6, 0.5])), "crop 4 must be inside the image"),
        "a box of nothing": (state(coords=(4, [0.5, 0.5, 0, 0.5])), "crop 4 must be inside the image"),
        "a NaN box": (state(coords=(4, np.nan)), "crop 4 must be inside the image"),
        "other flips": ([coords, flip.astype(np.int64) + 2, labels], "flips must be 6 values, each true or false"),
        "fewer boxes": ([coords[:-1], flip, labels], "coordinates must be floating [6, 4], they are float32 [5, 4]"),
        "integer boxes": ([coords.astype(int), flip, labels], "coordinates must be floating [6, 4], they are int64"),
        "fewer flips": ([coords, flip[1:], labels], "flips must be 6 values, each true or false, they are bool [5]"),
        "two arrays": ([coords, flip], "it must hold three arrays, coordinates, flips and labels; it holds float32 [6, 4], bool [6]"),
        "a number": (3, "were not written by torch.save, or are damaged"),
        "too many crops": ([coords, flip, np.zeros(100_001, int)], "an image must have 1 to 100000 crops, it has 100001"),
        "a scalar": ([coords, flip, np.ones(())], "an image must have 1 to 100000 crops, it has 0"),
        "four dimensions": ([coords, flip, labels[None, None].repeat(6, 0)], "labels must be int [N], or floating"),
        "three rows a crop": ([coords, flip, labels.repeat(2, 1)], "labels must be int [N], or floating"),
        "other classes": ([coords, flip, probabilities(2, CROPS, 30)], "it has probabilities of 30 classes, not of 40: pass --num-classes 30"),
        "a hard class past C": ([coords, flip, np.full(CROPS, 40)], "crop 0: a class is not in 0..39"),
        "classes beyond all": ([coords, flip, np.full((CROPS, 2), -1e300)], "is stored in float64, which rounds whole numbers above"),
        "probabilities beyond all": ([coords, flip, np.full((CROPS, 2), (1, 1e300))], "crop 0: a probability is NaN or infinite"),
        "unsigned classes beyond all": ([coords, flip, np.full(CROPS, 2**32 - 1, np.uint32)], "crop 0: a class is not in 0..39"),
        "booleans": ([coords, flip, flip], "labels must be int [N], or floating"),
        "another K": (fkd_state(2, "smoothing"), "'n02/n02_3' has 1 classes per view in float32, the labels before it have 5 in float32"),
        "another precision": (fkd_state(2, half=True), "has 5 classes per view in float16, the labels before it have 5 in float32"),
    }  # fmt: skip


@pytest.mark.parametrize("name", bad_states())
def test_values_that_no_teacher_answered_are_refused_by_file_and_crop(name, tmp_path):
    value, why = bad_states()[name]
    folder = write_fkd(tmp_path / "fkd")
    torch.save(value, folder / "n02" / "n02_3.tar")
    with pytest.raises(ImportedLabelsError, match=re.escape(why)):
        run("fkd", folder, tmp_path / "out")
    assert not (tmp_path / "out" / "import.json").exists()


def test_classes_that_float16_rounds_are_refused(tmp_path):
    coords, flip, _ = fkd_state(0)
    labels = np.zeros((CROPS, 2), np.float16)
    labels[:] = (2047, 0.5)
    (tmp_path / "fkd").mkdir()
    torch.save([np.float16(coords), flip, labels], tmp_path / "fkd" / "a.tar")
    assert run("fkd", tmp_path / "fkd", tmp_path / "out", num_classes=5000).rows == CROPS
    labels[2, 0] = 4000
    torch.save([np.float16(coords), flip, labels], tmp_path / "fkd" / "a.tar")
    with pytest.raises(
        ImportedLabelsError, match="class 4000 is stored in float16, which rounds whole numbers above 2048"
    ):
        run("fkd", tmp_path / "fkd", tmp_path / "again", num_classes=5000)


NO_FILES = [
    # content, what is said
    (b"", "damaged: it does not begin like a zip file"),
    (b"<html>not found</html>", "damaged: it does not begin like a zip file"),
    (b"ustar" * 300, "damaged: it does not begin like a zip file"),
    (pickle.dumps(Evil(), 2), "it was written by a torch before 1.6, or by pickle itself"),
    (
        b"PK\x03\x04" + bytes(100),
        "were not written by torch.save, or are damaged: File is not a zip file. Fetch the file again",
    ),
]


@pytest.mark.parametrize(("content", "why"), NO_FILES, ids=range(len(NO_FILES)))
def test_what_torch_did_not_write_is_refused(content, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_fkd(tmp_path / "fkd")
    (folder / "n02" / "n02_3.tar").write_bytes(content)
    with pytest.raises(ImportedLabelsError, match=re.escape(why)):
        run("fkd", folder, tmp_path / "out")
    assert not (tmp_path / "owned").exists()


def test_a_file_that_unpacks_to_more_is_refused(tmp_path):
    folder = write_fkd(tmp_path / "fkd")
    path = folder / "n02" / "n02_3.tar"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**8))
    with pytest.raises(
        ImportedLabelsError, match=r"it is compressed \(archive/data.pkl\), which torch.save never does"
    ):
        run("fkd", folder, tmp_path / "out")


def test_a_file_beyond_the_limit_is_not_read(tmp_path):
    folder = write_fkd(tmp_path / "fkd")
    with (folder / "n02" / "n02_3.tar").open("wb") as file:
        file.truncate(2**30)  # a hole: nothing on the disk
    with pytest.raises(
        ImportedLabelsError, match="a file of labels may have at most 67108864 bytes, this one has 1073741824"
    ):
        run("fkd", folder, tmp_path / "out")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10**6), bit=st.integers(0, 7), cut=st.booleans())
def test_a_flipped_bit_or_a_cut_is_an_error_of_ours_or_other_numbers(at, bit, cut, tmp_path):
    """No checksum covers these files, so a changed number may pass; nothing but our error ever comes out."""
    path = tmp_path / "fkd" / "a.tar"
    path.parent.mkdir(exist_ok=True)
    torch.save(fkd_state(0), path)
    data = bytearray(path.read_bytes())
    at %= len(data)
    data[at] ^= 1 << bit
    path.write_bytes(data[:at] if cut else data)
    try:
        rows = read_file(path, tmp_path / "fkd", num_classes=CLASSES)
    except ImportedLabelsError:
        return
    assert not cut
    assert np.isfinite(rows.topk_prob).all()
    assert (rows.hard < CLASSES).all()


# --- TinyViT -------------------------------------------------------------------------------------------------------


def test_tinyvit_records_come_in_as_they_were_stored(tmp_path):
    record = run("tinyvit", write_tinyvit(tmp_path / "logits"), tmp_path / "out")
    found = rows_of(tmp_path / "out")
    assert (record.rows, record.views, record.topk, record.precision) == (28, (0, 1), 10, "float16")
    assert [part.path for part in record.files] == [
        f"labels/epoch-0000{epoch}-rank-000{rank}-000000.parquet" for epoch in (0, 1) for rank in (0, 1)
    ]
    prob = np.concatenate([probabilities(100 * epoch + rank, 7) for epoch in (0, 1) for rank in (0, 1)])
    order = np.argsort(-prob, axis=1, kind="stable")[:, :10]
    np.testing.assert_array_equal(found["topk_index"], order)
    np.testing.assert_array_equal(found["topk_prob"], np.take_along_axis(prob, order, 1).astype(np.float16))
    np.testing.assert_array_equal(found["hard"], order[:, 0])
    assert found["key"].tolist() == [f"n000{rank}_{row}" for _ in (0, 1) for rank in (0, 1) for row in range(7)]
    assert found["view"].tolist() == [0] * 14 + [1] * 14
    assert found["seed"].tolist() == [7919 * row + epoch for epoch in (0, 1) for _ in (0, 1) for row in range(7)]


def test_one_epoch_alone_is_imported_too(tmp_path):
    folder = write_tinyvit(tmp_path / "logits") / "logits_top10_epoch1"
    assert run("tinyvit", folder, tmp_path / "out").views == (1, 1)


def test_many_records_are_read_some_at_a_time_into_tables_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.exchange.tinyvit.ROWS_AT_ONCE", 4)
    monkeypatch.setattr(imports, "TABLE_BYTES", 8 * (100 + 10 * 8 + 10 * 2))
    folder = write_tinyvit(tmp_path / "logits", epochs=(3,), ranks=(0, 10), rows=21)
    record = run("tinyvit", folder, tmp_path / "out")
    assert [part.rows for part in record.files] == [8, 8, 5, 8, 8, 5]
    assert rows_of(tmp_path / "out")["key"].tolist() == [f"n000{rank}_{row}" for rank in (0, 10) for row in range(21)]


def test_keys_that_are_positions_are_said_to_be(tmp_path):
    folder = write_tinyvit(tmp_path / "logits", ranks=(0,))
    for epoch in (0, 1):
        (folder / f"logits_top10_epoch{epoch}" / "rank0-keys.txt").write_text("".join(f"{i}\n" for i in range(7)))
    record = run("tinyvit", folder, tmp_path / "out")
    assert "its keys are positions in a list of images, which you need, too" in record.lost


RECORD = 4 + 4 * 10


def damaged_tinyvit() -> dict[str, tuple[Any, str]]:
    """What happens to the files of rank 1 of epoch 1, and what must be said."""

    def values(change):
        def do(folder: Path) -> None:
            path = folder / "logits_top10_epoch1" / "rank1-values.bin"
            path.write_bytes(change(path.read_bytes()))

        return do

    def keys(change):
        def do(folder: Path) -> None:
            path = folder / "logits_top10_epoch1" / "rank1-keys.txt"
            path.write_bytes(change(path.read_bytes()))

        return do

    def put(offset: int, data: bytes):
        at = 5 * RECORD + offset
        return values(lambda old: old[:at] + data + old[at + len(data) :])

    half = np.float16
    return {
        "cut": (values(lambda old: old[:-3]), "rank1-values.bin: it is truncated: 305 bytes are 6 records of 44 bytes, and record 6 at byte 264 has 41"),
        "a record less": (values(lambda old: old[:-RECORD]), "rank1-keys.txt: it has more than 6 lines, and rank1-values.bin has 6 records"),
        "a key less": (keys(lambda old: old[: old.rindex(b"\n", 0, -1) + 1]), "rank1-keys.txt: it has 6 lines, and rank1-values.bin has 7 records"),
        "NaN": (put(4 + 20, half("nan").tobytes()), "record 5 at byte 220: a probability is NaN or infinite"),
        "past C": (put(4, struct.pack("<h", CLASSES)), "record 5 at byte 220: a class is not in 0..39"),
        "negative": (put(4, struct.pack("<h", -1)), "record 5 at byte 220: a class is not in 0..39"),
        "above 1": (put(4 + 20, half(1.5).tobytes()), "record 5 at byte 220: a probability is not in 0..1"),
        "unsorted": (put(4 + 38, half(0.9).tobytes()), "record 5 at byte 220: probabilities are not in descending order"),
        "seed": (put(0, struct.pack("<i", -5)), "record 5 at byte 220: a seed must be in 0..2147483647, this one is -5"),
        "a key twice": (keys(lambda old: old.replace(b"n0001_6", b"n0001_2")), "line 7: the key 'n0001_2' stands twice"),
        "an empty key": (keys(lambda old: old.replace(b"n0001_6", b"")), "line 7 is not a key: line 7 must have 1 to 1024 bytes, got 0"),
        "a long key": (keys(lambda old: old.replace(b"n0001_6", b"x" * 10**6)), "line 7 is not a key: line 7 must have 1 to 1024 bytes, got 1026"),
        "no text": (keys(lambda old: old.replace(b"n0001_6", b"\xff\xfe")), "line 7 is not a key: "),
        "a control": (keys(lambda old: old.replace(b"n0001_6", b"a\x00b")), "must not contain control characters"),
        "no keys": (lambda folder: (folder / "logits_top10_epoch1" / "rank1-keys.txt").unlink(), "rank1-values.bin has no rank1-keys.txt beside it"),
        "no values": (lambda folder: (folder / "logits_top10_epoch1" / "rank1-values.bin").unlink(), "rank1-keys.txt has no rank1-values.bin beside it"),
        "another K": (lambda folder: (folder / "logits_top10_epoch1").rename(folder / "logits_top5_epoch1"), "all epochs must have the same K, got [5, 10]"),
        "an epoch twice": (lambda folder: (folder / "logits_top10_epoch1").rename(folder / "logits_top10_epoch00"), "two files have the same epoch and rank"),
        "a K of its own": (lambda folder: [(folder / f"logits_top10_epoch{e}").rename(folder / f"logits_top5000_epoch{e}") for e in (0, 1)], "at most 4096 classes are stored for a view"),
    }  # fmt: skip


@pytest.mark.parametrize("name", damaged_tinyvit())
def test_a_damaged_record_is_refused_by_file_and_place(name, tmp_path):
    damage, why = damaged_tinyvit()[name]
    folder = write_tinyvit(tmp_path / "logits")
    damage(folder)
    with pytest.raises(ImportedLabelsError, match=re.escape(why)):
        run("tinyvit", folder, tmp_path / "out")
    assert not (tmp_path / "out" / "import.json").exists()


# --- both ----------------------------------------------------------------------------------------------------------


def test_the_report_says_bytes_before_and_now_and_what_is_lost(tmp_path):
    record = run("tinyvit", write_tinyvit(tmp_path / "logits"), tmp_path / "out")
    before = sum(len(data) for data in files_of(tmp_path / "logits").values())
    now = sum(len(data) for name, data in files_of(tmp_path / "out").items() if name.startswith("labels/"))
    report = import_table(record, tmp_path / "out")
    assert f"imported       28 labels into 4 tables: {tmp_path}/out/labels\nviews          0:2\n" in report
    assert "stored         K = 10 of 40 classes, float16" in report
    assert f"{before / 28:.1f} before (1.5 kB in 8 files), {now / 28:.1f} now" in report
    assert "not a label set: it cannot be trained on" in report
    assert all(f"  - {line}" in report for line in (*record.lost, *record.use))
    assert json.loads((tmp_path / "out" / "import.json").read_text())["lost"] == list(record.lost)


@pytest.mark.parametrize(("kind", "write", "who"), [("fkd", write_fkd, "FKD"), ("tinyvit", write_tinyvit, "TinyViT")])
def test_an_import_is_no_label_set_and_says_why_and_for_what_it_is_good(kind, write, who, tmp_path):
    run(kind, write(tmp_path / "theirs"), tmp_path / "out")
    with pytest.raises(LabelSetMismatch) as caught:
        LabelSet.open(tmp_path / "out")
    assert str(caught.value).startswith(
        f"{tmp_path}/out is an import of {who}'s labels, not a label set: its views cannot be replayed, because "
    )
    assert "import.json says what they can be used for. To train, make labels with: deit-cli precompute" in str(
        caught.value
    )


@pytest.mark.parametrize(
    "text", ["{", "{}", '{"format": "deit-cli-import", "version": 2}', '{"format": "deit-cli-import", "version": 1}']
)
def test_an_import_that_cannot_be_read_is_no_label_set_either(text, tmp_path):
    (tmp_path / "import.json").write_text(text)
    with pytest.raises(
        LabelSetMismatch, match=r"is not a label set, and its import.json cannot be read: .*\. Import the labels again"
    ):
        LabelSet.open(tmp_path)


@pytest.mark.slow
def test_a_killed_import_goes_on_and_ends_as_an_uninterrupted_one(tmp_path):
    folder = write_tinyvit(tmp_path / "logits")
    run("tinyvit", folder, tmp_path / "whole")
    script = """
import os, signal, sys
from pathlib import Path
from pipeline.exchange import imports
real = imports._publish
def publish(path, data):
    if path.name.startswith("epoch-00001-rank-0000"):
        os.kill(os.getpid(), signal.SIGKILL)
    real(path, data)
imports._publish = publish
imports.import_labels("tinyvit", Path(sys.argv[1]), Path(sys.argv[2]), num_classes=40)
"""
    done = subprocess.run([sys.executable, "-c", script, str(folder), str(tmp_path / "out")], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert len(files_of(tmp_path / "out")) == 2
    run("tinyvit", folder, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_tables_of_another_import_are_not_taken_for_ones_own(tmp_path):
    run("fkd", write_fkd(tmp_path / "fkd"), tmp_path / "out")
    (tmp_path / "out" / "import.json").unlink()
    with pytest.raises(
        ImportedLabelsError, match=r"part-000000.parquet was made from other labels, with other settings"
    ):
        run("fkd", write_fkd(tmp_path / "other", "smoothing"), tmp_path / "out")


def wrong_places(tmp: Path) -> list[tuple[str, Any, Any, dict[str, Any], type[DeitCliError], str]]:
    fkd = write_fkd(tmp / "fkd")
    run("fkd", fkd, tmp / "done")
    (tmp / "full").mkdir()
    (tmp / "full" / "photo.jpg").write_bytes(b"")
    return [
        ("fkd", tmp / "none", tmp / "out", {}, ImportedLabelsError, "none is not a folder"),
        ("fkd", fkd / "n01" / "n01_7.tar", tmp / "out", {}, ImportedLabelsError, "n01_7.tar is not a folder"),
        ("fkd", tmp / "full", tmp / "out", {}, ImportedLabelsError, "no .tar file below this folder"),
        ("tinyvit", fkd, tmp / "out", {}, ImportedLabelsError, "no logits_topK_epochE/rankR-values.bin in this folder"),
        ("fkd", fkd, tmp / "done", {}, ImportedLabelsError, "done holds an import already"),
        ("fkd", fkd, tmp / "full", {}, ImportedLabelsError, "full is not empty and holds no interrupted import"),
        ("fkd", fkd, fkd, {}, ImportedLabelsError, "is the folder of the labels themselves"),
        ("fkd", fkd, tmp / "out", {"num_classes": 30}, ImportedLabelsError, "a class is not in 0..29"),
        ("fkd", "s3://bucket/fkd", tmp / "out", {}, UsageError, "s3://bucket/fkd is a URL: copy them first"),
        ("fkd", fkd, "s3://bucket/out", {}, UsageError, "s3://bucket/out is a URL: copy them first"),
        ("fkd", fkd, tmp / "out", {"num_classes": 0}, UsageError, "--num-classes must be in 1..2147483647, got 0"),
        ("fkd", fkd, tmp / "out", {"topk": -1}, UsageError, "--topk must be in 0..4096, got -1"),
    ]  # fmt: skip


def test_wrong_places_and_settings_are_named(tmp_path):
    for kind, path, out, options, error, why in wrong_places(tmp_path):
        with pytest.raises(error, match=re.escape(why)):
            run(kind, path, out, **options)
    assert not (tmp_path / "out").exists()


def test_more_classes_than_are_kept_ask_for_topk(tmp_path):
    coords, flip, _ = fkd_state(0)
    (tmp_path / "fkd").mkdir()
    torch.save([coords, flip, probabilities(0, CROPS, 5000)], tmp_path / "fkd" / "a.tar")
    with pytest.raises(ImportedLabelsError, match="probabilities of 5000 classes, at most 4096 are kept: pass --topk"):
        run("fkd", tmp_path / "fkd", tmp_path / "out", num_classes=5000)
    assert run("fkd", tmp_path / "fkd", tmp_path / "out", num_classes=5000, topk=20).topk == 20


def test_the_command_imports_and_names_damage_in_one_line(tmp_path):
    folder = write_fkd(tmp_path / "fkd")
    result = CliRunner().invoke(
        cli.commands, ["labels", "import", "fkd", str(folder), str(tmp_path / "out"), "--num-classes", "40"]
    )
    assert result.exit_code == 0, result.output
    assert "24 labels into 1 table" in result.output
    (folder / "n01" / "n01_7.tar").write_bytes(b"")
    result = CliRunner().invoke(cli.commands, ["labels", "import", "fkd", str(folder), str(tmp_path / "again")])
    assert isinstance(result.exception, ImportedLabelsError)
    assert "\n" not in str(result.exception)
    result = CliRunner().invoke(
        cli.commands, ["labels", "import", "fkd", str(folder), str(tmp_path / "again"), "--num-classes", "x"]
    )
    assert result.exit_code == 2


def test_no_codec_but_latin1_has_a_name_that_is_let_through():
    """The guard goes by what Python calls a codec; the one that arrays need must be the one that it lets through."""
    assert codecs.lookup("latin1").name == "iso8859-1"
    program = io.BytesIO()
    pickle.Pickler(program, 2).dump([b"x"])
    assert b"latin1" in program.getvalue()
