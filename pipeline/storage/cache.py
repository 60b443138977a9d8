"""A disk cache of remote files: a folder with a size limit that many processes share.

A file is downloaded once, under a lock that dies with its holder, to a temporary name; measured, hashed, and only then
given its name. Beside it stands a small JSON with its length and hash: without that, or with another length, it is not a
file of the cache. When room is needed, the least recently used file goes, and is fetched again by the next process that
needs it. So every file is opened through `use` (or `fetch`), and a date decides nothing but the order of eviction.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from pipeline.errors import RemoteFileCorrupt, StorageError
from pipeline.repeats import warn_counted
from pipeline.storage import remote
from pipeline.storage.atomic import TEMPORARY_PREFIX, locked, refusals_named, replace_file, sweep_temporaries
from pipeline.storage.json import pretty_json
from pipeline.storage.patience import MIN_RATE
from pipeline.storage.remote import NO_PROMISE, Promise
from pipeline.storage.urls import url_name, user_cache
from pipeline.text import byte_size, parse_bytes

log = logging.getLogger("deit_cli.cache")

DEFAULT_SIZE = "100GB"
DEFAULT_RATE = "10kB"
IN_USE_S = 60.0  # files used within this time are not evicted for a file fetched ahead
AHEAD_S = 900.0  # a file fetched ahead is dated this far into the future until its first use
POLL_S = 0.2
LONG_WAIT_S = 60.0  # whoever waits longer for a file is told
_OPENINGS = 8  # if a file is evicted between `fetch` and `open` this often, the cache is much too small

Result = TypeVar("Result")


class NoRoom(Exception):
    """Everything in the cache is being downloaded, or (for a file fetched ahead) in use."""


@dataclass(frozen=True)
class Cache:
    """A folder of downloaded files that may hold at most `max_bytes`. It has three fields, so it pickles small.

    Files must arrive at `min_rate` bytes a second, or they are requested again.
    The limit includes downloads. A download of known length reserves its space before the first byte; a download of
    unknown length is counted once it is complete.
    """

    folder: Path
    max_bytes: int
    min_rate: int = MIN_RATE

    def use(self, url: str, promise: Promise, use: Callable[[Path], Result]) -> Result:
        """Return `use(path)` of the local copy of a remote file; it raises the errors of `fetch`.

        If the copy is evicted before it is opened, it is fetched again. A file that is open stays readable when it is evicted.
        """
        for _ in range(_OPENINGS):
            with contextlib.suppress(FileNotFoundError):
                return use(self.fetch(url, promise))
        raise StorageError(
            f"{url}: evicted from the cache {self.folder} {_OPENINGS} times before it was opened",
            fix="Raise --cache-size",
        )

    def fetch(self, url: str, promise: Promise = NO_PROMISE) -> Path:
        """Return the local path of a remote file; download it if it is not here.

        Exactly one process downloads, others wait for it. The path is good until the file is evicted, at any time:
        open it at once and fetch it again if it is gone, or use `use`.

        Args:
            url: http(s)://, s3://, gs:// or hf://.
            promise: known length and hash of the file.

        Raises:
            RemoteFileMissing: the file does not exist.
            RemoteFileCorrupt: its length or hash is not the promised one, after two downloads.
            StorageError: it cannot be downloaded, or does not fit into the cache.
        """
        path = self._path(url, promise)
        if not self._is_here(path, use=True):
            began = time.monotonic()
            while True:
                try:
                    self._bring(url, path, promise)
                    break
                except NoRoom as error:
                    if time.monotonic() - began > remote.DEADLINE_S:
                        raise StorageError(
                            f"{url}: no room in the cache {self.folder}: other downloads fill its"
                            f" {byte_size(self.max_bytes)}",
                            fix="Raise --cache-size",
                        ) from error
                    time.sleep(POLL_S)
            if (waited := time.monotonic() - began) >= LONG_WAIT_S:
                warn_counted(log, "files that somebody waited for", "%s: waited %.0f s for this file", url, waited)
        return path

    def fetch_ahead(self, url: str, promise: Promise, stop: threading.Event) -> Path | None:
        """Download a file before its first use, and date it AHEAD_S into the future; its first use dates it back.

        To make room, it evicts only files that were not used for IN_USE_S.

        Returns:
            its path; None if another process is downloading it, or `stop` was set.

        Raises:
            Stopped: `stop` was set during the download.
            StorageError: it cannot be downloaded.
        """
        path, brought = self._path(url, promise), False
        while not self._is_here(path, use=False):
            try:
                brought = self._bring(url, path, promise, ahead=stop)
                if not brought:
                    return None
            except NoRoom:
                if stop.wait(POLL_S):
                    return None
        if brought or time.time() - last_use(path) > IN_USE_S:
            _date(path, time.time() + AHEAD_S)
        return path

    def discard(self, url: str, promise: Promise = NO_PROMISE) -> None:
        """Delete the local copy of a file because it is damaged."""
        self._evict(self._path(url, promise))

    def _path(self, url: str, promise: Promise) -> Path:
        """Return the path of a file in the cache; the name contains the promise, so a changed promise is another file."""
        promised = json.dumps([url, promise.bytes, promise.sha256])
        digest = hashlib.blake2b(promised.encode(), digest_size=16).hexdigest()
        return self.folder / f"{digest}-{re.sub('[^A-Za-z0-9._-]', '_', url_name(url))[-80:]}"

    def _is_here(self, path: Path, *, use: bool) -> bool:
        """Return True if a complete file is in the cache; `use` updates its date."""
        try:
            promised = json.loads(_sidecar(path).read_bytes())["bytes"]
            found = os.stat(path)
        except (OSError, ValueError, KeyError, TypeError):
            return False
        if found.st_size != promised:
            message = "%s has %d bytes, %s were downloaded: fetching it again"
            warn_counted(log, "files that were downloaded again", message, path, found.st_size, promised)
            return False
        if use and abs(time.time() - found.st_mtime) > 1:
            _date(path, time.time())
        return True

    def _bring(self, url: str, path: Path, promise: Promise, ahead: threading.Event | None = None) -> bool:
        """Download a file unless it is here; with `ahead`, return False if another process is downloading it.

        Raises:
            NoRoom: there is not enough room at present.
        """
        with refusals_named(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with locked(_lock(path), wait=ahead is None) as ours:
            if not ours:
                return False
            if not self._is_here(path, use=ahead is None):  # another process may have downloaded it meanwhile
                self._download(url, path, promise, ahead)
        return True

    def _download(self, url: str, path: Path, promise: Promise, ahead: threading.Event | None) -> None:
        pause = time.sleep if ahead is None else ahead.wait
        try:
            remote.retried(url, lambda: self._download_once(url, path, promise, ahead), pause=pause)
        except RemoteFileCorrupt as error:
            warn_counted(log, "files that were downloaded again", "%s; downloading it once more", error)
            remote.retried(url, lambda: self._download_once(url, path, promise, ahead), pause=pause)

    def _download_once(self, url: str, path: Path, promise: Promise, ahead: threading.Event | None) -> None:
        def write(file: BinaryIO) -> None:
            nonlocal received
            reserved = 0

            def begin(announced: int | None) -> None:
                nonlocal reserved
                reserved = announced or promise.bytes or 0
                self._take_room(url, file, reserved, ahead)

            received = remote.receive(
                url,
                file,
                size=promise.bytes,
                begin=begin,
                check=check,
                min_rate=self.min_rate,
            )
            if not reserved:
                with contextlib.suppress(NoRoom), locked(self.folder / ".lock"):
                    self._make_room(0, older_than=None)
            if promise.sha256 is not None and received.sha256 != promise.sha256:
                raise RemoteFileCorrupt(
                    f"{url} has SHA-256 {received.sha256[:12]}…, {promise.sha256[:12]}… is promised: it was changed or replaced"
                )

        def check(length: int) -> None:
            if ahead is not None and ahead.is_set():
                raise remote.Stopped
            self._refuse_larger(url, length)

        received = remote.Received(0, "")
        with refusals_named(path):
            _sidecar(path).unlink(missing_ok=True)
        replace_file(path, write)
        about = {"url": url, "bytes": received.bytes, "sha256": received.sha256}
        replace_file(_sidecar(path), pretty_json(about))

    def _take_room(self, url: str, file: BinaryIO, need: int, ahead: threading.Event | None) -> None:
        """Make room for a download and reserve it: the file gets its full length before the first byte."""
        self._refuse_larger(url, need)
        with locked(self.folder / ".lock"):
            self._make_room(need, older_than=None if ahead is None else time.time() - IN_USE_S)
            if need:
                file.truncate(need)

    def _refuse_larger(self, url: str, size: int) -> None:
        if size > self.max_bytes:
            raise StorageError(
                f"{url} has {byte_size(size)} or more, the whole cache {self.folder} has {byte_size(self.max_bytes)}",
                fix="Raise --cache-size",
            )

    def _make_room(self, need: int, *, older_than: float | None) -> None:
        """Evict the least recently used files until `need` bytes fit.

        Args:
            need: number of bytes that must fit.
            older_than: date; only files last used before it are evicted; None: any file.

        Raises:
            NoRoom: the remaining files are newer, or being downloaded.
        """
        used, files = self._contents()
        for date, size, path in sorted(files):
            if used + need <= self.max_bytes or (older_than is not None and date >= older_than):
                break
            used -= size if self._evict(path) else 0
        if used + need > self.max_bytes:
            raise NoRoom

    def _contents(self) -> tuple[int, list[tuple[float, int, Path]]]:
        """Return the bytes in the cache, with downloads in progress, and last use, size and path of every file."""
        with refusals_named(self.folder):
            if any(name.startswith(TEMPORARY_PREFIX) for name in os.listdir(self.folder)):
                sweep_temporaries(self.folder)
            used, files = 0, []
            for entry in os.scandir(self.folder):
                if (
                    entry.name.endswith((".lock", ".json")) or entry.is_dir()
                ):  # indexes of sources are in a folder of their own
                    continue
                with contextlib.suppress(FileNotFoundError):
                    stat = entry.stat()
                    used += stat.st_size
                    if not entry.name.startswith(TEMPORARY_PREFIX):
                        files.append((stat.st_mtime, stat.st_size, Path(entry.path)))
        return used, files

    def _evict(self, path: Path) -> bool:
        """Delete a file unless it is being downloaded; its sidecar is deleted first, so a partial deletion is not a valid file."""
        with refusals_named(path), locked(_lock(path), wait=False) as ours:
            if ours:
                for part in (_sidecar(path), path, _lock(path)):
                    part.unlink(missing_ok=True)
            return ours


def open_cache(folder: Path | None = None, size: str = DEFAULT_SIZE, min_rate: str = DEFAULT_RATE) -> Cache:
    """Return the cache in a folder (None: `deit-cli` in the user's cache folder) of a size such as `50GB`.

    Args:
        folder: folder of the cache.
        size: maximum size.
        min_rate: bytes a second at which files must arrive, such as `10kB`.
    """
    folder = folder.expanduser().absolute() if folder else user_cache() / "deit-cli"
    return Cache(folder, parse_bytes(size, what="--cache-size"), parse_bytes(min_rate, what="--min-rate"))


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _lock(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _date(path: Path, when: float) -> None:
    """Set the date of the last use. It only decides the order of eviction, so a failure is ignored."""
    with contextlib.suppress(OSError):
        os.utime(path, (when, when))


def last_use(path: Path) -> float:
    """Return the date of the last use; 0 for a file that does not exist."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0
