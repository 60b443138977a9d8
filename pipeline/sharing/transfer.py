"""Label sets that move: push one to a folder or bucket, pull one from there; only what is missing, everything by its hash.

Both do the same between two places: the plan first (it claims the address), then the files, several at a time, and the
manifest last, so that a copy which was cut anywhere is refused by every reader and continued by the same command. A file
that is there with the same content is left; one with other content is an error, and never overwritten.
"""

import contextlib
import functools
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TypeVar, cast

from pipeline.errors import LabelSetMismatch, RemoteFileRefused, UsageError
from pipeline.labels.card import CARD_NAME
from pipeline.labels.format import IMAGES_FOLDER, MANIFEST_NAME, PLAN_NAME, SIGNATURE_NAME
from pipeline.labels.labelset import LabelSet
from pipeline.labels.manifest import FileEntry, Manifest, Plan, Probe, parse_manifest, parse_plan, short
from pipeline.machine.progress import Progress, Tick
from pipeline.sharing.manifests import contains, probes_in, subset_manifest, unite
from pipeline.storage.json import pretty_json
from pipeline.storage.place import Folder, Place, Promise, open_place
from pipeline.storage.uploads import refuse_web
from pipeline.storage.urls import is_url
from pipeline.text import byte_size, count

log = logging.getLogger("deit_cli.sharing")

CLASSES_NAME = f"{IMAGES_FOLDER}/classes.txt"
WORKERS = 8  # files at a time

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What a push or a pull did.

    Attributes:
        manifest: of what lies at the destination now.
        sent_files: label and samples files that were missing there, and were brought.
        sent_bytes: of them.
        found_files: those that were there before.
        found_bytes: of them.
    """

    manifest: Manifest
    sent_files: int
    sent_bytes: int
    found_files: int
    found_bytes: int


def push(folder: Path, location: str, *, workers: int = WORKERS, progress: Progress = lambda tick: None) -> Moved:
    """Send a sealed label set of this machine to a folder or bucket, beside views that are there of the same set.

    Args:
        folder: where it lies.
        location: a folder, or s3://, gs://, hf://.
        workers: files that are sent at a time.
        progress: is told how many files are there.

    Raises:
        LabelSetMismatch: another label set is there, or another file under the name of one of these.
        LabelSetIncomplete: either is not sealed, or together they leave a gap.
        LabelSetCorrupt: a file of the folder is missing, or has another length.
        StorageError: a file of the folder is damaged, or the destination cannot be written.
    """
    _refuse_same(str(folder), location)
    refuse_web(location)
    label_set, here, there = LabelSet.open(folder), Folder(folder), open_place(location)

    def move(file: Promise, stop: threading.Event) -> bool:
        held = there.holds(file, folder / file.name)
        return _taken(held if held is not None else there.take(file, folder / file.name), held, file, there)

    workers = 1 if location.startswith("hf://") else workers  # each file is a commit on the one before
    return _transfer("push", label_set, label_set.manifest, here, there, move, workers=workers, progress=progress)


def pull(
    location: str,
    folder: Path,
    *,
    views: tuple[int, int] | None = None,
    shards: Sequence[str] | None = None,
    expect_manifest: str | None = None,
    workers: int = WORKERS,
    progress: Progress = lambda tick: None,
) -> Moved:
    """Bring a label set, or a part of it that is one, to this machine; beside views that are there of the same set.

    Args:
        location: a folder, or s3://, gs://, hf://, http(s)://.
        folder: where it is to lie.
        views: start and stop of those that are wanted; whole blocks come. None: all.
        shards: names of source shards, or patterns. None: all.
        expect_manifest: pin, `sha256:` and the hash that the manifest there must have; None: any.
        workers: files that are brought at a time.
        progress: is told how many files are here.

    Raises:
        LabelSetMismatch: another label set is here, or another file under the name of one of these.
        LabelSetIncomplete: either is not sealed, or together they leave a gap.
        LabelSetCorrupt: a file there, or one that is here, has not the promised hash.
        StorageError: it could not be received or written.
    """
    _refuse_same(location, str(folder))
    label_set, there, here = (
        LabelSet.open(location, expect_manifest=expect_manifest),
        open_place(location),
        Folder(folder),
    )
    manifest = label_set.manifest
    if views is not None or shards is not None:
        manifest = subset_manifest(
            manifest, label_set.plan, views=views, shards=shards, probes_of=functools.partial(_probes_of, label_set)
        )

    def move(file: Promise, stop: threading.Event) -> bool:
        held = here.holds(file, None)
        came = held if held is not None else there.give(file, folder / file.name, stop) or here.holds(file, None)
        return _taken(bool(came), held, file, here)

    return _transfer("pull", label_set, manifest, there, here, move, workers=workers, progress=progress)


def moved_line(destination: str, moved: Moved, verb: str) -> str:
    """Return one line on what was moved, and what is at the destination now."""
    blocks = sorted(moved.manifest.view_blocks)
    found = (
        f"; {count(moved.found_files, 'file')}, {byte_size(moved.found_bytes)}, there before"
        if moved.found_files
        else ""
    )
    shards = "" if moved.manifest.shards is None else f" of {count(len(moved.manifest.shards), 'source shard')}"
    return (
        f"{destination}: {count(moved.sent_files, 'file')}, {byte_size(moved.sent_bytes)}, {verb}{found}. Label set"
        f" {short(moved.manifest.labelset_id)}, views {blocks[0][0]}:{blocks[-1][1]}{shards}"
    )


def _transfer(
    phase: str,
    label_set: LabelSet,
    manifest: Manifest,
    source: Place,
    target: Place,
    move: Callable[[Promise, threading.Event], bool],
    *,
    workers: int,
    progress: Progress,
) -> Moved:
    """Plan first, files, manifest last."""
    plan, names = label_set.plan, (str(source), str(target))
    plan_data, manifest_data = _read_both(source, label_set)
    claimed = hashlib.sha256(_claim(target, plan_data, plan, names)).hexdigest()

    def change(old: bytes | None) -> bytes:
        """The manifest of both; as it was written by whoever sealed it, wherever that is possible, with its hash."""
        if old is None:
            united = manifest.model_copy(update={"plan_sha256": claimed, "content_sha256": None})
        else:
            theirs = parse_manifest(old, f"{target}/{MANIFEST_NAME}", plan_sha256=claimed)
            united = unite(manifest, theirs, plan, names=names)
            if contains(theirs, united):
                return old
        new = pretty_json(united.to_json())
        same = claimed == label_set.manifest.plan_sha256 and contains(label_set.manifest, united)
        return manifest_data if same and contains(united, label_set.manifest) else new

    result = change(target.read(MANIFEST_NAME))  # what cannot be united is refused before anything is sent
    tally = _move_all(phase, manifest.files, move, workers=workers, progress=progress)
    _carry(source, target, signed=result == manifest_data)
    final = target.update(MANIFEST_NAME, change)
    return Moved(
        manifest=parse_manifest(final, f"{target}/{MANIFEST_NAME}", plan_sha256=claimed),
        sent_files=tally.made,
        sent_bytes=tally.bytes_written,
        found_files=tally.done - tally.made,
        found_bytes=sum(entry.bytes for entry in manifest.files) - tally.bytes_written,
    )


def _read_both(source: Place, label_set: LabelSet) -> tuple[bytes, bytes]:
    """Return plan and manifest as they are stored, which are still those that were opened."""
    plan, manifest = source.read(PLAN_NAME), source.read(MANIFEST_NAME)
    opened = (label_set.manifest.plan_sha256, pretty_json(label_set.manifest.to_json()))
    if (hashlib.sha256(plan or b"").hexdigest(), manifest) != opened or plan is None or manifest is None:
        raise LabelSetMismatch(
            f"{source} was changed since it was opened",
            fix="Run the same command again",
        )
    return plan, manifest


def _claim(target: Place, data: bytes, plan: Plan, names: tuple[str, str]) -> bytes:
    """Write the plan, create-only; return the one that is there, which is of the same label set."""
    there = target.read(PLAN_NAME)
    if there is None:
        target.put(data, PLAN_NAME)
        there = target.read(PLAN_NAME) or data  # another writer may have been first
    found = parse_plan(there, f"{target}/{PLAN_NAME}")
    if found.labelset_id != plan.labelset_id:
        differing = [
            n for n in ("recipe_id", "teacher_id", "source_id", "topk", "precision") if _differs(found, plan, n)
        ]
        raise LabelSetMismatch(
            f"{names[1]} holds label set {short(found.labelset_id)}, {names[0]} holds"
            f" {short(plan.labelset_id)}: {', '.join(name.removesuffix('_id') for name in differing)}"
            " differ",
            fix="Choose another destination",
        )
    return there


def _differs(one: Plan, other: Plan, name: str) -> bool:
    return getattr(one, name) != getattr(other, name)


def _taken(right: bool | None, held: bool | None, file: Promise, target: Place) -> bool:
    """Return whether a file was brought; raise if another one is there."""
    if not right:
        raise LabelSetMismatch(
            f"{target}/{file.name} is there with other content than the manifest says ({file.bytes} bytes,"
            f" SHA-256 {short(file.sha256)}…), and is not overwritten",
            fix="Delete it there, or choose another destination",
        )
    return held is None


def _carry(source: Place, target: Place, *, signed: bool) -> None:
    """Take along what lies beside the files: the card where there is none, and the signature of this very manifest.

    And the class names of packed images, so that these are a source there too.
    """
    classes, card, signature = (_read_optional(source, name) for name in (CLASSES_NAME, CARD_NAME, SIGNATURE_NAME))
    if classes is not None:
        target.put(classes, CLASSES_NAME)
    if card is not None and not target.put(card, CARD_NAME):
        log.info("%s/%s is another one, and stays", target, CARD_NAME)
    if signature is not None and signed:
        target.put(signature, SIGNATURE_NAME, replace=True)
    elif not signed and (signature or _read_optional(target, SIGNATURE_NAME)) is not None:
        log.warning("%s: no signature covers the manifest that is there now: sign it", target)


def _read_optional(place: Place, name: str) -> bytes | None:
    with contextlib.suppress(RemoteFileRefused):  # so answers a store that may not be listed, and has no such file
        return place.read(name)
    return None


def _move_all(
    phase: str,
    entries: Sequence[FileEntry],
    move: Callable[[Promise, threading.Event], bool],
    *,
    workers: int,
    progress: Progress,
) -> Tick:
    """Move every file; return the last tick: `done` of them are there, `made` were brought."""
    began, tick = time.monotonic(), Tick(phase=phase, done=0, total=len(entries))

    def one(entry: FileEntry, stop: threading.Event) -> int | None:
        return entry.bytes if move(_promise(entry), stop) else None

    with contextlib.closing(in_threads(entries, one, workers=workers)) as moves:  # whatever happens here ends them
        for brought in moves:
            tick = Tick(
                phase=phase,
                done=tick.done + 1,
                total=len(entries),
                elapsed_s=time.monotonic() - began,
                made=tick.made + (brought is not None),
                bytes_written=tick.bytes_written + (brought or 0),
                unit="files",
            )
            progress(tick)
    return tick


def in_threads(
    jobs: Iterable[Job], run: Callable[[Job, threading.Event], Result], *, workers: int
) -> Generator[Result, None, None]:
    """Yield results as they come; the first failure is raised as soon as the jobs that are being done have ended.

    The threads are daemons: a process that is told to end does not wait for a transfer, which may be cut anywhere.

    Args:
        jobs: are begun in this order.
        run: does one; the event says that it should end early, by raising Stopped.
        workers: jobs that are done at a time.
    """
    waiting, results = SimpleQueue[Job](), SimpleQueue[tuple[Result | None, BaseException | None]]()
    for job in jobs:
        waiting.put(job)
    left, stop, failure = waiting.qsize(), threading.Event(), None

    def work() -> None:
        while not stop.is_set():
            try:
                job = waiting.get_nowait()
            except Empty:
                return
            try:
                results.put((run(job, stop), None))
            except BaseException as error:
                results.put((None, error))

    threads = [threading.Thread(target=work, daemon=True, name="transfer") for _ in range(min(workers, left))]
    try:
        for thread in threads:
            thread.start()
        while left and failure is None:
            with contextlib.suppress(Empty):
                result, failure = results.get(timeout=0.2)  # so that signals come through
                left -= 1
                if failure is None:
                    yield cast(Result, result)
    finally:
        stop.set()
    if failure is not None:
        for thread in threads:
            thread.join()
        raise failure


def _probes_of(label_set: LabelSet, entry: FileEntry) -> tuple[Probe, ...]:
    return probes_in(label_set.read_file(entry), entry)


def _promise(entry: FileEntry) -> Promise:
    return Promise(name=str(entry.path), bytes=entry.bytes, sha256=entry.sha256)


def _refuse_same(source: str, target: str) -> None:
    if not is_url(source) and not is_url(target) and Path(source).resolve() == Path(target).resolve():
        raise UsageError(f"source and destination are the same folder, {target}")
