"""Class labels from a file instead of from the source: CSV, JSON lines, or ImageNet's ground truth.

The file is read once, in the process that opens the source. Every source shard then carries only the labels of its own images,
packed, so that it stays cheap to send to other processes.
"""

import csv
import hashlib
import io
import json
import logging
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import SourceError
from pipeline.images.class_names import class_numbers, names_of_order, ordered_class_names
from pipeline.images.columns import Column
from pipeline.images.samples import (
    IMAGE_EXTENSIONS,
    ShardIndex,
    SourceOptions,
    SourceShard,
    check_label,
    reading,
)
from pipeline.repeats import warn_counted
from pipeline.storage.cache import Cache
from pipeline.storage.place import File, RemoteFile, open_file
from pipeline.text import check_name, count

log = logging.getLogger("deit_cli.labels_file")

MAX_LABELS_BYTES = 1 << 30  # ten million rows
NO_LABEL = -1  # of an image whose row says that it has no class
LABEL_TYPE = "i"  # of `array`: int32

IMAGE_COLUMNS = ("path", "file_name", "filename", "file", "image", "image_path", "image_id", "imageid", "image_name")
IMAGE_COLUMNS += ("img", "key", "id", "name", "fname", "images", "filepath", "file_path", "filenames", "paths")
LABEL_COLUMNS = ("label", "class", "class_name", "label_name", "category", "target", "cls", "class_id", "label_id")
LABEL_COLUMNS += ("labels", "synset", "wnid", "predictionstring")
KAGGLE_COLUMN = "predictionstring"  # LOC_val_solution.csv: the synset, then boxes
SYNSET = re.compile("n[0-9]{8}")
GROUND_TRUTH_IMAGE = "ILSVRC2012_val_{:08}"
IMAGENET_CLASSES = 1000
ORDER_FILES = ("map_clsloc.txt", "synsets.txt", "meta.mat")  # beside the ground truth: the synset of each ILSVRC id
TABLES = "CSV or TSV with a path and a label, JSON lines, or ILSVRC2012_validation_ground_truth.txt"


class OtherLabels(SourceShard[Any]):
    """A source shard whose class labels come from elsewhere; everything else is that of the shard itself.

    Attributes:
        shard: the shard itself.
    """

    shard: SourceShard[Any]

    @property
    def place_type(self) -> type[Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Type of the shard's places."""
        return self.shard.place_type

    @property
    def remote_files(self) -> tuple[RemoteFile, ...]:
        """Remote files of the shard itself."""
        return self.shard.remote_files

    @cached_property
    def index(self) -> ShardIndex[Any]:
        """The index of the shard itself, with the other class labels."""
        return self.build_index()

    def file_of(self, position: int) -> str:
        """Return the file that the shard itself names."""
        return self.shard.file_of(position)

    def read_image(self, position: int) -> bytes:
        """Return the encoded image of one sample."""
        return self.shard.read_image(position)


@dataclass(frozen=True)
class LabelledShard(OtherLabels):
    """A source shard with given class labels."""

    name: str
    shard: SourceShard[Any]
    packed_labels: bytes  # int32 in the order of the keys, deflated; NO_LABEL for none
    keys_digest: bytes  # of the keys to which the labels belong: the shard might have changed

    @classmethod
    def make(cls, shard: SourceShard[Any], class_labels: Iterable[int | None]) -> "LabelledShard":
        """Return the shard with these class labels, in the order of its keys."""
        labels = array(LABEL_TYPE, (NO_LABEL if label is None else label for label in class_labels))
        return cls(shard.name, shard, zlib.compress(labels.tobytes(), 1), _digest(shard.keys))

    def build_index(self) -> ShardIndex[Any]:
        """Return the index of the shard itself, with the given class labels."""
        index = self.shard.index
        if _digest(index.keys) != self.keys_digest:
            raise SourceError(f"source shard {self.name} has other images than when its class labels were read")
        labels = np.frombuffer(zlib.decompress(self.packed_labels), np.int32)
        return ShardIndex(index.keys, Column(pa.array(labels, mask=labels == NO_LABEL)), index.places)


@dataclass(frozen=True)
class RenumberedShard(OtherLabels):
    """A source shard whose classes have other numbers."""

    name: str
    shard: SourceShard[Any]
    numbers: tuple[int, ...]  # by the shard's own number of a class

    def build_index(self) -> ShardIndex[Any]:
        """Return the index of the shard itself, with the other numbers."""
        index = self.shard.index
        labels = [None if label is None else self.numbers[label] for label in index.class_labels]
        return ShardIndex(index.keys, Column(pa.array(labels, pa.int32())), index.places)


def _digest(keys: Sequence[str]) -> bytes:
    return hashlib.blake2b("\n".join(keys).encode(), digest_size=16).digest()


def label_shards(
    shards: Sequence[SourceShard[Any]],
    class_names: tuple[str, ...] | None,
    options: SourceOptions,
    *,
    where: object,
    cache: Cache | None = None,
) -> tuple[tuple[str, ...] | None, tuple[LabelledShard, ...]]:
    """Return class names and shards with the class labels of `options.labels_file`.

    An image is found by its key, by its path with the extension, or by its file name where that is unique.

    Args:
        shards: shards of the source; their own class labels are not used.
        class_names: class names of the source itself; None: it has none.
        options: labels file, its column of labels (`label_key`), and the order of the class names.
        where: source, for the messages.
        cache: cache for a labels file behind a URL; None: the default cache.

    Raises:
        SourceError: the file is missing or damaged, contradicts itself, lacks an image, or has labels that are no class.
    """
    assert options.labels_file is not None
    table = read_labels_file(open_file(options.labels_file, cache), options)
    names, numbers = _numbers(table, class_names, options)
    found = _matched(table, shards, where)
    labelled = (
        LabelledShard.make(shard, (None if at == NO_LABEL else numbers[at] for at in labels))
        for shard, labels in zip(shards, found, strict=True)
    )
    return names, tuple(labelled)


# --- the file ---------------------------------------------------------------------------------------------------------


@dataclass
class LabelsTable:
    """The rows of a labels file.

    Attributes:
        file: name of the file, for errors.
        rows: path of an image without its extension -> position in `labels`, or NO_LABEL.
        labels: different labels, as written.
        lines: number of the first line of each label, from 1.
    """

    file: str
    rows: dict[str, int] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    _places: dict[str, int] = field(default_factory=dict)

    def add(self, path: str, label: str, line: int) -> None:
        """Add one row; an empty label and -1 say that the image has no class."""
        key = without_extension(path.removeprefix("./"))
        if not key:
            raise self.error(line, "there is no path of an image")
        place = NO_LABEL if label in ("", "-1") else self._place(label, line)
        if self.rows.setdefault(key, place) != place:
            had = self.rows[key]
            other = "no class" if had == NO_LABEL else repr(self.labels[had])
            raise self.error(line, f"{key!r} has the label {label!r} here, and {other} in an earlier line")

    def _place(self, label: str, line: int) -> int:
        if label not in self._places:
            self._places[label] = len(self.labels)
            self.labels.append(self._checked(label, line))
            self.lines.append(line)
        return self._places[label]

    def _checked(self, label: str, line: int) -> str:
        if re.fullmatch(r"-?[0-9]+\.[0-9]*|[0-9.]+[eE][+-]?[0-9]+|-[0-9]+|(?i:nan)", label):
            raise self.error(
                line,
                f"a label must be a class number, 0 or more, or a class name, got {label!r}",
                fix="Write whole numbers, and nothing for an image without a class",
            )
        return check_name(label, f"{self.file}: line {line}: class name")

    def error(self, line: int, text: str, *, fix: str | None = None) -> SourceError:
        """Return an error for one line of the file."""
        return SourceError(f"{self.file}: line {line}: {text}", fix=fix)


def read_labels_file(file: File, options: SourceOptions) -> LabelsTable:
    """Return the rows of a labels file.

    Raises:
        SourceError: the file is missing, too large, not UTF-8, or in no known form; or it has an image twice with other labels.
    """
    text, table = _read_text(file), LabelsTable(str(file))
    lines = text.split("\n")
    first = next((line for line in lines if line.strip()), "")
    if not first:
        raise SourceError(f"{file}: no row in this file. A labels file is {TABLES}")
    if first.lstrip().startswith("{"):
        rows = _json_rows(lines, table, options)
    elif first.lstrip().startswith("["):
        raise SourceError(f"{file}: a JSON list is not read", fix="Write one object a line: JSON lines")
    elif file.suffix not in (".csv", ".tsv") and not re.search(r"[,\s]", first.strip()):
        rows = _ground_truth_rows(lines, table, file)
    else:
        rows = _table_rows(text, first, table, options)
    for path, label, line in rows:
        table.add(path, label, line)
    if not table.rows:
        raise SourceError(f"{file}: no row in this file, only the names of its columns")
    return table


def without_extension(path: str) -> str:
    """Return a path without the extension of an image, which keys do not have either."""
    stem, dot, extension = path.rpartition(".")
    return stem if dot and f".{extension.lower()}" in IMAGE_EXTENSIONS else path


def _read_text(file: File) -> str:
    """Return the text of a small file with `\\n` at the end of each line, without the mark that Windows puts first."""
    with reading(file):
        if file.path is not None and file.path.exists() and not file.path.is_file():
            raise SourceError(f"{file}: class labels must be a plain file")
        content = file.read(max_bytes=MAX_LABELS_BYTES)
    if content is None:
        raise SourceError(f"{file}: does not exist", fix=f"A labels file is {TABLES}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SourceError(f"{file}: line {line}: class labels must be valid UTF-8", fix="Save it as UTF-8") from None
    if "\0" in text:
        raise SourceError(f"{file}: line {text[: text.index(chr(0))].count(chr(10)) + 1}: a NUL character: not text")
    return text.replace("\r\n", "\n")


def _table_rows(text: str, first: str, table: LabelsTable, options: SourceOptions) -> Iterator[tuple[str, str, int]]:
    """Yield (path, label, line) of CSV, TSV, or lines of a path, a space and a label."""
    delimiter = "\t" if "\t" in first else "," if "," in first else " "
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    columns: tuple[int, int] | None = None
    width = 0
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            if columns is None:
                width = len(cells)
                columns, is_header, is_kaggle = _columns_of(cells, table, reader.line_num, options)
                if is_header:
                    continue
            if len(cells) != width:
                raise table.error(reader.line_num, f"{count(width, 'column')} must be here, as above, got {len(cells)}")
            label = cells[columns[1]]
            yield cells[columns[0]], label.split(" ")[0] if is_kaggle else label, reader.line_num
    except csv.Error as error:
        raise table.error(reader.line_num, f"not valid CSV: {error}") from None


def _columns_of(
    first: Sequence[str], table: LabelsTable, line: int, options: SourceOptions
) -> tuple[tuple[int, int], bool, bool]:
    """Return the columns of path and label, whether the first row names the columns, and whether a label is Kaggle's."""
    names = [cell.lower() for cell in first]
    image = _named_column(names, None, IMAGE_COLUMNS)
    label = _named_column(names, options.label_key, LABEL_COLUMNS)
    if options.label_key is not None and options.label_key.lower() not in names:
        raise table.error(line, f"there is no column {options.label_key!r} (--label-key), got {', '.join(first)[:200]}")
    several = [name for name in names if name in LABEL_COLUMNS]
    if options.label_key is None and len(several) > 1:
        raise table.error(
            line,
            f"several columns could be the label: {', '.join(several)}",
            fix=f"Choose one, such as --label-key {several[0]}",
        )
    is_header = image is not None or label is not None
    if len(names) == 2:
        image = image if image is not None else 0 if label in (None, 1) else 1
        label = label if label is not None else 1 - image
    if image is None or label is None or image == label:
        raise table.error(
            line,
            f"it must be clear which columns are path and label, got {len(names)}: {', '.join(first)[:200]}",
            fix="Name them path and label in the first line, or choose the label's with --label-key",
        )
    return (image, label), is_header, names[label] == KAGGLE_COLUMN


def _named_column(names: Sequence[str], asked: str | None, usual: Sequence[str]) -> int | None:
    wanted = [asked.lower(), *usual] if asked is not None else usual
    return next((names.index(name) for name in wanted if name in names), None)


def _json_rows(lines: Sequence[str], table: LabelsTable, options: SourceOptions) -> Iterator[tuple[str, str, int]]:
    """Yield (path, label, line) of JSON lines."""
    for line, text in enumerate(lines, start=1):
        if text.strip():
            values = _json_object(text, table, line)
            path = _json_value(values, None, IMAGE_COLUMNS, table, line, "path")
            label = _json_value(values, options.label_key, LABEL_COLUMNS, table, line, "label")
            if not isinstance(path, str):
                raise table.error(line, f"the path of an image must be text, got {path!r}")
            if label is not None and (isinstance(label, bool) or not isinstance(label, str | int)):
                raise table.error(line, f"a label must be a class number or a class name, got {label!r:.80}")
            yield path.strip(), "" if label is None else str(label).strip(), line


def _json_object(text: str, table: LabelsTable, line: int) -> dict[str, Any]:
    try:
        values = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise table.error(line, f"not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise table.error(line, "an object with path and label must be here")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a field stands twice")
    return values


def _json_value(
    values: dict[str, Any], asked: str | None, usual: Sequence[str], table: LabelsTable, line: int, what: str
) -> Any:
    name = asked if asked in values else next((name for name in usual if name in values), None)
    if name is None or (what == "label" and asked is not None and name != asked):
        raise table.error(
            line,
            f"no field is the {what}, got {', '.join(map(str, values))[:200] or 'none'}",
            fix=f"Name it {what}" if asked is None else f"--label-key {asked} asks for another name",
        )
    return values[name]


# --- ImageNet's ground truth ------------------------------------------------------------------------------------------


def _ground_truth_rows(lines: Sequence[str], table: LabelsTable, file: File) -> Iterator[tuple[str, str, int]]:
    """Yield (path, synset, line) of a file with one ILSVRC id, or one synset, for each image of ImageNet's validation set."""
    values = [line.strip() for line in lines]
    while values and not values[-1]:
        values.pop()
    order = None if SYNSET.fullmatch(values[0]) else _synsets_of_ids(file)
    for line, value in enumerate(values, start=1):
        image = GROUND_TRUTH_IMAGE.format(line)
        if order is None and SYNSET.fullmatch(value):
            yield image, value, line
        elif order is not None and re.fullmatch("[0-9]{1,4}", value) and 1 <= int(value) <= len(order):
            yield image, order[int(value) - 1], line
        else:
            wanted = "a synset such as n01440764" if order is None else f"an ILSVRC id in 1..{len(order)}"
            raise table.error(
                line,
                f"{wanted} must be here, one for each of ILSVRC2012_val_00000001 and the following, got {value[:80]!r}",
                fix="For other images write a path and a label in each line",
            )


def _synsets_of_ids(file: File) -> tuple[str, ...]:
    """Return the synset of each ILSVRC id, from a file beside the ground truth.

    The ids are not in the order of the synsets, which is that of the classes of torchvision and timm.
    """
    for name in ORDER_FILES:
        beside = file.beside(name)
        with reading(beside):
            content = beside.read(max_bytes=MAX_LABELS_BYTES)
        if content is not None:
            order = _mat_synsets(content, beside) if name.endswith(".mat") else _text_synsets(content, beside)
            return _checked_order(order, beside)
    raise SourceError(
        f"{file}: one number a line are ILSVRC ids, whose order is not that of the classes of torchvision and timm, and no"
        f" file beside it says the synset of each id ({', '.join(ORDER_FILES)})",
        fix="Put meta.mat or map_clsloc.txt of ImageNet's development kit beside it, or pass Kaggle's LOC_val_solution.csv",
    )


def _text_synsets(content: bytes, file: File) -> list[str]:
    """Return the synsets of `n02119789 1 kit_fox`, or of one synset a line."""
    found = []
    for line, text in enumerate(content.decode(errors="replace").splitlines(), start=1):
        words = text.split()
        if not words or not SYNSET.fullmatch(words[0]) or words[1:2] not in ([], [str(line)]):
            raise SourceError(
                f"{file}: line {line}: the synset of ILSVRC id {line} must be here, such as 'n02119789 1 kit_fox', got"
                f" {text[:80]!r}"
            )
        found.append(words[0])
    return found


def _mat_synsets(content: bytes, file: File) -> list[str]:
    """Return the synsets of `meta.mat`: its structs without children are the classes, and state their ids."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise SourceError(
            f"{file} cannot be read without scipy", fix="Install it: pip install scipy; or put map_clsloc.txt beside it"
        ) from None
    try:
        structs = loadmat(io.BytesIO(content), squeeze_me=True)["synsets"]
        leaves = structs[structs["num_children"].astype(int) == 0]
        found = {int(each["ILSVRC2012_ID"]): str(each["WNID"]) for each in leaves}
    except Exception as error:  # a damaged file raises a dozen types of error
        raise SourceError(f"{file}: damaged, or not ImageNet's meta.mat: {error}") from error
    return [found.get(number, "") for number in range(1, len(found) + 1)]


def _checked_order(order: Sequence[str], file: File) -> tuple[str, ...]:
    if len(set(order)) != IMAGENET_CLASSES or len(order) != IMAGENET_CLASSES or not all(map(SYNSET.fullmatch, order)):
        raise SourceError(f"{file}: {IMAGENET_CLASSES} different synsets must be here, got {len(set(order))}")
    if list(order) == sorted(order):
        raise SourceError(
            f"{file}: the synsets are sorted, which is the order of torchvision and timm, not that of the ILSVRC ids",
            fix="Use meta.mat or map_clsloc.txt of ImageNet's development kit",
        )
    return tuple(order)


# --- classes and images -----------------------------------------------------------------------------------------------


def _numbers(
    table: LabelsTable, class_names: tuple[str, ...] | None, options: SourceOptions
) -> tuple[tuple[str, ...] | None, list[int]]:
    """Return the class names, and the class number of each label of the file."""
    ordered = names_of_order(options)
    known = ordered if ordered is not None else class_names
    numbers = [label.isascii() and label.isdecimal() for label in table.labels]
    if all(numbers):
        return known, _plain_numbers(table, known, options)
    of_name = class_numbers(known or ())
    if any(numbers) and not of_name.keys() >= set(table.labels):
        number, name = numbers.index(True), numbers.index(False)
        raise table.error(
            max(table.lines[number], table.lines[name]),
            f"labels must be all numbers or all names: {table.labels[number]!r} in line {table.lines[number]},"
            f" {table.labels[name]!r} in line {table.lines[name]}",
        )
    if options.class_order is not None or not of_name.keys() >= set(table.labels):
        known = ordered_class_names(table.labels, options, where=table.file)
        of_name = class_numbers(known)
    assert known is not None
    return known, [of_name[label] for label in table.labels]


def _plain_numbers(table: LabelsTable, known: tuple[str, ...] | None, options: SourceOptions) -> list[int]:
    if known is None and options.class_order is not None:
        raise SourceError(
            f"{table.file}: class numbers have no other order, and --class-order {options.class_order} is one of names",
            fix="Leave out --class-order, or pass a file with the name of each class",
        )
    size = None if known is None else len(known)
    found = [
        check_label(int(label), size, f"{table.file}: line {line}")
        for label, line in zip(table.labels, table.lines, strict=True)
    ]
    of_name = class_numbers(known or ())
    for label, number, line in zip(table.labels, found, table.lines, strict=True):
        if of_name.get(label, number) != number:
            raise table.error(
                line,
                f"{label!r} is the number of one class and the name of another, number {of_name[label]}",
                fix="Pass --class-order natural, where names and numbers agree, or write names that are no numbers",
            )
    return found


def _refuse_header(table: LabelsTable, unused: str) -> None:
    """Raise SourceError if the first row looks like names of columns: it names no image, and its label is in no other row."""
    first, place = next(iter(table.rows.items()))
    if unused == first and place != NO_LABEL and list(table.rows.values()).count(place) == 1:
        raise table.error(
            table.lines[place],
            f"{first!r} is no image, and {table.labels[place]!r} is the label of no other row: these seem to be names of columns",
            fix="Name the columns path and label, or delete the line",
        )


def _matched(table: LabelsTable, shards: Sequence[SourceShard[Any]], where: object) -> list[Sequence[int]]:
    """Return the position of each image's label in `labels`, for every shard in order of its keys.

    Raises:
        SourceError: an image has no row.
    """
    used: set[str] = set()
    missing: list[str] = []
    by_name = _by_file_name(table, shards)
    found = []
    for shard in shards:
        places = array(LABEL_TYPE)
        for key in shard.keys:
            row = key if key in table.rows else by_name.get(_file_name(key), "")
            if row in table.rows:
                used.add(row)
                places.append(table.rows[row])
            else:
                missing.append(key)
        found.append(places)
    images = sum(map(len, shards))
    if missing:
        raise SourceError(
            f"{table.file}: {len(missing):,} of {count(images, 'image')} of {where} have no row, the first is"
            f" {missing[0]!r}; the file has {next(iter(table.rows))!r}",
            fix="Add their rows: the path of the image, and its label or nothing",
        )
    if unused := len(table.rows) - len(used):
        first = next(row for row in table.rows if row not in used)
        _refuse_header(table, first)
        message = "%s: %d of %d rows name no image of %s, the first is %r"
        warn_counted(
            log, "labels files with rows without an image", message, table.file, unused, len(table.rows), where, first
        )
    return found


def _by_file_name(table: LabelsTable, shards: Sequence[SourceShard[Any]]) -> dict[str, str]:
    """Return the row of each file name that is unique among the rows and among the images; empty if keys suffice."""
    if all(key in table.rows for shard in shards for key in shard.keys):
        return {}
    images = Counter(_file_name(key) for shard in shards for key in shard.keys)
    rows = Counter(map(_file_name, table.rows))
    names = ((_file_name(row), row) for row in table.rows)
    return {name: row for name, row in names if rows[name] == 1 and images[name] == 1}


def _file_name(path: str) -> str:
    return path.rpartition("/")[2]
