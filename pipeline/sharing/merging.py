"""Merge: one label set of what several machines made of one identity, views or source shards, sealed or not yet.

Files are taken over as they are, created and never replaced, so a merge that was killed is continued by the same command.
Of a sealed set a file is what its manifest says; in a folder that was never sealed (a rank of a job, a run that was
stopped) it is what its own footer says, down to the hash of its rows. Such a footer itself is under no hash: whether its
replay probes are sound shows when they are rendered, in verifying or training.
"""

import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import LabelSetCorrupt, LabelSetError, LabelSetMismatch, UsageError
from pipeline.labels.card import refresh_card
from pipeline.labels.format import PLAN_NAME, damaged_file
from pipeline.labels.labelset import LabelSet, checked_labels_footer, checked_samples
from pipeline.labels.manifest import (
    FileEntry,
    Plan,
    images_path,
    label_blocks,
    labels_path,
    read_plan,
    samples_path,
    short,
)
from pipeline.labels.sealing import check_theirs, check_untouched, claim, seal, sealed_manifest
from pipeline.labels.tables import Contents, SampleRows, read_all_views
from pipeline.machine.progress import Progress
from pipeline.machine.threads import Telling
from pipeline.storage.atomic import TEMPORARY_PREFIX, publish_file, refusals_named, sha256_file, sweep_temporaries
from pipeline.storage.cache import read_local
from pipeline.storage.urls import is_url
from pipeline.text import count

log = logging.getLogger("deit_cli.merging")

_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class Merged:
    """What a merge came to.

    Attributes:
        files: label shards, samples files and tars that were taken over.
        found: those that were there before.
        label_set: the result; None where it lacks label shards, and was not sealed.
        missing: these label shards, source shard and views; none of a sealed result.
    """

    files: int
    found: int
    label_set: LabelSet | None
    missing: tuple[tuple[str, range], ...]


def merge(out: Path, locations: Sequence[str], *, progress: Progress = lambda _: None) -> Merged:
    """Take over the files of several label sets of one identity, and seal what is complete.

    The result holds every source shard that has samples in one of them. It is sealed if each of these has every block of
    views that one of them has.

    Args:
        out: a folder that is empty, not there yet, or holds a label set of the same identity, which then grows.
        locations: folders; of sealed sets URLs too.
        progress: hears of files.

    Raises:
        UsageError: `out` is among `locations`.
        LabelSetMismatch: two of them are of different label sets or images, or cut the same views into other blocks.
        LabelSetCorrupt: a file is damaged.
    """
    _refuse_same(out, locations)
    parts = [_open(location) for location in locations]
    plan = _claim(out, parts)
    _check_found(out, plan)
    sweep_temporaries(out)
    found, tell = 0, Telling("merge", sum(len(part) for part in parts), progress, unit="files")
    for part in parts:
        for file in part:
            with refusals_named(out / file.path):
                found += not _take(out / file.path, file)
            tell()
    missing = _seal(out, plan)
    label_set = None if missing else LabelSet.open(out)
    if label_set:
        refresh_card(label_set)
    return Merged(sum(map(len, parts)) - found, found, label_set, missing)


@dataclass(frozen=True)
class _File:
    """A file that another set has: checked when it is written."""

    part: "_Part"
    entry: FileEntry | None  # None where no manifest lists it
    path: Path  # in the set
    shard: str
    views: range  # none of samples and images

    def check(self) -> Contents | None:
        """Read a table whole and check it; a tar of images is checked as it is copied."""
        label_set = self.part.label_set
        if self.entry is not None:
            assert label_set is not None
            return None if self.entry.kind == "images" else label_set.read_file(self.entry)
        path, plan = Path(self.part.location) / self.path, self.part.plan
        with refusals_named(path):
            contents = Contents(str(path), path.read_bytes())
        if self.views:
            checked_labels_footer(contents, plan, self.shard, self.views)
            usable = self.part.usable(self.shard)
            if any(not np.array_equal(rows.row, usable) for rows in read_all_views(contents)):
                raise LabelSetCorrupt(
                    f"{path} does not have the usable rows of its samples file", fix=damaged_file(self.views)
                )
        else:
            self.part.samples(contents, self.shard)
        return contents


class _Part:
    """One of the sets that are merged."""

    def __init__(self, location: str, plan: Plan, label_set: LabelSet | None, folder: Path | None) -> None:
        self.location, self.plan, self.label_set = location, plan, label_set
        self._usable: dict[str, NDArray[np.int64]] = {}
        self._files = list(self._listed(label_set) if label_set else self._lying(folder or Path(location)))

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[_File]:
        return iter(self._files)

    def samples(self, file: Path | Contents, shard: str) -> SampleRows:
        """Read the samples of a source shard where no manifest lists them, and check them against the plan."""
        return checked_samples(file, self.plan, next(r for r in self.plan.source.shards if r.name == shard))

    def usable(self, shard: str) -> NDArray[np.int64]:
        """Return the rows that each view of a source shard must have, where no manifest lists them."""
        if shard not in self._usable:
            self._usable[shard] = self.samples(Path(self.location) / samples_path(shard), shard).usable
        return self._usable[shard]

    @property
    def blocks(self) -> list[range]:
        """Of views, of its label shards."""
        return [file.views for file in self._files if file.views]

    def _listed(self, label_set: LabelSet) -> Iterator[_File]:
        for entry in label_set.manifest.files:
            yield _File(self, entry, Path(entry.path), entry.shard, entry.views)

    def _lying(self, folder: Path) -> Iterator[_File]:
        names = [record.name for record in self.plan.source.shards]
        present = [name for name in names if (folder / samples_path(name)).is_file()]
        for name in present:
            yield _File(self, None, Path(samples_path(name)), name, range(0))
        for views in label_blocks(folder):
            for name in present:  # without samples nobody knows whose labels they are
                path = Path(labels_path(name, views))
                if (folder / path).is_file():
                    yield _File(self, None, path, name, views)


def _refuse_same(out: Path, locations: Sequence[str]) -> None:
    if not locations:
        raise UsageError("name at least one label set to merge into the first folder")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: the first folder is the result")
    for location in locations:
        if is_url(location):
            continue
        part, result = Path(location).resolve(), out.resolve()
        if part == result:
            raise UsageError(f"{location} is both the result and a part: a label set that is there grows by itself")
        if result.is_relative_to(part) or part.is_relative_to(result):
            raise UsageError(f"{out} and {location} lie one in the other: choose a result apart from its parts")


def _open(location: str) -> _Part:
    """Open a part: a sealed set by its manifest, another folder by what lies in it."""
    try:
        label_set = LabelSet.open(location)
    except LabelSetError:
        folder = Path(location)
        if is_url(location) or not (folder / PLAN_NAME).is_file() or sealed_manifest(folder) is not None:
            raise
        return _Part(location, read_plan(folder), None, folder)
    return _Part(location, label_set.plan, label_set, None)


def _claim(out: Path, parts: Sequence[_Part]) -> Plan:
    """Check that all are of one identity, and make `out` a label set of it, with the first one's plan if it has none."""
    known = out / PLAN_NAME
    if known.is_file():
        plan, where = read_plan(out), str(out)
    else:
        if out.is_dir() and any(not path.name.startswith(TEMPORARY_PREFIX) for path in out.iterdir()):
            raise LabelSetMismatch(f"{out} is not empty and holds no label set: choose another folder")
        plan, where = parts[0].plan, parts[0].location
    for part in parts:
        _check_same(plan, where, part)
    held = {(views.start, views.stop) for part in parts for views in part.blocks}
    blocks = [range(*block) for block in sorted(held | {(b.start, b.stop) for b in label_blocks(out)})]
    _refuse_overlap(out, blocks)
    claim(out, plan, blocks)
    return read_plan(out)


def _check_same(plan: Plan, where: str, part: _Part) -> None:
    for name in ("recipe_id", "teacher_id", "source_id", "topk", "precision"):
        mine, theirs = getattr(plan, name), getattr(part.plan, name)
        if mine != theirs:
            what = name.removesuffix("_id")
            raise LabelSetMismatch(
                f"{where} has {what} {short(str(mine))}, {part.location} has {short(str(theirs))}: only sets"
                " of one identity can be merged",
                fix="Leave one of them out",
            )


def _check_found(out: Path, plan: Plan) -> None:
    """Check what lies in the result already: a manifest vouches for all that it lists, whoever made it.

    Raises:
        LabelSetCorrupt: a file is not as it was sealed, or, where none was sealed, not what its footer says.
    """
    check_untouched(out, label_blocks(out))
    sealed = sealed_manifest(out)
    listed = {Path(entry.path) for entry in sealed.files} if sealed else set()
    for file in _Part(str(out), plan, None, out):
        if file.path not in listed:
            file.check()


def _take(path: Path, file: _File) -> bool:
    """Create a file of the result; return False where it was there, of the same images and rows."""
    contents = file.check()
    if publish_file(path, contents.data if contents else partial(_copy_tar, file)):
        return True
    if contents is None:
        assert file.entry is not None
        if sha256_file(path) != file.entry.sha256:
            raise LabelSetMismatch(
                f"{path} has other bytes than the one in {file.part.location}: it is damaged, or was packed"
                " from other images or with another Pillow",
                fix="Delete it, or leave that set out",
            )
        return False
    if contents.data != path.read_bytes():
        theirs = path.with_name(f"{TEMPORARY_PREFIX}theirs-{path.name}")
        try:
            theirs.write_bytes(contents.data)
            check_theirs(path, theirs)
        finally:
            theirs.unlink(missing_ok=True)
        log.info("%s: %s has other bytes for the same rows; the file that is there stays", path, file.part.location)
    return False


def _copy_tar(file: _File, target: BinaryIO) -> None:
    """Copy a tar of images, and hold it against its manifest."""
    label_set, entry = file.part.label_set, file.entry
    assert label_set is not None
    assert entry is not None

    def copy(path: Path) -> str:
        target.seek(0)
        target.truncate()
        digest = hashlib.sha256()
        with path.open("rb") as source:
            while block := source.read(_BLOCK_BYTES):
                digest.update(block)
                target.write(block)
        return digest.hexdigest()

    where = label_set.file_of(entry)
    if read_local(where, copy) != entry.sha256:
        raise LabelSetCorrupt(f"{where} has not the SHA-256 that its manifest says: it is damaged", fix=damaged_file())


def _seal(out: Path, plan: Plan) -> tuple[tuple[str, range], ...]:
    """Seal what lies in a folder if it is complete; return the label shards that it lacks."""
    names = [record.name for record in plan.source.shards]
    shards = tuple(name for name in names if (out / samples_path(name)).is_file())
    blocks = label_blocks(out)
    _refuse_overlap(out, blocks)
    wanted = [(name, views) for views in blocks for name in shards]
    missing = tuple((name, views) for name, views in wanted if not (out / labels_path(name, views)).is_file())
    gaps = tuple(("", range(a.stop, b.start)) for a, b in itertools.pairwise(blocks) if a.stop != b.start)
    if missing or gaps or not blocks or not shards:
        return missing + gaps or (("", range(0, 1)),)
    part = None if len(shards) == len(names) else shards
    seal(out, plan, blocks, part, images=_has_images(out, shards))
    return ()


def _has_images(out: Path, shards: Sequence[str]) -> bool:
    """Whether every source shard has its images in the folder; a sealed set that has them cannot lose them."""
    absent = [name for name in shards if not (out / images_path(name)).is_file()]
    sealed = sealed_manifest(out)
    if absent and sealed and any(entry.kind == "images" for entry in sealed.files):
        raise LabelSetMismatch(
            f"{out} has its images in it, and those of {absent[0]!r} are not there: merge sets that all have theirs, or"
            " choose another folder"
        )
    if absent and len(absent) < len(shards):
        log.warning("%s: the images of %s are in none of these sets, so the result has no images", out, absent[0])
    return not absent


def _refuse_overlap(out: Path, blocks: Sequence[range]) -> None:
    for a, b in itertools.pairwise(blocks):
        if b.start < a.stop:
            raise LabelSetMismatch(
                f"{out}: these sets cut the same views into other blocks, {a.start}:{a.stop} and {b.start}:{b.stop}",
                fix="Merge those that were made with one --views-per-shard",
            )


def merged_lines(out: Path, merged: Merged) -> str:
    """Return what a merge came to, for people."""
    files = f"{count(merged.files, 'file')} taken over, {merged.found:,} were there"
    if merged.label_set is not None:
        held, views = merged.label_set, merged.label_set.views
        names = held.plan.source.shards
        part = "" if len(held.shards) == len(names) else f" of {len(held.shards)} of {len(names)} source shards"
        return f"{out}: {files}; views {views.start}:{views.stop}{part}, sealed"
    some = ", ".join(_named(name, views) for name, views in merged.missing[:3])
    more = f" and {len(merged.missing) - 3:,} more" if len(merged.missing) > 3 else ""
    views = _span([*label_blocks(out), *(views for _, views in merged.missing)])
    return (
        f"{out}: {files}; not sealed, it lacks {some}{more}. Merge the sets that have them, or make them:"
        f" deit-cli labels extend {out} --views {views.start}:{views.stop}"
    )


def _named(name: str, views: range) -> str:
    return f"views {views.start}:{views.stop}" + (f" of {name}" if name else "")


def _span(blocks: Sequence[range]) -> range:
    return range(min(block.start for block in blocks), max(block.stop for block in blocks))
