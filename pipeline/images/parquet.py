"""Hugging Face image Parquet as source shards: runs of row groups, decoded one row group at a time.

An image column is a struct of `bytes` and `path`. Class names come from the `huggingface` schema metadata.
"""

import json
import logging
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from pipeline.errors import RemoteFileMissing, SourceError, StorageError
from pipeline.images.samples import (
    IMAGE_EXTENSIONS,
    Kept,
    ShardIndex,
    SourceShard,
    check_image_bytes,
    check_label,
    file_state,
    reading,
)
from pipeline.storage.place import File, RemoteFile
from pipeline.text import check_name

log = logging.getLogger("deit_cli.parquet_source")

ROWS_PER_SHARD = 4096
CACHE_BYTES = 256 << 20  # two row groups of 1,000 ImageNet photographs, the largest common size
MAX_ROW_GROUP_BYTES = 2 << 30  # limit of the memory that one image may cost a process
MAX_ROW_GROUP_ROWS = 1 << 20  # a footer may claim any number; real row groups have thousands of images
MAX_METADATA_BYTES = 16 << 20  # enough for the names of half a million classes
_BATCH_ROWS = 16  # rows between two size checks: dictionary encoding can unpack 780 bytes to 10 MB per row
_LABEL_COLUMNS = ("label", "labels", "fine_label")  # usual names; CIFAR-100 has fine_label


class ParquetPlace(NamedTuple):
    """The position of an image: row group in the file, row in the group."""

    group: int
    row: int


@dataclass(frozen=True)
class Columns:
    """The columns that are read: the image and its class label, with the names of the classes."""

    image: str
    label: str | None
    class_names: tuple[str, ...] | None

    @property
    def num_classes(self) -> int | None:
        """Number of class names, or None if there are none."""
        return None if self.class_names is None else len(self.class_names)


class RowGroupCache:
    """A cache of the image columns of the row groups that this process used last: at most `max_bytes`, or one row group.

    The shards of a source share it; a pickled cache is empty.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._columns: OrderedDict[tuple[File, int], pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[File, int], load: Callable[[], pa.ChunkedArray]) -> pa.ChunkedArray:
        """Return the column of a row group; `load` reads it if it is not in the cache."""
        with self._lock:
            if key not in self._columns:
                column = load()
                self._make_room(column.nbytes)
                self._columns[key] = column
                self.num_bytes += column.nbytes
            self._columns.move_to_end(key)
            return self._columns[key]

    def _make_room(self, size: int) -> None:
        while self._columns and self.num_bytes + size > self.max_bytes:
            self.num_bytes -= self._columns.popitem(last=False)[1].nbytes

    def __reduce__(self) -> tuple[type["RowGroupCache"], tuple[int]]:
        return RowGroupCache, (self.max_bytes,)


@dataclass(frozen=True)
class ParquetShard(SourceShard[ParquetPlace]):
    """A run of row groups of one Parquet file, from `first_group` on; `group_rows` holds the rows of each."""

    name: str
    file: File
    columns: Columns
    first_group: int
    group_rows: tuple[int, ...]
    cache: RowGroupCache
    kept: Kept | None = None
    place_type: ClassVar[type[ParquetPlace]] = ParquetPlace

    @property
    def remote_files(self) -> tuple[RemoteFile, ...]:
        """The Parquet file if it is remote, else nothing."""
        return self.file.to_download

    @property
    def state(self) -> tuple[int, ...] | None:
        """Length and date of a local file."""
        return file_state(self.file)

    def __len__(self) -> int:
        return sum(self.group_rows)

    def build_index(self) -> ShardIndex[ParquetPlace]:
        """Read the paths and labels; if the paths cannot be keys, read the images too and name them by content."""
        places = self._places()
        keys = self._path_keys() or self._content_keys(places)
        for place, key in zip(places, keys, strict=True):
            check_name(key, f"{self._where(place)}: sample key")
        return ShardIndex(tuple(keys), self._class_labels(), places)

    def read_image(self, position: int) -> bytes:
        """Return the image of one sample; keys and class labels in the file must be as in the index.

        They are compared when this process reads the first image, and a key that is the hash of an image with each image.
        """
        by_content = self._checked_keys == "content"
        image = self._image_at(place := self.index.places[position])
        if by_content and self.index.keys[position].partition("-")[0] != xxhash.xxh3_128_hexdigest(image):
            raise self.changed(self._where(place))
        return image

    @cached_property
    def _checked_keys(self) -> Literal["path", "content"]:
        """Compare a kept index with the paths and class labels in the file, and return what the keys are."""
        index = self.index
        if not self.index_is_kept:
            return "path"  # this process made it from the file
        keys = self._path_keys()
        if index.places != self._places() or list(index.class_labels) != self._class_labels():
            raise self.changed(self.file)
        if keys is not None and list(index.keys) != keys:
            raise self.changed(self.file)
        return "content" if keys is None else "path"

    def _path_keys(self) -> list[str] | None:
        """Return the paths without their extensions, or None if one is missing or two are equal."""
        return _path_keys(self._read_all(f"{self.columns.image}.path"))

    def _image_at(self, place: ParquetPlace) -> bytes:
        """Return the image of one row; its row group stays in memory for the next rows."""
        column = self.cache.get((self.file, place.group), lambda: self._read_group(place.group))
        with _named_errors(self.file):
            image = column[place.row].as_py()
        if image is None or image["bytes"] is None:
            raise SourceError(f"{self._where(place)}: no image bytes (a path to a file elsewhere is not followed)")
        check_image_bytes(len(image["bytes"]), self._where(place))
        return image["bytes"]

    def _places(self) -> list[ParquetPlace]:
        groups = enumerate(self.group_rows, start=self.first_group)
        return [ParquetPlace(group, row) for group, rows in groups for row in range(rows)]

    def _where(self, place: ParquetPlace) -> str:
        return f"{self.file}: row group {place.group}, row {place.row}"

    def _read_all(self, leaf: str) -> list[Any]:
        """Return one column, or one leaf of the image column, of every row."""
        groups = range(self.first_group, self.first_group + len(self.group_rows))
        with _opened(self.file) as file:
            return [value for group in groups for value in self._column(file, group, leaf).to_pylist()]

    def _read_group(self, group: int) -> pa.ChunkedArray:
        with _opened(self.file) as file:
            return self._column(file, group, f"{self.columns.image}.bytes")

    def _column(self, file: pq.ParquetFile, group: int, leaf: str) -> pa.ChunkedArray:
        """Decode a column of a row group, and check its size while decoding."""
        batches, size = [], 0
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[leaf], use_threads=False):
            size += batch.nbytes
            if size > MAX_ROW_GROUP_BYTES:
                raise SourceError(
                    f"{self.file}: row group {group} holds more than {MAX_ROW_GROUP_BYTES} bytes of images",
                    fix="Write the file anew with smaller row groups",
                )
            batches.append(batch.column(0))
        rows = sum(map(len, batches))
        if rows != self.group_rows[group - self.first_group]:
            raise SourceError(
                f"{self.file}: row group {group} has {rows} rows, its footer said otherwise", fix="Copy it again"
            )
        return pa.chunked_array(batches)

    def _class_labels(self) -> list[int | None]:
        if self.columns.label is None:
            return [None] * sum(self.group_rows)
        values = zip(self._places(), self._read_all(self.columns.label), strict=True)
        # Hugging Face writes -1 for the labels of a hidden test set.
        return [
            None if value in (None, -1) else check_label(value, self.columns.num_classes, self._where(place))
            for place, value in values
        ]

    def _content_keys(self, places: Sequence[ParquetPlace]) -> list[str]:
        """Return the hash of each image's bytes as its key; copies of an earlier image get the suffixes -1, -2, ..."""
        copies: Counter[str] = Counter()
        keys = []
        for place in places:
            name = xxhash.xxh3_128_hexdigest(self._image_at(place))
            keys.append(f"{name}-{copies[name]}" if copies[name] else name)
            copies[name] += 1
        return keys


def open_parquets(files: Sequence[File]) -> tuple[tuple[str, ...] | None, tuple[ParquetShard, ...]]:
    """Return the class names, which all files must share, and the shards of all files in order."""
    cache = RowGroupCache(CACHE_BYTES)
    shards: list[ParquetShard] = []
    columns: dict[File, Columns] = {}
    for file in files:
        columns[file], rows = _read_footer(file)
        if columns[file].class_names != columns[files[0]].class_names:
            raise SourceError(f"{file}: its class names differ from those of {files[0]}; one source has one list")
        for piece, groups in enumerate(_cut(rows)):
            group_rows = tuple(rows[groups.start : groups.stop])
            shards.append(ParquetShard(f"{file.stem}.{piece:04}", file, columns[file], groups.start, group_rows, cache))
    return columns[files[0]].class_names, tuple(shards)


def _read_footer(file: File) -> tuple[Columns, list[int]]:
    """Return the columns and the number of rows of each row group, from the footer of a file."""

    def parse(parquet: pq.ParquetFile) -> tuple[Columns, list[int]]:
        return _find_columns(file, parquet.schema_arrow), _group_rows(file, parquet.metadata)

    if file.path is None:
        # If the server supports ranges, only the footer is downloaded. If not, or if the footer is damaged, the whole file
        # is read, and an error names it if the file itself is damaged.
        try:
            return file.use_ranges(lambda opened: parse(pq.ParquetFile(opened)))
        except RemoteFileMissing as error:
            raise SourceError(str(error)) from error
        except StorageError as error:
            log.debug("%s: its footer cannot be read alone: %s", file, error)
    with _opened(file) as parquet:
        return parse(parquet)


def _group_rows(file: File, footer: pq.FileMetaData) -> list[int]:
    rows = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    if not sum(rows):
        raise SourceError(f"{file}: no rows in this file")
    if not 0 <= min(rows) <= max(rows) <= MAX_ROW_GROUP_ROWS:
        raise SourceError(f"{file}: row groups must have at most {MAX_ROW_GROUP_ROWS} rows, found {max(rows)}")
    return rows


def _cut(rows: Sequence[int]) -> list[range]:
    """Cut row groups into runs of ROWS_PER_SHARD rows or more; the last run takes the remaining ones."""
    starts, in_run = [0], 0
    for group, end in enumerate(accumulate(rows), start=1):
        if end - in_run >= ROWS_PER_SHARD and end < sum(rows):
            starts.append(group)
            in_run = end
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True)]


def _path_keys(images: Sequence[dict[str, Any] | None]) -> list[str] | None:
    """Return the paths without their extensions, or None if one is missing or two are equal."""
    keys = {_without_extension(image["path"]): None for image in images if image and image["path"] is not None}
    return list(keys) if len(keys) == len(images) else None


def _without_extension(path: str) -> str:
    stem, extension = os.path.splitext(path)
    return stem if extension.lower() in IMAGE_EXTENSIONS else path


@contextmanager
def _opened(file: File) -> Iterator[pq.ParquetFile]:
    with _named_errors(file), file.use(lambda path: pq.ParquetFile(path, page_checksum_verification=True)) as parquet:
        yield parquet


@contextmanager
def _named_errors(file: File) -> Iterator[None]:
    """Turn any error of pyarrow into one that names the file: damaged bytes raise a dozen types of error."""
    try:
        with reading(file):
            yield
    except SourceError:
        raise
    except Exception as error:
        raise SourceError(f"{file}: damaged, or not Parquet: {error}") from error


def _find_columns(file: File, schema: pa.Schema) -> Columns:
    for field in schema:
        _refuse_extension_types(file, field)
    images = [field.name for field in schema if _is_image(field.type)]
    if len(images) != 1:
        raise SourceError(
            f"{file}: exactly one image column (a struct of bytes and path) is needed, found {images or 'none'} "
            f"among {schema.names}"
        )
    features = _features(file, schema)
    label = _label_column(file, schema, features)
    return Columns(images[0], label, _class_names(file, label, features))


def _refuse_extension_types(file: File, field: pa.Field) -> None:
    """Raise an error for extension types: a registered one may run code when it is read, and no image set needs one."""
    if isinstance(field.type, pa.BaseExtensionType) or b"ARROW:extension:name" in (field.metadata or {}):
        raise SourceError(f"{file}: column {field.name!r} has an extension type, which is not read")
    for child in range(field.type.num_fields):
        _refuse_extension_types(file, field.type.field(child))


def _is_image(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind) or {field.name for field in kind} != {"bytes", "path"}:
        return False
    data, path = kind.field("bytes").type, kind.field("path").type
    return (pa.types.is_binary(data) or pa.types.is_large_binary(data)) and (
        pa.types.is_string(path) or pa.types.is_large_string(path)
    )


def _features(file: File, schema: pa.Schema) -> dict[str, Any]:
    """Return the column features that `datasets` writes into the schema metadata."""
    text = (schema.metadata or {}).get(b"huggingface", b"{}")
    if len(text) > MAX_METADATA_BYTES:
        raise SourceError(
            f"{file}: its 'huggingface' schema metadata has {len(text)} bytes, at most {MAX_METADATA_BYTES} are read"
        )
    try:
        features = json.loads(text).get("info", {}).get("features", {})
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, AttributeError, RecursionError) as error:
        raise SourceError(f"{file}: its 'huggingface' schema metadata cannot be read: {error}") from None


def _label_column(file: File, schema: pa.Schema, features: dict[str, Any]) -> str | None:
    """Return the label column: the ClassLabel feature, or else an integer column with a usual name."""
    integers = [field.name for field in schema if pa.types.is_integer(field.type)]
    named = [name for name in integers if features.get(name, {}).get("_type") == "ClassLabel"]
    usual = [name for name in integers if name in _LABEL_COLUMNS]
    # CIFAR-100 has two ClassLabel columns, fine_label and coarse_label: the usual name decides.
    found = [name for name in named if name in usual] if len(named) > 1 else named or usual
    if len(found) > 1 or (named and not found):
        raise SourceError(f"{file}: several label columns, {found or named}: write the file with one of them")
    return found[0] if found else None


def _class_names(file: File, label: str | None, features: dict[str, Any]) -> tuple[str, ...] | None:
    names = features.get(label, {}).get("names") if label else None
    if names is None:
        return None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise SourceError(f"{file}: the class names of column {label!r} must be a list of strings")
    return tuple(check_name(name, f"{file}: class name of column {label!r}") for name in names)
