"""Tables of a label set: the Arrow schemas, and their exact conversion to Parquet and back.

There are two kinds of file. A samples file lists the samples of one source shard, in order. A label shard holds the teacher's
answers for one source shard and one block of views: row group i is view `view_start + i`. Positions join the two:
`row` of a label is the row of its sample. Each footer identifies its file, so a file can be understood without its set.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from pipeline.errors import LabelSetCorrupt, LabelSetMismatch
from pipeline.images.columns import Column
from pipeline.labels.encoding import Codec, LabelRows, codec_of, find_problem
from pipeline.labels.format import DAMAGED_FILE, FORMAT, MAX_SHARD_SAMPLES, MAX_TOPK, VERSION, Precision
from pipeline.labels.parquet_guard import (
    Chunk,
    bounded_rows,
    check_pages,
    column_chunks,
    guarded,
    refuse_extension_types,
)
from pipeline.storage.json import (
    Count,
    Name,
    Record,
    Sha256,
    View,
    Xxh3,
    canonical_json,
    is_version,
    other_version,
    parse_json,
)

FOOTER_KEY = b"deit_cli"
MAX_VIEW_BYTES = 1 << 30  # of memory
ROWS_AT_ONCE = 8192  # maximum number of rows of views that are read at once
_WRITE: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 3,
    "use_dictionary": False,
    "write_page_checksum": True,
}
# This takes 10 us for a view, a hundredth of the teacher's time; each byte is published, stored and read many times.
_WRITE_LABELS: dict[str, Any] = _WRITE | {"compression_level": 15}
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
_FooterT = TypeVar("_FooterT", bound=Record)


@dataclass(frozen=True)
class SampleRows:
    """The samples of one source shard, in order.

    Attributes:
        key: sample keys; these and the other sequences may be tuples or, from a file, columns.
        class_label: ground truth, None if unlabelled.
        image_bytes: uint32 [N], length of the encoded image.
        image_xxh3: 16 bytes each, xxh3-128 of the encoded image.
        height: uint32 [N], pixels; 0 if the image is bad.
        width: uint32 [N], pixels; 0 if the image is bad.
        bad: reason why an image cannot be used, None for a good image. A bad image has a row here and none in label shards.
    """

    key: Sequence[str]
    class_label: Sequence[int | None]
    image_bytes: NDArray[np.uint32]
    image_xxh3: Sequence[bytes]
    height: NDArray[np.uint32]
    width: NDArray[np.uint32]
    bad: Sequence[str | None]

    def __len__(self) -> int:
        return len(self.key)

    @property
    def usable(self) -> NDArray[np.int64]:
        """Rows whose image is good, int64, ascending."""
        return np.flatnonzero([reason is None for reason in self.bad])

    def take(self, rows: NDArray[np.int64]) -> "SampleRows":
        """Return only these rows, in this order."""
        chosen: list[int] = rows.tolist()
        return SampleRows(
            tuple(self.key[row] for row in chosen),
            tuple(self.class_label[row] for row in chosen),
            self.image_bytes[rows],
            tuple(self.image_xxh3[row] for row in chosen),
            self.height[rows],
            self.width[rows],
            tuple(self.bad[row] for row in chosen),
        )


class SamplesFooter(Record):
    """The content of a samples file's footer."""

    format: Literal["deit-cli-labels"] = FORMAT
    version: Literal[1] = VERSION
    kind: Literal["samples"] = "samples"
    labelset_id: Sha256
    source_id: Sha256
    shard: Name
    rows: Count


class LabelsFooter(Record):
    """The content of a label shard's footer. `content_xxh3` covers every value in the file, `probes` some rendered pixels."""

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

    @property
    def codec(self) -> Codec:
        """The codec that stores its labels."""
        return codec_of(self.precision, self.num_classes, self.topk)


@dataclass(frozen=True)
class Contents:
    """A whole file in memory with its name: the bytes that were checked are the bytes that are parsed."""

    name: str
    data: bytes

    def __str__(self) -> str:
        return self.name

    @cached_property
    def parquet(self) -> pq.ParquetFile:
        """The open file, kept because views of one label shard are read in a row."""
        refuse_extension_types(self.data, self.name)
        data = pa.BufferReader(self.data)
        return guarded(self.name, lambda: pq.ParquetFile(data, page_checksum_verification=True))

    @cached_property
    def chunks(self) -> list[list[Chunk]]:
        """Locations of the columns of each row group."""
        return guarded(self.name, lambda: column_chunks(self.data))

    @cached_property
    def labels_footer(self) -> LabelsFooter:
        """The footer of a label shard, parsed once."""
        return _footer(self.parquet, self.name, LabelsFooter)

    @cached_property
    def labels_layout(self) -> LabelsFooter:
        """The footer, after schema and row groups were checked against it."""
        footer = self.labels_footer
        _check_layout(self.parquet, self.name, footer)
        return footer


def labels_schema(codec: Codec) -> pa.Schema:
    """Return the exact schema of the label shards of a codec."""
    rows = [pa.field(name, pa.uint32(), nullable=False) for name in ("view", "row")]
    return pa.schema([*rows, *(column_field(name, codec.record[name]) for name in codec.columns)])


def write_labels(file: BinaryIO, views: Sequence[LabelRows], footer: LabelsFooter) -> None:
    """Write one label shard: a row group for each view."""
    schema = labels_schema(footer.codec)
    # Putting bytes of one significance side by side compresses best; rows and views form runs, so their differences compress best.
    split = {column_leaf(field): "BYTE_STREAM_SPLIT" for field in schema}
    encoding = split | dict.fromkeys(("view", "row"), "DELTA_BINARY_PACKED")
    with pq.ParquetWriter(
        file, schema.with_metadata(_metadata(footer)), column_encoding=encoding, **_WRITE_LABELS
    ) as writer:
        for view, rows in enumerate(views, footer.view_start):
            columns = [column_array(getattr(rows, field.name), field) for field in list(schema)[1:]]
            table = pa.table([pa.array(np.full(len(rows), view, np.uint32)), *columns], schema=schema)
            writer.write_table(table, row_group_size=max(1, len(rows)))


def write_samples(file: BinaryIO, samples: SampleRows, footer: SamplesFooter) -> None:
    """Write one samples file."""
    table = pa.table({"row": np.arange(len(samples)), **vars(samples)}, schema=SAMPLES_SCHEMA)
    pq.write_table(table.replace_schema_metadata(_metadata(footer)), file, **_WRITE)


def read_labels_footer(file: Path | Contents) -> LabelsFooter:
    """Return the footer of a label shard, without reading its rows."""
    return contents_of(file).labels_footer


def read_samples_footer(file: Path | Contents) -> SamplesFooter:
    """Return the footer of a samples file, without reading its rows."""
    file = contents_of(file)
    return _footer(file.parquet, file.name, SamplesFooter)


def read_views(file: Path | Contents, first: int, most: int) -> list[LabelRows]:
    """Read consecutive views of a label shard, and check their schema, counts and ranges.

    One call for several views is faster: a call of the library costs as much as a hundred rows.

    Args:
        file: a label shard.
        first: the first of these views.
        most: maximum number of views, at least 1.

    Returns:
        the first view, and the following ones up to `most` that exist, fit in ROWS_AT_ONCE and are valid.

    Raises:
        LabelSetCorrupt: the file does not match its footer.
    """
    file = contents_of(file)
    footer = file.labels_layout
    if not footer.view_start <= first < footer.view_stop:
        raise LabelSetCorrupt(f"{file} holds views {footer.view_start}..{footer.view_stop - 1}, not {first}")
    most = max(1, min(most, ROWS_AT_ONCE // max(1, footer.rows_per_view), footer.view_stop - first))
    return _read_run(file, footer, range(first, first + most))


def read_all_views(file: Path | Contents) -> list[LabelRows]:
    """Read a whole label shard, and check its content hash too."""
    file = contents_of(file)
    footer = file.labels_layout
    views: list[LabelRows] = []
    while (first := footer.view_start + len(views)) < footer.view_stop:
        views += read_views(file, first, footer.view_stop - first)
    if footer.codec.content_xxh3(views) != footer.content_xxh3:
        raise LabelSetCorrupt(f"{file}: its rows do not have the hash that its footer states", fix=DAMAGED_FILE)
    return views


def read_samples(file: Path | Contents) -> SampleRows:
    """Read a samples file."""
    contents = contents_of(file)
    parquet, name = contents.parquet, contents.name
    footer = _footer(parquet, name, SamplesFooter)
    _check_schema(parquet, SAMPLES_SCHEMA, name)
    if parquet.metadata.num_rows != footer.rows:
        raise LabelSetCorrupt(f"{name} has {parquet.metadata.num_rows} rows, its footer says {footer.rows}")
    if footer.rows > MAX_SHARD_SAMPLES:
        raise LabelSetCorrupt(f"{name} has {footer.rows} rows, the maximum is {MAX_SHARD_SAMPLES}")
    groups = range(parquet.metadata.num_row_groups)
    largest = max((check_pages(contents.data, contents.chunks, group, name) for group in groups), default=0)
    table = guarded(name, lambda: bounded_rows(parquet, SAMPLES_SCHEMA, name, largest=largest))
    guarded(name, lambda: table.validate(full=True))  # every text is UTF-8
    columns = {field.name: _whole(table[field.name]) for field in SAMPLES_SCHEMA}
    if not np.array_equal(columns["row"].to_numpy(), np.arange(footer.rows)):
        raise LabelSetCorrupt(f"{name}: rows must be 0..{footer.rows - 1} in order")
    return SampleRows(
        key=Column(columns["key"]),
        class_label=Column(columns["class_label"]),
        image_bytes=columns["image_bytes"].to_numpy(),
        image_xxh3=Column(columns["image_xxh3"]),
        height=columns["height"].to_numpy(),
        width=columns["width"].to_numpy(),
        bad=Column(columns["bad"]),
    )


def column_field(name: str, kind: np.dtype[Any]) -> pa.Field:
    """Return the column for a field of a codec's record: numbers, or lists of numbers if the field has a width."""
    element = pa.from_numpy_dtype(kind.base)
    if not kind.shape:
        return pa.field(name, element, nullable=False)
    return pa.field(name, pa.list_(pa.field("element", element, nullable=False), kind.shape[0]), nullable=False)


def column_leaf(field: pa.Field) -> str:
    """Return the name of a column's numbers in Parquet."""
    return f"{field.name}.list.element" if pa.types.is_fixed_size_list(field.type) else field.name


def column_array(values: NDArray[Any], field: pa.Field) -> pa.Array:
    """Return numbers [N], or lists of numbers [N, K], in the form of a column."""
    flat = pa.array(np.ascontiguousarray(values).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, type=field.type) if pa.types.is_fixed_size_list(field.type) else flat


def _metadata(footer: SamplesFooter | LabelsFooter) -> dict[bytes, bytes]:
    return {FOOTER_KEY: canonical_json(footer.model_dump(mode="json"))}


def contents_of(file: Path | Contents) -> Contents:
    """Return a file in memory; raise LabelSetCorrupt if it cannot be read."""
    if isinstance(file, Contents):
        return file
    try:
        return Contents(str(file), file.read_bytes())
    except FileNotFoundError as error:
        raise LabelSetCorrupt(f"{file} is missing") from error
    except OSError as error:
        raise LabelSetCorrupt(f"{file} cannot be read: {error.strerror or error}") from error


def _footer(file: pq.ParquetFile, path: str, kind: type[_FooterT]) -> _FooterT:
    metadata = file.metadata.metadata or {}
    if FOOTER_KEY not in metadata:
        raise LabelSetMismatch(f"{path} is Parquet, but not of a label set: its footer has no {FOOTER_KEY.decode()!r}")
    try:
        values = parse_json(metadata[FOOTER_KEY])
    except (ValueError, RecursionError) as error:
        raise LabelSetCorrupt(f"{path}: its footer is not valid JSON: {error}") from error
    if not is_version(values, FORMAT, VERSION):
        what, fix = other_version(values, FORMAT, VERSION)
        raise LabelSetMismatch(f"{path} {what}", fix=fix)
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


def _check_layout(file: pq.ParquetFile, path: str, footer: LabelsFooter) -> None:
    _check_schema(file, labels_schema(footer.codec), path)
    groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    if len(groups) != footer.view_stop - footer.view_start or set(groups) - {footer.rows_per_view}:
        raise LabelSetCorrupt(f"{path}: row groups have {groups[:4]}… rows, not {footer.rows_per_view} for each view")
    size = footer.rows_per_view * footer.codec.memory_bytes
    if size > MAX_VIEW_BYTES:
        raise LabelSetCorrupt(f"{path}: one view takes {size} bytes of memory, the maximum is {MAX_VIEW_BYTES}")


def _check_schema(file: pq.ParquetFile, expected: pa.Schema, path: str) -> None:
    found = guarded(path, lambda: file.schema_arrow).remove_metadata()
    marked = any(b"ARROW:extension:name" in (field.metadata or {}) for field in found)
    if marked or not found.equals(expected):
        raise LabelSetCorrupt(
            f"{path}: its columns are {found.names}, format v{VERSION} requires {expected.names} with exact types"
        )


def _read_run(file: Contents, footer: LabelsFooter, views: range) -> list[LabelRows]:
    """Read and check some views; if a later view is damaged, return only the first one."""
    try:
        rows = _read_row_groups(file, footer, views)
    except LabelSetCorrupt:
        if len(views) == 1:
            raise
        return _read_run(file, footer, views[:1])
    size = footer.rows_per_view
    return [rows.part(slice(place * size, (place + 1) * size)) for place in range(len(views))]


def _read_row_groups(file: Contents, footer: LabelsFooter, views: range) -> LabelRows:
    """Read and check views, and return their rows in sequence."""
    groups = [view - footer.view_start for view in views]
    for group in groups:
        check_pages(file.data, file.chunks, group, file.name)
    table = guarded(file.name, lambda: file.parquet.read_row_groups(groups, use_threads=False))
    codec, record = footer.codec, footer.codec.record
    stored = {name: _values(table[name]).reshape(-1, *record[name].shape) for name in codec.columns}
    rows = codec.decode(_values(table["row"]), stored)
    if problem := find_problem(rows, footer.num_classes, len(views)):
        raise LabelSetCorrupt(f"{file}: view {views[0]}: {problem}")
    numbers = _values(table["view"]).reshape(len(views), -1)
    if (numbers != np.array(views)[:, None]).any():
        raise LabelSetCorrupt(f"{file}: row group {groups[0]} must hold only view {views[0]}")
    return rows


def _values(column: pa.ChunkedArray) -> NDArray[Any]:
    """Return the numbers of a column; numbers in lists are joined into one array."""
    whole = _whole(column)
    return (whole.flatten() if pa.types.is_fixed_size_list(whole.type) else whole).to_numpy()


def _whole(column: pa.ChunkedArray) -> pa.Array:
    """Return a column as one array."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
