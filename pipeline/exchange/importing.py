"""Import of labels that other projects published: into plain Parquet, with what is lost said in so many words.

Parts are made in the order of the files, each whole in memory before it is published under its name. import.json comes
last and is the commit. A killed import goes on when it is run again: parts that are there must be the very bytes that it
makes.
"""

import hashlib
import io
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import ImportedLabelsError, UsageError
from pipeline.exchange import fkd, tinyvit
from pipeline.exchange.imported import ForeignRows, Shape, write_part
from pipeline.labels.format import MAX_TOPK
from pipeline.labels.manifest import IMPORT_FORMAT, IMPORT_NAME, IMPORT_VERSION, Foreign, ImportRecord, PartRecord
from pipeline.machine.progress import Progress, Tick
from pipeline.storage.atomic import TEMPORARY_PREFIX, publish_file, refusals_named, sweep_temporaries
from pipeline.storage.json import pretty_json
from pipeline.storage.urls import local_path
from pipeline.text import byte_size, count

PART_BYTES = 64 * 2**20  # of rows in memory
KEY_BYTES = 100  # that a key may take there, about

ANY_LOSS = (
    "which teacher answered (its name, weights, input size and normalisation) is not recorded: ask who published the labels",
    "the temperature of the probabilities is not recorded; they stand as they were stored",
    "class names and their order are not recorded; classes are numbers",
    "no hash of the images is recorded: whether your copy has the same ones cannot be proved",
)
ANY_USE = (
    "look at what a teacher says: entropy, its most frequent classes, hard samples",
    "compare with other label sets of the same images, by key",
    "train with the program that made them, on the files that were imported",
)
IMAGE_USE: dict[Foreign, str] = {
    "fkd": "distil on the level of images: the mean over the crops of an image is a soft label that needs no crop",
    "tinyvit": "distil on the level of images, where its settings had no mixup and no CutMix: the mean over the epochs of an image",
}
LOSSES: dict[Foreign, tuple[str, ...]] = {
    "fkd": (
        "its random crops and flips are recorded, but not the pixels, nor how they were resized, so nothing proves that a view is the one that the teacher saw",
        "boxes are shares of the image's height and width; the sizes of the images are not recorded",
        "the class label of an image stands in its folder's name alone, and its file name was cut at the first point",
    ),
    "tinyvit": (
        "of a view nothing but the seed of TinyViT's own augmentation code is recorded, and neither that code's version nor its settings",
        "with mixup or CutMix, which its settings decide, the partner of a view follows from the sampler's order and is not recorded",
        "an epoch may have a key twice, from two ranks, because its sampler pads",
    ),
}
COLUMNS = {
    "key": "sample key",
    "view": "number of the crop (fkd) or of the epoch (tinyvit)",
    "hard": "the teacher's most probable class",
    "topk_index": "most probable classes, most probable first",
    "topk_prob": "their probabilities, as they were stored",
    "tail_mass": "1 minus the stored probabilities, at least 0; rounding of what was stored included",
    "crop_top": "top of the crop, as a share of the image's height",
    "crop_left": "left of the crop, as a share of the image's width",
    "crop_height": "height of the crop, as a share of the image's height",
    "crop_width": "width of the crop, as a share of the image's width",
    "flip": "whether the crop was flipped from left to right",
    "seed": "of TinyViT's augmentation code",
}

MORE: dict[Foreign, tuple[str, ...]] = {
    "fkd": ("crop_top", "crop_left", "crop_height", "crop_width", "flip"),
    "tinyvit": ("seed",),
}


@dataclass(frozen=True)
class Batch:
    """Some rows of one source file, and the group of tables that they go to."""

    group: str
    rows: ForeignRows


@dataclass(frozen=True)
class Reader:
    """Labels to import: how many files and bytes they are, and their rows."""

    files: int
    bytes: int
    batches: Iterator[Batch]


def import_labels(
    kind: Foreign,
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    num_classes: int,
    topk: int | None = None,
    progress: Progress = lambda _: None,
) -> ImportRecord:
    """Import published labels into a folder of Parquet files.

    Args:
        kind: their format.
        source: folder of them.
        destination: new folder, or the one that an interrupted import of the same labels left.
        num_classes: C; every class is checked against it.
        topk: classes to keep of each view; None: all that are stored.
        progress: is told how many source files are read.

    Raises:
        ImportedLabelsError: they are damaged, unsafe, or not in the layout of their format; or the destination holds
            something else.
    """
    _check_settings(num_classes, topk)
    path, out = (_local(place) for place in (source, destination))
    _check_out(out, path)
    sweep_temporaries(out)
    reader = _open_fkd(path, num_classes, progress) if kind == "fkd" else _open_tinyvit(path, num_classes, progress)
    tables = _Tables(kind, out, num_classes=num_classes, topk=topk)
    for batch in reader.batches:
        tables.add(batch)
    tables.flush()
    record = _record(kind, tables, reader)
    _publish(out / IMPORT_NAME, pretty_json(record.model_dump(mode="json")))
    return record


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
        raise ImportedLabelsError(f"{path} is no folder: pass the folder that holds the labels")
    if (out / IMPORT_NAME).exists():
        raise ImportedLabelsError(
            f"{out} holds an import already",
            fix="Choose another folder",
        )
    if out.resolve() == path.resolve():
        raise ImportedLabelsError(
            f"{out} is the folder of the labels themselves",
            fix="Choose another folder",
        )
    with refusals_named(out):
        names = {name for name in os.listdir(out) if not name.startswith(TEMPORARY_PREFIX)} if out.exists() else set()
    if names - {"labels"}:
        raise ImportedLabelsError(
            f"{out} is not empty and holds no import that was interrupted",
            fix="Choose another folder",
        )


def _open_fkd(path: Path, num_classes: int, progress: Progress) -> Reader:
    files = fkd.list_files(path)

    def read() -> Iterator[Batch]:
        began = time.monotonic()
        for done, file in enumerate(files, 1):
            yield Batch("part", fkd.read_file(file, path, num_classes=num_classes))
            progress(Tick("files", done, len(files), time.monotonic() - began, made=done, unit="files"))

    return Reader(len(files), _sizes(files), read())


def _open_tinyvit(path: Path, num_classes: int, progress: Progress) -> Reader:
    files = tinyvit.list_files(path)
    size = _sizes([path for file in files for path in (file.keys, file.values)])
    totals = [tinyvit.count_records(file) for file in files]

    def read() -> Iterator[Batch]:
        began, done = time.monotonic(), 0
        for file in files:
            for rows in tinyvit.read_rank(file, num_classes=num_classes):
                yield Batch(file.name, rows)
                done += len(rows)
                progress(Tick("records", done, sum(totals), time.monotonic() - began, made=done, unit="records"))

    return Reader(2 * len(files), size, read())


def _sizes(files: Iterable[Path]) -> int:
    total = 0
    for file in files:
        with refusals_named(file):
            total += file.stat().st_size
    return total


class _Tables:
    """Gathers rows into tables of bounded size, and publishes them.

    Attributes:
        shape: of all rows; None before the first.
        stored: classes that the source has for each view.
        parts: tables that were published.
        views: smallest and largest view number.
        keys_are_numbers: whether no key has anything but digits.
    """

    def __init__(self, kind: Foreign, out: Path, *, num_classes: int, topk: int | None) -> None:
        self._kind, self._out, self._num_classes, self._topk = kind, out, num_classes, topk
        self._group, self._number, self._held_bytes = "", 0, 0
        self._held: list[ForeignRows] = []
        self.shape: Shape | None = None
        self.stored = 0
        self.parts: list[PartRecord] = []
        self.views: tuple[int, int] | None = None
        self.keys_are_numbers = True

    def add(self, batch: Batch) -> None:
        """Take some rows; rows of another group go to another table."""
        rows = self._cut(batch.rows)
        if batch.group != self._group:
            self.flush()
            self._group, self._number = batch.group, 0
        self._held.append(rows)
        self._held_bytes += len(rows) * KEY_BYTES + rows.topk_index.nbytes + rows.topk_prob.nbytes
        low, high = int(rows.view.min()), int(rows.view.max())
        self.views = (low, high) if self.views is None else (min(low, self.views[0]), max(high, self.views[1]))
        self.keys_are_numbers = self.keys_are_numbers and all(key.isdecimal() for key in rows.key)
        if self._held_bytes >= PART_BYTES:
            self.flush()

    def _cut(self, rows: ForeignRows) -> ForeignRows:
        """Return rows with no more classes than were asked for; all rows must be of one kind."""
        stored = rows.topk_index.shape[1]
        topk = stored if self._topk is None else min(stored, self._topk)
        shape = Shape(self._num_classes, topk, rows.topk_prob.dtype.name)  # pyright: ignore[reportArgumentType]
        if topk > MAX_TOPK:
            raise ImportedLabelsError(
                f"{rows.key[0]!r} has probabilities of {stored} classes, at most {MAX_TOPK} are kept: pass --topk"
            )
        if self.shape is None:
            self.shape, self.stored = shape, stored
        if (shape, stored) != (self.shape, self.stored):
            raise ImportedLabelsError(
                f"{rows.key[0]!r} has {stored} classes a view in {shape.precision}, the labels before it have"
                f" {self.stored} in {self.shape.precision}: they are of two kinds",
                fix="Import them one by one",
            )
        return rows.first(topk)

    def flush(self) -> None:
        """Publish the rows that are held."""
        if not self._held:
            return
        assert self.shape is not None
        path = f"labels/{self._group}-{self._number:06d}.parquet"
        footer = {
            "format": IMPORT_FORMAT,
            "version": IMPORT_VERSION,
            "imported_from": self._kind,
            "num_classes": self._num_classes,
        }
        buffer = io.BytesIO()
        write_part(buffer, self._held, self.shape, footer)
        _publish(self._out / path, data := buffer.getvalue())
        digest = hashlib.sha256(data).hexdigest()
        rows = sum(map(len, self._held))
        self.parts.append(PartRecord(path=path, rows=rows, bytes=len(data), sha256=digest))
        self._held, self._held_bytes, self._number = [], 0, self._number + 1


def _publish(path: Path, data: bytes) -> None:
    """Give a table its name, unless an interrupted import has made the very same one."""

    def write(file: BinaryIO) -> None:
        file.write(data)

    if publish_file(path, write):
        return
    with refusals_named(path):
        found = path.read_bytes()
    if found != data:
        raise ImportedLabelsError(
            f"{path} was made from other labels, with other settings or by another pyarrow",
            fix="Choose another folder",
        )


def _record(kind: Foreign, tables: _Tables, reader: Reader) -> ImportRecord:
    assert tables.shape is not None
    assert tables.views is not None
    shape = tables.shape
    names = ["key", "view", "hard", *(["topk_index", "topk_prob", "tail_mass"] if shape.topk else []), *MORE[kind]]
    return ImportRecord(
        imported_from=kind,
        num_classes=shape.num_classes,
        topk=shape.topk,
        precision=shape.precision,
        rows=sum(part.rows for part in tables.parts),
        views=tables.views,
        source_files=reader.files,
        source_bytes=reader.bytes,
        lost=(*LOSSES[kind], *_further_losses(kind, tables), *ANY_LOSS),
        use=(*ANY_USE, IMAGE_USE[kind]),
        columns={name: COLUMNS[name] for name in names},
        files=tuple(tables.parts),
    )


def _further_losses(kind: Foreign, tables: _Tables) -> Iterator[str]:
    """Say what these very labels lack."""
    assert tables.shape is not None
    if tables.shape.topk < tables.stored:
        yield f"--topk kept {tables.shape.topk} of {tables.stored} classes a view, the others are in tail_mass"
    if not tables.stored:
        yield "only the most probable class was stored, without its probability"
    elif tables.stored < tables.shape.num_classes:
        yield f"of {tables.shape.num_classes} classes {tables.stored} were stored for each view; of the others only the sum is known"
    if tables.shape.precision == "float16":
        what = "probabilities and boxes" if kind == "fkd" else "probabilities"
        yield f"{what} were stored in float16: 11 significant bits, and tail_mass has the rounding of all of them"
    if tables.keys_are_numbers:
        yield "its keys are positions in somebody's list of images, which you need too"


def import_table(record: ImportRecord, out: str | os.PathLike[str]) -> str:
    """Return what an import made, what it cost, and what is lost, for people."""
    size = sum(part.bytes for part in record.files)
    kept = (
        f"K = {record.topk} of {record.num_classes} classes"
        if record.topk
        else f"hard labels of {record.num_classes} classes"
    )
    rows = [
        (
            "imported",
            f"{count(record.rows, 'label')} into {count(len(record.files), 'table')}: {os.fspath(out)}/labels",
        ),
        ("views", f"{record.views[0]}:{record.views[1] + 1}"),
        ("stored", f"{kept}, {record.precision}" if record.topk else kept),
        (
            "bytes a label",
            f"{record.source_bytes / record.rows:.1f} before ({byte_size(record.source_bytes)} in {count(record.source_files, 'file')}), {size / record.rows:.1f} now ({byte_size(size)})",
        ),
    ]
    lines = [f"{name:15}{text}" for name, text in rows]
    lines += ["no label set: it cannot be trained on. What is lost, or was never there:"]
    lines += [f"  - {loss}" for loss in record.lost]
    return "\n".join([*lines, "What it is good for:", *(f"  - {use}" for use in record.use)])
