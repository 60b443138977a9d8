"""Import of labels that other projects published into plain Parquet; import.json lists the lost data.

An import is not a label set. Another program made its views with random draws, so they cannot be rendered again or checked
with probes; only label sets of format v1 can be used for training.

Tables are made in the order of the files; each is complete in memory before it is published. import.json comes last and
is the commit. A killed import continues when it is run again: existing tables must have exactly the bytes that it makes.
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ImportedLabelsError, UsageError
from pipeline.exchange import fkd, tinyvit
from pipeline.exchange.foreign import ForeignRows
from pipeline.exchange.import_record import ANY_USE, FORMATS, Foreign, ImportRecord, PartRecord, columns_of, losses
from pipeline.labels.encoding import Codec, codec_of
from pipeline.labels.format import IMPORT_FORMAT, IMPORT_NAME, MAX_TOPK, VERSION
from pipeline.labels.tables import column_array, column_field, column_leaf
from pipeline.machine.progress import Progress
from pipeline.machine.threads import ProgressCounter
from pipeline.storage.atomic import TEMPORARY_PREFIX, publish_file, refusals_named, sweep_temporaries
from pipeline.storage.json import canonical_json, pretty_json
from pipeline.storage.urls import local_path

FOOTER_KEY = b"deit_cli_import"
TABLE_BYTES = 64 * 2**20  # of rows in memory
KEY_BYTES = 100  # approximate memory for one key


@dataclass(frozen=True)
class Reader:
    """The labels to import: their rows, and the number and bytes of their files."""

    files: int
    bytes: int
    rows: Iterator[ForeignRows]


def import_labels(
    kind: Foreign,
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    num_classes: int,
    topk: int | None = None,
    progress: Progress = lambda _: None,
) -> ImportRecord:
    """Import published labels into a folder of Parquet files, and return its import record.

    Args:
        kind: format of the labels.
        source: folder that holds the labels.
        destination: new folder, or the folder of an interrupted import of the same labels.
        num_classes: C; every class is checked against it.
        topk: number of classes to keep for each view; None: all stored classes.
        progress: receives the number of files or records that are read.

    Raises:
        ImportedLabelsError: the labels are damaged, unsafe, or not in the layout of their format; or the destination holds
            something else.
        UsageError: a number is out of range, or a location is a URL.
    """
    _check_settings(num_classes, topk)
    path, out = (_local(place) for place in (source, destination))
    _check_out(out, path)
    sweep_temporaries(out)
    reader = _READERS[kind](path, num_classes, progress)
    tables = _Tables(kind, out, num_classes=num_classes, topk=topk)
    for rows in reader.rows:
        tables.add(rows)
    tables.flush()
    record = tables.record(reader)
    _publish(out / IMPORT_NAME, pretty_json(record.model_dump(mode="json")))
    return record


def write_table(file: BinaryIO, parts: Sequence[ForeignRows], codec: Codec, footer: dict[str, Any]) -> None:
    """Write one table: rows in their original order, in one row group.

    Its columns are those of a label shard, with the key instead of the row, followed by the other recorded columns.
    """
    hard, index, prob, view = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("hard", "topk_index", "topk_prob", "view")
    )
    labels = codec.store(hard, index, prob)
    more = {name: np.concatenate([part.more[name] for part in parts]) for name in parts[0].more}
    numbers = [column_field(name, codec.record[name]) for name in labels]
    numbers = [column_field("view", view.dtype), *numbers, *(column_field(name, more[name].dtype) for name in more)]
    keys = pa.array([key for part in parts for key in part.key], pa.string())
    arrays = [
        column_array(values, field)
        for values, field in zip((view, *labels.values(), *more.values()), numbers, strict=True)
    ]
    schema = pa.schema([pa.field("key", pa.string(), nullable=False), *numbers], {FOOTER_KEY: canonical_json(footer)})
    table = pa.table([keys, *arrays], schema=schema)
    split = [column_leaf(field) for field in numbers if field.name in labels]
    pq.write_table(
        table,
        file,
        row_group_size=max(1, len(table)),
        compression="zstd",
        compression_level=3,
        use_dictionary=["key"],  # pyright: ignore[reportArgumentType]
        column_encoding=dict.fromkeys(split, "BYTE_STREAM_SPLIT") | {"view": "DELTA_BINARY_PACKED"},
        write_page_checksum=True,
    )


class _Tables:
    """Gathers rows into tables of bounded size, and publishes them."""

    def __init__(self, kind: Foreign, out: Path, *, num_classes: int, topk: int | None) -> None:
        self._kind: Foreign = kind
        self._out, self._num_classes, self._topk = out, num_classes, topk
        self._table, self._number, self._held_bytes = "", 0, 0
        self._held: list[ForeignRows] = []
        self._codec: Codec | None = None  # of all rows; None before the first
        self._stored = 0  # number of classes that the source has for each view
        self._parts: list[PartRecord] = []
        self._views: tuple[int, int] | None = None  # minimum and maximum view number
        self._keys_are_numbers = True

    def add(self, rows: ForeignRows) -> None:
        """Add some rows; rows for another table start a new file."""
        rows = self._cut(rows)
        if rows.table != self._table:
            self.flush()
            self._table, self._number = rows.table, 0
        self._held.append(rows)
        self._held_bytes += len(rows) * KEY_BYTES + rows.topk_index.nbytes + rows.topk_prob.nbytes
        low, high = int(rows.view.min()), int(rows.view.max())
        self._views = (low, high) if self._views is None else (min(low, self._views[0]), max(high, self._views[1]))
        self._keys_are_numbers = self._keys_are_numbers and all(key.isdecimal() for key in rows.key)
        if self._held_bytes >= TABLE_BYTES:
            self.flush()

    def _cut(self, rows: ForeignRows) -> ForeignRows:
        """Return rows with at most the requested number of classes; all rows must have the same layout."""
        stored = rows.topk_index.shape[1]
        topk = stored if self._topk is None else min(stored, self._topk)
        if topk > MAX_TOPK:
            raise ImportedLabelsError(
                f"{rows.key[0]!r} has probabilities of {stored} classes, at most {MAX_TOPK} are kept: pass --topk"
            )
        codec = codec_of("float16" if rows.topk_prob.dtype == np.float16 else "float32", self._num_classes, topk)
        if self._codec is None:
            self._codec, self._stored = codec, stored
        if (codec, stored) != (self._codec, self._stored):
            raise ImportedLabelsError(
                f"{rows.key[0]!r} has {stored} classes per view in {codec.prob_dtype}, the labels before it have"
                f" {self._stored} in {self._codec.prob_dtype}: they are of two kinds",
                fix="Import each kind separately",
            )
        return rows.first(topk)

    def flush(self) -> None:
        """Publish the rows that are held in memory."""
        if not self._held:
            return
        assert self._codec is not None
        path = f"labels/{self._table}-{self._number:06d}.parquet"
        footer = {
            "format": IMPORT_FORMAT,
            "version": VERSION,
            "imported_from": self._kind,
            "num_classes": self._num_classes,
        }
        buffer = io.BytesIO()
        write_table(buffer, self._held, self._codec, footer)
        _publish(self._out / path, data := buffer.getvalue())
        digest = hashlib.sha256(data).hexdigest()
        rows = sum(map(len, self._held))
        self._parts.append(PartRecord(path=path, rows=rows, bytes=len(data), sha256=digest))
        self._held, self._held_bytes, self._number = [], 0, self._number + 1

    def record(self, reader: Reader) -> ImportRecord:
        """Return the content of import.json for all published tables."""
        codec = self._codec
        assert codec is not None
        assert self._views is not None
        lost = losses(self._kind, codec, stored=self._stored, keys_are_numbers=self._keys_are_numbers)
        return ImportRecord(
            imported_from=self._kind,
            num_classes=codec.num_classes,
            topk=codec.topk,
            precision="float16" if codec.prob_dtype == np.float16 else "float32",
            rows=sum(part.rows for part in self._parts),
            views=self._views,
            source_files=reader.files,
            source_bytes=reader.bytes,
            lost=tuple(lost),
            use=(*ANY_USE, FORMATS[self._kind].use),
            columns=columns_of(self._kind, codec),
            files=tuple(self._parts),
        )


def _publish(path: Path, data: bytes) -> None:
    """Publish a file under its name, unless an interrupted import has made an identical one."""
    if publish_file(path, data):
        return
    with refusals_named(path):
        found = path.read_bytes()
    if found != data:
        raise ImportedLabelsError(
            f"{path} was made from other labels, with other settings or by another pyarrow", fix="Choose another folder"
        )


def _local(place: str | os.PathLike[str]) -> Path:
    if (path := local_path(place)) is None:
        raise UsageError(
            f"labels are imported from a folder into a folder, {os.fspath(place)} is a URL: copy them first"
        )
    return path


def _check_settings(num_classes: int, topk: int | None) -> None:
    if not 1 <= num_classes < 2**31:
        raise UsageError(f"--num-classes must be in 1..{2**31 - 1}, got {num_classes}")
    if topk is not None and not 0 <= topk <= MAX_TOPK:
        raise UsageError(f"--topk must be in 0..{MAX_TOPK}, got {topk}")


def _check_out(out: Path, path: Path) -> None:
    if not path.is_dir():
        raise ImportedLabelsError(f"{path} is not a folder: pass the folder that holds the labels")
    if (out / IMPORT_NAME).exists():
        raise ImportedLabelsError(f"{out} holds an import already", fix="Choose another folder")
    if out.resolve() == path.resolve():
        raise ImportedLabelsError(f"{out} is the folder of the labels themselves", fix="Choose another folder")
    with refusals_named(out):
        names = {name for name in os.listdir(out) if not name.startswith(TEMPORARY_PREFIX)} if out.exists() else set()
    if names - {"labels"}:
        raise ImportedLabelsError(f"{out} is not empty and holds no interrupted import", fix="Choose another folder")


def _open_fkd(path: Path, num_classes: int, progress: Progress) -> Reader:
    files = fkd.list_files(path)

    def read() -> Iterator[ForeignRows]:
        count = ProgressCounter("files", len(files), progress, unit="files")
        for file in files:
            yield fkd.read_file(file, path, num_classes=num_classes)
            count()

    return Reader(len(files), _sizes(files), read())


def _open_tinyvit(path: Path, num_classes: int, progress: Progress) -> Reader:
    files = tinyvit.list_files(path)
    size = _sizes([path for file in files for path in (file.keys, file.values)])
    total = sum(tinyvit.count_records(file) for file in files)

    def read() -> Iterator[ForeignRows]:
        count = ProgressCounter("records", total, progress, unit="records")
        for file in files:
            for rows in tinyvit.read_rank(file, num_classes=num_classes):
                yield rows
                count(len(rows))

    return Reader(2 * len(files), size, read())


def _sizes(files: Iterable[Path]) -> int:
    total = 0
    for file in files:
        with refusals_named(file):
            total += file.stat().st_size
    return total


_READERS: dict[Foreign, Callable[[Path, int, Progress], Reader]] = {"fkd": _open_fkd, "tinyvit": _open_tinyvit}
