"""Push and pull label sets: only missing files are transferred, and every file is checked by its hash.

Both do the same between two places: first the plan (it claims the address), then the files, several at a time, and the
manifest last. So every reader refuses an interrupted copy, and the same command continues it. A file
that exists with the same content is kept; one with other content is an error, and never overwritten.
"""

import contextlib
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import LabelSetMismatch, RemoteFileRefused, UsageError
from pipeline.labels.format import IMAGES_FOLDER, MANIFEST_NAME, PLAN_NAME, SIGNATURE_NAME
from pipeline.labels.labelset import LabelSet
from pipeline.labels.manifest import FileEntry, Manifest, Plan, parse_manifest, parse_plan, short
from pipeline.machine.progress import Progress, Tick
from pipeline.machine.threads import in_threads
from pipeline.overview.card import CARD_NAME
from pipeline.overview.summary import in_short
from pipeline.sharing.manifests import contains, probes_in, subset_manifest, unite
from pipeline.storage.json import pretty_json
from pipeline.storage.place import File, Place, open_place
from pipeline.storage.remote import Promise
from pipeline.text import byte_size, count

log = logging.getLogger("deit_cli.sharing")

CLASSES_NAME = f"{IMAGES_FOLDER}/classes.txt"
WORKERS = 8  # number of files at a time

Move = Callable[[File, File, threading.Event], bool]  # source, target, event to stop early -> was it transferred?


@dataclass(frozen=True, kw_only=True)
class Moved:
    """The result of a push or a pull.

    Attributes:
        manifest: manifest of the set at the destination after the transfer.
        sent_files: number of label and samples files that were missing there and were transferred.
        sent_bytes: total size of the transferred files.
        found_files: number of files that were already there.
        found_bytes: total size of the files that were already there.
    """

    manifest: Manifest
    sent_files: int
    sent_bytes: int
    found_files: int
    found_bytes: int


def push(folder: Path, location: str, *, workers: int = WORKERS, progress: Progress = lambda tick: None) -> Moved:
    """Send a local sealed label set to a folder or bucket, which may already hold other views of the same set.

    Args:
        folder: folder of the set.
        location: destination: a folder, or s3://, gs://, hf://.
        workers: number of files that are sent at a time.
        progress: function called with the number of files at the destination.

    Raises:
        LabelSetMismatch: the destination has another label set, or a file with the same name and other content.
        LabelSetIncomplete: one of the two sets is not sealed, or together they leave a gap.
        LabelSetCorrupt: a file of the folder is missing, or has another length.
        StorageError: a file of the folder is damaged, or the destination cannot be written.
    """
    here, there = Place(folder), open_place(location)
    _refuse_same(here, there)
    there.refuse_unwritable()
    label_set, workers = LabelSet.open(folder), 1 if there.takes_one_at_a_time else workers
    return _transfer("push", label_set, label_set.manifest, here, there, _upload, workers=workers, progress=progress)


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
    """Fetch a label set or a part of it into a local folder, which may already hold other views of the same set.

    Args:
        location: source: a folder, or s3://, gs://, hf://, http(s)://.
        folder: local folder to write to.
        views: start and stop of the wanted views; whole blocks are fetched. None: all.
        shards: names of source shards, or patterns. None: all.
        expect_manifest: pin of the manifest at the source, `sha256:` and its hash; None: any manifest.
        workers: number of files that are fetched at a time.
        progress: function called with the number of local files.

    Raises:
        LabelSetMismatch: the folder has another label set, or a file with the same name and other content.
        LabelSetIncomplete: one of the two sets is not sealed, or together they leave a gap.
        LabelSetCorrupt: a file, at the source or in the folder, does not have the hash in the manifest.
        StorageError: a file could not be received or written.
    """
    there, here = open_place(location), Place(folder)
    _refuse_same(there, here)
    label_set = LabelSet.open(location, expect_manifest=expect_manifest)
    manifest = label_set.manifest
    if views is not None or shards is not None:
        manifest = subset_manifest(
            manifest,
            label_set.plan,
            views=views,
            shards=shards,
            probes_of=lambda entry: probes_in(label_set.read_file(entry), entry),
        )
    return _transfer("pull", label_set, manifest, there, here, _download, workers=workers, progress=progress)


def _upload(source: File, target: File, stop: threading.Event) -> bool:
    assert source.path is not None
    held = target.holds(source.path)
    _check_content(target, held if held is not None else target.store(source.path))
    return held is None


def _download(source: File, target: File, stop: threading.Event) -> bool:
    assert target.path is not None
    held = target.holds()
    _check_content(target, held if held is not None else source.fetch(target.path, stop) or target.holds())
    return held is None


def _check_content(target: File, right: bool | None) -> None:
    if not right:
        size, sha256 = target.promise.bytes, short(str(target.promise.sha256))
        raise LabelSetMismatch(
            f"{target} exists with other content than the manifest says ({size} bytes,"
            f" SHA-256 {sha256}…), and is not overwritten",
            fix="Delete it there, or choose another destination",
        )


def moved_line(destination: str, moved: Moved, verb: str) -> str:
    """Return one line on what was moved, and what is at the destination now."""
    blocks = moved.manifest.blocks
    before = f"; {count(moved.found_files, 'file')}, {byte_size(moved.found_bytes)}, already there"
    found = before if moved.found_files else ""
    shards = "" if moved.manifest.shards is None else f" of {count(len(moved.manifest.shards), 'source shard')}"
    return (
        f"{destination}: {count(moved.sent_files, 'file')}, {byte_size(moved.sent_bytes)}, {verb}{found}. Label set"
        f" {short(moved.manifest.labelset_id)}, views {blocks[0].start}:{blocks[-1].stop}{shards}"
    )


def moved_record(destination: object, moved: Moved) -> dict[str, Any]:
    """Return what was moved, and what is at the destination now, as JSON values."""
    return in_short(destination, LabelSet.open(str(destination))) | {
        "files": moved.sent_files,
        "bytes": moved.sent_bytes,
        "files_before": moved.found_files,
        "bytes_before": moved.found_bytes,
    }


def _transfer(
    phase: str,
    label_set: LabelSet,
    manifest: Manifest,
    source: Place,
    target: Place,
    move: Move,
    *,
    workers: int,
    progress: Progress,
) -> Moved:
    """Transfer the plan first, then the files, and the manifest last; return the result."""
    plan, names = label_set.plan, (str(source), str(target))
    plan_data, manifest_data = _read_both(source, label_set)
    claimed = hashlib.sha256(_claim(target, plan_data, plan, names)).hexdigest()

    def change(old: bytes | None) -> bytes:
        """Return the manifest of both sets; if possible the exact bytes of one, so that its hash stays the same."""
        if old is None:
            united = manifest.model_copy(update={"plan_sha256": claimed, "content_sha256": None})
        else:
            there = parse_manifest(old, target / MANIFEST_NAME, plan_sha256=claimed)
            united = unite(manifest, there, plan, names=names)
            if contains(there, united):
                return old
        new = pretty_json(united.to_json())
        same = claimed == label_set.manifest.plan_sha256 and contains(label_set.manifest, united)
        return manifest_data if same and contains(united, label_set.manifest) else new

    manifest_there = target / MANIFEST_NAME
    before = manifest_there.read()
    result = change(before)  # raise for sets that cannot be united before sending anything
    tally = _move_all(phase, source, target, manifest.files, move, workers=workers, progress=progress)
    _carry(source, target, ours=result == manifest_data, unchanged=result == before)
    final = manifest_there.update(change)
    return Moved(
        manifest=parse_manifest(final, manifest_there, plan_sha256=claimed),
        sent_files=tally.made,
        sent_bytes=tally.bytes_written,
        found_files=tally.done - tally.made,
        found_bytes=sum(entry.bytes for entry in manifest.files) - tally.bytes_written,
    )


def _read_both(source: Place, label_set: LabelSet) -> tuple[bytes, bytes]:
    """Return the bytes of plan and manifest; raise if they changed since the set was opened."""
    plan, manifest = (source / PLAN_NAME).read(), (source / MANIFEST_NAME).read()
    opened = (label_set.manifest.plan_sha256, pretty_json(label_set.manifest.to_json()))
    if (hashlib.sha256(plan or b"").hexdigest(), manifest) != opened or plan is None or manifest is None:
        raise LabelSetMismatch(f"{source} was changed since it was opened", fix="Run the same command again")
    return plan, manifest


def _claim(target: Place, data: bytes, plan: Plan, names: tuple[str, str]) -> bytes:
    """Write the plan, create-only; return the plan at the destination, which must be of the same label set."""
    there = (target / PLAN_NAME).read()
    if there is None:
        (target / PLAN_NAME).put(data)
        there = (target / PLAN_NAME).read() or data  # another writer may have been first
    found = parse_plan(there, target / PLAN_NAME)
    if found.labelset_id != plan.labelset_id:
        parts = ("recipe_id", "teacher_id", "source_id", "topk", "precision")
        differing = [name for name in parts if getattr(found, name) != getattr(plan, name)]
        raise LabelSetMismatch(
            f"{names[1]} holds label set {short(found.labelset_id)}, {names[0]} holds"
            f" {short(plan.labelset_id)}: {', '.join(name.removesuffix('_id') for name in differing)}"
            " differ",
            fix="Choose another destination",
        )
    return there


def _carry(source: Place, target: Place, *, ours: bool, unchanged: bool) -> None:
    """Copy the other files: the card if the destination has none, and the signature of exactly this manifest.

    The class names of packed images are copied, too, so that the images can be used as a source there.

    Args:
        source: label set to copy from.
        target: destination.
        ours: whether the manifest of the destination will be the one of the source.
        unchanged: whether the manifest of the destination stays as it is; its signature then stays valid.
    """
    classes, card, signature = (_read_optional(source / name) for name in (CLASSES_NAME, CARD_NAME, SIGNATURE_NAME))
    if classes is not None:
        (target / CLASSES_NAME).put(classes)
    if card is not None and not (target / CARD_NAME).put(card):
        log.info("%s exists with other content, and is kept", target / CARD_NAME)
    if signature is not None and ours:
        (target / SIGNATURE_NAME).put(signature, replace=True)
    elif not (ours or unchanged) and (signature or _read_optional(target / SIGNATURE_NAME)) is not None:
        log.warning("%s: no signature covers its current manifest: sign it", target)


def _read_optional(file: File) -> bytes | None:
    with contextlib.suppress(RemoteFileRefused):  # a store that may not be listed gives this error for a missing file
        return file.read()
    return None


def _move_all(
    phase: str,
    source: Place,
    target: Place,
    entries: Sequence[FileEntry],
    move: Move,
    *,
    workers: int,
    progress: Progress,
) -> Tick:
    """Transfer every file; return the last tick: `done` counts files now there, `made` the transferred ones."""
    began, tick, stop = time.monotonic(), Tick(phase=phase, done=0, total=len(entries)), threading.Event()

    def one(entry: FileEntry) -> bool:
        promise = Promise(entry.bytes, entry.sha256)
        return move(source.file(entry.path, promise), target.file(entry.path, promise), stop)

    with contextlib.closing(in_threads(entries, one, workers, stop=stop)) as moves:  # stops the transfers on any error
        for entry, brought in moves:
            tick = Tick(
                phase=phase,
                done=tick.done + 1,
                total=len(entries),
                elapsed_s=time.monotonic() - began,
                made=tick.made + brought,
                bytes_written=tick.bytes_written + (entry.bytes if brought else 0),
                unit="files",
            )
            progress(tick)
    return tick


def _refuse_same(source: Place, target: Place) -> None:
    if source.path is not None and target.path is not None and source.path.resolve() == target.path.resolve():
        raise UsageError(f"source and destination are the same folder, {target}")
