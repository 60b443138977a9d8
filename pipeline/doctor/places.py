"""Checks of a folder with small temporary files: speed, links, locks, atomic replacement and clock."""

import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.doctor.findings import Section
from pipeline.errors import StorageError
from pipeline.storage.atomic import TEMPORARY_PREFIX, dead_temporaries, publish_file, temporary_name
from pipeline.text import byte_size, count

MOST_BYTES, MOST_S = 256 * 2**20, 2.0  # limits of the speed test
BLOCK_BYTES, SYNC_BYTES = 4 * 2**20, 32 * 2**20
PUBLISHED = 5
SLOW_BYTES_PER_S = 10 * 10**6  # 300 views of ImageNet are 12 GB: 20 minutes at this speed
LITTLE_ROOM = 10**9
SKEW_S = 2.0  # FAT stores times with a resolution of two seconds
LONGEST_NAME = 208  # a source shard's name of 200 bytes and its extension
MOST_ENTRIES = 100_000  # maximum number of entries searched for temporary files
_IN_MEMORY = ("tmpfs", "ramfs")


def examine_folder(asked: Path) -> Section:
    """Return findings on the operations of writers in a folder, or in its nearest existing parent."""
    section = Section(f"folder {asked}")
    folder = asked.absolute()
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    if folder != asked.absolute():
        section.row("looked at", f"{folder}, its nearest existing parent")
    if not folder.is_dir():
        section.problem(f"{folder} is not a folder", "Choose a folder")
        return section
    try:
        with _scratch(folder) as file:
            file.write_bytes(b"x")
    except OSError as error:
        section.row("writable", "no")
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        way_out = "Free some space" if is_full else "Choose a folder that can be written, or change its permissions"
        section.problem(f"{folder} cannot be written: {error.strerror or error}", way_out)
        return section
    section.row("writable", "yes")
    _file_system(section, folder)
    for look in (_speed, _publishing, _links, _locks, _swapping, _spelling, _clock):
        try:
            look(section, folder)
        except (OSError, StorageError) as error:
            section.problem(
                f"{look.__name__.strip('_')} could not be tested in {folder}: {error}", "Check the file system"
            )
    if folder == asked.absolute():
        _left_over(section, folder)
    return section


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Give the path of a file that is deleted at the end; if this process is killed, a later sweep deletes it."""
    path = folder / temporary_name()
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _file_system(section: Section, folder: Path) -> None:
    usage, stat = shutil.disk_usage(folder), os.statvfs(folder)
    kind = folder_kind(folder)
    section.row(
        "file system",
        f"{kind}, {byte_size(usage.free)} free of {byte_size(usage.total)}",
        {"kind": kind, "free": usage.free, "total": usage.total},
    )
    if kind in _IN_MEMORY:
        section.warning(f"{folder} is in memory ({kind}): a restart deletes it", "Choose a folder on a disk")
    if usage.free < LITTLE_ROOM:
        section.warning(
            f"{folder} has {byte_size(usage.free)} left",
            "Free some space, or choose another folder; deit-cli estimate prints the size of the labels",
        )
    if stat.f_files and stat.f_favail < 1000:
        section.warning(
            f"the file system has room for {stat.f_favail} more files",
            "Delete small files, or choose another file system",
        )
    longest = os.pathconf(folder, "PC_NAME_MAX")
    if 0 < longest < LONGEST_NAME:
        section.warning(
            f"a file name may have {longest} bytes here, the name of a source shard may need {LONGEST_NAME}",
            "Choose another folder, or shorter names for the source shards",
        )


def folder_kind(folder: Path) -> str:
    """Return the kind of file system of a folder, such as ext4 or nfs4."""
    device = os.stat(folder).st_dev
    number, kind = f"{os.major(device)}:{os.minor(device)}", "unknown"
    with contextlib.suppress(OSError, IndexError, ValueError):
        for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
            fields = line.split()
            if fields[2] == number:
                kind = fields[fields.index("-") + 1]
    return kind


def _speed(section: Section, folder: Path) -> None:
    """Measure the speed of writing and fsync for two seconds, 256 MB or a tenth of the free space."""
    room = min(MOST_BYTES, shutil.disk_usage(folder).free // 10)
    block = os.urandom(min(BLOCK_BYTES, max(1, room)))  # random, so that compression does not help
    written, synced = 0, 0
    began = time.monotonic()
    with _scratch(folder) as path, path.open("xb", buffering=0) as file:
        while written < max(room, 1) and time.monotonic() - began < MOST_S:
            written += file.write(block)
            if written - synced >= SYNC_BYTES:
                os.fsync(file.fileno())
                synced = written
        os.fsync(file.fileno())
        pace = written / max(1e-9, time.monotonic() - began)
    section.row(
        "writing",
        f"{byte_size(pace)}/s, fsync included, over {byte_size(written)}",
        {"bytes_per_s": pace, "bytes": written},
    )
    if written >= BLOCK_BYTES and pace < SLOW_BYTES_PER_S:
        section.warning(
            f"writing to {folder} is slow: {byte_size(pace)}/s",
            "Write to a local disk and push the label set when it is complete",
        )


def _publishing(section: Section, folder: Path) -> None:
    """Measure the time to publish a file, apart from writing its bytes: create, fsync, link, fsync of the folder."""
    names = [folder / temporary_name() for _ in range(PUBLISHED)]
    began = time.monotonic()
    try:
        created = [publish_file(name, b"") for name in names]
        each = (time.monotonic() - began) / PUBLISHED
        again = publish_file(names[0], b"")
    finally:
        for name in names:
            name.unlink(missing_ok=True)
    section.row("publishing a file", f"{1000 * each:.1f} ms", {"seconds": each})
    if not all(created) or again:
        section.problem(
            f"a file that exists can be created again in {folder}: two writers would overwrite each other",
            "Choose a folder on another file system",
        )


def _links(section: Section, folder: Path) -> None:
    with _scratch(folder) as one, _scratch(folder) as other:
        one.write_bytes(b"")
        try:
            os.link(one, other)
            linked = os.path.samefile(one, other)
        except OSError:
            linked = False
    section.row("hard links", "yes" if linked else "no", linked)
    if not linked:
        section.warning(
            f"{folder} does not support hard links, so the last of two simultaneous writers of a file wins",
            "Write there from one process at a time, or choose a folder on another file system",
        )


def _locks(section: Section, folder: Path) -> None:
    held = refused = False
    with _scratch(folder) as path, path.open("xb") as one, path.open("rb") as other:
        try:
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            refused = held
    section.row("file locks", "yes" if refused else "not kept" if held else "no", refused)
    if not refused:
        section.warning(
            f"file locks {'are not kept' if held else 'are refused'} in {folder}: two runs in one folder, or two downloads of one file, would not notice each other",
            "Start only one run per folder; keep --cache-dir on a local disk (NFS: mount it with locks)",
        )


def _swapping(section: Section, folder: Path) -> None:
    with _scratch(folder) as old, _scratch(folder) as new:
        old.write_bytes(b"old")
        new.write_bytes(b"new")
        with old.open("rb") as reader:
            os.replace(new, old)
            kept = reader.read() == b"old"
        swapped = old.read_bytes() == b"new"
    section.row("swapping files", "yes" if swapped and kept else "no", swapped and kept)
    if not (swapped and kept):
        section.problem(
            f"a file in {folder} cannot be replaced while it is read",
            "Choose a folder on another file system",
        )


def _spelling(section: Section, folder: Path) -> None:
    name = temporary_name()[:-1]
    lower, upper = folder / f"{name}a", folder / f"{name}A"
    try:
        lower.write_bytes(b"")
        one = upper.exists()
    finally:
        lower.unlink(missing_ok=True)
    section.row("upper and lower case", "are one" if one else "differ", not one)
    if one:
        section.warning(
            f"names that differ only in upper and lower case are the same file in {folder}",
            "Choose names for source shards that differ in more than case",
        )


def _clock(section: Section, folder: Path) -> None:
    """Compare this machine's clock with the clock that sets file times: on a network file system, the server's."""
    with _scratch(folder) as path:
        before = time.time()
        path.write_bytes(b"x")
        stamp, after = path.stat().st_mtime, time.time()
    skew = stamp - min(max(stamp, before), after)
    text = f"files are {abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}"
    section.row("clock", text if abs(skew) > 0.1 else "files have this machine's time", round(skew, 3))
    if abs(skew) > SKEW_S:
        section.warning(
            f"files in {folder} get times {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this machine's clock; labels do not depend on it, backups and build tools do",
            "Synchronise both clocks (NTP)",
        )


def _left_over(section: Section, folder: Path) -> None:
    """Count the temporary files that killed writers left."""
    seen = 0
    left: list[Path] = []
    for place, _, names in os.walk(folder):
        seen += len(names)
        left += [Path(place) / name for name in names if name.startswith(TEMPORARY_PREFIX)]
        if seen > MOST_ENTRIES:
            break
    size = 0
    for path in left:
        with contextlib.suppress(OSError):
            size += path.stat().st_size
    dead = sum(1 for _ in dead_temporaries(left))
    text = f"{count(len(left), 'file')}, {byte_size(size)}; {dead} of killed writers" if left else "none"
    section.row(
        "temporary files",
        text + (f" (of the first {seen:,} files)" if seen > MOST_ENTRIES else ""),
        {"files": len(left), "bytes": size, "dead": dead},
    )
    if dead:
        section.warning(
            f"{count(dead, 'temporary file')} of killed writers {'is' if dead == 1 else 'are'} in {folder}",
            "Delete them, or run precompute or train in the folder of these files again",
        )
