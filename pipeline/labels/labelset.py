"""LabelSet: a sealed label set, opened for reading: its plan and manifest, its rows in order, and its images."""

import copy
import hashlib
import os
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.errors import LabelSetCorrupt, LabelSetError, LabelSetIncomplete, LabelSetMismatch, UsageError
from pipeline.images.class_names import class_numbers
from pipeline.images.labels_file import RenumberedShard
from pipeline.images.source import NO_OPTIONS, Source, SourceOptions, open_source
from pipeline.images.tars import TarShard
from pipeline.labels.checked_files import CheckedFiles, check_lengths
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
    SourceRecord,
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
        place: folder or URL of the set. Its text is the location that the user passed.
        plan: plan of the set: recipe, teacher, source.
        manifest: list of the complete files.
        manifest_sha256: hash of the parsed bytes of `manifest.json`; a pin holds this hash.
    """

    def __init__(self, place: Place, *, expect_manifest: str | None = None) -> None:
        """Open a place; use `LabelSet.open` instead, which refuses incomplete sets."""
        plan = (place / PLAN_NAME).read()
        if plan is None:
            if (found := (place / IMPORT_NAME).read()) is not None:
                raise refuse_import(found, place)
            raise LabelSetError(
                f"{place} is not a label set: it has no {PLAN_NAME}", fix="Make one with: deit-cli precompute"
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
                f"{place}: {PLAN_NAME} belongs to label set {of_plan}, {MANIFEST_NAME} to {of_manifest}",
                fix=DAMAGED_PLAN,
            )
        self.records: tuple[ShardRecord, ...] = shards_of(self.manifest, self.plan, place / MANIFEST_NAME)
        self._entries = {(e.kind, e.shard, e.view_start): e for e in self.manifest.files}
        self._files = CheckedFiles(place, self.plan, self.manifest)

    @classmethod
    def open(
        cls, location: str | os.PathLike[str], *, cache: Cache | None = None, expect_manifest: str | None = None
    ) -> "LabelSet":
        """Open a complete label set, and return it; for a local set, check the presence and length of every promised file.

        Args:
            location: folder or URL of the set. Plan and manifest behind a URL are always downloaded again.
            cache: cache for the other files of a URL; None: the default cache.
            expect_manifest: pin, `sha256:` and the hash that `manifest.json` must have; None: any.

        Raises:
            LabelSetIncomplete: the set is not sealed.
            LabelSetCorrupt: a file is missing or has another length.
            LabelSetMismatch: the format version differs, plan and manifest do not match, or the manifest is not the pinned one.
        """
        label_set = cls(open_place(location, cache), expect_manifest=expect_manifest)
        label_set.check_complete()
        check_lengths(label_set.manifest.files, label_set.place)
        return label_set

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": copy.copy(self._files)}  # without the files in memory

    @property
    def folder(self) -> Path:
        """The local folder of the set.

        Raises:
            UsageError: the set is behind a URL.
        """
        if self.place.path is None:
            raise UsageError(f"{self.place} is not a folder of this machine", fix="Fetch it with deit-cli labels pull")
        return self.place.path

    @property
    def recipe(self) -> Recipe:
        """The augmentation that made the views."""
        return self.plan.recipe

    @property
    def source_record(self) -> SourceRecord:
        """The source that was labelled."""
        return self.plan.source

    @property
    def is_part(self) -> bool:
        """Whether the set has only some source shards of the source."""
        return self.manifest.shards is not None

    @property
    def num_classes(self) -> int:
        """C, the number of the teacher's classes."""
        return self.plan.teacher.num_classes

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes in label order, if source or teacher knows them."""
        return self.plan.source.class_names or self.plan.teacher.class_names

    @property
    def shards(self) -> tuple[str, ...]:
        """Names of the source shards in the set, in order: all source shards of the plan, or a subset."""
        return tuple(record.name for record in self.records)

    @property
    def num_samples(self) -> int:
        """Number of samples in these source shards, including bad ones."""
        return sum(record.num_samples for record in self.records)

    @property
    def num_usable(self) -> int:
        """Number of samples in these source shards that have labels, by the manifest."""
        first = [
            entry for entry in self.manifest.files if entry.kind == "labels" and entry.view_start == self.views.start
        ]
        return sum(entry.rows // (entry.view_stop - entry.view_start) for entry in first)

    @property
    def views(self) -> range:
        """The view numbers that every sample has."""
        blocks = self.manifest.blocks
        return range(blocks[0].start, blocks[-1].stop) if blocks else range(0)

    @cached_property
    def partly_usable(self) -> frozenset[str]:
        """Names of the source shards that have bad images by the manifest: their label shards have fewer rows than samples.

        A manifest may lie. Reading samples and labels compares both with it.
        """
        size = {record.name: record.num_samples for record in self.records}
        return frozenset(
            entry.shard
            for entry in self.manifest.files
            if entry.kind == "labels" and entry.rows != size[entry.shard] * (entry.view_stop - entry.view_start)
        )

    def check_complete(self) -> None:
        """Raise LabelSetIncomplete or LabelSetCorrupt unless the set is sealed and the manifest lists all of its files."""
        check_complete(self.manifest, self.shards, self.place)

    def samples(self, shard: str) -> SampleRows:
        """Read the samples of a source shard, and check them against the plan's hash of keys and class labels."""
        return self._files.samples(self._entry("samples", shard, 0))

    def read(self, shard: str, view: int) -> LabelRows:
        """Read the labels of one view of a source shard: one row for each usable sample, in row order.

        Raises:
            LabelSetCorrupt: the file is damaged, or has other rows.
        """
        return self._files.labels(self._labels_entry(shard, view), view, self._entry("samples", shard, 0))

    def read_file(self, entry: FileEntry) -> Contents:
        """Return a file's bytes after checking their length and SHA-256; see `CheckedFiles.read`."""
        return self._files.read(entry)

    def file_of(self, entry: FileEntry) -> File:
        """Return a file of the set, with its length and hash from the manifest."""
        return self._files.file(entry)

    def remote_files(self, shard: str, view: int | None = None) -> tuple[RemoteFile, ...]:
        """Return the remote files that hold the samples (and, with a view, the labels) of a source shard.

        `Prefetch` takes these files; a local set has no remote files.
        """
        entries = [self._entry("samples", shard, 0)] + ([] if view is None else [self._labels_entry(shard, view)])
        return tuple(file for entry in entries for file in self.file_of(entry).to_download)

    @property
    def has_images(self) -> bool:
        """Return whether the set is self-contained: it has the labelled images."""
        return any(entry.kind == "images" for entry in self.manifest.files)

    def open_source(
        self, data: str | None = None, *, options: SourceOptions = NO_OPTIONS, cache: Cache | None = None
    ) -> Source:
        """Open the images of the set, and return them.

        Args:
            data: source to use; None: the set's own images if it has any, else those at the location in the plan.
            options: how `data` is read; without options, as the plan says that the labelled images were.
            cache: cache for a remote `data`; None: the default cache.

        Raises:
            UsageError: the plan has a URL, which may be a stranger's.
        """
        if data is None and self.has_images:
            return self._own_images()
        if data is None:
            return self._with_classes(open_source(self.images_location(), options=self._reading(), cache=cache))
        source = open_source(data, options=self._reading() if options == NO_OPTIONS else options, cache=cache)
        return source if source.class_names is not None else self._with_classes(source)

    def _reading(self) -> SourceOptions:
        """Return how the images were read at labelling."""
        reading = self.plan.source.reading
        if reading is None:
            return NO_OPTIONS
        if reading.image_root is not None and local_path(reading.image_root) is None:
            raise UsageError(
                f"{self.place} was labelled with images below {reading.image_root}. A label set may be a stranger's, so its"
                " URLs are opened only on request: pass --data and --image-root"
            )
        return SourceOptions(**reading.model_dump())

    def _with_classes(self, source: Source) -> Source:
        """Return a source with the class numbers of the plan if it has the same names in another order, or no names.

        The order may come from a file that the plan does not have, as may the names: what the plan says is meant.
        """
        names, own = self.plan.source.class_names, source.class_names
        if names is None or own == names:
            return source
        if own is None:
            return replace(source, class_names=names)
        numbers = class_numbers(names)
        if not numbers.keys() >= set(own):
            return source
        shards = (RenumberedShard(shard.name, shard, tuple(numbers[name] for name in own)) for shard in source.shards)
        return replace(source, class_names=names, shards=tuple(shards))

    def images_location(self) -> str:
        """Return the location of the images in the plan.

        Raises:
            UsageError: the location is a URL, which may be a stranger's.
        """
        location = self.plan.source.location
        if local_path(location) is None:
            raise UsageError(
                f"{self.place} was labelled from {location}. A label set may be a stranger's, so its URLs are opened"
                f" only on request: pass --data {location}, or a copy of it"
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
