"""LabelSet: a sealed label set, opened for reading: what it says, its rows in order, and its images."""

import copy
import hashlib
import os
from pathlib import Path
from typing import Any

from pipeline.errors import LabelSetCorrupt, LabelSetError, LabelSetIncomplete, LabelSetMismatch, UsageError
from pipeline.images.source import Source, open_source
from pipeline.images.tars import TarShard
from pipeline.labels.checked_files import CheckedFiles, check_length
from pipeline.labels.encoding import LabelRows
from pipeline.labels.format import (
    DAMAGED_PLAN,
    IMAGES_FOLDER,
    IMPORT_NAME,
    INCOMPLETE_SET,
    MANIFEST_NAME,
    PLAN_NAME,
    check_pin,
)
from pipeline.labels.manifest import (
    FileEntry,
    ShardRecord,
    parse_manifest,
    parse_plan,
    refuse_import,
    shards_of,
    short,
)
from pipeline.labels.sealing import check_complete
from pipeline.labels.tables import Contents, SampleRows
from pipeline.storage.cache import Cache
from pipeline.storage.place import File, Place, RemoteFile, open_place
from pipeline.storage.urls import local_path
from pipeline.views.recipe import Recipe


class LabelSet:
    """A sealed label set, opened for reading. It is small, and can be sent to worker processes.

    Attributes:
        place: the folder or URL where it lies. As text, what the user passed.
        plan: what it is: recipe, teacher, source.
        manifest: what is complete of it.
        manifest_sha256: hash of the very bytes of `manifest.json` that were parsed: what a pin names.
    """

    def __init__(self, place: Place, *, expect_manifest: str | None = None) -> None:
        """Open a place; use `LabelSet.open`, which refuses sets that are not complete."""
        plan = (place / PLAN_NAME).read()
        if plan is None:
            if (found := (place / IMPORT_NAME).read()) is not None:
                raise refuse_import(found, place)
            raise LabelSetError(
                f"{place} is not a label set: it has no {PLAN_NAME}",
                fix="Make one with: deit-cli precompute",
            )
        manifest = (place / MANIFEST_NAME).read()
        if manifest is None:
            raise LabelSetIncomplete(f"{place} has no {MANIFEST_NAME}", fix=INCOMPLETE_SET)
        self.place = place
        self.manifest_sha256 = hashlib.sha256(manifest).hexdigest()
        check_pin(expect_manifest, self.manifest_sha256, place / MANIFEST_NAME)
        self.plan = parse_plan(plan, place / PLAN_NAME)
        self.manifest = parse_manifest(manifest, place / MANIFEST_NAME, plan_sha256=hashlib.sha256(plan).hexdigest())
        if self.manifest.labelset_id != self.plan.labelset_id:
            of_plan, of_manifest = short(self.plan.labelset_id), short(self.manifest.labelset_id)
            raise LabelSetMismatch(
                f"{place}: {PLAN_NAME} is of label set {of_plan}, {MANIFEST_NAME} of {of_manifest}", fix=DAMAGED_PLAN
            )
        self.records: tuple[ShardRecord, ...] = shards_of(self.manifest, self.plan, place / MANIFEST_NAME)
        self._entries = {(e.kind, e.shard, e.view_start): e for e in self.manifest.files}
        self._files = CheckedFiles(place, self.plan, self.manifest)

    @classmethod
    def open(
        cls,
        location: str | os.PathLike[str],
        *,
        cache: Cache | None = None,
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
        label_set = cls(open_place(location, cache), expect_manifest=expect_manifest)
        label_set.check_complete()
        for entry in label_set.manifest.files:
            check_length(label_set.file_of(entry), entry, label_set.place)
        return label_set

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": copy.copy(self._files)}  # without what that one has in memory

    @property
    def folder(self) -> Path:
        """The folder of this machine where it lies.

        Raises:
            UsageError: it lies behind a URL.
        """
        if self.place.path is None:
            raise UsageError(f"{self.place} is not a folder of this machine", fix="Fetch it with deit-cli labels pull")
        return self.place.path

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
        return tuple(record.name for record in self.records)

    @property
    def num_samples(self) -> int:
        """Samples of these source shards, the bad ones too."""
        return sum(record.num_samples for record in self.records)

    @property
    def views(self) -> range:
        """The view numbers that every sample has."""
        blocks = self.manifest.blocks
        return range(blocks[0].start, blocks[-1].stop) if blocks else range(0)

    def check_complete(self) -> None:
        """Raise LabelSetIncomplete or LabelSetCorrupt unless the set is sealed and the manifest lists all of its files."""
        check_complete(self.manifest, self.shards, self.place)

    def samples(self, shard: str) -> SampleRows:
        """Read the samples of a source shard, and check them against the plan's hash of keys and class labels."""
        return self._files.samples(self._entry("samples", shard, 0))

    def read(self, shard: str, view: int) -> LabelRows:
        """Read the labels of one view of a source shard: one row for each usable sample of it, in row order.

        Raises:
            LabelSetCorrupt: the file is damaged, or has other rows.
        """
        return self._files.labels(self._labels_entry(shard, view), view, self._entry("samples", shard, 0))

    def read_file(self, entry: FileEntry) -> Contents:
        """Return a file's bytes after checking their length and SHA-256; see `CheckedFiles.read`."""
        return self._files.read(entry)

    def file_of(self, entry: FileEntry) -> File:
        """Return where a file lies, with what the manifest promises of it."""
        return self._files.file(entry)

    def remote_files(self, shard: str, view: int | None = None) -> tuple[RemoteFile, ...]:
        """Return the remote files that samples (and, with a view, labels) of a source shard are read from.

        They are what `Prefetch` takes; a local set has none.
        """
        entries = [self._entry("samples", shard, 0)] + ([] if view is None else [self._labels_entry(shard, view)])
        return tuple(file for entry in entries for file in self.file_of(entry).to_download)

    @property
    def has_images(self) -> bool:
        """Whether it is self-contained: the images that were labelled are in it."""
        return any(entry.kind == "images" for entry in self.manifest.files)

    def open_source(self, data: str | None = None, *, cache: Cache | None = None) -> Source:
        """Open the images: those at `data`, or else the set's own, or else those where it found them.

        Args:
            data: a source to use instead of the others; None: none is given.
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
        if local_path(location) is None:
            raise UsageError(
                f"{self.place} was labelled from {location}. A label set may be a stranger's, so its URLs are not opened"
                f" unasked: pass --data {location}, or a copy of it"
            )
        return location

    def _own_images(self) -> Source:
        names = self.plan.source.class_names
        shards = tuple(
            TarShard(name, self.file_of(self._entry("images", name, 0)), None if names is None else len(names))
            for name in self.shards
        )
        return Source(str(self.place / IMAGES_FOLDER), "tar", names, shards)

    def _entry(self, kind: str, shard: str, view_start: int) -> FileEntry:
        try:
            return self._entries[kind, shard, view_start]
        except KeyError:
            raise LabelSetCorrupt(
                f"{self.place}: the manifest lists no {kind} of {shard!r} from view {view_start}"
            ) from None

    def _labels_entry(self, shard: str, view: int) -> FileEntry:
        block = next((block for block in self.manifest.blocks if view in block), None)
        if block is None:
            raise LabelSetMismatch(f"{self.place} holds views {self.views.start}..{self.views.stop - 1}, not {view}")
        return self._entry("labels", shard, block.start)
