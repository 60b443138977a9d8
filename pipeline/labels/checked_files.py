"""Checked reading of a label set: each file is read whole, checked against manifest and plan, then parsed from the same bytes."""

import contextlib
import hashlib
import os
import stat
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import (
    LabelSetCorrupt,
    LabelSetError,
    LabelSetMismatch,
    RemoteFileCorrupt,
    RemoteFileMissing,
    SourceError,
    StorageError,
)
from pipeline.images.samples import keys_sha256
from pipeline.labels.encoding import LabelRows
from pipeline.labels.format import MANIFEST_NAME, REMOTE_FILE, damaged_file, missing_file
from pipeline.labels.manifest import FileEntry, Manifest, Plan, read_probes, short
from pipeline.labels.tables import (
    Contents,
    LabelsFooter,
    SampleRows,
    contents_of,
    read_labels_footer,
    read_samples,
    read_samples_footer,
    read_views,
)
from pipeline.storage.atomic import refusals_named
from pipeline.storage.json import load_json
from pipeline.storage.place import File, Place
from pipeline.storage.remote import Promise
from pipeline.text import check_name

RECENT_BYTES = 16 << 20  # verified files kept in memory; the last file is kept even if it is larger
USABLE_BYTES = 16 << 20  # usable rows kept in memory; ImageNet's take 5 MB


class CheckedFiles:
    """Reader of the files of a label set. It is small, and can be sent to worker processes.

    A file is read once into memory, its length and SHA-256 are checked against the manifest, and rows are parsed from the
    same bytes: nothing can change between check and use. The last few files stay in memory, because views of one source shard
    are read in a row. Each thread needs its own copy (`copy.copy`), which starts with no files in memory.
    """

    def __init__(self, place: Place, plan: Plan, manifest: Manifest) -> None:
        self._place, self._plan, self._manifest = place, plan, manifest
        self._recent: OrderedDict[FileEntry, _Read] = OrderedDict()
        self._usable: OrderedDict[str, NDArray[np.uint32]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_recent": OrderedDict(), "_usable": OrderedDict()}

    def file(self, entry: FileEntry) -> File:
        """Return a file of the set, with its length and hash from the manifest."""
        return self._place.file(entry.path, Promise(entry.bytes, entry.sha256))

    def read(self, entry: FileEntry) -> Contents:
        """Return a file's bytes after checking their length and SHA-256.

        Raises:
            LabelSetCorrupt: the file is missing, or has another length or other bytes.
        """
        return self._read(entry).contents

    def samples(self, entry: FileEntry) -> SampleRows:
        """Read the samples of a source shard, and check them against the plan's hash of keys and class labels."""
        file = self.read(entry)
        samples = checked_samples(file, self._plan, entry.shard)
        check_num_samples(file, samples, entry)
        self._keep_usable(entry.shard, samples.usable.astype(np.uint32))
        return samples

    def labels(self, entry: FileEntry, view: int, samples: FileEntry) -> LabelRows:
        """Read the labels of one view of a source shard: one row for each usable sample, in row order.

        Args:
            entry: the label shard.
            view: view number.
            samples: the samples file of the source shard.
        """
        usable = self._usable.get(samples.shard)
        if usable is None:
            usable = self.samples(samples).usable
        read = self._read(entry)
        if read.views is None:
            footer = checked_labels_footer(read.contents, self._plan, entry.shard, entry.views)
            check_num_rows(read.contents, footer, entry)
            read.views = ViewsInOrder(read.contents)
        rows = read.views.read(view)
        check_rows(read.contents, view, rows, usable, block=entry.views)
        return rows

    def _keep_usable(self, shard: str, usable: NDArray[np.uint32]) -> None:
        self._usable[shard] = usable
        self._usable.move_to_end(shard)
        while len(self._usable) > 1 and sum(each.nbytes for each in self._usable.values()) > USABLE_BYTES:
            self._usable.popitem(last=False)

    def _read(self, entry: FileEntry) -> "_Read":
        if (unchanged := self._unchanged(entry)) is not None:
            return unchanged
        file = self.file(entry)
        if file.path is not None:
            check_length(file, entry, self._place)
            with refusals_named(file.path):
                return self._read_checked(entry, file, file.path)
        try:
            with contextlib.suppress(LabelSetCorrupt):
                return file.use(lambda path: self._read_checked(entry, file, path))
            file.discard()  # the download was correct, so its copy on this disk was damaged later
            return file.use(lambda path: self._read_checked(entry, file, path))
        except (RemoteFileMissing, RemoteFileCorrupt) as error:
            raise LabelSetCorrupt(error.what, fix=f"{REMOTE_FILE}{self._newer_manifest()}") from error

    def _unchanged(self, entry: FileEntry) -> "_Read | None":
        """Return a local file from memory if it is unchanged on disk; most reads end here."""
        read = self._recent.get(entry)
        if read is None or not read.state:
            return None
        try:
            found = os.stat(read.contents.name)
        except OSError:
            return None
        self._recent.move_to_end(entry)
        return read if read.state == _state(found) else None

    def _read_checked(self, entry: FileEntry, file: File, path: Path) -> "_Read":
        with path.open("rb") as opened:
            found = os.fstat(opened.fileno())
            # The bytes in memory stay correct if a cached copy changes; a local file of the set that changes must be reported.
            state = () if file.path is None else _state(found)
            read = self._recent.get(entry)
            if read is None or read.state != state:
                with fits_in_memory(file):
                    read = _Read(state, Contents(str(file), opened.read()))
                self._check_bytes(entry, read.contents)
                self._recent[entry] = read
        self._recent.move_to_end(entry)
        while len(self._recent) > 1 and sum(len(r.contents.data) for r in self._recent.values()) > RECENT_BYTES:
            self._recent.popitem(last=False)
        return read

    def _check_bytes(self, entry: FileEntry, file: Contents) -> None:
        found = hashlib.sha256(file.data).hexdigest()
        if found != entry.sha256 or len(file.data) != entry.bytes:
            self._recent.pop(entry, None)
            raise LabelSetCorrupt(
                f"{file} has SHA-256 {short(found)}…, the manifest says {short(entry.sha256)}…: it is damaged",
                fix=f"{damaged_file(entry.views)}{self._newer_manifest()}",
            )

    def _newer_manifest(self) -> str:
        """Return a message if the set was changed since it was opened, and an empty text otherwise."""
        try:
            data = (self._place / MANIFEST_NAME).read()
            found = load_json(data or b"{}", MANIFEST_NAME)["content_sha256"]
        except (StorageError, KeyError, TypeError):
            return ""
        opened = self._manifest.content_sha256
        if found == opened:
            return ""
        return f" (the manifest has changed since it was opened: its content_sha256 was {short(str(opened))}…, now it is {short(str(found))}…)"


class ViewsInOrder:
    """Reader of the views of one label shard; reading in order is faster, because later views are read ahead.

    Each read covers twice as many views as the one before, so few views are read in vain.
    """

    def __init__(self, file: Contents) -> None:
        self._file = file
        self._next, self._at_once = -1, 1
        self._ahead: dict[int, LabelRows] = {}

    def read(self, view: int) -> LabelRows:
        """Read one view; `tables.read_views` lists the checks."""
        rows = self._ahead.pop(view, None)
        if rows is None:
            self._at_once = 2 * self._at_once if view == self._next else 1
            rows, *later = read_views(self._file, view, self._at_once)
            self._ahead = dict(enumerate(later, view + 1))
        self._next = view + 1
        return rows


@dataclass
class _Read:
    """A file in memory.

    Attributes:
        state: identity and dates of the local file that was read; empty for a remote file.
        contents: the checked bytes.
        views: reader of a label shard whose footer was checked; None before that check.
    """

    state: tuple[int, ...]
    contents: Contents
    views: ViewsInOrder | None = None


def _state(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@contextlib.contextmanager
def fits_in_memory(file: object) -> Iterator[None]:
    """Raise an error that names the file if memory is too small: a sparse file may claim any length."""
    try:
        yield
    except MemoryError as error:
        raise LabelSetError(f"{file} cannot be read: there is not enough memory for it") from error


def check_length(file: File, entry: FileEntry, place: Place) -> None:
    """Raise LabelSetCorrupt unless a file of a local set exists, is inside the set, and has the promised length.

    The length of a remote file is checked when it is read.
    """
    if file.path is None or place.path is None:
        return
    if not file.path.resolve().is_relative_to(place.path.resolve()):
        raise LabelSetCorrupt(f"{file} points outside the label set")
    if not file.path.is_file():
        raise LabelSetCorrupt(f"{file} is missing, but the manifest promises it", fix=missing_file(entry.views))
    size = file.path.stat().st_size
    if size != entry.bytes:
        raise LabelSetCorrupt(
            f"{file} has {size} bytes, the manifest says {entry.bytes}: it was cut or changed",
            fix=damaged_file(entry.views),
        )


def check_lengths(entries: Iterable[FileEntry], place: Place) -> None:
    """Check the length of many files as `check_length` does; the folder of a file is looked at once, not once for each file.

    Raises:
        LabelSetCorrupt: a file is missing, outside the set, or has another length.
    """
    if place.path is None:
        return
    inside: set[str] = set()
    root, real_root = str(place.path), os.path.realpath(place.path)
    for entry in entries:
        name = f"{root}/{entry.path}"
        folder = os.path.dirname(name)
        if folder not in inside and _is_inside(os.path.realpath(folder), real_root):
            inside.add(folder)
        try:
            found = os.lstat(name)
        except (OSError, ValueError):
            found = None
        plain = found is not None and stat.S_ISREG(found.st_mode) and found.st_size == entry.bytes
        if not plain or folder not in inside:
            check_length(place.file(entry.path), entry, place)  # a link, or the error


def _is_inside(path: str, root: str) -> bool:
    return Path(path).is_relative_to(root)


def check_num_samples(file: object, samples: SampleRows, entry: FileEntry) -> None:
    """Raise LabelSetCorrupt unless a samples file has as many rows as the manifest says."""
    if len(samples) != entry.rows:
        raise LabelSetCorrupt(f"{file} has {len(samples)} rows, the manifest says {entry.rows}")


def check_num_rows(file: object, footer: LabelsFooter, entry: FileEntry) -> None:
    """Raise LabelSetCorrupt unless a label shard has as many rows as the manifest says."""
    if footer.rows_per_view * len(entry.views) != entry.rows:
        raise LabelSetCorrupt(
            f"{file} has {footer.rows_per_view} rows per view, the manifest says {entry.rows} in total"
        )


def check_rows(file: object, view: int, rows: LabelRows, usable: NDArray[np.integer[Any]], *, block: range) -> None:
    """Raise LabelSetCorrupt unless a view has one row for each usable sample of its source shard.

    Args:
        file: the label shard, for the error.
        view: view number.
        rows: its labels.
        usable: rows of the usable samples, integer [N], ascending.
        block: views of the label shard, for the error.
    """
    if not np.array_equal(rows.row, usable):
        raise LabelSetCorrupt(
            f"{file}: view {view} does not have the usable rows of its samples file", fix=damaged_file(block)
        )


def checked_samples(file: Path | Contents, plan: Plan, shard: str) -> SampleRows:
    """Read the samples file of a source shard of this label set, and return its samples.

    Raises:
        LabelSetMismatch: the file belongs to another label set or source shard, or its keys or class labels do not fit the plan.
        LabelSetCorrupt: a key or class label is impossible for a source.
    """
    record, file = plan.shard(shard), contents_of(file)  # read once: the footer and the rows are of the same bytes
    footer = read_samples_footer(file)
    expected = (plan.labelset_id, plan.source_id, shard)
    _check_identity(file, expected, (footer.labelset_id, footer.source_id, footer.shard))
    samples = read_samples(file)
    if keys_sha256(samples.key, samples.class_label) != record.keys_sha256 or len(samples) != record.num_samples:
        raise LabelSetMismatch(f"{file}: its keys and class labels do not match the plan for {shard!r}")
    _check_sample_values(samples, plan.teacher.num_classes, file)
    return samples


def _check_sample_values(samples: SampleRows, num_classes: int, file: Path | Contents) -> None:
    """Refuse keys and labels that no source can have: they would reach terminals, paths of other tools, or a loss."""
    if len(set(samples.key)) != len(samples):
        key = next(key for key, count in Counter(samples.key).items() if count > 1)
        raise LabelSetCorrupt(f"{file}: the key {key!r} occurs twice")
    try:
        for key in samples.key:
            check_name(key, "sample key")
    except SourceError as error:
        raise LabelSetCorrupt(f"{file}: {error}") from error
    for row, label in enumerate(samples.class_label):
        if label is not None and not 0 <= label < num_classes:
            raise LabelSetCorrupt(f"{file}: row {row}: class label must be in 0..{num_classes - 1}, got {label}")


def checked_labels_footer(file: Path | Contents, plan: Plan, shard: str, views: range) -> LabelsFooter:
    """Return the footer of a label shard; raise LabelSetError if it does not match the plan and the file's path."""
    footer = read_labels_footer(file)
    expected_ids = (plan.labelset_id, plan.recipe_id, plan.teacher_id, plan.source_id, shard)
    _check_identity(
        file, expected_ids, (footer.labelset_id, footer.recipe_id, footer.teacher_id, footer.source_id, footer.shard)
    )
    found = (footer.view_start, footer.view_stop, footer.num_classes, footer.topk, footer.precision)
    expected = (views.start, views.stop, plan.teacher.num_classes, plan.topk, plan.precision)
    if found != expected:
        raise LabelSetMismatch(
            f"{file} says (views, classes, K, precision) {found}, its path and the plan say {expected}"
        )
    samples = plan.shard(shard).num_samples
    if footer.rows_per_view > samples:
        raise LabelSetCorrupt(
            f"{file} says {footer.rows_per_view} rows per view, its source shard has {samples} samples"
        )
    read_probes(footer.probes, file)
    return footer


def _check_identity(file: Path | Contents, expected: tuple[str, ...], found: tuple[str, ...]) -> None:
    """Compare label set id, further ids, and the name of the source shard, which comes last."""
    if expected != found:
        is_other = (expected[0], expected[-1]) != (found[0], found[-1])
        raise LabelSetMismatch(
            f"{file} belongs to {found[-1]!r} of label set {short(found[0])}, not to {expected[-1]!r} of {short(expected[0])}"
            + ("" if is_other else ": its recipe, teacher or source id differs")
        )
