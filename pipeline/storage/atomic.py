"""Atomic file writes: publish a complete file under a free name, or replace another file; hashes and locks.

A file of ours is written under a temporary name in its own folder, fsynced, and only then given its name, so
a reader sees it whole or not at all, after SIGKILL and after power loss too. Nothing is deleted or overwritten
except by `replace_file`, which swaps one complete file for another."""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import DiskFullError, StorageError

TEMPORARY_PREFIX = ".tmp-"
_TEMPORARY = re.compile(r"\.tmp-(?P<host>[A-Za-z0-9.-]+)-(?P<pid>\d+)-[0-9a-f]{16}")
# Errors of link(2) on file systems without hard links (exFAT, some network mounts).
_NO_LINKS = frozenset({"EPERM", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EMLINK"})


Content = bytes | Callable[[BinaryIO], object]  # bytes, or a function that writes to an open file without closing it


def publish_file(path: Path, content: Content) -> bool:
    """Create a complete file atomically; an existing file is never replaced.

    Args:
        path: final name; its folder is created.
        content: the bytes, or a function that writes them.

    Returns:
        True if this call created the file, False if another writer had already created it (`content` is dropped).

    Raises:
        StorageError: the operating system refused; no file has the final name.
    """
    with refusals_named(path), _temporary_file(path, content) as temporary:
        try:
            _link(temporary, path)
        except FileExistsError:
            return False
        _fsync_folder(path.parent)
        return True


def replace_file(path: Path, content: Content) -> None:
    """Replace a file by new content, atomically: readers see the old file or the new one.

    Raises:
        StorageError: the operating system refused; the old file is untouched.
    """
    with refusals_named(path), _temporary_file(path, content) as temporary:
        os.replace(temporary, path)
        _fsync_folder(path.parent)


def publish_partial(partial: Path, path: Path) -> bool:
    """Give a complete file in the same folder its final name, as `publish_file` does; the old name is always removed.

    Returns:
        True if this call gave the name, False if another file already had it.
    """
    with refusals_named(path):
        try:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            _link(partial, path)
        except FileExistsError:
            return False
        finally:
            partial.unlink(missing_ok=True)
        _fsync_folder(path.parent)
        return True


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Lock a folder against other callers of this function; without effect on file systems that have no locks."""
    with refusals_named(folder):
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create a folder and those above it, durably."""
    with refusals_named(folder):
        _make_folder(folder)


def sweep_temporaries(folder: Path) -> int:
    """Delete temporary files below `folder` whose writers on this host are dead; return how many.

    Files that may not be deleted, because they belong to another user, stay.
    """
    swept = 0
    for path in dead_temporaries(folder.rglob(f"{TEMPORARY_PREFIX}*")):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
            swept += 1
    return swept


def dead_temporaries(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the paths that are temporary files whose writers on this host are dead."""
    for path in paths:
        match = _TEMPORARY.fullmatch(path.name)
        if match and path.is_file() and match["host"] == _host() and not _is_alive(int(match["pid"])):
            yield path


def temporary_name() -> str:
    """Return a new name for a temporary file; it names its writer, so that the file can be swept once the writer is dead."""
    return f"{TEMPORARY_PREFIX}{_host()}-{os.getpid()}-{secrets.token_hex(8)}"


def sync_folder(folder: Path) -> None:
    """Fsync the names in a folder: a writer may have been killed after giving a name and before the fsync."""
    with refusals_named(folder):
        _fsync_folder(folder)


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as hex."""
    with refusals_named(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file, across processes and threads; without `wait`, give False if it is already held.

    A lock file may be deleted together with the file it guards, so a lock counts only if its name still leads to it.
    """
    while True:
        with refusals_named(path):
            file = path.open("ab")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            try:
                if _leads_to(path, file):
                    yield True
                    return
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)  # closing the file does not unlock it if the process has forked


@contextlib.contextmanager
def _temporary_file(path: Path, content: Content) -> Iterator[Path]:
    _make_folder(path.parent)
    temporary = path.parent / temporary_name()
    try:
        with temporary.open("xb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    """Create a folder and those above it, durably: each new name is fsynced in the folder that holds it."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _fsync_folder(folder.parent)


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:
        if _errno_name(error) not in _NO_LINKS:
            raise
        # Without hard links two writers can race here; both hold labels of one identity, and every reader checks.
        if path.exists():
            raise FileExistsError(path) from error
        os.replace(temporary, path)


_FIXES = {
    "ENOSPC": "Free some space",
    "EDQUOT": "Raise the quota",
    "EROFS": "Choose a folder that can be written",
    "EACCES": "Choose a folder that can be written and read",
    "EPERM": "Choose a folder that can be written and read",
}


@contextlib.contextmanager
def refusals_named(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block into a StorageError that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise StorageError(f"{error.filename or path}: no such file or folder") from error
    except OSError as error:
        name = _errno_name(error)
        kind = DiskFullError if name in ("ENOSPC", "EDQUOT") else StorageError
        raise kind(f"{path}: {error.strerror or error}", fix=_FIXES.get(name)) from error


def _errno_name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, "")


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.]", "-", socket.gethostname()) or "host"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _leads_to(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
