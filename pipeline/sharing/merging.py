"""Merge label sets of one identity, made on several machines, into one label set, sealed or unsealed.

Files are copied unchanged, and never replaced, so the same command continues a merge that was killed.
A file of a sealed set is checked against its manifest. In an unsealed folder (a rank of a job, a run that was
stopped) it is checked against its own footer, which has the hash of its rows. The footer itself has no hash: wrong
replay probes in it are found only when they are rendered, in verification or training.
"""

import hashlib
import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import LabelSetCorrupt, LabelSetError, LabelSetMismatch, UsageError
from pipeline.labels.checked_files import check_rows, checked_labels_footer, checked_samples
from pipeline.labels.format import PLAN_NAME, damaged_file
from pipeline.labels.labelset import LabelSet
from pipeline.labels.manifest import (
    FileEntry,
    Plan,
    images_path,
    in_order,
    label_blocks,
    labels_path,
    read_plan,
    samples_path,
    short,
)
from pipeline.labels.sealing import check_replaceable, check_untouched, claim, seal, sealed_manifest
from pipeline.labels.tables import Contents, read_all_views
from pipeline.machine.progress import Progress
from pipeline.machine.threads import ProgressCounter
from pipeline.overview.card import refresh_card
from pipeline.overview.summary import in_short
from pipeline.storage.atomic import TEMPORARY_PREFIX, publish_file, refusals_named, sha256_file, sweep_temporaries
from pipeline.storage.urls import local_path
from pipeline.text import count, first_few

log = logging.getLogger("deit_cli.merging")

_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class Merged:
    """The result of a merge.

    Attributes:
        files: number of label shards, samples files and tars that were copied.
        found: number of files that were already there.
        label_set: the sealed result; None if label shards are missing.
        missing: source shard and views of each missing label shard; empty for a sealed result.
    """

    files: int
    found: int
    label_set: LabelSet | None
    missing: tuple[tuple[str, range], ...]


def merge(out: Path, locations: Sequence[str], *, progress: Progress = lambda _: None) -> Merged:
    """Copy the files of several label sets of one identity into one folder, and seal it if it is complete.

    The result holds every source shard that has samples in one of the sets. It is sealed if every
    source shard has every block of views.

    Args:
        out: folder that is new, empty, or holds a label set of the same identity, to which files are added.
        locations: folders of label sets; also URLs for sealed sets.
        progress: function called with the number of files done.

    Raises:
        UsageError: `out` is among `locations`.
        LabelSetMismatch: two sets differ in identity or images, or divide the same views into other blocks.
        LabelSetCorrupt: a file is damaged.
    """
    _refuse_same(out, locations)
    inputs = [_open(location) for location in locations]
    plan = _claim(out, inputs)
    _check_found(out, plan)
    sweep_temporaries(out)
    files = [(given, file) for given in inputs for file in given.files]
    found, count_one = 0, ProgressCounter("merge", len(files), progress, unit="files")
    for given, file in files:
        with refusals_named(out / file.path):
            found += not _add(out / file.path, given, file)
        count_one()
    missing = _seal(out, plan)
    label_set = None if missing else LabelSet.open(out)
    if label_set:
        refresh_card(label_set)
    return Merged(len(files) - found, found, label_set, missing)


@dataclass(frozen=True)
class _File:
    """A file of one of the merged sets, which is checked when it is written.

    Attributes:
        entry: entry in the manifest; None if no manifest lists the file.
        path: path inside the set.
        shard: name of its source shard.
        views: views of a label shard; empty for samples and images.
    """

    entry: FileEntry | None
    path: Path
    shard: str
    views: range


class _Input(ABC):
    """One of the sets to merge, or the existing files of the result.

    Attributes:
        name: path or URL.
        plan: plan of the set.
        files: files of the set.
    """

    def __init__(self, name: object, plan: Plan, files: Iterable[_File]) -> None:
        self.name, self.plan, self.files = str(name), plan, list(files)

    @abstractmethod
    def read(self, file: _File) -> Contents | None:
        """Return a table after checking it; None for a tar of images, which is checked while it is copied."""

    def copy_images(self, file: _File, target: BinaryIO) -> None:
        """Copy a tar of images, and check it against the manifest."""
        raise NotImplementedError  # only sealed sets have images


class _SealedSet(_Input):
    """A sealed set, whose files are checked against its manifest."""

    def __init__(self, label_set: LabelSet) -> None:
        self._label_set = label_set
        entries = label_set.manifest.files
        files = (_File(entry, Path(entry.path), entry.shard, entry.views) for entry in entries)
        super().__init__(label_set.place, label_set.plan, files)

    def read(self, file: _File) -> Contents | None:
        """Return a table after checking its hash."""
        assert file.entry is not None
        return None if file.entry.kind == "images" else self._label_set.read_file(file.entry)

    def copy_images(self, file: _File, target: BinaryIO) -> None:
        """Copy a tar of images, and check it against the manifest."""
        assert file.entry is not None

        def copy(path: Path) -> str:
            target.seek(0)
            target.truncate()
            digest = hashlib.sha256()
            with path.open("rb") as source:
                while block := source.read(_BLOCK_BYTES):
                    digest.update(block)
                    target.write(block)
            return digest.hexdigest()

        tar = self._label_set.file_of(file.entry)
        if tar.use(copy) != file.entry.sha256:
            raise LabelSetCorrupt(f"{tar} does not have the SHA-256 in its manifest: it is damaged", fix=damaged_file())


class _UnsealedFolder(_Input):
    """An unsealed folder, whose files are checked against their own footers."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self._folder = folder
        self._usable: dict[str, NDArray[np.uint32]] = {}
        super().__init__(folder, plan, _lying_files(folder, plan))

    def read(self, file: _File) -> Contents:
        """Return a table after checking it against plan and samples."""
        path = self._folder / file.path
        with refusals_named(path):
            contents = Contents(str(path), path.read_bytes())
        if file.views:
            checked_labels_footer(contents, self.plan, file.shard, file.views)
            for view, rows in enumerate(read_all_views(contents), file.views.start):
                check_rows(path, view, rows, self._usable_rows(file.shard), block=file.views)
        else:
            checked_samples(contents, self.plan, file.shard)
        return contents

    def _usable_rows(self, shard: str) -> NDArray[np.uint32]:
        if shard not in self._usable:
            samples = checked_samples(self._folder / samples_path(shard), self.plan, shard)
            self._usable[shard] = samples.usable.astype(np.uint32)  # kept for all source shards
        return self._usable[shard]


def _lying_files(folder: Path, plan: Plan) -> Iterator[_File]:
    """Yield the tables in a folder."""
    names = [record.name for record in plan.source.shards]
    present = [name for name in names if (folder / samples_path(name)).is_file()]
    for name in present:
        yield _File(None, Path(samples_path(name)), name, range(0))
    for views in label_blocks(folder):
        for name in present:  # labels are useless without the samples file
            path = Path(labels_path(name, views))
            if (folder / path).is_file():
                yield _File(None, path, name, views)


def _refuse_same(out: Path, locations: Sequence[str]) -> None:
    if not locations:
        raise UsageError("name at least one label set to merge into the first folder")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: the first folder is the result")
    for location in locations:
        if (path := local_path(location)) is None:
            continue
        given, result = path.resolve(), out.resolve()
        if given == result:
            raise UsageError(
                f"{location} is both the result and an input: leave it out, the files in the result are kept"
            )
        if result.is_relative_to(given) or given.is_relative_to(result):
            raise UsageError(f"one of {out} and {location} contains the other: choose a result outside its inputs")


def _open(location: str) -> _Input:
    """Return a sealed set with the files of its manifest, or an unsealed folder with the files in it."""
    try:
        return _SealedSet(LabelSet.open(location))
    except LabelSetError:
        folder = local_path(location)
        if folder is None or not (folder / PLAN_NAME).is_file() or sealed_manifest(folder) is not None:
            raise
        return _UnsealedFolder(folder, read_plan(folder))


def _claim(out: Path, inputs: Sequence[_Input]) -> Plan:
    """Check that all sets have one identity, write the plan to `out` if it has none, and return the plan."""
    known = out / PLAN_NAME
    if known.is_file():
        plan, where = read_plan(out), str(out)
    else:
        if out.is_dir() and any(not path.name.startswith(TEMPORARY_PREFIX) for path in out.iterdir()):
            raise LabelSetMismatch(f"{out} is not empty and holds no label set: choose another folder")
        plan, where = inputs[0].plan, inputs[0].name
    for given in inputs:
        _check_same(plan, where, given)
    blocks = in_order([*label_blocks(out), *(file.views for given in inputs for file in given.files if file.views)])
    _refuse_overlap(out, blocks)
    claim(out, plan, blocks)
    return read_plan(out)


def _check_same(plan: Plan, where: str, given: _Input) -> None:
    for name in ("recipe_id", "teacher_id", "source_id", "topk", "precision"):
        expected, found = getattr(plan, name), getattr(given.plan, name)
        if expected != found:
            what = name.removesuffix("_id")
            raise LabelSetMismatch(
                f"{where} has {what} {short(str(expected))}, {given.name} has {short(str(found))}: only sets"
                " of one identity can be merged",
                fix="Leave one of them out",
            )


def _check_found(out: Path, plan: Plan) -> None:
    """Check the existing files of the result, because its manifest will list them, too.

    Raises:
        LabelSetCorrupt: a file differs from the manifest or, in an unsealed folder, from its own footer.
    """
    check_untouched(out, label_blocks(out))
    sealed = sealed_manifest(out)
    listed = {Path(entry.path) for entry in sealed.files} if sealed else set()
    lying = _UnsealedFolder(out, plan)
    for file in lying.files:
        if file.path not in listed:
            lying.read(file)


def _add(path: Path, given: _Input, file: _File) -> bool:
    """Create a file of the result; return False if it exists with the same images and rows."""
    contents = given.read(file)
    if publish_file(path, contents.data if contents else partial(given.copy_images, file)):
        return True
    if contents is None:
        assert file.entry is not None
        if sha256_file(path) != file.entry.sha256:
            raise LabelSetMismatch(
                f"{path} has other bytes than the one in {given.name}: it is damaged, or was packed"
                " from other images or with another Pillow",
                fix="Delete it, or leave that set out",
            )
        return False
    if contents.data != path.read_bytes():
        other = path.with_name(f"{TEMPORARY_PREFIX}other-{path.name}")
        try:
            other.write_bytes(contents.data)
            check_replaceable(path, other)
        finally:
            other.unlink(missing_ok=True)
        log.info("%s: %s has other bytes for the same rows; the existing file is kept", path, given.name)
    return False


def _seal(out: Path, plan: Plan) -> tuple[tuple[str, range], ...]:
    """Seal a folder if it is complete; return the missing label shards."""
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
    """Return True if the folder has the images of every source shard; a sealed set with images cannot lose them."""
    absent = [name for name in shards if not (out / images_path(name)).is_file()]
    sealed = sealed_manifest(out)
    if absent and sealed and any(entry.kind == "images" for entry in sealed.files):
        raise LabelSetMismatch(
            f"{out} contains images, but those of {absent[0]!r} are missing: merge only sets with images, or"
            " choose another folder"
        )
    if absent and len(absent) < len(shards):
        log.warning("%s: the images of %s are in none of these sets, so the result has no images", out, absent[0])
    return not absent


def _refuse_overlap(out: Path, blocks: Sequence[range]) -> None:
    for a, b in itertools.pairwise(blocks):
        if b.start < a.stop:
            raise LabelSetMismatch(
                f"{out}: these sets divide the same views into different blocks, {a.start}:{a.stop} and {b.start}:{b.stop}",
                fix="Merge only sets that were made with the same --views-per-shard",
            )


def merged_record(out: Path, merged: Merged) -> dict[str, Any]:
    """Return the result of a merge as JSON values."""
    missing = [{"shard": name, "views": [views.start, views.stop]} for name, views in merged.missing]
    files = {"files": merged.files, "files_before": merged.found, "missing": missing}
    return in_short(out, merged.label_set) | files


def merged_lines(out: Path, merged: Merged) -> str:
    """Return the result of a merge as readable text."""
    files = f"{count(merged.files, 'file')} copied, {merged.found:,} existed already"
    if merged.label_set is not None:
        held, views = merged.label_set, merged.label_set.views
        names = held.plan.source.shards
        part = "" if len(held.shards) == len(names) else f" of {len(held.shards)} of {len(names)} source shards"
        return f"{out}: {files}; views {views.start}:{views.stop}{part}, sealed"
    missing = [f"views {views.start}:{views.stop}" + (f" of {name}" if name else "") for name, views in merged.missing]
    blocks = [*label_blocks(out), *(views for _, views in merged.missing)]
    start, stop = min(block.start for block in blocks), max(block.stop for block in blocks)
    return (
        f"{out}: {files}; not sealed, it lacks {first_few(missing, 3)}. Merge the sets that have them, or compute them:"
        f" deit-cli labels extend {out} --views {start}:{stop}"
    )
