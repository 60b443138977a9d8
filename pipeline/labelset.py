"""LabelSet: open a label set, refuse what does not fit, read its rows in order."""

import itertools
import os
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from pipeline.errors import (
    LabelSetCorrupt,
    LabelSetError,
    LabelSetIncomplete,
    LabelSetMismatch,
    SourceError,
    StorageError,
)
from pipeline.ids import canonical_json
from pipeline.labels import (
    LabelRows,
    LabelsFooter,
    SampleRows,
    read_all_views,
    read_labels_footer,
    read_samples,
    read_samples_footer,
    read_view,
)
from pipeline.manifest import (
    MANIFEST_NAME,
    PLAN_NAME,
    FileEntry,
    Plan,
    ShardRecord,
    SourceRecord,
    first_difference,
    read_manifest,
    read_plan,
    read_probes,
    short,
)
from pipeline.recipe import Recipe
from pipeline.samples import keys_sha256
from pipeline.sources import Source
from pipeline.storage import sha256_file


class LabelSet:
    """A sealed label set, opened for reading. It is small, and can be sent to worker processes.

    Before the first row of a file is used, the file's length and SHA-256 are checked against the manifest.
    """

    def __init__(self, folder: Path) -> None:
        """Open a folder; use `LabelSet.open`, which refuses sets that are not complete."""
        if not os.path.isfile(folder / PLAN_NAME):
            raise LabelSetError(
                f"{folder} is not a label set: it has no {PLAN_NAME}. Make one with: deit-cli precompute"
            )
        if not os.path.isfile(folder / MANIFEST_NAME):
            raise LabelSetIncomplete(
                f"{folder} has no {MANIFEST_NAME}: run the same deit-cli precompute again to complete it"
            )
        self.folder = folder
        self.plan = read_plan(folder)
        self.manifest = read_manifest(folder)
        if self.manifest.labelset_id != self.plan.labelset_id:
            mine, theirs = short(self.plan.labelset_id), short(self.manifest.labelset_id)
            raise LabelSetMismatch(f"{folder}: {PLAN_NAME} is of label set {mine}, {MANIFEST_NAME} of {theirs}")
        self._entries = {(e.kind, e.shard, e.view_start): e for e in self.manifest.files}
        self._verified: set[FileEntry] = set()

    @classmethod
    def open(cls, folder: str | Path) -> "LabelSet":
        """Open a complete label set; check that every promised file is there with the promised length.

        Raises:
            LabelSetIncomplete: it is not sealed.
            LabelSetCorrupt: a file is missing or has another length.
            LabelSetMismatch: it is of another format version, or its parts do not belong together.
        """
        label_set = cls(Path(folder))
        if not label_set.manifest.sealed:
            raise LabelSetIncomplete(
                f"{folder} is not sealed: some of its labels do not exist yet. Run the same deit-cli precompute again to complete it"
            )
        label_set._check_coverage()
        for entry in label_set.manifest.files:
            label_set._check_length(entry)
        return label_set

    @property
    def recipe(self) -> Recipe:
        """The augmentation that made the views."""
        return self.plan.make_recipe()

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
        """Names of the source shards, in order."""
        return tuple(shard.name for shard in self.plan.source.shards)

    @property
    def views(self) -> range:
        """The view numbers that every sample has."""
        blocks = sorted(self.manifest.view_blocks)
        return range(blocks[0][0], blocks[-1][1]) if blocks else range(0)

    def samples(self, shard: str) -> SampleRows:
        """Read the samples of a source shard, and check them against the plan's hash of keys and class labels."""
        entry = self._entry("samples", shard, 0)
        path = self.checked_path(entry)
        record = next(record for record in self.plan.source.shards if record.name == shard)
        samples = checked_samples(path, self.plan, record)
        if len(samples) != entry.rows:
            raise LabelSetCorrupt(f"{path} has {len(samples)} rows, the manifest says {entry.rows}")
        return samples

    def read(self, shard: str, view: int) -> LabelRows:
        """Read the labels of one view of a source shard, in row order."""
        entry = self._labels_entry(shard, view)
        path = self.checked_path(entry)
        self._check_footer(entry, path)
        return read_view(path, view)

    def check_source(self, source: Source) -> None:
        """Raise LabelSetMismatch unless these are the keys, class labels and class names that were labelled."""
        record = record_of(source)
        if record.id == self.plan.source_id:
            return
        mine, theirs = (
            r.model_dump(mode="json", include={"class_names", "shards"}) for r in (self.plan.source, record)
        )
        raise LabelSetMismatch(
            f"{self.folder} labels source {short(self.plan.source_id)}, {source.location} is source {short(record.id)}"
            f"{first_difference(mine, theirs)}. Pass the --data that was labelled"
        )

    def verify(self) -> list[str]:
        """Check every byte and every row of the set; return the problems found, nothing for a sound set."""
        problems: list[str] = []
        for entry in self.manifest.files:
            try:
                path = self.checked_path(entry)
                if entry.kind == "samples":
                    self.samples(entry.shard)
                else:
                    self._verify_rows(entry, path)
            except (LabelSetError, StorageError) as error:
                problems.append(str(error))
        return list(dict.fromkeys(problems))  # a damaged samples file spoils every label shard of it

    def checked_path(self, entry: FileEntry) -> Path:
        """Return a file's path after checking its length and SHA-256, once per object.

        Raises:
            LabelSetCorrupt: the file is missing, has another length, or other bytes.
        """
        path = self._check_length(entry)
        if entry not in self._verified:
            found = sha256_file(path)
            if found != entry.sha256:
                raise LabelSetCorrupt(
                    f"{path} has SHA-256 {short(found)}…, the manifest says {short(entry.sha256)}…: it is damaged."
                    " Delete it and run the same deit-cli precompute again"
                )
            self._verified.add(entry)
        return path

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

    def _check_length(self, entry: FileEntry) -> Path:
        path = self.folder / entry.path
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise LabelSetCorrupt(f"{path} points outside the label set")
        if not path.is_file():
            raise LabelSetCorrupt(
                f"{path} is missing, but the manifest promises it. Run the same deit-cli precompute again"
            )
        size = path.stat().st_size
        if size != entry.bytes:
            raise LabelSetCorrupt(
                f"{path} has {size} bytes, the manifest says {entry.bytes}: it was cut or changed."
                " Delete it and run the same deit-cli precompute again"
            )
        return path

    def _check_coverage(self) -> None:
        """A sealed set holds every source shard's samples, and its labels for every block of views."""
        blocks = sorted(self.manifest.view_blocks)
        if not blocks:
            raise LabelSetIncomplete(f"{self.folder} holds no views")
        if any(a[1] != b[0] for a, b in itertools.pairwise(blocks)):
            raise LabelSetIncomplete(
                f"{self.folder}: its views {blocks} have a gap. Compute the missing ones with --views"
            )
        expected = {("samples", name, 0, 0) for name in self.shards}
        expected |= {("labels", name, start, stop) for name in self.shards for start, stop in blocks}
        found = {(e.kind, e.shard, e.view_start, e.view_stop) for e in self.manifest.files}
        for what, difference in (("lacks", expected - found), ("has an unknown", found - expected)):
            if difference:
                kind, shard, *_ = sorted(difference)[0]
                raise LabelSetCorrupt(f"{self.folder}: the sealed manifest {what} {kind} file of {shard!r}")

    def _check_footer(self, entry: FileEntry, path: Path) -> None:
        views = range(entry.view_start, entry.view_stop)
        footer = checked_labels_footer(path, self.plan, entry.shard, views)
        if footer.rows_per_view * len(views) != entry.rows:
            raise LabelSetCorrupt(
                f"{path} has {footer.rows_per_view} rows a view, the manifest says {entry.rows} in all"
            )

    def _verify_rows(self, entry: FileEntry, path: Path) -> None:
        self._check_footer(entry, path)
        usable = self.samples(entry.shard).usable
        for view, rows in enumerate(read_all_views(path), entry.view_start):
            if not np.array_equal(rows.row, usable):
                raise LabelSetCorrupt(
                    f"{path}: view {view} must have the {len(usable)} usable rows of its samples file"
                )


def record_of(source: Source) -> SourceRecord:
    """Return what plan and manifest say of a source."""
    record = source.identity() | {"kind": source.kind, "location": os.path.abspath(source.location)}
    try:
        return SourceRecord.model_validate_json(canonical_json(record))
    except (ValidationError, UnicodeEncodeError) as error:
        raise SourceError(
            f"{source.location!r} cannot be named in a label set: {' '.join(str(error).split())[:200]}"
        ) from error


def checked_samples(path: Path, plan: Plan, record: ShardRecord) -> SampleRows:
    """Read a samples file of this label set.

    Raises:
        LabelSetMismatch: it is of another label set or source shard, or its keys or class labels are not the plan's.
    """
    footer = read_samples_footer(path)
    mine = (plan.labelset_id, plan.source_id, record.name)
    _check_identity(path, mine, (footer.labelset_id, footer.source_id, footer.shard))
    samples = read_samples(path)
    if keys_sha256(samples.key, samples.class_label) != record.keys_sha256 or len(samples) != record.num_samples:
        raise LabelSetMismatch(
            f"{path}: its keys and class labels are not those that the plan names for {record.name!r}"
        )
    return samples


def checked_labels_footer(path: Path, plan: Plan, shard: str, views: range) -> LabelsFooter:
    """Read what a label shard says of itself, and refuse it unless all of that is what its place in the set says."""
    footer = read_labels_footer(path)
    mine = (plan.labelset_id, plan.recipe_id, plan.teacher_id, plan.source_id, shard)
    _check_identity(
        path, mine, (footer.labelset_id, footer.recipe_id, footer.teacher_id, footer.source_id, footer.shard)
    )
    found = (footer.view_start, footer.view_stop, footer.num_classes, footer.topk, footer.precision)
    expected = (views.start, views.stop, plan.teacher.num_classes, plan.topk, plan.precision)
    if found != expected:
        raise LabelSetMismatch(
            f"{path} says (views, classes, K, precision) {found}, its place in the set says {expected}"
        )
    read_probes(footer.probes, path)
    return footer


def _check_identity(path: Path, mine: tuple[str, ...], found: tuple[str, ...]) -> None:
    """Compare label set id, further ids, and the name of the source shard, which comes last."""
    if mine != found:
        raise LabelSetMismatch(
            f"{path} says it is {found[-1]!r} of label set {short(found[0])}, not {mine[-1]!r} of {short(mine[0])}"
            + ("" if (mine[0], mine[-1]) != (found[0], found[-1]) else ": its recipe, teacher or source id differs")
        )
