"""Reading of remote files through fsspec: receive, read and list; temporary failures are retried.

Writing is in `uploads`.

Libraries handle failures differently: fsspec does not retry after a 503, and a truncated body without Content-Length
passes as complete. Here every answer is compared with the announced length, every wait has a limit, and an error
names the address, the expected value and the received one. A transfer that is slower than a minimum rate counts as failed.

`download` creates a local file. Its partial content is beside it as `.part-HASH`, named after the promised content, and is
locked while a process works on it. A later run requests only the rest. The hash of the whole file shows if the first part
was right; if the hash is wrong, the file is fetched once more from its start.
"""

import hashlib
import io
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pipeline.errors import RemoteFileCorrupt, RemoteFileMissing, StorageError
from pipeline.repeats import warn_counted
from pipeline.storage.atomic import locked, make_folder, publish_partial, refusals_named, replace_file
from pipeline.storage.patience import (
    ANSWER_S,
    LISTING_S,
    MIN_RATE,
    WINDOW_S,
    Interrupted,
    Rate,
    longer_than,
    watched,
)
from pipeline.storage.stores import store_of

log = logging.getLogger("deit_cli.remote")

RETRY_DELAYS_S = (1.0, 2.0, 4.0, 8.0, 16.0)
DEADLINE_S = 900.0  # no retry is started after this time
RANGE_BYTES = 1 << 20  # size of a request if only the end of a file is needed

Result = TypeVar("Result")


@dataclass(frozen=True)
class Promise:
    """The promised length and hash of a file; None where nothing is promised.

    Attributes:
        bytes: length of the file.
        sha256: hash of the file, hex.
    """

    bytes: int | None = None
    sha256: str | None = None


NO_PROMISE = Promise()


@dataclass(frozen=True)
class Received:
    """The length and SHA-256 of received bytes."""

    bytes: int
    sha256: str


def receive(
    url: str,
    file: BinaryIO,
    *,
    size: int | None = None,
    start: int = 0,
    begin: Callable[[int | None], None] = lambda announced: None,
    check: Callable[[int], None] = lambda received: None,
    min_rate: float = MIN_RATE,
) -> Received:
    """Write a remote file to a local one in one attempt, check its length, and return length and hash.

    Args:
        url: URL of the file.
        file: local file, written from its start.
        size: promised number of bytes, or None.
        start: number of bytes already in `file`, which must then be readable; only the rest is requested. The hash shows
            if these bytes were right. If a server sends the whole file anyway, all of it is received.
        begin: function called before the first byte with the announced length, or None without one.
        check: function called before every block with the number of bytes including the block; it may raise.
        min_rate: bytes a second that must arrive.

    Raises:
        Interrupted: the transfer failed or is too slow, and a retry may succeed.
        RemoteFileMissing: the file does not exist.
        RemoteFileRefused: access was denied.
        RemoteFileCorrupt: the length is not the promised one.
        StorageError: the server refused the transfer permanently.
    """
    store = store_of(url)
    sink = _Sink(url, file, size, start, begin, check)
    if start and start == size:
        return Received(start, sink.digest.hexdigest())
    rate = sink.rate = Rate(min_rate, grain=store.grain)
    try:
        watched(lambda: store.receive(url, sink), rate.too_slow)
    except Exception as error:
        raise sink.error or store.named(url, error) from error
    finally:
        sink.end()
    sink.begin()  # also for an empty file, which sends no block
    if sink.announced not in (None, sink.received) or (sink.announced is None and sink.received < (size or 0)):
        expected = size if sink.announced is None else sink.announced
        raise Interrupted(f"the answer ended after {sink.received} of {expected} bytes")
    sink.refuse_length(sink.received)
    return Received(sink.received, sink.digest.hexdigest())


def retried(url: str, attempt: Callable[[], Result], *, pause: Callable[[float], Any] = time.sleep) -> Result:
    """Return what `attempt` returns; if it is interrupted, try again after increasing pauses.

    A pause is at least as long as the server asks for, but no try begins later than DEADLINE_S after the first.

    Raises:
        StorageError: every attempt was interrupted.
    """
    began, tries = time.monotonic(), 0
    for delay in (*RETRY_DELAYS_S, None):
        try:
            tries += 1
            result = attempt()
        except Interrupted as error:
            spent = time.monotonic() - began
            if delay is None or spent >= DEADLINE_S:
                raise StorageError(
                    f"{url}: gave up after {tries} tries in {spent:.0f} s: {error}",
                    fix="Run the same command again when it answers",
                ) from error
            delay = min(max(delay, error.retry_after_s), DEADLINE_S - spent)
            warn_counted(
                log, "interrupted requests that were tried again", "%s: %s; trying again in %.3g s", url, error, delay
            )
            pause(delay)
        else:
            if tries > 1:
                spent = time.monotonic() - began
                message = "%s: it took %d tries and %.0f s"
                warn_counted(log, "files that took more than one try", message, url, tries, spent)
            return result
    raise AssertionError("the last try returns or raises")


def receive_whole(
    url: str,
    file: BinaryIO,
    *,
    size: int | None = None,
    check: Callable[[int], None] = lambda received: None,
    min_rate: float = MIN_RATE,
) -> Received:
    """Write a remote file to an open local one as `receive` does; an interrupted attempt begins again at the start."""

    def attempt() -> Received:
        file.seek(0)
        file.truncate()
        return receive(url, file, size=size, check=check, min_rate=min_rate)

    return retried(url, attempt)


def receive_file(url: str, path: Path) -> None:
    """Replace a local file by a remote one atomically; it raises the errors of `receive`."""
    replace_file(path, lambda file: receive_whole(url, file))


def read_url(url: str, *, max_bytes: int, min_rate: float = MIN_RATE) -> bytes | None:
    """Return the current bytes of a small remote file (a plan, manifest or list of class names); None if it does not exist.

    Args:
        url: URL of the file.
        max_bytes: largest permitted size.
        min_rate: bytes a second that must arrive.

    Raises:
        StorageError: the file is too large, or could not be read.
    """

    def check(received: int) -> None:
        if received > max_bytes:
            raise StorageError(f"{url}: such a file may have at most {max_bytes} bytes, this one has more")

    buffer = io.BytesIO()
    try:
        receive_whole(url, buffer, check=check, min_rate=min_rate)
    except RemoteFileMissing:
        return None
    return buffer.getvalue()


def read_ranges(url: str, use: Callable[[Any], Result], *, min_rate: float = MIN_RATE) -> Result:
    """Return `use(file)` of an open remote file; only the ranges that `use` reads are received, at `min_rate` bytes a second.

    Raises:
        RemoteFileMissing: the file does not exist.
        StorageError: the file could not be read, or its server does not support ranges.
    """

    def attempt() -> Result:
        system, path = store_of(url).file_system(url)
        settings = {"block_size": RANGE_BYTES, "cache_type": "readahead"}
        with watched(lambda: system.open(path, "rb", **settings), longer_than(ANSWER_S)) as file:
            return use(_WatchedFile(file, min_rate))

    return _named(url, attempt)


def list_url(url: str) -> list[str]:
    """Return the names of the files directly in a remote folder, sorted.

    Raises:
        RemoteFileMissing: the folder does not exist.
        StorageError: the URL is on a web server, which cannot list folders.
    """
    store = store_of(url)
    if not store.lists_files:
        raise StorageError(f"{url}: a web server has no list of its files: name them, as in train-{{000..127}}.tar")

    def attempt() -> list[str]:
        system, path = store.file_system(url)
        entries = system.ls(path, detail=True, refresh=True)
        files = [entry["name"] for entry in entries if entry["type"] == "file"]
        return sorted(name.rstrip("/").rpartition("/")[2] for name in files)

    return _named(url, lambda: watched(attempt, longer_than(LISTING_S)))


def list_tree(url: str) -> dict[str, str]:
    """Return each file below a folder of a bucket: relative path -> token that changes with the content.

    The list is never cached. A folder that does not exist has no files.
    """
    store = store_of(url)

    def attempt() -> dict[str, str]:
        system, path = store.file_system(url)
        try:
            found = system.find(path, detail=True)
        except FileNotFoundError:
            return {}
        top = path.strip("/") + "/"
        files = {name.strip("/"): entry for name, entry in found.items() if entry["type"] == "file"}
        return {name.removeprefix(top): store.token(entry) for name, entry in files.items() if name.startswith(top)}

    return _named(url, lambda: watched(attempt, longer_than(LISTING_S)))


class _WatchedFile:
    """An open remote file whose reads end: each has the time that its bytes, or those read ahead, need at the minimum rate."""

    def __init__(self, file: Any, min_rate: float) -> None:
        self._file, self._min_rate = file, min_rate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, length: int = -1) -> bytes:
        """Read at most `length` bytes; -1: up to the end.

        Raises:
            Interrupted: they do not arrive in time.
        """
        ahead = RANGE_BYTES + (length if length >= 0 else self._file.size or 0)
        return watched(lambda: self._file.read(length), longer_than(max(WINDOW_S, ahead / self._min_rate)))


def _named(url: str, ask: Callable[[], Result]) -> Result:
    """Return what a store answers; its errors become ours, and temporary ones are retried."""

    def attempt() -> Result:
        try:
            return ask()
        except Exception as error:
            raise store_of(url).named(url, error) from error

    return retried(url, attempt)


def info_of(url: str) -> dict[str, Any] | None:
    """Return the store's current information on a file, never cached; None if it does not exist or is a folder."""
    return retried(url, lambda: store_of(url).info(url))


def token_of(url: str) -> str | None:
    """Return the token of one file, see `list_tree`; None if it does not exist."""
    info = info_of(url)
    return None if info is None else store_of(url).token(info)


class _Sink:
    """A file-like object for fsspec that counts and hashes the bytes written to it.

    Attributes:
        error: a failure on this side (a full disk, no room, a wrong length), so that it is not treated as a network failure.
        rate: the rate at which bytes arrive.
    """

    rate: Rate

    def __init__(
        self, url: str, file: BinaryIO, size: int | None, start: int, begin: Callable, check: Callable
    ) -> None:
        from fsspec.callbacks import Callback  # imported here, so that local files do not need it

        self._url, self._file, self._size, self._begin, self._check = url, file, size, begin, check
        self.callback = Callback()
        self.digest = hashlib.sha256()
        self.received = self.start = start
        self.error: Exception | None = None
        self._begun = self._ended = False
        self._turn = threading.Lock()
        while start:  # `file` is at its start
            block = file.read(min(start, RANGE_BYTES))
            self.digest.update(block)
            start -= len(block)

    @property
    def announced(self) -> int | None:
        """Return the length of the whole file if the server announces it, else None."""
        return None if self.callback.size is None else self.start + self.callback.size

    def begin(self) -> None:
        """Prepare for the first byte; raise if the announced length is wrong, before receiving the file."""
        if not self._begun:
            self._begun = True
            if self.start and self.callback.size == self._size:
                self._restart()
            if self.announced is not None:
                self.refuse_length(self.announced)
            self._begin(self.announced)

    def _restart(self) -> None:
        """Start again from byte 0, because the server ignores ranges and sends the whole file."""
        self._file.seek(0)
        self._file.truncate()
        self.digest, self.received, self.start = hashlib.sha256(), 0, 0

    def refuse_length(self, length: int) -> None:
        if self._size is not None and length != self._size:
            raise RemoteFileCorrupt(
                f"{self._url} has {length} bytes, {self._size} are promised: it was cut, changed or replaced"
            )

    def write(self, data: bytes) -> int:
        with self._turn:
            if self._ended:
                raise Stopped
            self.rate.add(len(data))
            try:
                self.begin()
                self._check(self.received + len(data))
                self._file.write(data)
            except Exception as error:
                self.error = error
                raise
            self.digest.update(data)
            self.received += len(data)
            return len(data)

    def end(self) -> None:
        """Take no more bytes: a transfer that was given up may go on for a while, and the file is used again."""
        with self._turn:
            self._ended = True

    def read(self) -> bytes:
        raise io.UnsupportedOperation("written only")

    def tell(self) -> int:
        return self.received

    def close(self) -> None:
        """Do nothing: the caller closes the file that it opened."""


class Stopped(Exception):
    """Error: a transfer was told to stop."""


def download(
    url: str, path: Path, promise: Promise, *, stop: threading.Event | None = None, min_rate: float = MIN_RATE
) -> bool:
    """Download a remote file to its final name, create-only.

    Args:
        url: URL of the file.
        path: final local name.
        promise: promised length and hash.
        stop: event that ends the download when it is set.
        min_rate: bytes a second that must arrive.

    Returns:
        True if the file was downloaded, False if another process created `path` meanwhile.

    Raises:
        RemoteFileMissing: the file does not exist.
        RemoteFileCorrupt: length or hash is not the promised one, even after a download from the start.
        StorageError: the file could not be received or written.
        Stopped: `stop` was set.
    """
    assert promise.bytes is not None
    assert promise.sha256 is not None
    size, sha256, stop = promise.bytes, promise.sha256, stop or threading.Event()
    make_folder(path.parent)
    partial = path.with_name(f".part-{sha256[:32]}")
    with locked(partial):
        if path.exists():  # the previous holder of the lock has downloaded it
            partial.unlink(missing_ok=True)
            return False
        for trusted in (True, False):
            if not trusted:
                os.truncate(partial, 0)
            try:
                received = retried(url, lambda: _continue(url, partial, size, stop, min_rate), pause=stop.wait)
            except RemoteFileCorrupt:
                if not trusted:
                    raise
                message = "%s: what has come does not go on as it began; fetching it from its start"
                warn_counted(log, "downloads that began anew", message, url)
                continue
            if received.sha256 == sha256:
                return publish_partial(partial, path)
            message = "%s has SHA-256 %s…, not %s…; fetching it from its start"
            warn_counted(log, "downloads that began anew", message, url, received.sha256[:12], sha256[:12])
        os.truncate(partial, 0)
    raise RemoteFileCorrupt(
        f"{url} has SHA-256 {received.sha256[:12]}…, {sha256[:12]}… is promised: it was changed or replaced"
    )


def _continue(url: str, partial: Path, size: int, stop: threading.Event, min_rate: float) -> Received:
    """Append the missing rest of a file to its partial download; return length and hash of the whole."""

    def check(_: int) -> None:
        if stop.is_set():
            raise Stopped

    with refusals_named(partial), partial.open("r+b") as file:
        here = os.fstat(file.fileno()).st_size
        if here > size:
            file.truncate(0)
            here = 0
        check(here)
        try:
            return receive(url, file, size=size, start=here, check=check, min_rate=min_rate)
        except Interrupted:
            check(here)  # a process that is being ended loses its connections first
            raise
