"""Parquet files with images as source shards: runs of row groups, decoded one row group at a time.

An image column is a struct of `bytes` and `path`, as Hugging Face's `datasets` writes it, or plain bytes. Class names come from the
`huggingface` schema metadata, or are the values of a text column.
"""

import json
import logging
import os
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from pipeline.errors import RemoteFileMissing, SourceError, StorageError
from pipeline.images.class_names import class_numbers, names_of_order, ordered_class_names, reordered
from pipeline.images.samples import (
    IMAGE_EXTENSIONS,
    LFS_POINTER,
    NO_LABELS,
    NO_OPTIONS,
    Kept,
    ShardIndex,
    SourceOptions,
    SourceShard,
    check_image_bytes,
    check_label,
    file_state,
    is_label_like,
    reading,
)
from pipeline.storage.place import File, RemoteFile
from pipeline.storage.urls import local_path
from pipeline.text import check_name, printable

log = logging.getLogger("deit_cli.parquet_source")

ROWS_PER_SHARD = 4096
CACHE_BYTES = 256 << 20  # two row groups of 1,000 ImageNet photographs, the largest common size
MAX_ROW_GROUP_BYTES = 2 << 30  # limit of the memory that one image may cost a process
MAX_ROW_GROUP_ROWS = 1 << 20  # a footer may claim any number; real row groups have thousands of images
MAX_METADATA_BYTES = 16 << 20  # enough for the names of half a million classes
MAX_CLASSES = 1 << 20
_BATCH_ROWS = 16  # rows between two size checks: dictionary encoding can unpack 780 bytes to 10 MB per row
_IMAGE_COLUMNS = frozenset({"image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes"})  # of plain bytes
# Usual names of label columns; CIFAR-100 has fine_label.
_LABEL_COLUMNS = frozenset(
    {"label", "labels", "fine_label", "cls", "target", "targets", "class", "class_label"}
) | frozenset(f"{what}_{number}" for what in ("class", "label", "target") for number in ("id", "idx", "index"))
_NAME_COLUMNS = frozenset(
    {"label", "labels", "fine_label", "cls", "target", "class", "class_label", "class_name", "label_name"}
)

Result = TypeVar("Result")


class ParquetPlace(NamedTuple):
    """The position of an image: row group in the file, row in the group."""

    group: int
    row: int


@dataclass(frozen=True)
class Columns:
    """The columns that are read: the image and its class label, with the names of the classes.

    Attributes:
        image: name of the image column.
        data: the column, or the leaf `image.bytes` of it, that holds the encoded images; None if there are only paths.
        path: the column or leaf that holds their paths; None if they have none.
        label: name of the label column; None for no class labels.
        class_names: names of the classes, None if nothing says them.
        by_name: True if the label column holds the names and not the numbers.
        renumbered: new number of each class number in the file; None: they stay.
    """

    image: str
    data: str | None
    path: str | None
    label: str | None
    class_names: tuple[str, ...] | None
    by_name: bool = False
    renumbered: tuple[int, ...] | None = None

    def label_of(self, value: Any, numbers: Mapping[str, int], where: str) -> int | None:
        """Return the class label of one value of the label column.

        Args:
            value: number or name; None for no label.
            numbers: number of each class name.
            where: place of the value, for the error.
        """
        if value is None or value == -1:  # Hugging Face writes -1 for the labels of a hidden test set
            return None
        if self.by_name:
            if value not in numbers:
                raise SourceError(
                    f"{where}: {value!r:.100} is the name of none or several of the {len(numbers)} classes"
                )
            return numbers[value]
        if self.renumbered is not None:
            return self.renumbered[check_label(value, len(self.renumbered), where)]
        return check_label(value, None if self.class_names is None else len(self.class_names), where)


class RowGroupCache:
    """A cache of the image columns of the row groups that this process used last: at most `max_bytes`, or one row group.

    The shards of a source share it; a pickled cache is empty.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._columns: OrderedDict[tuple[File, int, str], pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[File, int, str], load: Callable[[], pa.ChunkedArray]) -> pa.ChunkedArray:
        """Return a column of a row group; `load` reads it if it is not in the cache."""
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
    """A run of row groups of one Parquet file, from `first_group` on; `group_rows` holds the rows of each.

    Attributes:
        image_root: folder for the paths of rows without image bytes; None: such rows are refused.
    """

    name: str
    file: File
    columns: Columns
    first_group: int
    group_rows: tuple[int, ...]
    cache: RowGroupCache
    image_root: Path | None = None
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

    def file_of(self, position: int) -> str:
        """Return the sample and the file it lies in."""
        return f"{self.index.keys[position]!r} in {self.file}"

    def build_index(self) -> ShardIndex[ParquetPlace]:
        """Read the paths and labels; if the paths cannot be keys, read the images too and name them by content."""
        places = self._places()
        keys = self._path_keys() or self._content_keys(places)
        for place, key in zip(places, keys, strict=True):
            check_name(key, f"{self._where(place)}: sample key")
        return ShardIndex(tuple(keys), self._class_labels(), places)

    def read_image(self, position: int) -> bytes:
        """Return the image of one sample; keys and class labels in the file must be as in the index.

        They are compared when this process reads the first image through a kept index, and when the file has changed since;
        a key that is the hash of an image is compared with each image.
        """
        if (self.index_is_kept and "_keys" not in self.__dict__) or self.state != self.indexed_state:
            self._compare()
        image = self._image_at(place := self.index.places[position])
        if self.__dict__.get("_keys") == "content":
            name = self.index.keys[position].partition("-")[0]
            if name != xxhash.xxh3_128_hexdigest(image):
                raise self.changed(self._where(place))
        return image

    def _compare(self) -> None:
        """Compare the index with the paths and class labels in the file as it is now, and note what the keys are."""
        index, state, keys = self.index, self.state, self._path_keys()
        if index.places != self._places() or list(index.class_labels) != self._class_labels():
            raise self.changed(self.file)
        if keys is not None and list(index.keys) != keys:
            raise self.changed(self.file)
        if keys is None and not all(re.fullmatch(r"[0-9a-f]{32}(-[1-9][0-9]*)?", key) for key in index.keys):
            raise self.changed(self.file)
        object.__setattr__(self, "_keys", "content" if keys is None else "path")
        object.__setattr__(self, "indexed_state", state)

    def _image_at(self, place: ParquetPlace) -> bytes:
        """Return the image of one row; its row group stays in memory for the next rows."""
        image = self._cell(place, self.columns.data)
        if image is None:
            return self._read_path(place, self._cell(place, self.columns.path))
        check_image_bytes(len(image), self._where(place))
        return image

    def _cell(self, place: ParquetPlace, leaf: str | None) -> Any:
        """Return the value of one row, None without such a column."""
        if leaf is None:
            return None
        column = self.cache.get((self.file, place.group, leaf), lambda: self._read_group(place.group, leaf))
        with _named_errors(self.file):
            return _unpacked(column[place.row].as_py())

    def _read_path(self, place: ParquetPlace, path: str | None) -> bytes:
        """Return the file that a row without image bytes names, which must lie below `image_root`, links followed."""
        where = self._where(place)
        if path is None:
            raise SourceError(f"{where}: no image bytes, and no path")
        if self.image_root is None:
            raise SourceError(
                f"{where}: no image bytes, and the path {path!r:.200} is not followed",
                fix="Pass --image-root DIR, the folder below which the images lie",
            )
        with reading(where):
            try:
                root = self.image_root.resolve()
                file = (root / path).resolve()
            except (ValueError, RuntimeError) as error:  # a NUL, or a loop of links
                raise SourceError(f"{where}: the path {path!r:.200} cannot be read: {error}") from None
            if not file.is_relative_to(root):
                raise SourceError(f"{where}: the path {path!r:.200} leads out of --image-root {self.image_root}")
        with reading(file):
            check_image_bytes(file.stat().st_size, file)
            if not file.is_file():  # reading a pipe would block
                raise SourceError(f"{file}: is not a file")
            return file.read_bytes()

    def _places(self) -> list[ParquetPlace]:
        groups = enumerate(self.group_rows, start=self.first_group)
        return [ParquetPlace(group, row) for group, rows in groups for row in range(rows)]

    def _where(self, place: ParquetPlace) -> str:
        return f"{self.file}: row group {place.group}, row {place.row}"

    def _read_all(self, leaf: str) -> list[Any]:
        """Return one column, or one leaf of the image column, of every row."""
        groups = range(self.first_group, self.first_group + len(self.group_rows))
        with _opened(self.file) as file:
            return [_unpacked(value) for group in groups for value in self._column(file, group, leaf).to_pylist()]

    def _read_group(self, group: int, leaf: str) -> pa.ChunkedArray:
        with _opened(self.file) as file:
            return self._column(file, group, leaf)

    def _column(self, file: pq.ParquetFile, group: int, leaf: str) -> pa.ChunkedArray:
        """Decode a column of a row group, and check its size while decoding."""
        batches, size = [], 0
        name = leaf if leaf in file.schema_arrow.names else leaf.rpartition(".")[0]
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[leaf], use_threads=False):
            size += batch.nbytes
            if size > MAX_ROW_GROUP_BYTES:
                raise SourceError(
                    f"{self.file}: row group {group} holds more than {MAX_ROW_GROUP_BYTES} bytes of images",
                    fix="Write the file anew with smaller row groups",
                )
            batches.append(batch.column(name))
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
        numbers = class_numbers(self.columns.class_names or ()) if self.columns.by_name else {}
        return [self.columns.label_of(value, numbers, self._where(place)) for place, value in values]

    def _path_keys(self) -> list[str] | None:
        """Return the paths without their extensions, or None if one is missing or two are equal."""
        if self.columns.path is None:
            return None
        paths = self._read_all(self.columns.path)
        keys = {_without_extension(path): None for path in paths if path is not None}
        return list(keys) if len(keys) == len(paths) else None

    def _content_keys(self, places: Sequence[ParquetPlace]) -> list[str]:
        """Return the hash of each image's bytes as its key; copies of an earlier image get the suffixes -1, -2, ..."""
        copies: Counter[str] = Counter()
        keys = []
        for place in places:
            name = xxhash.xxh3_128_hexdigest(self._image_at(place))
            keys.append(f"{name}-{copies[name]}" if copies[name] else name)
            copies[name] += 1
        return keys


def open_parquets(
    files: Sequence[File], options: SourceOptions = NO_OPTIONS
) -> tuple[tuple[str, ...] | None, tuple[ParquetShard, ...]]:
    """Return the class names, which all files must share, and the shards of all files in order."""
    footers = {file: _read_footer(file, options) for file in files}
    columns = _agreed({file: columns for file, (columns, _) in footers.items()}, options)
    cache = RowGroupCache(CACHE_BYTES)
    root = None if options.image_root is None else _image_root(options.image_root)
    shards: list[ParquetShard] = []
    for file, (_, rows) in footers.items():
        for piece, groups in enumerate(_cut(rows)):
            group_rows = tuple(rows[groups.start : groups.stop])
            name = f"{file.stem}.{piece:04}"
            shards.append(ParquetShard(name, file, columns[file], groups.start, group_rows, cache, root))
    return columns[files[0]].class_names, tuple(shards)


def _image_root(folder: str) -> Path:
    path = local_path(folder)
    if path is None or not path.is_dir():
        raise SourceError(f"--image-root must be a local folder, got {folder}")
    return path


def _agreed(columns: dict[File, Columns], options: SourceOptions) -> dict[File, Columns]:
    """Return the columns of each file with the names and numbers of the classes, which all files of a source share."""
    (first, found), *others = columns.items()
    for file, other in others:
        if other.class_names != found.class_names:
            raise SourceError(f"{file}: its class names differ from those of {first}; one source has one list")
        if (other.label, other.by_name) != (found.label, found.by_name):
            told = [f"{printable(each.label or 'none')}{' (text)' if each.by_name else ''}" for each in (other, found)]
            raise SourceError(
                f"{file}: its label column is {told[0]}, that of {first} is {told[1]}",
                fix="One source has one label column",
            )
    names, renumbered = found.class_names, None
    if found.by_name:
        names = names_of_order(options) or _names_in(columns, options)
    elif names is None:
        names = names_of_order(options) if found.label else None
    elif options.class_order is not None:
        names, renumbered = reordered(names, options, where=first)
    return {file: replace(each, class_names=names, renumbered=renumbered) for file, each in columns.items()}


def _names_in(columns: dict[File, Columns], options: SourceOptions) -> tuple[str, ...]:
    """Return the values of the text column that is the label, of all files, in the order of the options."""
    names: set[str] = set()
    for file, each in columns.items():
        assert each.label is not None
        names |= _use(file, partial(_values, label=each.label, where=f"{file}: class name of column {each.label!r}"))
    return ordered_class_names(names, options, where=next(iter(columns)))


def _values(parquet: pq.ParquetFile, label: str, where: str) -> set[str]:
    """Return the names in a text column, each a valid one."""
    found: set[str] = set()
    for batch in parquet.iter_batches(_BATCH_ROWS, columns=[label], use_threads=False):
        new = set(batch.column(label).unique().to_pylist()) - found - {None}
        found |= {check_name(name, where) for name in new}
        if len(found) > MAX_CLASSES:
            raise SourceError(f"{where}: more than {MAX_CLASSES} names: the column holds no classes")
    return found


def _read_footer(file: File, options: SourceOptions) -> tuple[Columns, list[int]]:
    """Return the columns and the number of rows of each row group, from the footer of a file."""
    return _use(
        file, lambda parquet: (_find_columns(file, parquet.schema_arrow, options), _group_rows(file, parquet.metadata))
    )


def _use(file: File, use: Callable[[pq.ParquetFile], Result]) -> Result:
    """Return `use(parquet)` of an open file, of which only the parts that it reads are downloaded if it is remote."""
    if file.path is None:
        # If the server supports ranges, only those parts are downloaded. If not, or if the footer is damaged, the whole file is
        # read, and an error names it if the file itself is damaged.
        try:
            return file.use_ranges(lambda opened: use(pq.ParquetFile(opened)))
        except RemoteFileMissing as error:
            raise SourceError(str(error)) from error
        except StorageError as error:
            log.debug("%s: its footer cannot be read alone: %s", file, error)
    with _opened(file) as parquet:
        return use(parquet)


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


def _unpacked(value: Any) -> Any:
    """Return the one field of a struct of which one leaf was read, and any other value itself."""
    return next(iter(value.values())) if isinstance(value, dict) else value


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
        if file.path is not None and file.path.is_file() and _begins_as_pointer(file.path):
            raise SourceError(f"{file}: a pointer of Git LFS and not the file itself", fix="Run git lfs pull") from None
        raise SourceError(f"{file}: damaged, or not Parquet: {error}") from error


def _begins_as_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def _find_columns(file: File, schema: pa.Schema, options: SourceOptions) -> Columns:
    """Return the columns of a file; the names of text labels are not read yet."""
    for field in schema:
        _refuse_extension_types(file, field)
    image = _image_column(file, schema, options.image_key)
    data, path = _leaves(image)
    features = _features(file, schema)
    label = _label_column(file, schema, features, NO_LABELS if options.labels_file is not None else options.label_key)
    by_name = label is not None and _is_text(schema.field(label).type)
    names = None if by_name else _class_names(file, label, features)
    return Columns(image.name, data, path, label, names, by_name)


def _image_column(file: File, schema: pa.Schema, image_key: str | None) -> pa.Field:
    """Return the image column: the one that the user chose, or the one struct of bytes and path, or the one column of bytes."""
    if image_key is not None:
        chosen = [schema.field(name) for name in map(str.strip, image_key.split(";")) if schema.names.count(name) == 1]
        if not chosen:
            raise SourceError(f"{file}: no column {image_key!r} for --image-key among {schema.names}")
        if not any(_leaves(chosen[0])):
            raise SourceError(
                f"{file}: column {chosen[0].name!r} holds {printable(str(chosen[0].type))}, and --image-key needs bytes, a struct of bytes"
                " and path, or paths"
            )
        return chosen[0]
    structs = [field for field in schema if _is_image(field.type)]
    plain = [field for field in schema if _is_bytes(field.type)]
    if len(structs) == 1:
        return structs[0]
    if not structs and len(plain) == 1 and plain[0].name.lower() in _IMAGE_COLUMNS:
        return plain[0]
    raise _no_image_column(file, schema, [field.name for field in structs or plain])


def _no_image_column(file: File, schema: pa.Schema, found: list[str]) -> SourceError:
    lists = [field.name for field in schema if _is_list(field.type) and _is_image(field.type.value_type)]
    texts = [field.name for field in schema if _is_text(field.type)]
    if found:
        fix = printable(f"Choose one: --image-key {found[0]}")
    elif lists:
        fix = f"Column {lists[0]!r} has a list of images in each row: write a row for each image"
    elif texts:
        fix = "If a column holds the paths of image files, pass it as --image-key, and their folder as --image-root"
    else:
        fix = None
    return SourceError(
        f"{file}: exactly one image column (a struct of bytes and path, or bytes) is needed, found {found or 'none'} among"
        f" {schema.names}",
        fix=fix,
    )


def _leaves(image: pa.Field) -> tuple[str | None, str | None]:
    """Return the columns or leaves that hold the encoded images and their paths; both None for any other column."""
    if _is_image(image.type):
        has_path = any(field.name == "path" for field in image.type)
        return f"{image.name}.bytes", f"{image.name}.path" if has_path else None
    if _is_bytes(image.type):
        return image.name, None
    return (None, image.name) if _is_text(image.type) else (None, None)


def _refuse_extension_types(file: File, field: pa.Field) -> None:
    """Raise an error for extension types: a registered one may run code when it is read, and no image set needs one."""
    if isinstance(field.type, pa.BaseExtensionType) or b"ARROW:extension:name" in (field.metadata or {}):
        raise SourceError(f"{file}: column {field.name!r} has an extension type, which is not read")
    for child in range(field.type.num_fields):
        _refuse_extension_types(file, field.type.field(child))


def _is_image(kind: pa.DataType) -> bool:
    """Return True for a struct of bytes, perhaps path, and perhaps more. A column whose every value is missing has the type null."""
    if not pa.types.is_struct(kind):
        return False
    types = {field.name: field.type for field in kind}
    if "bytes" not in types:
        return False
    data, path = types["bytes"], types.get("path", pa.null())
    return (_is_bytes(data) or (pa.types.is_null(data) and "path" in types)) and (
        _is_text(path) or pa.types.is_null(path)
    )


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_integer(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind.value_type if pa.types.is_dictionary(kind) else kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


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


def _label_column(file: File, schema: pa.Schema, features: dict[str, Any], label_key: str | None) -> str | None:
    """Return the label column: the one that the user chose, or the ClassLabel feature, or one with a usual name.

    Numbers go before names: a column `label` and its text in `label_name` say the same.
    """
    if label_key is not None:
        return None if label_key == NO_LABELS else _chosen_label(file, schema, label_key)
    integers = [field.name for field in schema if _is_integer(field.type)]
    named = [name for name in integers if features.get(name, {}).get("_type") == "ClassLabel"]
    usual = [name for name in integers if name.lower() in _LABEL_COLUMNS]
    texts = [field.name for field in schema if _is_text(field.type) and field.name.lower() in _NAME_COLUMNS]
    # CIFAR-100 has two ClassLabel columns, fine_label and coarse_label: the usual name decides.
    found = [name for name in named if name in usual] if len(named) > 1 else named or usual or texts
    if len(named) == 1 and named[0] not in usual:  # `domain` beside `label`
        found = [*named, *usual, *texts]
    if len(found) > 1 or (named and not found):
        raise SourceError(
            f"{file}: several label columns, {found or named}",
            fix=printable(f"Choose one: --label-key {(found or named)[0]}"),
        )
    like = [field for field in schema if is_label_like(field.name) and not pa.types.is_null(field.type)]
    if not found and like:
        told = printable(", ".join(f"{field.name!r} ({field.type})" for field in like))
        raise SourceError(
            f"{file}: no column holds class labels that can be read (numbers in a column such as `label`, or names), but there"
            f" are {told}",
            fix=f"Choose one, such as --label-key {printable(like[0].name)}, or pass --label-key {NO_LABELS} to read the images alone",
        )
    return found[0] if found else None


def _chosen_label(file: File, schema: pa.Schema, label_key: str) -> str:
    if schema.names.count(label_key) != 1:
        raise SourceError(f"{file}: no column {label_key!r} for --label-key among {schema.names}")
    kind = schema.field(label_key).type
    if not (_is_integer(kind) or _is_text(kind)):
        raise SourceError(
            f"{file}: column {label_key!r} holds {printable(str(kind))}, and --label-key needs whole numbers or names of classes"
        )
    return label_key


def _class_names(file: File, label: str | None, features: dict[str, Any]) -> tuple[str, ...] | None:
    names = features.get(label, {}).get("names") if label else None
    if names is None:
        return None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise SourceError(f"{file}: the class names of column {label!r} must be a list of strings")
    return tuple(check_name(name, f"{file}: class name of column {label!r}") for name in names)
