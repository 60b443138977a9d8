import json
import logging
import os
import pickle
import random
import shutil
import subprocess
import sys
import tarfile
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds

from pipeline.errors import SourceError, UsageError
from pipeline.images import folders, index
from pipeline.images import source as source_module
from pipeline.images.index import SIDECAR_NAME, write_sidecar
from pipeline.images.parquet import ParquetShard
from pipeline.images.samples import ShardIndex, ShardSummary, SourceOptions, SourceShard
from pipeline.images.source import Source, open_source
from pipeline.images.tars import TarShard
from pipeline.storage.cache import Cache

NAMES = [("a", 3), ("b", 1), ("c", None), ("d", 4)]


def write_tar(path: Path, samples: list[tuple[str, int | None]], *, size: int = 60) -> None:
    """Write a tar with an image of bytes that name their sample, `size` long, beside a class label."""
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file, wds.TarWriter(file, mtime=0) as writer:  # pyright: ignore[reportAttributeAccessIssue]
        for key, label in samples:
            image = f"{path.stem} {key}".ljust(size, ".").encode()
            writer.write({"__key__": key, "jpg": image} | ({} if label is None else {"cls": str(label).encode()}))


def write_parquet(path: Path, samples: list[tuple[str, int | None]], *, paths: bool = True) -> None:
    """Write the same as a Parquet file, in row groups of two."""
    path.parent.mkdir(exist_ok=True)
    images = [{"bytes": f"{path.stem} {key}".encode(), "path": f"{key}.jpg" if paths else None} for key, _ in samples]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(images, kind), "label": pa.array([label for _, label in samples], pa.int64())})
    pq.write_table(table, path, row_group_size=2)


@pytest.fixture(autouse=True)
def _kept_from_one_sample_on(monkeypatch) -> None:
    monkeypatch.setattr(index, "LEAST_KEPT", 1)


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(tmp_path / "cache", 1 << 30)


@pytest.fixture(params=["tar", "parquet", "parquet without paths"])
def data(request, tmp_path) -> Path:
    """A source of two files of four samples."""
    for number in range(2):
        samples = [(f"{key}{number}", label) for key, label in NAMES]
        if request.param == "tar":
            write_tar(tmp_path / f"data/t{number}.tar", samples)
        else:
            write_parquet(tmp_path / f"data/t{number}.parquet", samples, paths=request.param == "parquet")
    return tmp_path / "data"


def contents(source: Source) -> list[tuple[str, int | None, bytes]]:
    return [(s.key, s.class_label, s.image) for shard in source.shards for s in shard]


def kept_file(cache: Cache) -> Path:
    (path,) = (cache.folder / "index").glob("*.arrow")
    return path


def no_building(monkeypatch) -> None:
    def refuse(shard: SourceShard[Any]) -> Any:
        raise AssertionError(f"{shard.name} was indexed again")

    monkeypatch.setattr(index, "index_shard", refuse)
    for kind in (TarShard, ParquetShard):
        monkeypatch.setattr(kind, "build_index", refuse)


def test_a_source_that_is_opened_again_is_not_indexed_again_and_holds_the_same(data, cache, monkeypatch):
    first = open_source(data, cache=cache)
    truth, identity = contents(open_source(data)), first.identity()
    assert first.num_labelled == 6
    assert first.max_label == 4
    no_building(monkeypatch)
    again = open_source(data, cache=cache)
    assert again.identity() == identity
    assert (again.num_samples, again.num_labelled, again.max_label) == (8, 6, 4)
    assert contents(again) == truth
    assert [tuple(shard.keys) for shard in again.shards] == [tuple(shard.keys) for shard in first.shards]


def test_one_shard_alone_is_indexed_alone(tmp_path, cache, monkeypatch):
    for number in range(3):
        write_tar(tmp_path / f"data/t{number}.tar", NAMES)
    built = []
    real = TarShard.build_index
    monkeypatch.setattr(TarShard, "build_index", lambda shard: built.append(shard.name) or real(shard))
    source = open_source(tmp_path / "data", cache=cache)
    assert source.shard("t1")[0].key == "a"
    assert built == ["t1"]
    assert not (cache.folder / "index").exists()


def test_only_a_file_that_has_changed_is_indexed_again(tmp_path, cache, monkeypatch):
    for number in range(3):
        write_tar(tmp_path / f"data/t{number}.tar", NAMES)
    assert open_source(tmp_path / "data", cache=cache).num_samples == 12
    write_tar(tmp_path / "data/t1.tar", NAMES[:3])
    write_tar(tmp_path / "data/t3.tar", NAMES)
    built = []
    real = index.index_shard
    monkeypatch.setattr(index, "index_shard", lambda shard: built.append(shard.name) or real(shard))
    assert open_source(tmp_path / "data", cache=cache).num_samples == 15
    assert built == ["t1", "t3"]
    assert contents(open_source(tmp_path / "data", cache=cache)) == contents(open_source(tmp_path / "data"))


def test_a_file_that_is_missing_now_is_no_shard(tmp_path, cache):
    for number in range(3):
        write_tar(tmp_path / f"data/t{number}.tar", NAMES)
    assert open_source(tmp_path / "data", cache=cache).num_samples == 12
    (tmp_path / "data/t1.tar").unlink()
    assert open_source(tmp_path / "data", cache=cache).num_samples == 8


def replaced_unseen(path: Path, write) -> None:
    """Replace a file by one of equal length and date."""
    before = path.stat()
    write()
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


UNSEEN = [
    ("another class label", [("a0", 3), ("b0", 2), ("c0", None), ("d0", 4)], 1),
    ("another key", [("a0", 3), ("x0", 1), ("c0", None), ("d0", 4)], 1),
    ("another order", [("b0", 1), ("a0", 3), ("c0", None), ("d0", 4)], 0),
    ("a label that moved to another image", [("a0", 3), ("b0", None), ("c0", 1), ("d0", 4)], 1),
]


@pytest.mark.parametrize(("change", "samples", "first"), UNSEEN, ids=[name for name, *_ in UNSEEN])
@pytest.mark.parametrize("kind", ["tar", "parquet", "parquet without paths"])
def test_a_file_that_was_replaced_with_equal_length_and_date_is_an_error_and_then_indexed_anew(
    kind, change, samples, first, tmp_path, cache
):
    def write(samples: list[tuple[str, int | None]]) -> None:
        if kind == "tar":
            write_tar(path, samples)
        else:
            write_parquet(path, samples, paths=kind == "parquet")

    path = tmp_path / f"data/t0.{kind.split()[0]}"
    write([(f"{key}0", label) for key, label in NAMES])
    assert open_source(path, cache=cache).num_labelled == 3
    before = kept_file(cache)
    replaced_unseen(path, lambda: write(samples))
    source = open_source(path, cache=cache)
    with pytest.raises(SourceError, match=r"not those of the index: the file was changed.*Run the command again"):
        contents(source)
    assert not before.exists()
    assert contents(open_source(path, cache=cache)) == contents(open_source(path))


def damaged(path: Path, seed: int) -> None:
    """Flip a bit, cut the file, or repeat a part of it."""
    draw, data = random.Random(seed), bytearray(path.read_bytes())
    at = draw.randrange(len(data))
    match seed % 4:
        case 0 | 1:
            data[at] ^= 1 << draw.randrange(8)
        case 2:
            del data[at:]
        case _:
            data[at : at + 8] = bytes(draw.randrange(256) for _ in range(8))
    path.write_bytes(data)


@pytest.mark.parametrize("seed", range(300))
def test_an_index_that_is_torn_or_damaged_never_changes_a_sample(seed, tmp_path, cache):
    for number in range(2):
        write_tar(tmp_path / f"data/t{number}.tar", [(f"{key}{number}", label) for key, label in NAMES])
    truth = open_source(tmp_path / "data", cache=cache)
    identity, expected = truth.identity(), contents(truth)
    damaged(kept_file(cache), seed)
    try:
        found = open_source(tmp_path / "data", cache=cache)
        numbers = found.num_samples
        assert contents(found) == expected
        assert numbers == 8
        if found.identity() != identity:  # a wrong hash of right keys: it fits no label set
            assert seed % 4 != 2
    except SourceError:
        found = open_source(tmp_path / "data", cache=cache)
        if contents(found) != expected:  # an error that leaves the index would come again
            raise


def forged(path: Path, change) -> None:
    """Write an index anew with other values, sound as a file: `change` gets the columns of the first shard as lists."""
    reader = pa.ipc.open_file(pa.BufferReader(path.read_bytes()))
    batches = [reader.get_batch_with_custom_metadata(number) for number in range(reader.num_record_batches)]
    with path.open("wb") as file, pa.ipc.new_file(file, reader.schema) as writer:
        for number, (batch, more) in enumerate(batches):
            columns, about = batch.to_pydict(), json.loads(more[b"deit-cli-index"])
            if number == 0:
                labels = columns["class_label"]
                change(columns, about)
                if about["summary"].pop("fits", True):
                    about["summary"] = asdict(ShardSummary.of(ShardIndex(columns["key"], labels, ())))
            writer.write_batch(
                pa.record_batch(columns, schema=batch.schema), custom_metadata={b"deit-cli-index": json.dumps(about)}
            )


def swap_places(columns: dict[str, list[Any]], _: Any) -> None:
    for name in ("start", "stop", "data", "size"):
        columns[name][0], columns[name][1] = columns[name][1], columns[name][0]


def swap_images(columns: dict[str, list[Any]], _: Any) -> None:
    for name in ("data", "size"):
        columns[name][0], columns[name][1] = columns[name][1], columns[name][0]


def leave_out(columns: dict[str, list[Any]], _: Any) -> None:
    for values in columns.values():
        del values[1]
    columns["stop"][0] = columns["start"][1]


def stand_twice(columns: dict[str, list[Any]], _: Any) -> None:
    for name, values in columns.items():
        values[1] = "e0" if name == "key" else values[0]


def another_label(columns: dict[str, list[Any]], _: Any) -> None:
    columns["class_label"][0] = 2


def no_label(columns: dict[str, list[Any]], _: Any) -> None:
    columns["class_label"][0] = None


def shorter(columns: dict[str, list[Any]], _: Any) -> None:
    columns["size"][0] -= 1


def far_away(columns: dict[str, list[Any]], _: Any) -> None:
    columns["start"][0] = columns["data"][0] = 1 << 40


def negative(columns: dict[str, list[Any]], _: Any) -> None:
    columns["start"][0] = -512


def huge(columns: dict[str, list[Any]], _: Any) -> None:
    columns["size"][0] = 1 << 40


def chosen(*rows: int) -> Any:
    """Return a forgery that has these samples in this order."""

    def change(columns: dict[str, list[Any]], _: Any) -> None:
        for values in columns.values():
            values[:] = [values[row] for row in rows]

    change.__name__ = f"only {rows}"
    return change


def false_summary(**values: Any) -> Any:
    """Return a forgery whose columns are right, and its summary is not."""

    def change(_: Any, about: Any) -> None:
        about["summary"] |= values | {"fits": False}

    change.__name__ = f"summary {values}"
    return change


FORGERIES = [
    *(swap_places, swap_images, leave_out, stand_twice, another_label, no_label, shorter, far_away, negative, huge),
    *(chosen(0, 2, 3), chosen(1, 2, 3), chosen(0, 1, 2), chosen(0, 0, 2, 3), chosen(3, 2, 1, 0)),
    *(false_summary(num_samples=2), false_summary(num_labelled=4), false_summary(max_label=999)),
    false_summary(keys_sha256="0" * 64),
]


@pytest.mark.parametrize("change", FORGERIES, ids=lambda change: change.__name__)
def test_an_index_that_lies_is_an_error_where_it_lies(change, tmp_path, cache):
    write_tar(tmp_path / "data/t0.tar", [(f"{key}0", label) for key, label in NAMES])
    assert open_source(tmp_path / "data", cache=cache).num_samples == 4
    forged(kept_file(cache), change)
    found = open_source(tmp_path / "data", cache=cache)
    _ = found.num_samples
    with pytest.raises(SourceError, match="not those of the index"):
        contents(found)
    assert contents(open_source(tmp_path / "data", cache=cache)) == contents(open_source(tmp_path / "data"))


USELESS = [
    ("without a state", lambda columns, about: about.update(state=[])),
    ("of another version", lambda columns, about: about.update(state=[*about["state"], 7])),
    ("with a text for a number", lambda columns, about: about["summary"].update(num_labelled="3", fits=False)),
    ("with a negative number", lambda columns, about: about["summary"].update(max_label=-1, fits=False)),
    ("with an unknown field", lambda columns, about: about["summary"].update(more=1, fits=False)),
    ("without samples", lambda columns, about: [values.clear() for values in columns.values()]),
]


@pytest.mark.parametrize(("what", "change"), USELESS, ids=[name for name, _ in USELESS])
def test_an_index_that_cannot_be_ours_is_ignored(what, change, tmp_path, cache):
    write_tar(tmp_path / "data/t0.tar", [(f"{key}0", label) for key, label in NAMES])
    truth = contents(open_source(tmp_path / "data"))
    assert open_source(tmp_path / "data", cache=cache).num_samples == 4
    forged(kept_file(cache), change)
    found = open_source(tmp_path / "data", cache=cache)
    assert found.num_samples == 4
    assert contents(found) == truth


def test_an_extension_type_in_an_index_is_not_even_read(tmp_path, cache):
    class Hostile(pa.ExtensionType):
        read = False

        def __init__(self) -> None:
            super().__init__(pa.string(), "hostile")

        def __arrow_ext_serialize__(self) -> bytes:
            return b""

        @classmethod
        def __arrow_ext_deserialize__(cls, storage_type: Any, serialized: bytes) -> "Hostile":
            Hostile.read = True
            return cls()

    write_tar(tmp_path / "data/t0.tar", NAMES)
    source = open_source(tmp_path / "data", cache=cache)
    assert source.num_samples == 4
    path = kept_file(cache)
    pa.register_extension_type(Hostile())  # pyright: ignore[reportArgumentType]
    try:
        schema = pa.schema([pa.field("key", Hostile())], metadata=pa.ipc.open_file(path.read_bytes()).schema.metadata)
        with path.open("wb") as file, pa.ipc.new_file(file, schema):
            pass
        assert open_source(tmp_path / "data", cache=cache).num_samples == 4
        assert not Hostile.read
    finally:
        pa.unregister_extension_type("hostile")


def test_an_index_beside_the_source_is_used_on_another_machine_where_the_files_have_other_dates(
    tmp_path, cache, monkeypatch
):
    write_tar(tmp_path / "data/t0.tar", NAMES)
    write_sidecar(open_source(tmp_path / "data", cache=cache))
    os.utime(tmp_path / "data/t0.tar", (5, 5))
    truth = contents(open_source(tmp_path / "data"))
    no_building(monkeypatch)
    other = open_source(tmp_path / "data", cache=Cache(tmp_path / "other", 1))
    assert other.num_samples == 4
    assert contents(other) == truth


def test_an_index_beside_the_source_that_does_not_fit_is_an_error_that_names_it(tmp_path, cache):
    write_tar(tmp_path / "data/t0.tar", NAMES)
    path = write_sidecar(open_source(tmp_path / "data", cache=cache))
    assert path == tmp_path / "data" / SIDECAR_NAME
    write_tar(tmp_path / "data/t0.tar", [("a", 1), *NAMES[1:]])
    with pytest.raises(SourceError, match=rf"Delete {path}, or write it anew with deit-cli index"):
        contents(open_source(tmp_path / "data", cache=Cache(tmp_path / "other", 1)))
    write_sidecar(open_source(tmp_path / "data", cache=cache))
    assert contents(open_source(tmp_path / "data", cache=Cache(tmp_path / "other", 1)))[0][1] == 1


def test_a_small_source_is_not_kept(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(index, "LEAST_KEPT", 5)
    write_tar(tmp_path / "data/t0.tar", NAMES)
    source = open_source(tmp_path / "data", cache=cache)
    assert source.num_samples == 4
    assert list((cache.folder / "index").iterdir()) == []
    no_building(monkeypatch)
    assert len(contents(source)) == 4  # but this process has it


def test_where_nothing_can_be_written_each_process_indexes_what_it_uses(tmp_path):
    write_tar(tmp_path / "data/t0.tar", NAMES)
    (tmp_path / "file").touch()
    source = open_source(tmp_path / "data", cache=Cache(tmp_path / "file/cache", 1))
    assert source.num_samples == 4
    assert contents(source) == contents(open_source(tmp_path / "data"))


def test_several_processes_index_as_one_does(tmp_path, cache, monkeypatch):
    for number in range(6):
        write_tar(tmp_path / f"data/t{number}.tar", [(f"{key}{number}", label) for key, label in NAMES])
    monkeypatch.setattr(index, "SHARDS_FOR_WORKERS", 2)
    monkeypatch.setattr(index, "usable_cores", lambda: 2)
    source = open_source(tmp_path / "data", cache=cache)
    assert source.num_samples == 24
    assert contents(source) == contents(open_source(tmp_path / "data"))
    assert source.source_id == open_source(tmp_path / "data").source_id


def test_an_index_is_made_beside_other_work_and_then_used(tmp_path, cache, monkeypatch):
    for number in range(3):
        write_tar(tmp_path / f"data/t{number}.tar", NAMES)
    source = open_source(tmp_path / "data", cache=cache)
    assert source.kept is not None
    source.kept.complete_beside(source.shards)  # too few source shards: nothing happens
    assert not (cache.folder / "index").exists()
    monkeypatch.setattr(index, "SHARDS_FOR_WORKERS", 3)
    monkeypatch.setattr(index, "usable_cores", lambda: 2)
    source.kept.complete_beside(source.shards)
    for thread in threading.enumerate():
        if thread.name == "index":
            thread.join()
    truth = contents(open_source(tmp_path / "data"))
    no_building(monkeypatch)
    assert contents(source) == truth


def test_a_damaged_file_is_no_error_of_the_index_beside_but_of_its_use(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(index, "SHARDS_FOR_WORKERS", 2)
    for number in range(2):
        write_tar(tmp_path / f"data/t{number}.tar", NAMES)
    (tmp_path / "data/t1.tar").write_bytes((tmp_path / "data/t1.tar").read_bytes()[:-700])
    source = open_source(tmp_path / "data", cache=cache)
    assert source.kept is not None
    source.kept.complete_beside(source.shards)
    for thread in threading.enumerate():
        if thread.name == "index":
            thread.join()
    assert len(source.shard("t0").keys) == 4
    with pytest.raises(SourceError, match="cut off"):
        _ = source.shard("t1").keys


def test_an_error_in_another_process_is_the_same_error(tmp_path, cache, monkeypatch):
    for number in range(3):
        write_tar(tmp_path / f"data/t{number}.tar", NAMES)
    whole = (tmp_path / "data/t1.tar").read_bytes()
    (tmp_path / "data/t1.tar").write_bytes(whole[:-700])
    with pytest.raises(SourceError) as alone:
        _ = open_source(tmp_path / "data", cache=cache).num_samples
    monkeypatch.setattr(index, "SHARDS_FOR_WORKERS", 2)
    monkeypatch.setattr(index, "usable_cores", lambda: 2)
    with pytest.raises(SourceError) as together:
        _ = open_source(tmp_path / "data", cache=cache).num_samples
    assert str(together.value) == str(alone.value)
    assert list((cache.folder / "index").iterdir()) == []


def test_a_warning_in_another_process_is_said_by_this_one(tmp_path, cache, monkeypatch, caplog):
    for number in range(3):
        write_tar(tmp_path / f"data/t{number}.tar", NAMES)
        with tarfile.open(tmp_path / f"data/t{number}.tar", "a") as tar:
            tar.addfile(tarfile.TarInfo("z.gif"))
    monkeypatch.setattr(index, "SHARDS_FOR_WORKERS", 2)
    monkeypatch.setattr(index, "usable_cores", lambda: 2)
    assert open_source(tmp_path / "data", cache=cache).num_samples == 12
    assert sum("1 picture is not read" in message for message in caplog.messages) == 3


def test_a_process_that_dies_is_an_error(tmp_path, cache, monkeypatch):
    for number in range(3):
        write_tar(tmp_path / f"data/t{number}.tar", NAMES)
    monkeypatch.setattr(index, "SHARDS_FOR_WORKERS", 2)
    monkeypatch.setattr(index, "usable_cores", lambda: 2)
    real = subprocess.Popen

    def dying(command: list[str], **how: Any) -> Any:
        return real([sys.executable, "-c", "raise SystemExit(3)"], **how)

    monkeypatch.setattr(index.subprocess, "Popen", dying)
    with pytest.raises(SourceError, match=r"a process that indexed t[012] ended early"):
        _ = open_source(tmp_path / "data", cache=cache).num_samples


@pytest.mark.parametrize("appended", [True, False], ids=["samples appended in the padding", "a damaged end"])
def test_what_follows_the_samples_of_an_index_is_looked_at(appended, tmp_path, cache):
    """GNU tar pads to 10,240 bytes, so that a tar with more samples can have the same length."""
    path = tmp_path / "data/t0.tar"
    write_tar(path, NAMES)
    path.write_bytes(path.read_bytes().ljust(20 * 512, b"\0"))
    write_sidecar(open_source(tmp_path / "data"))

    def change() -> None:
        if appended:
            with tarfile.open(path, "a") as tar:
                tar.addfile(tarfile.TarInfo("z.jpg"))
        else:
            path.write_bytes(path.read_bytes()[:-1] + b"7")

    replaced_unseen(path, change)
    with pytest.raises(SourceError, match="not those of the index"):
        contents(open_source(tmp_path / "data", cache=cache))


def test_a_parquet_file_that_is_replaced_after_it_was_indexed_is_an_error(tmp_path, cache):
    path = tmp_path / "data/t0.parquet"
    write_parquet(path, NAMES)
    source = open_source(path, cache=cache)
    assert tuple(source.shards[0].keys) == ("a", "b", "c", "d")
    write_parquet(path, [NAMES[0], NAMES[3], NAMES[2], NAMES[1]])
    os.utime(path, (5, 5))
    with pytest.raises(SourceError, match="not those of the index"):
        contents(source)


def test_a_file_that_is_only_touched_stays_as_it_is(data, cache):
    source = open_source(data, cache=cache)
    truth = contents(source)
    for path in data.iterdir():
        os.utime(path, (5, 5))
    assert contents(source) == truth


def test_a_tar_that_is_replaced_between_count_and_use_is_an_error(tmp_path, cache):
    write_tar(tmp_path / "data/t0.tar", NAMES[:3])
    assert open_source(tmp_path / "data", cache=cache).num_samples == 3
    source = open_source(tmp_path / "data", cache=cache)
    assert source.num_samples == 3
    write_tar(tmp_path / "data/t0.tar", NAMES)
    with pytest.raises(SourceError, match="not those of the index"):
        contents(source)


def test_new_numbers_of_classes_are_part_of_an_index(tmp_path, cache):
    write_tar(tmp_path / "data/t0.tar", [("a", 0), ("b", 0)])
    options = SourceOptions(class_order="text")
    for names, label in (("dog", "cat", "eel"), 1), (("cat", "dog", "eel"), 0):
        (tmp_path / "data/classes.txt").write_text("".join(f"{name}\n" for name in names))
        source = open_source(tmp_path / "data", cache=cache, options=options)
        assert source.max_label == label
        assert contents(source)[0][1] == label


@pytest.mark.parametrize("column", [pa.float64(), pa.bool_(), pa.int64()])
def test_an_index_with_columns_of_another_type_is_ignored(column, tmp_path, cache):
    write_tar(tmp_path / "data/t0.tar", [("a", 1), ("b", 0)])
    assert open_source(tmp_path / "data", cache=cache).num_samples == 2
    path = kept_file(cache)
    reader = pa.ipc.open_file(pa.BufferReader(path.read_bytes()))
    batch, more = reader.get_batch_with_custom_metadata(0)
    schema = reader.schema.set(1, pa.field("class_label", column))
    with path.open("wb") as file, pa.ipc.new_file(file, schema) as writer:
        columns = [batch[0], batch[1].cast(column), *batch.columns[2:]]
        writer.write_batch(pa.record_batch(columns, schema=schema), custom_metadata=more)
    labels = [label for _, label, _ in contents(open_source(tmp_path / "data", cache=cache))]
    assert labels == [1, 0]
    assert all(type(label) is int for label in labels)


@pytest.mark.parametrize("kind", ["index", "sidecar", "listing"])
def test_a_pipe_in_place_of_an_index_is_not_opened(kind, tmp_path, cache, folder):
    write_tar(tmp_path / "tars/t0.tar", NAMES)
    data = folder if kind == "listing" else tmp_path / "tars"
    truth = contents(open_source(data, cache=Cache(tmp_path / "other", 1)))
    _ = open_source(data, cache=cache).num_samples
    path = data / SIDECAR_NAME if kind == "sidecar" else next((cache.folder / "index").glob("*[gw]"))
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    assert contents(open_source(data, cache=cache)) == truth


def test_an_index_that_was_not_used_for_long_is_deleted(tmp_path, cache):
    write_tar(tmp_path / "data/t0.tar", NAMES)
    write_tar(tmp_path / "other/t0.tar", NAMES)
    assert open_source(tmp_path / "data", cache=cache).num_samples == 4
    old = kept_file(cache)
    os.utime(old, (5, 5))
    assert open_source(tmp_path / "other", cache=cache).num_samples == 4
    assert not old.exists()
    assert kept_file(cache) != old


def test_an_index_is_mapped_once_while_others_use_it_too(tmp_path, cache, monkeypatch):
    write_tar(tmp_path / "data/t0.tar", NAMES)
    assert open_source(tmp_path / "data", cache=cache).num_samples == 4
    mapped = []
    real = index._Mapped.__init__
    monkeypatch.setattr(index._Mapped, "__init__", lambda self, *how: mapped.append(how) or real(self, *how))
    monkeypatch.setattr(index, "_OPEN", {})
    for day in range(3):
        os.utime(kept_file(cache), (day, day))  # another process has used it
        assert open_source(tmp_path / "data", cache=cache).num_samples == 4
    assert len(mapped) == 1


def test_an_index_that_may_not_be_dated_is_used(tmp_path, cache, monkeypatch):
    write_tar(tmp_path / "data/t0.tar", NAMES)
    os.utime(write_sidecar(open_source(tmp_path / "data")), (5, 5))

    def refuse(*_: Any) -> None:
        raise PermissionError("it belongs to somebody else")

    monkeypatch.setattr(index.os, "utime", refuse)
    no_building(monkeypatch)
    assert open_source(tmp_path / "data", cache=cache).num_samples == 4


def test_the_class_names_are_part_of_an_index(tmp_path, cache):
    write_tar(tmp_path / "data/t0.tar", NAMES)
    assert open_source(tmp_path / "data", cache=cache).num_samples == 4
    (tmp_path / "data/classes.txt").write_text("one\ntwo\n")
    with pytest.raises(SourceError, match=r"class label must be in 0\.\.1"):
        _ = open_source(tmp_path / "data", cache=cache).num_samples


def test_a_pickled_source_finds_its_index_again(tmp_path, cache):
    for number in range(2):
        write_tar(tmp_path / f"data/t{number}.tar", NAMES)
    source = open_source(tmp_path / "data", cache=cache)
    assert source.num_samples == 8
    sent = pickle.dumps(source)
    assert len(sent) < 2000
    assert contents(pickle.loads(sent)) == contents(source)


def test_a_long_indexing_says_so(tmp_path, cache, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="deit_cli")
    for number in range(2):
        write_tar(tmp_path / f"data/t{number}.tar", NAMES)
    monkeypatch.setattr(index, "_TOLD_S", -1)
    assert open_source(tmp_path / "data", cache=cache).num_samples == 8
    assert "indexing the source: 1 of 2 source shards" in caplog.messages


@pytest.mark.parametrize("workers", [1, 3])
def test_an_index_beside_the_source_has_the_same_bytes_each_time(workers, tmp_path, monkeypatch):
    for number in range(6):
        write_tar(tmp_path / f"data/t{number}.tar", [(f"{key}{number}", label) for key, label in NAMES])
    first = write_sidecar(open_source(tmp_path / "data")).read_bytes()
    for path in (tmp_path / "data").glob("*.tar"):
        os.utime(path, (7, 7))
    monkeypatch.setattr(index, "SHARDS_FOR_WORKERS", 2)
    monkeypatch.setattr(index, "usable_cores", lambda: workers)
    assert write_sidecar(open_source(tmp_path / "data")).read_bytes() == first


def test_an_image_folder_gets_no_index_beside_it(folder):
    with pytest.raises(
        UsageError, match=r"gets no index: it is for local tars and Parquet files.*An image folder needs none"
    ):
        write_sidecar(open_source(folder))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An image folder of two classes and an empty one, whose listing is kept although it is new."""
    monkeypatch.setattr(source_module, "LEAST_KEPT", 1)
    monkeypatch.setattr(folders, "_SETTLED_NS", -(10**12))
    monkeypatch.setattr(source_module, "SAMPLES_PER_SHARD", 3)
    for name in ("cat/1.jpg", "cat/2.png", "dog/1.jpg", "dog/3.JPEG", "dog/4.webp"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(name.encode())
    (tmp_path / "data/eel").mkdir()
    return tmp_path / "data"


def no_listing(monkeypatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("the folder was listed again")

    monkeypatch.setattr(source_module, "list_folder", refuse)


def test_a_folder_that_is_opened_again_is_not_listed_again(folder, cache, monkeypatch, caplog):
    truth = open_source(folder, cache=cache)
    expected, identity, said = contents(truth), truth.identity(), caplog.messages.copy()
    assert len(truth.shards) == 2
    assert any("1 class folder without an image: eel" in message for message in said)
    caplog.clear()
    no_listing(monkeypatch)
    again = open_source(folder, cache=cache)
    assert again.identity() == identity
    assert again.num_labelled == 5
    assert contents(again) == expected
    assert caplog.messages == said  # what was passed over is said each time


CHANGES = [
    ("a file more", lambda folder: (folder / "cat/9.jpg").touch()),
    ("a file less", lambda folder: (folder / "cat/1.jpg").unlink()),
    ("a file renamed", lambda folder: (folder / "cat/1.jpg").rename(folder / "cat/5.jpg")),
    ("a folder more", lambda folder: (folder / "ant").mkdir()),
    ("a file in the empty class", lambda folder: (folder / "eel/1.jpg").touch()),
    ("a class renamed", lambda folder: (folder / "cat").rename(folder / "zebra")),
]


@pytest.mark.parametrize(("what", "change"), CHANGES, ids=[name for name, _ in CHANGES])
def test_a_folder_that_has_changed_is_listed_again(what, change, folder, cache, tmp_path):
    assert open_source(folder, cache=cache).num_samples == 5
    change(folder)
    truth = open_source(folder, cache=Cache(tmp_path / "other", 1))
    assert open_source(folder, cache=cache).identity() == truth.identity()
    assert contents(open_source(folder, cache=cache)) == contents(truth)


def test_a_folder_that_has_equal_dates_is_listed_again(folder, cache):
    before = {path: path.stat() for path in (folder, *folder.iterdir())}
    assert open_source(folder, cache=cache).num_samples == 5
    (folder / "cat/9.jpg").touch()
    for path, stat in before.items():
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert open_source(folder, cache=cache).num_samples == 6


def test_a_link_that_leads_to_another_folder_is_listed_again(folder, cache):
    other = shutil.copytree(folder, folder.parent / "other")
    (other / "cat/9.jpg").touch()
    for path in (other, *other.iterdir()):
        stat = (folder / path.relative_to(other)).stat()
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert open_source(link, cache=cache).num_samples == 5
    link.unlink()
    link.symlink_to(other)
    assert open_source(link, cache=cache).num_samples == 6


def test_a_folder_that_has_just_changed_is_not_kept(folder, cache, monkeypatch):
    monkeypatch.setattr(folders, "_SETTLED_NS", 3_000_000_000)
    (folder / "cat/9.jpg").touch()
    assert open_source(folder, cache=cache).num_samples == 6
    assert not (cache.folder / "index").exists()


def test_other_options_are_another_listing(folder, cache, monkeypatch):
    assert open_source(folder, cache=cache).class_names == ("cat", "dog")
    names = folder.parent / "names.txt"
    names.write_text("dog\neel\ncat\n")
    options = SourceOptions(class_order=str(names))
    assert open_source(folder, cache=cache, options=options).class_names == ("dog", "eel", "cat")
    names.write_text("eel\ndog\ncat\n")
    assert open_source(folder, cache=cache, options=options).class_names == ("eel", "dog", "cat")


@pytest.mark.parametrize("seed", range(40))
def test_a_listing_that_is_torn_or_damaged_is_ignored(seed, folder, cache):
    truth = open_source(folder, cache=cache)
    (path,) = (cache.folder / "index").iterdir()
    damaged(path, seed)
    found = open_source(folder, cache=cache)
    assert found.identity() == truth.identity()
    assert contents(found) == contents(truth)
