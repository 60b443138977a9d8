"""Tables of a label set: the Arrow schemas, and their exact way to Parquet and back.

Two kinds of file. A samples file lists the samples of one source shard, in order. A label shard holds the teacher's
answers for one source shard and one block of views: row group i is view `view_start + i`. Positions join the two:
`row` of a label is the row of its sample. Each footer says what the file is, so a file found alone explains itself.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from pipeline.config import Precision
from pipeline.errors import LabelSetCorrupt, LabelSetMismatch
from pipeline.ids import canonical_json
from pipeline.records import Count, Name, Record, Sha256, View, Xxh3, is_version, other_version
from pipeline.remedies import DAMAGED_FILE
from pipeline.storage import parse_json

FORMAT = "deit-cli-labels"
VERSION = 1
FOOTER_KEY = b"deit_cli"
MAX_TOPK = 4096
_WRITE = {"compression": "zstd", "compression_level": 3, "use_dictionary": False, "write_page_checksum": True}


@dataclass(frozen=True)
class LabelRows:
    """The teacher's answers for one view of one source shard.

    Attributes:
        row: uint32 [N], rising: the samples' rows in the samples file.
        hard: uint16 [N], argmax class (uint32 where C > 65536).
        topk_index: as `hard`, [N, K], most probable first; K may be 0.
        topk_prob: float16 or float32 [N, K], probabilities at temperature 1.
        tail_mass: as `topk_prob`, [N], 1 minus the kept probability.
    """

    row: NDArray[np.uint32]
    hard: NDArray[np.unsignedinteger]
    topk_index: NDArray[np.unsignedinteger]
    topk_prob: NDArray[np.floating]
    tail_mass: NDArray[np.floating]

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True)
class SampleRows:
    """The samples of one source shard, in order.

    Attributes:
        key: sample keys.
        class_label: ground truth, None where unlabelled.
        image_bytes: uint32 [N], length of the encoded image.
        image_xxh3: 16 bytes each, xxh3-128 of the encoded image.
        height: uint32 [N], pixels; 0 where the image is bad.
        width: likewise.
        bad: why an image cannot be used, None for a good one. A bad image has a row here and none in label shards.
    """

    key: tuple[str, ...]
    class_label: tuple[int | None, ...]
    image_bytes: NDArray[np.uint32]
    image_xxh3: tuple[bytes, ...]
    height: NDArray[np.uint32]
    width: NDArray[np.uint32]
    bad: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.key)

    @property
    def usable(self) -> NDArray[np.int64]:
        """Rows whose image is good, int64, rising."""
        return np.flatnonzero([reason is None for reason in self.bad])

    def take(self, rows: NDArray[np.int64]) -> "SampleRows":
        """Return some rows alone, in this order."""
        chosen = rows.tolist()
        key, label, xxh3, bad = (
            tuple(column[row] for row in chosen) for column in (self.key, self.class_label, self.image_xxh3, self.bad)
        )
        return SampleRows(key, label, self.image_bytes[rows], xxh3, self.height[rows], self.width[rows], bad)


class SamplesFooter(Record):
    """What a samples file says of itself."""

    format: Literal["deit-cli-labels"] = FORMAT
    version: Literal[1] = VERSION
    kind: Literal["samples"] = "samples"
    labelset_id: Sha256
    source_id: Sha256
    shard: Name
    rows: Count


class LabelsFooter(Record):
    """What a label shard says of itself. `content_xxh3` covers every value in it, `probes` the pixels behind it."""

    format: Literal["deit-cli-labels"] = FORMAT
    version: Literal[1] = VERSION
    kind: Literal["labels"] = "labels"
    labelset_id: Sha256
    recipe_id: Sha256
    teacher_id: Sha256
    source_id: Sha256
    shard: Name
    view_start: View
    view_stop: View
    rows_per_view: Count
    num_classes: Annotated[int, Field(ge=1, le=2**31 - 1)]
    topk: Annotated[int, Field(ge=0, le=MAX_TOPK)]
    precision: Precision
    content_xxh3: Xxh3
    probes: list[dict[str, Any]]
    environment: dict[str, str]


Footer = TypeVar("Footer", SamplesFooter, LabelsFooter)


def index_dtype(num_classes: int) -> np.dtype[np.unsignedinteger]:
    """Return uint16, or uint32 where there are more than 65,536 classes."""
    return np.dtype(np.uint16 if num_classes <= 65536 else np.uint32)


def label_bytes(num_classes: int, topk: int, precision: Precision) -> int:
    """Return the bytes of one label before compression: class, K indices and probabilities, tail."""
    index, prob = index_dtype(num_classes).itemsize, np.dtype(precision).itemsize
    return index + topk * (index + prob) + (prob if topk else 0)


def labels_schema(num_classes: int, topk: int, precision: Precision) -> pa.Schema:
    """Return the exact schema of label shards; K = 0 has no top-k columns."""
    index, prob = pa.from_numpy_dtype(index_dtype(num_classes)), pa.from_numpy_dtype(np.dtype(precision))
    columns = [("view", pa.uint32()), ("row", pa.uint32()), ("hard", index)]
    if topk:
        lists = [("topk_index", pa.list_(_element(index), topk)), ("topk_prob", pa.list_(_element(prob), topk))]
        columns += [*lists, ("tail_mass", prob)]
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns])


SAMPLES_SCHEMA = pa.schema(
    [
        pa.field("row", pa.uint32(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("class_label", pa.int32()),
        pa.field("image_bytes", pa.uint32(), nullable=False),
        pa.field("image_xxh3", pa.binary(16), nullable=False),
        pa.field("height", pa.uint32(), nullable=False),
        pa.field("width", pa.uint32(), nullable=False),
        pa.field("bad", pa.string()),
    ]
)


def content_xxh3(views: Sequence[LabelRows]) -> str:
    """Return the xxh3-128 over all values: for each view row, hard, topk_index, topk_prob, tail_mass, little-endian."""
    digest = xxhash.xxh3_128()
    for rows in views:
        for field in fields(rows):
            digest.update(np.ascontiguousarray(getattr(rows, field.name)).data)
    return digest.hexdigest()


def write_labels(file: BinaryIO, views: Sequence[LabelRows], footer: LabelsFooter) -> None:
    """Write one label shard: a row group for each view."""
    schema = labels_schema(footer.num_classes, footer.topk, footer.precision)
    # Bytes of one significance side by side compress best; rows and views are runs, so their differences do.
    encoding = {"view": "DELTA_BINARY_PACKED", "row": "DELTA_BINARY_PACKED", "hard": "BYTE_STREAM_SPLIT"}
    if footer.topk:
        lists = ["topk_index.list.element", "topk_prob.list.element", "tail_mass"]
        encoding |= dict.fromkeys(lists, "BYTE_STREAM_SPLIT")
    with pq.ParquetWriter(file, schema.with_metadata(_metadata(footer)), column_encoding=encoding, **_WRITE) as writer:
        for view, rows in enumerate(views, footer.view_start):
            writer.write_table(_labels_table(rows, view, schema), row_group_size=max(1, len(rows)))


def write_samples(file: BinaryIO, samples: SampleRows, footer: SamplesFooter) -> None:
    """Write one samples file."""
    hashes = pa.array(samples.image_xxh3, pa.binary(16))
    arrays = [
        np.arange(len(samples), dtype=np.uint32),
        pa.array(samples.key, pa.string()),
        pa.array(samples.class_label, pa.int32()),
        samples.image_bytes,
        hashes,
        samples.height,
        samples.width,
        pa.array(samples.bad, pa.string()),
    ]
    table = pa.table([pa.array(column) for column in arrays], schema=SAMPLES_SCHEMA)
    pq.write_table(table.replace_schema_metadata(_metadata(footer)), file, **_WRITE)


@dataclass(frozen=True)
class Contents:
    """A whole file in memory under its name: the bytes that were checked are the bytes that are parsed."""

    name: str
    data: bytes

    def __str__(self) -> str:
        return self.name

    @cached_property
    def parquet(self) -> pq.ParquetFile:
        """The file, opened once: views of one label shard are read in a row."""
        refuse_extension_types(self)
        data = pa.BufferReader(self.data)
        return _guarded(self.name, lambda: pq.ParquetFile(data, page_checksum_verification=True))


def read_labels_footer(file: Path | Contents) -> LabelsFooter:
    """Read what a label shard says of itself, without its rows."""
    return _footer(*_open(file), LabelsFooter)


def read_samples_footer(file: Path | Contents) -> SamplesFooter:
    """Read what a samples file says of itself, without its rows."""
    return _footer(*_open(file), SamplesFooter)


def read_view(file: Path | Contents, view: int) -> LabelRows:
    """Read one view of a label shard, and check schema, counts and ranges of what was read.

    Raises:
        LabelSetCorrupt: the file is not what its footer says.
    """
    parquet, name = _open(file)
    footer = _checked_labels(parquet, name)
    if not footer.view_start <= view < footer.view_stop:
        raise LabelSetCorrupt(f"{name} holds views {footer.view_start}..{footer.view_stop - 1}, not {view}")
    return _read_row_group(parquet, name, footer, view)


def read_all_views(file: Path | Contents) -> list[LabelRows]:
    """Read a whole label shard, and check its content hash too."""
    parquet, name = _open(file)
    footer = _checked_labels(parquet, name)
    views = [_read_row_group(parquet, name, footer, view) for view in range(footer.view_start, footer.view_stop)]
    if content_xxh3(views) != footer.content_xxh3:
        raise LabelSetCorrupt(f"{name}: its rows do not have the hash that its footer states. {DAMAGED_FILE}")
    return views


def read_samples(file: Path | Contents) -> SampleRows:
    """Read a samples file."""
    parquet, name = _open(file)
    footer = _footer(parquet, name, SamplesFooter)
    _check_schema(parquet, SAMPLES_SCHEMA, name)
    if parquet.metadata.num_rows != footer.rows:
        raise LabelSetCorrupt(f"{name} has {parquet.metadata.num_rows} rows, its footer says {footer.rows}")
    columns = _guarded(name, lambda: parquet.read().to_pydict())
    if columns["row"] != list(range(footer.rows)):
        raise LabelSetCorrupt(f"{name}: rows must be 0..{footer.rows - 1} in order")
    return SampleRows(
        key=tuple(columns["key"]),
        class_label=tuple(columns["class_label"]),
        image_bytes=np.array(columns["image_bytes"], np.uint32),
        image_xxh3=tuple(columns["image_xxh3"]),
        height=np.array(columns["height"], np.uint32),
        width=np.array(columns["width"], np.uint32),
        bad=tuple(columns["bad"]),
    )


def _element(kind: pa.DataType) -> pa.Field:
    return pa.field("element", kind, nullable=False)


def _metadata(footer: SamplesFooter | LabelsFooter) -> dict[bytes, bytes]:
    return {FOOTER_KEY: canonical_json(footer.model_dump(mode="json"))}


def _labels_table(rows: LabelRows, view: int, schema: pa.Schema) -> pa.Table:
    arrays = [pa.array(np.full(len(rows), view, np.uint32)), pa.array(rows.row), pa.array(rows.hard)]
    for name, values in (("topk_index", rows.topk_index), ("topk_prob", rows.topk_prob)):
        if name in schema.names:
            flat = pa.array(np.ascontiguousarray(values).ravel())
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, type=schema.field(name).type))
    if "tail_mass" in schema.names:
        arrays.append(pa.array(rows.tail_mass))
    return pa.table(arrays, schema=schema)


def _read(path: Path) -> Contents:
    try:
        return Contents(str(path), path.read_bytes())
    except FileNotFoundError as error:
        raise LabelSetCorrupt(f"{path} is missing") from error
    except OSError as error:
        raise LabelSetCorrupt(f"{path} cannot be read: {error.strerror or error}") from error


def _open(file: Path | Contents) -> tuple[pq.ParquetFile, str]:
    contents = _read(file) if isinstance(file, Path) else file
    return contents.parquet, contents.name


def _base64_marks(text: bytes) -> tuple[bytes, ...]:
    """Return what a base64 text with `text` in it must hold, for each place that it can have in a group of 3 bytes."""
    whole = [base64.b64encode(bytes(lead) + text + bytes(2)) for lead in range(3)]
    return tuple(code[-(-lead * 8 // 6) : (lead + len(text)) * 8 // 6] for lead, code in enumerate(whole))


_EXTENSION_MARKS = _base64_marks(b"ARROW:extension")


def refuse_extension_types(file: Contents) -> None:
    """Raise LabelSetCorrupt for a file with Arrow extension types, before pyarrow sees it.

    A registered extension type brings a deserialiser that runs as soon as the file is opened, and there are some that
    unpickle. So the Parquet footer, which holds the Arrow schema in base64, is searched first; its structure is not
    followed, because a hostile one could lead us past what pyarrow finds.
    """
    data = file.data
    length = int.from_bytes(data[-8:-4], "little")
    start = max(0, len(data) - 8 - length)
    if any(data.find(mark, start) >= 0 for mark in _EXTENSION_MARKS):
        raise LabelSetCorrupt(f"{file.name} has Arrow extension types, which may run code: no label set has any")


def _guarded(path: str, read: Any) -> Any:
    """Run a pyarrow call; whatever a damaged file makes it raise becomes one named error."""
    try:
        return read()
    except (pa.ArrowException, OSError, ValueError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise LabelSetCorrupt(
            f"{path}: damaged Parquet: {str(error).splitlines()[0] if str(error) else error}"
        ) from error


def _footer(file: pq.ParquetFile, path: str, kind: type[Footer]) -> Footer:
    metadata = file.metadata.metadata or {}
    if FOOTER_KEY not in metadata:
        raise LabelSetMismatch(f"{path} is Parquet, but not of a label set: its footer has no {FOOTER_KEY.decode()!r}")
    try:
        values = parse_json(metadata[FOOTER_KEY])
    except (ValueError, RecursionError) as error:
        raise LabelSetCorrupt(f"{path}: its footer is not valid JSON: {error}") from error
    if not is_version(values, FORMAT, VERSION):
        raise LabelSetMismatch(f"{path} {other_version(values, FORMAT, VERSION)}")
    expected = "labels" if kind is LabelsFooter else "samples"
    try:
        footer = kind.model_validate_json(canonical_json(values))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise LabelSetCorrupt(
            f"{path}: its footer does not have the fields of a {expected} file: {where}: {first['msg']}"
        ) from error
    if absent := sorted(kind.model_fields.keys() - footer.model_fields_set):
        raise LabelSetCorrupt(
            f"{path}: its footer does not have the fields of a {expected} file: {absent[0]}: Field required"
        )
    return footer


def _checked_labels(file: pq.ParquetFile, path: str) -> LabelsFooter:
    footer = _footer(file, path, LabelsFooter)
    _check_schema(file, labels_schema(footer.num_classes, footer.topk, footer.precision), path)
    groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    if len(groups) != footer.view_stop - footer.view_start or set(groups) - {footer.rows_per_view}:
        raise LabelSetCorrupt(f"{path}: row groups {groups[:4]}… are not {footer.rows_per_view} rows for each view")
    return footer


def _check_schema(file: pq.ParquetFile, expected: pa.Schema, path: str) -> None:
    found = _guarded(path, lambda: file.schema_arrow).remove_metadata()
    marked = any(b"ARROW:extension:name" in (field.metadata or {}) for field in found)
    if marked or not found.equals(expected):
        raise LabelSetCorrupt(
            f"{path}: its columns are {found.names}, format v{VERSION} has {expected.names} in exact types"
        )


def _read_row_group(file: pq.ParquetFile, path: str, footer: LabelsFooter, view: int) -> LabelRows:
    table = _guarded(path, lambda: file.read_row_group(view - footer.view_start, use_threads=False))
    prob, index = np.dtype(footer.precision), index_dtype(footer.num_classes)
    size, topk = len(table), footer.topk
    rows = LabelRows(
        row=_numpy(table["row"]),
        hard=_numpy(table["hard"]),
        topk_index=_matrix(table["topk_index"], topk) if topk else np.empty((size, 0), index),
        topk_prob=_matrix(table["topk_prob"], topk) if topk else np.empty((size, 0), prob),
        tail_mass=_numpy(table["tail_mass"]) if topk else np.empty(0, prob),
    )
    _check_values(rows, path, view, footer.num_classes)
    if not (_numpy(table["view"]) == view).all():
        raise LabelSetCorrupt(f"{path}: row group {view - footer.view_start} must hold view {view} alone")
    return rows


def _numpy(column: pa.ChunkedArray) -> NDArray[Any]:
    return (
        column.combine_chunks().to_numpy(zero_copy_only=False) if column.num_chunks != 1 else column.chunk(0).to_numpy()
    )


def _matrix(column: pa.ChunkedArray, width: int) -> NDArray[Any]:
    return np.concatenate([chunk.flatten().to_numpy() for chunk in column.chunks]).reshape(-1, width)


def _check_values(rows: LabelRows, path: str, view: int, num_classes: int) -> None:
    """Refuse values that no teacher can have answered."""
    prob, tail = rows.topk_prob.astype(np.float32), rows.tail_mass.astype(np.float32)
    problems = [
        (bool((np.diff(rows.row.astype(np.int64)) <= 0).any()), "rows do not rise"),
        (bool((np.diff(np.sort(rows.topk_index, axis=1), axis=1) == 0).any()), "a class stands twice in top-k"),
        (
            bool((rows.hard >= num_classes).any() or (rows.topk_index >= num_classes).any()),
            f"a class is not below {num_classes}",
        ),
        (
            not bool(((prob >= 0) & (prob <= 1)).all() and ((tail >= 0) & (tail <= 1)).all()),
            "a probability is outside 0..1",
        ),
        (bool((np.diff(prob, axis=1) > 0).any()), "probabilities do not fall"),
        (bool(prob.shape[1] and (np.abs(prob.sum(1) + tail - 1) > 0.01).any()), "probabilities do not add to 1"),
        (bool(prob.shape[1] and (rows.topk_index[:, 0] != rows.hard).any()), "`hard` is not the first of top-k"),
    ]
    for found, what in problems:
        if found:
            raise LabelSetCorrupt(f"{path}: view {view}: {what}")


def encode_rows(
    row: NDArray[np.int64],
    hard: NDArray[Any],
    index: NDArray[Any],
    prob: NDArray[np.float32],
    *,
    num_classes: int,
    precision: Precision,
) -> LabelRows:
    """Turn the teacher's float32 answers into stored rows, sorted by row.

    Args:
        row: int [N], samples' rows.
        hard: int [N], argmax.
        index: int [N, K].
        prob: float32 [N, K], full-precision probabilities; the tail is 1 minus their sum.
        num_classes: C.
        precision: of the stored probabilities.
    """
    order = np.argsort(row, kind="stable")
    tail = np.clip(1.0 - prob.astype(np.float64).sum(1), 0.0, 1.0) if prob.shape[1] else np.empty(0)
    kind = index_dtype(num_classes)
    return LabelRows(
        row=row[order].astype(np.uint32),
        hard=hard[order].astype(kind),
        topk_index=index[order].astype(kind),
        topk_prob=prob[order].astype(precision),
        tail_mass=(tail[order] if prob.shape[1] else tail).astype(precision),
    )
