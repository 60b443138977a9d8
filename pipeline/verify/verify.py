"""Verify a label set: check every file, row, probe and image, and report every problem, not only the first.

Other readers stop at the first error, but repairing a set needs the whole list. So each check runs even if others fail:
if the manifest is damaged, each file is checked against the plan and its own footer; if the plan is damaged, files are at
least hashed. Remote sets are read again from their location, not from the cache.
"""

import contextlib
import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DeitCliError, LabelSetCorrupt, LabelSetError, RemoteFileMissing, StorageError
from pipeline.images.source import Source
from pipeline.labels.checked_files import (
    check_length,
    check_num_rows,
    check_num_samples,
    check_rows,
    checked_labels_footer,
    checked_samples,
    fits_in_memory,
)
from pipeline.labels.format import (
    DAMAGED_MANIFEST,
    DAMAGED_PLAN,
    MANIFEST_NAME,
    MAX_FILE_BYTES,
    PLAN_NAME,
    REMOTE_FILE,
    check_pin,
    damaged_file,
    missing_file,
)
from pipeline.labels.labelset import LabelSet
from pipeline.labels.manifest import (
    FileEntry,
    Manifest,
    Plan,
    label_blocks,
    labels_path,
    parse_manifest,
    parse_plan,
    samples_path,
    short,
)
from pipeline.labels.tables import Contents, read_all_views
from pipeline.machine.progress import Progress
from pipeline.machine.threads import ProgressCounter, in_threads, usable_cores
from pipeline.settings.configs import TeacherConfig, VerifyConfig
from pipeline.sharing.signing import SIGNATURE_NAME, check_signature
from pipeline.storage.atomic import TEMPORARY_PREFIX, refusals_named
from pipeline.storage.place import Place, open_place
from pipeline.storage.remote import NO_PROMISE, Promise, Received
from pipeline.text import count, first_few
from pipeline.verify.images import check_images
from pipeline.verify.report import Problem, Report

REMOTE_THREADS = 8  # threads mostly wait for the server
WRONG_LABELS = "Do not train on this set; ask the people who labelled it, or label again with deit-cli precompute and another --out"


def verify(
    location: str, config: VerifyConfig, asked: TeacherConfig | None = None, *, progress: Progress = lambda _: None
) -> Report:
    """Check every byte and row of a label set, and run the optional checks of `config`; return the report.

    Args:
        location: folder or URL of the set.
        config: settings of the checks.
        asked: teacher that labels some views again; None: skip this check.
        progress: function called with the number of files, images and views done.

    Raises:
        LabelSetError: the location has no label set.
    """
    place = open_place(location)
    report = Report(location)
    threads = config.threads or (REMOTE_THREADS if place.path is None else usable_cores())
    plan, manifest = _open_parts(report, place, config.expect_manifest)
    if report.manifest_sha256 and (config.public_key or config.identity):
        _check_signature(report, place, config, report.manifest_sha256)
    tasks = list(_tasks(place.path, plan, manifest))
    _check_files(report, place, plan, tasks, threads, progress)
    if place.path is not None and manifest and manifest.files:
        _note_others(report, place.path, tasks)
    if report.label_set and (config.probes or config.data or asked or report.label_set.has_images):
        report.source = check_images(report, report.label_set, config, threads=threads, progress=progress)
        if asked and report.source:
            _ask_again(report, report.label_set, report.source, config, asked, progress)
    return report


def _check_signature(report: Report, place: Place, config: VerifyConfig, manifest_sha256: str) -> None:
    with report.noting(SIGNATURE_NAME, "signature"):
        report.signed_by = check_signature(
            place,
            manifest_sha256=manifest_sha256,
            public_key=config.public_key,
            identity=config.identity,
            identity_provider=config.identity_provider,
        )


def _ask_again(
    report: Report, label_set: LabelSet, source: Source, config: VerifyConfig, asked: TeacherConfig, progress: Progress
) -> None:
    """Label a sample of views again; report differences that rounding does not explain as problems."""
    from pipeline.teacher.loading import load_teacher  # imported here, so that the other checks do not need torch
    from pipeline.verify.relabel import relabel

    with report.noting(" + ".join(asked.teacher), "teacher"):
        teacher = load_teacher(asked, num_classes=label_set.num_classes)
        report.relabelled = relabel(
            label_set, source, teacher, views=config.relabel, seed=config.relabel_seed, progress=progress
        )
        report.problems += [
            Problem(teacher.identity.name, "teacher", f"{label_set.place}: {line}", WRONG_LABELS)
            for line in report.relabelled.problems()
        ]


# Plan and manifest


def _open_parts(report: Report, place: Place, expect_manifest: str | None) -> tuple[Plan | None, Manifest | None]:
    """Return plan and manifest as far as they are readable, and open the set if both are valid and fit together."""
    plan = manifest = None
    try:
        label_set = report.label_set = LabelSet(place)
    except (LabelSetError, StorageError) as error:
        plan, manifest = _open_each(report, place, error)
    else:
        plan, manifest = label_set.plan, label_set.manifest
        report.manifest_sha256 = label_set.manifest_sha256
        with report.noting(MANIFEST_NAME, "sealed", DAMAGED_MANIFEST):
            label_set.check_complete()
    if report.manifest_sha256:
        with report.noting(MANIFEST_NAME, "pin"):
            check_pin(expect_manifest, report.manifest_sha256, place / MANIFEST_NAME)
    return plan, manifest


def _open_each(report: Report, place: Place, error: DeitCliError) -> tuple[Plan | None, Manifest | None]:
    """Return plan and manifest read separately, because they do not make a label set together."""
    data: dict[str, bytes | None] = {PLAN_NAME: None, MANIFEST_NAME: None}
    for name in data:
        with contextlib.suppress(StorageError):
            data[name] = (place / name).read()
    if not any(data.values()):
        raise error
    plan = manifest = None
    before = len(report.problems)
    for name, way_out in ((PLAN_NAME, DAMAGED_PLAN), (MANIFEST_NAME, DAMAGED_MANIFEST)):
        content = data[name]
        with report.noting(name, name.removesuffix(".json"), way_out):
            if content is None:
                raise LabelSetCorrupt(f"{place / name} is missing")
            if name == PLAN_NAME:
                plan = parse_plan(content, place / name)
            else:
                report.manifest_sha256 = hashlib.sha256(content).hexdigest()
                manifest = parse_manifest(content, place / name, plan_sha256=None)
    if len(report.problems) == before:  # each is valid, but the manifest belongs to another plan
        report.problems.append(Problem(PLAN_NAME, "plan", error.what, error.fix or DAMAGED_PLAN))
        return None, manifest
    return plan, manifest


# Files


@dataclass(frozen=True)
class _Task:
    """A file to check; its length and hash are known if the manifest lists it."""

    kind: str
    shard: str
    views: range
    path: str
    entry: FileEntry | None


@dataclass(frozen=True)
class _Looked:
    """The result for one file: its size, its problem if any, and for a samples file the usable rows, uint32 [N]."""

    bytes: int
    problem: Problem | None
    usable: NDArray[np.uint32] | None = None


def _tasks(folder: Path | None, plan: Plan | None, manifest: Manifest | None) -> Iterator[_Task]:
    """Yield the files in the manifest; without a manifest, the existing files that the plan names."""
    if manifest and manifest.files:
        for entry in manifest.files:
            yield _Task(entry.kind, entry.shard, entry.views, str(entry.path), entry)
        return
    if plan is None or folder is None:  # a web server cannot list its files
        return
    names = [record.name for record in plan.source.shards]
    for name in names:
        if (folder / samples_path(name)).is_file():
            yield _Task("samples", name, range(0), str(samples_path(name)), None)
    for views in label_blocks(folder):
        paths = {name: labels_path(name, views) for name in names}
        yield from (
            _Task("labels", name, views, str(path), None) for name, path in paths.items() if (folder / path).is_file()
        )


def _check_files(
    report: Report, place: Place, plan: Plan | None, tasks: Sequence[_Task], threads: int, progress: Progress
) -> None:
    """Check every file: samples first, because they define the rows of the label shards."""
    count_one = ProgressCounter("verify", len(tasks), progress, unit="files")
    usable: dict[str, NDArray[np.uint32] | None] = {}
    found: dict[_Task, Problem] = {}
    first = [task for task in tasks if task.kind == "samples"]
    for part in (first, [task for task in tasks if task.kind != "samples"]):
        for task, looked in in_threads(part, lambda task: _look(place, plan, task, usable), threads):
            report.files += 1
            report.bytes += looked.bytes
            if looked.problem:
                found[task] = looked.problem
            if task.kind == "samples":
                usable[task.shard] = looked.usable
            count_one()
    report.problems += [found[task] for task in tasks if task in found]


def _look(place: Place, plan: Plan | None, task: _Task, usable: dict[str, NDArray[np.uint32] | None]) -> _Looked:
    """Check that one file exists, its length and hash, and then its content; return the result."""
    views = task.views if task.kind == "labels" else None
    name, size = place / task.path, 0
    rule = "present" if name.path is not None and not name.path.is_file() else "length"
    is_table = task.kind in ("samples", "labels") and plan is not None
    try:
        data, received = _read(place, task, keep=is_table)
        rule, size = "sha256", received.bytes
        if task.entry and (received.sha256, size) != (task.entry.sha256, task.entry.bytes):
            raise LabelSetCorrupt(
                f"{name} has SHA-256 {short(received.sha256)}…, the manifest says {short(task.entry.sha256)}…: it is damaged"
            )
        rule = "content"
        rows = _check_table(Contents(str(name), data), plan, task, usable) if is_table and plan else None
        return _Looked(size, None, rows)
    except (LabelSetError, StorageError) as error:
        rule = "present" if isinstance(error, RemoteFileMissing) else rule
        fix = REMOTE_FILE if place.path is None else missing_file(views) if rule == "present" else damaged_file(views)
        return _Looked(
            size, Problem(task.path, rule, error.what, (isinstance(error, LabelSetError) and error.fix) or fix)
        )


def _read(place: Place, task: _Task, *, keep: bool) -> tuple[bytes, Received]:
    """Return the current bytes of a file (empty unless `keep`), and its length and SHA-256, in one pass."""
    buffer: Any = io.BytesIO() if keep else _Nowhere()
    file = place.file(task.path, Promise(task.entry.bytes, task.entry.sha256) if task.entry else NO_PROMISE)
    if task.entry:
        check_length(file, task.entry, place)
    if (path := file.path) is not None:
        with refusals_named(path):
            if path.exists() and (not path.is_file() or (keep and path.stat().st_size > MAX_FILE_BYTES)):
                raise StorageError(
                    f"{path}: a table of a label set must be a plain file of at most {MAX_FILE_BYTES} bytes"
                )
    with fits_in_memory(file):
        received = file.copy_to(buffer)
        return buffer.getvalue() if keep else b"", received


class _Nowhere(io.RawIOBase):
    """A writable file that discards its content, for computing only the hash."""

    def write(self, data: Any) -> int:
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return 0

    def truncate(self, size: int | None = None) -> int:
        return 0


def _check_table(
    file: Contents, plan: Plan, task: _Task, usable: dict[str, NDArray[np.uint32] | None]
) -> NDArray[np.uint32] | None:
    """Check footer, schema and all rows against plan, manifest and samples; return the usable rows of a samples file."""
    plan.shard(task.shard)  # raises if the plan has no such source shard
    if task.kind == "samples":
        samples = checked_samples(file, plan, task.shard)
        if task.entry:
            check_num_samples(file, samples, task.entry)
        return samples.usable.astype(np.uint32)  # kept for all source shards
    footer = checked_labels_footer(file, plan, task.shard, task.views)
    if task.entry:
        check_num_rows(file, footer, task.entry)
    expected = usable.get(task.shard)
    for view, rows in enumerate(read_all_views(file), task.views.start):
        if expected is not None:
            check_rows(file, view, rows, expected, block=task.views)
    return None


def _note_others(report: Report, folder: Path, tasks: Sequence[_Task]) -> None:
    """Add a note on tables in the folder that are not part of the set, since users may believe that they are."""
    known = {task.path for task in tasks}
    present = {
        path.relative_to(folder).as_posix().encode(errors="backslashreplace").decode()
        for part in ("samples", "labels", "images")
        for path in (folder / part).rglob("*")
        if path.is_file()
    }
    temporary = sorted(name for name in present if Path(name).name.startswith(TEMPORARY_PREFIX))
    others = sorted(present - known - set(temporary))
    if others:
        one = len(others) == 1
        are, they, them = ("is", "It", "it") if one else ("are", "They", "them")
        report.notes.append(
            f"{count(len(others), 'file')} {are} not in the manifest, so no reader uses {them}: {first_few(others, 3)}."
            f" {they} may belong to a run that has not sealed {them} yet; otherwise delete {them}"
        )
    if temporary:
        report.notes.append(
            f"{count(len(temporary), 'temporary file')} of running or killed writers: {first_few(temporary, 3)}"
        )
