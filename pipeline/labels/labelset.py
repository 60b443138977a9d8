"""LabelSet: open a label set, refuse what does not fit, read its rows in order."""

import contextlib
import dataclasses
import hashlib
import itertools
import os
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.errors import (
    LabelSetCorrupt,
    LabelSetError,
    LabelSetIncomplete,
    LabelSetMismatch,
    RemoteFileCorrupt,
    RemoteFileMissing,
    SourceError,
    StorageError,
    UsageError,
)
from pipeline.images.samples import keys_sha256
from pipeline.images.source import Source, open_source
from pipeline.images.tars import TarShard
from pipeline.labels.comparing import Comparison, Listing, compare_names
from pipeline.labels.encoding import LabelRows
from pipeline.labels.format import (
    DAMAGED_PLAN,
    IMAGES_FOLDER,
    INCOMPLETE_SET,
    MANIFEST_NAME,
    PLAN_NAME,
    REMOTE_FILE,
    check_pin,
    damaged_file,
    missing_file,
)
from pipeline.labels.manifest import (
    IMPORT_NAME,
    FileEntry,
    Plan,
    ShardRecord,
    SourceRecord,
    parse_manifest,
    parse_plan,
    read_probes,
    refusal,
    shards_of,
    short,
)
from pipeline.labels.tables import (
    Contents,
    LabelsFooter,
    SampleRows,
    read_labels_footer,
    read_samples,
    read_samples_footer,
    read_view,
)
from pipeline.storage.atomic import refusals_named
from pipeline.storage.cache import RemoteFile, RemoteFolder, ShardCache, open_cache, read_local
from pipeline.storage.json import MAX_JSON_BYTES, canonical_json, load_json, read_small
from pipeline.storage.remote import read_url
from pipeline.storage.urls import is_url, join_url
from pipeline.text import check_name
from pipeline.views.recipe import Recipe

RECENT_BYTES = 16 << 20  # of verified files that an object keeps in memory, and the last one whatever its size


class LabelSet:
    """A sealed label set, opened for reading. It is small, and can be sent to worker processes.

    A file is read once into memory, its length and SHA-256 are checked against the manifest, and rows are parsed from
    those very bytes: nothing can change between check and use.

    Attributes:
        folder: where it lies: a path, or a URL with the cache that it is read through. As text, what the user passed.
        manifest_sha256: of the very bytes of `manifest.json` that were parsed: what a pin names.
    """

    def __init__(self, folder: Path | RemoteFolder, *, expect_manifest: str | None = None) -> None:
        """Open a folder; use `LabelSet.open`, which refuses sets that are not complete."""
        plan = _read_part(folder, PLAN_NAME)
        if plan is None:
            if (found := _read_part(folder, IMPORT_NAME)) is not None:
                raise LabelSetMismatch(refusal(found, folder))
            raise LabelSetError(
                f"{folder} is not a label set: it has no {PLAN_NAME}",
                fix="Make one with: deit-cli precompute",
            )
        manifest = _read_part(folder, MANIFEST_NAME)
        if manifest is None:
            raise LabelSetIncomplete(f"{folder} has no {MANIFEST_NAME}", fix=INCOMPLETE_SET)
        self.folder = folder
        self.manifest_sha256 = hashlib.sha256(manifest).hexdigest()
        check_pin(expect_manifest, self.manifest_sha256, folder / MANIFEST_NAME)
        self.plan = parse_plan(plan, folder / PLAN_NAME)
        self.manifest = parse_manifest(manifest, folder / MANIFEST_NAME, plan_sha256=hashlib.sha256(plan).hexdigest())
        if self.manifest.labelset_id != self.plan.labelset_id:
            mine, theirs = short(self.plan.labelset_id), short(self.manifest.labelset_id)
            raise LabelSetMismatch(
                f"{folder}: {PLAN_NAME} is of label set {mine}, {MANIFEST_NAME} of {theirs}", fix=DAMAGED_PLAN
            )
        self._records = {record.name: record for record in shards_of(self.manifest, self.plan, folder / MANIFEST_NAME)}
        self._entries = {(e.kind, e.shard, e.view_start): e for e in self.manifest.files}
        self._recent: OrderedDict[FileEntry, tuple[Any, Contents]] = OrderedDict()

    @classmethod
    def open(
        cls,
        location: str | os.PathLike[str],
        *,
        cache: ShardCache | None = None,
        expect_manifest: str | None = None,
    ) -> "LabelSet":
        """Open a complete label set; of a local one, check that every promised file is there with its length.

        Args:
            location: a folder, or the URL of one. Plan and manifest of a URL are read as they are now.
            cache: through which the other files of a URL are read; None: the default one.
            expect_manifest: pin, `sha256:` and the hash that `manifest.json` must have; None: any.

        Raises:
            LabelSetIncomplete: it is not sealed.
            LabelSetCorrupt: a file is missing or has another length.
            LabelSetMismatch: it is of another format version, its parts do not belong together, or it is not the pinned one.
        """
        text = os.fspath(location)
        folder = RemoteFolder(text, cache or open_cache()) if is_url(text) else Path(text)
        label_set = cls(folder, expect_manifest=expect_manifest)
        label_set.check_complete()
        for entry in label_set.manifest.files:
            if isinstance(label_set.folder, Path):
                check_length(label_set.folder / entry.path, entry, label_set.folder)
        return label_set

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_recent": OrderedDict()}

    @property
    def recipe(self) -> Recipe:
        """The augmentation that made the views."""
        return self.plan.recipe

    @property
    def num_classes(self) -> int:
        """C, the teacher's classes."""
        return self.plan.teacher.num_classes

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes in label order, where source or teacher knows them."""
        return self.plan.source.class_names or self.plan.teacher.class_names

    @property
    def shards(self) -> tuple[str, ...]:
        """Names of the source shards that are here, in order: all of the plan's, or some."""
        return tuple(self._records)

    @property
    def num_samples(self) -> int:
        """Samples of these source shards, the bad ones too."""
        return sum(record.num_samples for record in self._records.values())

    @property
    def views(self) -> range:
        """The view numbers that every sample has."""
        blocks = sorted(self.manifest.view_blocks)
        return range(blocks[0][0], blocks[-1][1]) if blocks else range(0)

    def samples(self, shard: str) -> SampleRows:
        """Read the samples of a source shard, and check them against the plan's hash of keys and class labels."""
        entry = self._entry("samples", shard, 0)
        file = self.read_file(entry)
        samples = checked_samples(file, self.plan, self._records[shard])
        if len(samples) != entry.rows:
            raise LabelSetCorrupt(f"{file.name} has {len(samples)} rows, the manifest says {entry.rows}")
        return samples

    def read(self, shard: str, view: int) -> LabelRows:
        """Read the labels of one view of a source shard, in row order."""
        entry = self._labels_entry(shard, view)
        file = self.read_file(entry)
        self._check_footer(entry, file)
        return read_view(file, view)

    def remote_files(self, shard: str, view: int | None = None) -> tuple[RemoteFile, ...]:
        """Return the remote files that samples (and, with a view, labels) of a source shard are read from.

        They are what `cache.prefetch` takes; a local set has none.
        """
        entries = [self._entry("samples", shard, 0)] + ([] if view is None else [self._labels_entry(shard, view)])
        return tuple(file for file in map(self.file_of, entries) if isinstance(file, RemoteFile))

    def check_source(self, source: Source) -> None:
        """Raise LabelSetMismatch unless these are the keys, class labels and class names that were labelled.

        Where the set holds some source shards only, a source of these alone will do, and one that has others too. The
        keys of a remote source would cost a download of all of it, so there names of shards and classes are compared,
        and keys and bytes image by image when they are used.
        """
        source = self.labelled_part(source)
        mine, theirs = tuple(self._records.values()), None if source.is_remote else record_of(source)
        classes, names = self.plan.source.class_names, tuple(shard.name for shard in source.shards)
        same = (source.class_names, names) == (classes, self.shards)
        if same and (theirs is None or theirs.shards == mine):
            return
        differences = [
            compare_names("class", classes, source.class_names),
            compare_names("shard", self.shards, names),
            *([] if theirs is None else self._compare_keys(source, theirs)),
        ]
        other = "" if theirs is None or self.manifest.shards is not None else f" (id {short(theirs.id)})"
        raise LabelSetMismatch(
            f"{self.folder} labels source {short(self.plan.source_id)}, {source.location}{other} is"
            f" another: {'; '.join(filter(None, differences))}",
            fix="Pass the --data that was labelled",
        )

    def _compare_keys(self, source: Source, theirs: SourceRecord) -> list[str]:
        """Say which samples of a local source differ, reading only the samples files of source shards that do."""
        comparison = Comparison()
        others = {record.name: record for record in theirs.shards}
        for name in dict.fromkeys((*self._records, *others)):
            if self._records.get(name) != others.get(name):
                table = self.samples(name) if name in self._records else None
                shard = source.shard(name) if name in others else None
                comparison.add(
                    name,
                    Listing(table.key, table.class_label) if table else Listing(),
                    Listing(shard.keys, shard.class_labels) if shard else Listing(),
                )
        return comparison.result().describe(limit=3)

    def labelled_part(self, source: Source) -> Source:
        """Return what the labels are of: the source, or those shards of it that are here if these are only some.

        Raises:
            LabelSetMismatch: it lacks one of those.
        """
        if self.manifest.shards is None:
            return source
        found = {shard.name for shard in source.shards}
        if lacking := [name for name in self.shards if name not in found]:
            raise LabelSetMismatch(
                f"{self.folder} labels {len(self.shards)} source shards, and {source.location} lacks"
                f" {len(lacking)} of them, such as {lacking[0]!r}",
                fix="Pass the --data that was labelled, or the part of it that has these",
            )
        return source.only(self.shards)

    @property
    def has_images(self) -> bool:
        """Whether it is self-contained: the images that were labelled are in it."""
        return any(entry.kind == "images" for entry in self.manifest.files)

    def open_source(self, data: str | None = None, *, cache: ShardCache | None = None) -> Source:
        """Open the images: those at `data`, or else the set's own, or else those where it found them.

        Args:
            data: a source, which goes before all others; None: there is none.
            cache: through which a remote `data` is read; None: the default one.
        """
        if data is None and self.has_images:
            return self._own_images()
        return open_source(self.images_location() if data is None else data, cache=cache)

    def images_location(self) -> str:
        """Return where the set found its images.

        Raises:
            UsageError: behind a URL, which a stranger may have written into the plan.
        """
        location = self.plan.source.location
        if is_url(location):
            raise UsageError(
                f"{self.folder} was labelled from {location}. A label set may be a stranger's, so its URLs are not opened"
                f" unasked: pass --data {location}, or a copy of it"
            )
        return location

    def _own_images(self) -> Source:
        names = self.plan.source.class_names
        shards = tuple(
            TarShard(name, self.file_of(self._entry("images", name, 0)), None if names is None else len(names))
            for name in self.shards
        )
        folder = self.folder
        parent = f"{folder}/{IMAGES_FOLDER}" if isinstance(folder, Path) else join_url(folder.url, IMAGES_FOLDER)
        return Source(parent, "tar", names, shards)

    def read_file(self, entry: FileEntry) -> Contents:
        """Return a file's bytes after checking their length and SHA-256.

        The last few stay in memory, for views of one shard that are read in a row, as long as the file stays the same.

        Raises:
            LabelSetCorrupt: the file is missing, has another length, or other bytes.
        """
        if (unchanged := self._unchanged(entry)) is not None:
            return unchanged
        file = self.file_of(entry)
        if isinstance(file, Path):
            check_length(file, entry, self.folder)
            with refusals_named(file):
                return self._read_checked(entry, file, file)
        try:
            with contextlib.suppress(LabelSetCorrupt):
                return read_local(file, lambda path: self._read_checked(entry, file, path))
            file.discard()  # it was sound when it was downloaded: its copy was damaged on this disk since
            return read_local(file, lambda path: self._read_checked(entry, file, path))
        except (RemoteFileMissing, RemoteFileCorrupt) as error:
            raise LabelSetCorrupt(error.what, fix=f"{REMOTE_FILE}{self._newer_manifest()}") from error

    def _unchanged(self, entry: FileEntry) -> Contents | None:
        """Return a file of this disk that is in memory, if it is still the one that was read: most reads end here."""
        kept, contents = self._recent.get(entry, (None, None))
        if not kept or contents is None:
            return None
        try:
            found = os.stat(contents.name)
        except OSError:
            return None
        self._recent.move_to_end(entry)
        return contents if kept == _state(found) else None

    def _read_checked(self, entry: FileEntry, name: Path | RemoteFile, path: Path) -> Contents:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            # Bytes in memory stay right whatever happens to a cached copy; a file of ours that changes is to be named.
            state = _state(stat) if name is path else ()
            kept, contents = self._recent.get(entry, (None, None))
            if contents is None or kept != state:
                with fits_in_memory(name):
                    contents = Contents(str(name), file.read())
                self._check_bytes(entry, contents)
                self._recent[entry] = state, contents
        self._recent.move_to_end(entry)
        while len(self._recent) > 1 and sum(len(c.data) for _, c in self._recent.values()) > RECENT_BYTES:
            self._recent.popitem(last=False)
        return contents

    def _check_bytes(self, entry: FileEntry, file: Contents) -> None:
        found = hashlib.sha256(file.data).hexdigest()
        if found != entry.sha256 or len(file.data) != entry.bytes:
            self._recent.pop(entry, None)
            raise LabelSetCorrupt(
                f"{file} has SHA-256 {short(found)}…, the manifest says {short(entry.sha256)}…: it is damaged",
                fix=f"{damaged_file(entry.views)}{self._newer_manifest()}",
            )

    def _newer_manifest(self) -> str:
        """Return what to say where the set was changed since it was opened: nothing if it was not."""
        try:
            data = _read_part(self.folder, MANIFEST_NAME)
            found = load_json(data or b"{}", MANIFEST_NAME)["content_sha256"]
        except (StorageError, KeyError, TypeError):
            return ""
        if found == self.manifest.content_sha256:
            return ""
        mine, now = short(str(self.manifest.content_sha256)), short(str(found))
        return f" (the manifest has changed since it was opened: its content was {mine}…, now it is {now}…)"

    def file_of(self, entry: FileEntry) -> Path | RemoteFile:
        """Return where a file lies, with what the manifest promises of it."""
        file = self.folder / entry.path
        if isinstance(file, Path):
            return file
        return dataclasses.replace(file, size=entry.bytes, sha256=entry.sha256)

    def _entry(self, kind: str, shard: str, view_start: int) -> FileEntry:
        try:
            return self._entries[kind, shard, view_start]
        except KeyError:
            raise LabelSetCorrupt(
                f"{self.folder}: the manifest lists no {kind} of {shard!r} from view {view_start}"
            ) from None

    def _labels_entry(self, shard: str, view: int) -> FileEntry:
        block = next((b for b in self.manifest.view_blocks if b[0] <= view < b[1]), None)
        if block is None:
            raise LabelSetMismatch(f"{self.folder} holds views {self.views.start}..{self.views.stop - 1}, not {view}")
        return self._entry("labels", shard, block[0])

    def check_complete(self) -> None:
        """Raise unless the set is sealed: it holds the samples of every source shard of it, and labels for every block."""
        if not self.manifest.sealed:
            raise LabelSetIncomplete(
                f"{self.folder} is not sealed: some of its labels do not exist yet", fix=INCOMPLETE_SET
            )
        blocks = sorted(self.manifest.view_blocks)
        if not blocks:
            raise LabelSetIncomplete(f"{self.folder} holds no views")
        if any(a[1] != b[0] for a, b in itertools.pairwise(blocks)):
            raise LabelSetIncomplete(
                f"{self.folder}: its views {blocks} have a gap",
                fix="Compute the missing ones with --views",
            )
        wanted = len(self.shards) * (1 + len(blocks))
        if wanted > 1000 + 2 * len(self.manifest.files):  # two long lists have a product that no memory holds
            raise LabelSetCorrupt(
                f"{self.folder}: the sealed manifest lists {len(self.manifest.files)} files, {len(self.shards)} source"
                f" shards and {len(blocks)} blocks of views need {wanted}"
            )
        expected = {("samples", name, 0, 0) for name in self.shards}
        if self.has_images:
            expected |= {("images", name, 0, 0) for name in self.shards}
        expected |= {("labels", name, start, stop) for name in self.shards for start, stop in blocks}
        found = {(e.kind, e.shard, e.view_start, e.view_stop) for e in self.manifest.files}
        for what, difference in (("lacks", expected - found), ("has an unknown", found - expected)):
            if difference:
                kind, shard, *_ = sorted(difference)[0]
                raise LabelSetCorrupt(f"{self.folder}: the sealed manifest {what} {kind} file of {shard!r}")

    def _check_footer(self, entry: FileEntry, file: Contents) -> None:
        views = range(entry.view_start, entry.view_stop)
        footer = checked_labels_footer(file, self.plan, entry.shard, views)
        if footer.rows_per_view * len(views) != entry.rows:
            raise LabelSetCorrupt(
                f"{file} has {footer.rows_per_view} rows a view, the manifest says {entry.rows} in all"
            )


@contextlib.contextmanager
def fits_in_memory(file: object) -> Iterator[None]:
    """Name the file that is read as a whole where there is no room for it: its length may be that of a hole."""
    try:
        yield
    except MemoryError as error:
        raise LabelSetError(f"{file} cannot be read: there is not enough memory for it") from error


def _state(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def check_length(path: Path, entry: FileEntry, folder: Path | RemoteFolder) -> None:
    """Raise LabelSetCorrupt unless a file of a local set is there, in it, and as long as promised."""
    if not path.resolve().is_relative_to(Path(str(folder)).resolve()):
        raise LabelSetCorrupt(f"{path} points outside the label set")
    if not path.is_file():
        raise LabelSetCorrupt(f"{path} is missing, but the manifest promises it", fix=missing_file(entry.views))
    size = path.stat().st_size
    if size != entry.bytes:
        raise LabelSetCorrupt(
            f"{path} has {size} bytes, the manifest says {entry.bytes}: it was cut or changed",
            fix=damaged_file(entry.views),
        )


def _read_part(folder: Path | RemoteFolder, name: str) -> bytes | None:
    """Return the bytes of the plan or the manifest as they are now, or None where there is none."""
    file = folder / name
    if isinstance(file, RemoteFile):
        try:
            return read_url(file.url, max_bytes=MAX_JSON_BYTES)
        except RemoteFileMissing:
            return None
    return read_small(file) if os.path.isfile(file) else None


def record_of(source: Source) -> SourceRecord:
    """Return what plan and manifest say of a source."""
    location = source.location if is_url(source.location) else os.path.abspath(source.location)
    record = source.identity() | {"kind": source.kind, "location": location}
    try:
        return SourceRecord.model_validate_json(canonical_json(record))
    except (ValidationError, UnicodeEncodeError) as error:
        raise SourceError(
            f"{source.location!r} cannot be named in a label set: {' '.join(str(error).split())[:200]}"
        ) from error


def checked_samples(file: Path | Contents, plan: Plan, record: ShardRecord) -> SampleRows:
    """Read a samples file of this label set.

    Raises:
        LabelSetMismatch: it is of another label set or source shard, or its keys or class labels are not the plan's.
        LabelSetCorrupt: a key or class label is one that no source can have.
    """
    footer = read_samples_footer(file)
    mine = (plan.labelset_id, plan.source_id, record.name)
    _check_identity(file, mine, (footer.labelset_id, footer.source_id, footer.shard))
    samples = read_samples(file)
    if keys_sha256(samples.key, samples.class_label) != record.keys_sha256 or len(samples) != record.num_samples:
        raise LabelSetMismatch(
            f"{file}: its keys and class labels are not those that the plan names for {record.name!r}"
        )
    _check_sample_values(samples, plan.teacher.num_classes, file)
    return samples


def _check_sample_values(samples: SampleRows, num_classes: int, file: Path | Contents) -> None:
    """Refuse what nobody can have indexed: it would end up in terminals, in paths of other tools, in a loss."""
    if len(set(samples.key)) != len(samples):
        key = next(key for key, count in Counter(samples.key).items() if count > 1)
        raise LabelSetCorrupt(f"{file}: the key {key!r} stands there twice")
    try:
        for key in samples.key:
            check_name(key, "sample key")
    except SourceError as error:
        raise LabelSetCorrupt(f"{file}: {error}") from error
    for row, label in enumerate(samples.class_label):
        if label is not None and not 0 <= label < num_classes:
            raise LabelSetCorrupt(f"{file}: row {row}: class label must be in 0..{num_classes - 1}, got {label}")


def checked_labels_footer(file: Path | Contents, plan: Plan, shard: str, views: range) -> LabelsFooter:
    """Read what a label shard says of itself, and refuse it unless all of that is what its place in the set says."""
    footer = read_labels_footer(file)
    mine = (plan.labelset_id, plan.recipe_id, plan.teacher_id, plan.source_id, shard)
    _check_identity(
        file, mine, (footer.labelset_id, footer.recipe_id, footer.teacher_id, footer.source_id, footer.shard)
    )
    found = (footer.view_start, footer.view_stop, footer.num_classes, footer.topk, footer.precision)
    expected = (views.start, views.stop, plan.teacher.num_classes, plan.topk, plan.precision)
    if found != expected:
        raise LabelSetMismatch(
            f"{file} says (views, classes, K, precision) {found}, its place in the set says {expected}"
        )
    samples = plan.shard(shard).num_samples
    if footer.rows_per_view > samples:
        raise LabelSetCorrupt(f"{file} says {footer.rows_per_view} rows a view, its source shard has {samples} samples")
    read_probes(footer.probes, file)
    return footer


def _check_identity(file: Path | Contents, mine: tuple[str, ...], found: tuple[str, ...]) -> None:
    """Compare label set id, further ids, and the name of the source shard, which comes last."""
    if mine != found:
        raise LabelSetMismatch(
            f"{file} says it is {found[-1]!r} of label set {short(found[0])}, not {mine[-1]!r} of {short(mine[0])}"
            + ("" if (mine[0], mine[-1]) != (found[0], found[-1]) else ": its recipe, teacher or source id differs")
        )
