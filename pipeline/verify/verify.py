"""Verify a label set: look at every file, row, probe and image, and name all that is wrong, not only the first.

A label set refuses itself as soon as one thing is not as it must be; whoever has to repair it needs the whole list. So
here nothing stops the rest: where the manifest is damaged, files are held against the plan by what they say of
themselves; where the plan is, they are at least hashed. Remote sets are read anew from where they lie, not from the cache.
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

from pipeline.errors import (
    DeitCliError,
    LabelSetCorrupt,
    LabelSetError,
    RemoteFileMissing,
    StorageError,
)
from pipeline.images.source import Source
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
from pipeline.labels.labelset import LabelSet, check_length, checked_labels_footer, checked_samples, fits_in_memory
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
from pipeline.machine.loaders import usable_cores
from pipeline.machine.progress import Progress
from pipeline.machine.threads import Telling, in_threads
from pipeline.settings.configs import TeacherConfig, VerifyConfig
from pipeline.sharing.signing import SIGNATURE_NAME, check_signature
from pipeline.storage.atomic import TEMPORARY_PREFIX, refusals_named
from pipeline.storage.cache import RemoteFolder, open_cache
from pipeline.storage.json import MAX_JSON_BYTES, read_small
from pipeline.storage.remote import read_url, receive, retried
from pipeline.storage.urls import is_url, join_url
from pipeline.teacher.loading import load_teacher
from pipeline.text import count
from pipeline.verify.images import check_images
from pipeline.verify.relabel import relabel
from pipeline.verify.report import Problem, Report

REMOTE_THREADS = 8  # they wait for a server most of the time
WRONG_LABELS = (
    "Do not train on this set; ask whoever labelled it, or label again with deit-cli precompute and another --out"
)
_BLOCK_BYTES = 8 << 20


def verify(
    location: str,
    config: VerifyConfig,
    asked: TeacherConfig | None = None,
    *,
    progress: Progress = lambda _: None,
) -> Report:
    """Check every byte and row of a label set, and whatever else is asked.

    Args:
        location: folder or URL of the set.
        config: what to check.
        asked: the teacher to label some views again with; None: none.
        progress: hears of files, images and views.

    Raises:
        LabelSetError: there is no label set.
    """
    folder = RemoteFolder(location, open_cache()) if is_url(location) else Path(location)
    report = Report(location)
    threads = config.threads or (REMOTE_THREADS if isinstance(folder, RemoteFolder) else usable_cores())
    plan, manifest = _open_parts(report, folder, config.expect_manifest)
    if report.manifest_sha256 and (config.public_key or config.identity):
        _check_signature(report, config, report.manifest_sha256)
    tasks = list(_tasks(folder, plan, manifest))
    _check_files(report, folder, plan, tasks, threads, progress)
    if isinstance(folder, Path) and manifest and manifest.files:
        _note_others(report, folder, tasks)
    if report.label_set and (config.probes or config.data or asked or report.label_set.has_images):
        report.source = check_images(report, report.label_set, config, threads=threads, progress=progress)
        if asked and report.source:
            _ask_again(report, report.label_set, report.source, config, asked, progress)
    return report


def _check_signature(report: Report, config: VerifyConfig, manifest_sha256: str) -> None:
    with report.noting(SIGNATURE_NAME, "signature"):
        report.signed_by = check_signature(
            report.location,
            manifest_sha256=manifest_sha256,
            public_key=config.public_key,
            identity=config.identity,
            identity_provider=config.identity_provider,
        )


def _ask_again(
    report: Report, label_set: LabelSet, source: Source, config: VerifyConfig, asked: TeacherConfig, progress: Progress
) -> None:
    """Label a sample of views again; what rounding does not explain is a problem."""
    with report.noting(" + ".join(asked.teacher), "teacher"):
        teacher = load_teacher(asked, num_classes=label_set.num_classes)
        report.relabelled = relabel(
            label_set, source, teacher, views=config.relabel, seed=config.relabel_seed, progress=progress
        )
        report.problems += [
            Problem(teacher.identity.name, "teacher", f"{label_set.folder}: {line}", WRONG_LABELS)
            for line in report.relabelled.problems()
        ]


# Plan and manifest


def _open_parts(
    report: Report, folder: Path | RemoteFolder, expect_manifest: str | None
) -> tuple[Plan | None, Manifest | None]:
    """Read plan and manifest as far as they can be read, and open the set where both are sound and fit."""
    plan = manifest = None
    try:
        label_set = report.label_set = LabelSet(folder)
    except (LabelSetError, StorageError) as error:
        plan, manifest = _open_each(report, folder, error)
    else:
        plan, manifest = label_set.plan, label_set.manifest
        report.manifest_sha256 = label_set.manifest_sha256
        with report.noting(MANIFEST_NAME, "sealed", DAMAGED_MANIFEST):
            label_set.check_complete()
    if report.manifest_sha256:
        with report.noting(MANIFEST_NAME, "pin"):
            check_pin(expect_manifest, report.manifest_sha256, folder / MANIFEST_NAME)
    return plan, manifest


def _open_each(report: Report, folder: Path | RemoteFolder, error: DeitCliError) -> tuple[Plan | None, Manifest | None]:
    """Read plan and manifest each by itself, where they do not make a label set together."""
    data = {name: _read_small(folder, name) for name in (PLAN_NAME, MANIFEST_NAME)}
    if not any(data.values()):
        raise error
    plan = manifest = None
    before = len(report.problems)
    for name, way_out in ((PLAN_NAME, DAMAGED_PLAN), (MANIFEST_NAME, DAMAGED_MANIFEST)):
        content = data[name]
        with report.noting(name, name.removesuffix(".json"), way_out):
            if content is None:
                raise LabelSetCorrupt(f"{folder / name} is missing")
            if name == PLAN_NAME:
                plan = parse_plan(content, folder / name)
            else:
                report.manifest_sha256 = hashlib.sha256(content).hexdigest()
                manifest = parse_manifest(content, folder / name, plan_sha256=None)
    if len(report.problems) == before:  # each is sound, but the manifest, which states its own hash, knows another plan
        report.problems.append(Problem(PLAN_NAME, "plan", error.what, error.fix or DAMAGED_PLAN))
        return None, manifest
    return plan, manifest


def _read_small(folder: Path | RemoteFolder, name: str) -> bytes | None:
    with contextlib.suppress(StorageError):
        if isinstance(folder, RemoteFolder):
            return read_url(join_url(folder.url, name), max_bytes=MAX_JSON_BYTES)
        return read_small(folder / name)
    return None


# Files


@dataclass(frozen=True)
class _Task:
    """One file to look at; its length and hash are known where the manifest lists it."""

    kind: str
    shard: str
    views: range
    path: str
    entry: FileEntry | None


@dataclass(frozen=True)
class _Looked:
    """What one file came to: its bytes, what is wrong with it, and of a samples file the usable rows, int64 [N]."""

    bytes: int
    problem: Problem | None
    usable: NDArray[np.int64] | None = None


def _tasks(folder: Path | RemoteFolder, plan: Plan | None, manifest: Manifest | None) -> Iterator[_Task]:
    """Yield the files that the manifest lists; without it, those that are there of what the plan names."""
    if manifest and manifest.files:
        for entry in manifest.files:
            yield _Task(entry.kind, entry.shard, entry.views, str(entry.path), entry)
        return
    if plan is None or not isinstance(folder, Path):
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
    report: Report,
    folder: Path | RemoteFolder,
    plan: Plan | None,
    tasks: Sequence[_Task],
    threads: int,
    progress: Progress,
) -> None:
    """Look at every file: samples first, because they say which rows a label shard must have."""
    tell = Telling("verify", len(tasks), progress, unit="files")
    usable: dict[str, NDArray[np.int64] | None] = {}
    found: dict[_Task, Problem] = {}
    first = [task for task in tasks if task.kind == "samples"]
    for part in (first, [task for task in tasks if task.kind != "samples"]):
        for task, looked in in_threads(part, lambda task: _look(folder, plan, task, usable), threads):
            report.files += 1
            report.bytes += looked.bytes
            if looked.problem:
                found[task] = looked.problem
            if task.kind == "samples":
                usable[task.shard] = looked.usable
            tell()
    report.problems += [found[task] for task in tasks if task in found]


def _look(
    folder: Path | RemoteFolder, plan: Plan | None, task: _Task, usable: dict[str, NDArray[np.int64] | None]
) -> _Looked:
    """Check one file: that it is there, its length and hash, and then all that is in it."""
    remote = isinstance(folder, RemoteFolder)
    views = task.views if task.kind == "labels" else None
    name, size = folder / task.path, 0
    rule = "present" if isinstance(name, Path) and not name.is_file() else "length"
    is_table = task.kind in ("samples", "labels") and plan is not None
    try:
        data, size, sha256 = _read(folder, task, keep=is_table)
        rule = "sha256"
        if task.entry and (sha256, size) != (task.entry.sha256, task.entry.bytes):
            raise LabelSetCorrupt(
                f"{name} has SHA-256 {short(sha256)}…, the manifest says {short(task.entry.sha256)}…: it is damaged"
            )
        rule = "content"
        rows = _check_table(Contents(str(name), data), plan, task, usable) if is_table and plan else None
        return _Looked(size, None, rows)
    except (LabelSetError, StorageError) as error:
        rule = "present" if isinstance(error, RemoteFileMissing) else rule
        fix = REMOTE_FILE if remote else missing_file(views) if rule == "present" else damaged_file(views)
        return _Looked(
            size, Problem(task.path, rule, error.what, (isinstance(error, LabelSetError) and error.fix) or fix)
        )


def _read(folder: Path | RemoteFolder, task: _Task, *, keep: bool) -> tuple[bytes, int, str]:
    """Return the bytes of a file (none, unless they are to be kept), their number and SHA-256, in one pass."""
    buffer: Any = io.BytesIO() if keep else _Nowhere()
    if isinstance(folder, RemoteFolder):
        url, size = join_url(folder.url, task.path), task.entry.bytes if task.entry else None

        def attempt() -> Any:
            buffer.seek(0)
            buffer.truncate()
            return receive(url, buffer, size=size)

        received = retried(url, attempt)
        return _kept(buffer), received.bytes, received.sha256
    path = folder / task.path
    if task.entry:
        check_length(path, task.entry, folder)
    digest, size = hashlib.sha256(), 0
    with refusals_named(path):
        if path.exists() and (not path.is_file() or (keep and path.stat().st_size > MAX_FILE_BYTES)):
            raise StorageError(f"{path}: a table of a label set is a plain file of at most {MAX_FILE_BYTES} bytes")
    with refusals_named(path), fits_in_memory(path), path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            buffer.write(block)
            size += len(block)
    return _kept(buffer), size, digest.hexdigest()


class _Nowhere(io.RawIOBase):
    """What is written here is gone: for files of which the hash alone is wanted."""

    def write(self, data: Any) -> int:
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return 0

    def truncate(self, size: int | None = None) -> int:
        return 0


def _kept(buffer: Any) -> bytes:
    return buffer.getvalue() if isinstance(buffer, io.BytesIO) else b""


def _check_table(
    file: Contents, plan: Plan, task: _Task, usable: dict[str, NDArray[np.int64] | None]
) -> NDArray[np.int64] | None:
    """Check footer, schema and all rows against plan, manifest and samples; return the usable rows of a samples file."""
    record = plan.shard(task.shard)
    if task.kind == "samples":
        samples = checked_samples(file, plan, record)
        if task.entry and len(samples) != task.entry.rows:
            raise LabelSetCorrupt(f"{file} has {len(samples)} rows, the manifest says {task.entry.rows}")
        return samples.usable
    footer = checked_labels_footer(file, plan, task.shard, task.views)
    if task.entry and footer.rows_per_view * len(task.views) != task.entry.rows:
        raise LabelSetCorrupt(
            f"{file} has {footer.rows_per_view} rows a view, the manifest says {task.entry.rows} in all"
        )
    expected = usable.get(task.shard)
    for view, rows in enumerate(read_all_views(file), task.views.start):
        if expected is not None and not np.array_equal(rows.row, expected):
            raise LabelSetCorrupt(f"{file}: view {view} must have the {len(expected)} usable rows of its samples file")
    return None


def _note_others(report: Report, folder: Path, tasks: Sequence[_Task]) -> None:
    """Say which tables lie in the folder without being part of the set: somebody may believe that they count."""
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
            f"{count(len(others), 'file')} {are} not in the manifest, so no reader looks at {them}: {_first(others)}."
            f" {they} may be of a run that has not sealed {them} yet; else delete {them}"
        )
    if temporary:
        report.notes.append(
            f"{count(len(temporary), 'temporary file')} of writers that work here or were killed: {_first(temporary)}"
        )


def _first(names: Sequence[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit:,} more" if len(names) > limit else "")
