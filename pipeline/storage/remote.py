"""Remote files through fsspec: receive one, read a small one, list a folder; what may pass is tried again.

Writing is in `uploads`.

Libraries disagree about failures: fsspec does not try again after a 503, and a body that is cut without Content-Length
passes for a whole one. Here every answer is measured against what was announced, every wait has a limit, and an error
names the address, what was expected and what came.

`download` brings a file to stay. What has come of it stands beside it as `.part-HASH`, named by the promised content, and is
locked while a process works on it. A later run asks for the rest only. Whether the first part was right shows in the hash of
the whole; where that is wrong the file is fetched once more from its start.
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

from pipeline.errors import RemoteFileCorrupt, StorageError
from pipeline.repeats import warn_counted
from pipeline.storage.atomic import locked, make_folder, publish_partial, refusals_named, replace_file
from pipeline.storage.stores import Interrupted, store_of

log = logging.getLogger("deit_cli.remote")

RETRY_DELAYS_S = (1.0, 2.0, 4.0, 8.0, 16.0)
DEADLINE_S = 900.0  # after which nothing is begun again
RANGE_BYTES = 1 << 20  # where only the end of a file is wanted

Result = TypeVar("Result")


@dataclass(frozen=True)
class Promise:
    """What is promised of the content of a file; None where nothing is.

    Attributes:
        bytes: length of the file.
        sha256: hash of the file, hex.
    """

    bytes: int | None = None
    sha256: str | None = None


NO_PROMISE = Promise()


@dataclass(frozen=True)
class Received:
    """What came: its length and SHA-256."""

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
) -> Received:
    """Write a remote file to a local one, once, and measure it against what is known of its length.

    Args:
        url: URL of the file.
        file: is written to from its start.
        size: promised bytes, or None.
        start: bytes of it that are in `file` already, which can then be read too; only the rest is asked for. Whether they
            were right shows in the hash. If a server sends the whole file anyway, all of it is received.
        begin: is called before the first byte with the announced length, None where there is none.
        check: is called before every block with the bytes that will have come; it may raise.

    Raises:
        Interrupted: the transfer failed, and may succeed if it is tried again.
        RemoteFileMissing: there is no such file.
        RemoteFileRefused: there is no access to it.
        RemoteFileCorrupt: its length is not the promised one.
        StorageError: it is refused for good.
    """
    sink = _Sink(url, file, size, start, begin, check)
    store = store_of(url)
    try:
        store.receive(url, sink)
    except Exception as error:
        raise sink.error or store.named(url, error) from error
    sink.begin()  # an empty file has no first byte
    if sink.announced not in (None, sink.received) or (sink.announced is None and sink.received < (size or 0)):
        expected = size if sink.announced is None else sink.announced
        raise Interrupted(f"the answer ended after {sink.received} of {expected} bytes")
    sink.refuse_length(sink.received)
    return Received(sink.received, sink.digest.hexdigest())


def retried(url: str, attempt: Callable[[], Result], *, pause: Callable[[float], Any] = time.sleep) -> Result:
    """Return what `attempt` returns; where it is interrupted, try again after longer and longer pauses.

    Raises:
        StorageError: it was interrupted every time.
    """
    began, tries = time.monotonic(), 0
    for delay in (*RETRY_DELAYS_S, None):
        try:
            tries += 1
            return attempt()
        except Interrupted as error:
            spent = time.monotonic() - began
            if delay is None or spent > DEADLINE_S:
                raise StorageError(
                    f"{url}: gave up after {tries} tries in {spent:.0f} s: {error}",
                    fix="Run the same command again when it answers",
                ) from error
            warn_counted(
                log, "interrupted requests that were tried again", "%s: %s; trying again in %g s", url, error, delay
            )
            pause(delay)
    raise AssertionError("the last try returns or raises")


def receive_file(url: str, path: Path) -> None:
    """Swap a local file for a remote one, as a whole; see `receive` for what it may raise."""

    def write(file: BinaryIO) -> None:
        retried(url, lambda: begin_anew(file))

    def begin_anew(file: BinaryIO) -> None:
        file.seek(0)
        file.truncate()
        receive(url, file)

    replace_file(path, write)


def read_url(url: str, *, max_bytes: int) -> bytes:
    """Return a small remote file as it is now: plans, manifests, class names.

    Raises:
        RemoteFileMissing: there is no such file.
        StorageError: it is too large, or could not be read.
    """

    def check(received: int) -> None:
        if received > max_bytes:
            raise StorageError(f"{url}: such a file may have at most {max_bytes} bytes, this one has more")

    def attempt() -> bytes:
        buffer = io.BytesIO()
        receive(url, buffer, check=check)
        return buffer.getvalue()

    return retried(url, attempt)


def read_ranges(url: str, use: Callable[[Any], Result]) -> Result:
    """Return `use(file)` of an open remote file of which only the ranges that are asked for are received.

    Raises:
        RemoteFileMissing: there is no such file.
        StorageError: it could not be read, or its server gives no ranges.
    """

    def attempt() -> Result:
        system, path = store_of(url).file_system(url)
        with system.open(path, "rb", block_size=RANGE_BYTES, cache_type="readahead") as file:
            return use(file)

    return _asked(url, attempt)


def list_url(url: str) -> list[str]:
    """Return the names of the files directly in a remote folder, sorted.

    Raises:
        RemoteFileMissing: there is no such folder.
        StorageError: web servers have no such list.
    """
    store = store_of(url)
    if not store.lists_files:
        raise StorageError(f"{url}: a web server has no list of its files: name them, as in train-{{000..127}}.tar")

    def attempt() -> list[str]:
        system, path = store.file_system(url)
        entries = system.ls(path, detail=True, refresh=True)
        files = [entry["name"] for entry in entries if entry["type"] == "file"]
        return sorted(name.rstrip("/").rpartition("/")[2] for name in files)

    return _asked(url, attempt)


def list_tree(url: str) -> dict[str, str]:
    """Return every file below a folder of a bucket, by its path in it, with a token that changes with its content.

    Never from a list that was asked for earlier. A folder that is not there has no files.
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

    return _asked(url, attempt)


def _asked(url: str, ask: Callable[[], Result]) -> Result:
    """Return what a store answers; its errors are named, and those that may pass tried again."""

    def attempt() -> Result:
        try:
            return ask()
        except Exception as error:
            raise store_of(url).named(url, error) from error

    return retried(url, attempt)


def info_of(url: str) -> dict[str, Any] | None:
    """Return what the store says of a file now, never from a list; None where there is none, or a folder."""
    return retried(url, lambda: store_of(url).info(url))


def token_of(url: str) -> str | None:
    """Return the token of one file, see `list_tree`; None where there is none."""
    info = info_of(url)
    return None if info is None else store_of(url).token(info)


class _Sink:
    """What fsspec takes for an open file, and what the bytes are measured by on their way.

    `error` is what went wrong on this side (a full disk, no room, a wrong length), so that it is not taken for the
    network's.
    """

    def __init__(
        self, url: str, file: BinaryIO, size: int | None, start: int, begin: Callable, check: Callable
    ) -> None:
        from fsspec.callbacks import Callback  # here, so that local files do without it

        self._url, self._file, self._size, self._begin, self._check = url, file, size, begin, check
        self.callback = Callback()
        self.digest = hashlib.sha256()
        self.received = self.start = start
        self.error: Exception | None = None
        self._begun = False
        while start:  # `file` stands at its start
            block = file.read(min(start, RANGE_BYTES))
            self.digest.update(block)
            start -= len(block)

    @property
    def announced(self) -> int | None:
        """The length of the whole file, as far as the server announces what it sends."""
        return None if self.callback.size is None else self.start + self.callback.size

    def begin(self) -> None:
        """Before the first byte: a wrong length is refused without receiving it."""
        if not self._begun:
            self._begun = True
            if self.start and self.callback.size == self._size:
                self._restart()
            if self.announced is not None:
                self.refuse_length(self.announced)
            self._begin(self.announced)

    def _restart(self) -> None:
        """This server takes no ranges, and sends the whole file."""
        self._file.seek(0)
        self._file.truncate()
        self.digest, self.received, self.start = hashlib.sha256(), 0, 0

    def refuse_length(self, length: int) -> None:
        if self._size is not None and length != self._size:
            raise RemoteFileCorrupt(
                f"{self._url} has {length} bytes, {self._size} are promised: it was cut, changed or replaced"
            )

    def write(self, data: bytes) -> int:
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

    def read(self) -> bytes:
        raise io.UnsupportedOperation("written only")

    def tell(self) -> int:
        return self.received

    def close(self) -> None:
        """The caller closes the file, which it has opened."""


class Stopped(Exception):
    """A transfer was told to end."""


def download(url: str, path: Path, promise: Promise, *, stop: threading.Event | None = None) -> bool:
    """Bring a remote file here under its final name, create-only.

    Args:
        url: URL of the file.
        path: its final name.
        promise: its length and hash.
        stop: when it is set, the download ends.

    Returns:
        True if the file came, False if another process had given the name meanwhile.

    Raises:
        RemoteFileMissing: there is no such file.
        RemoteFileCorrupt: it has not the promised length or hash, from its start on too.
        StorageError: it could not be received or written.
        Stopped: as told.
    """
    assert promise.bytes is not None
    assert promise.sha256 is not None
    size, sha256, stop = promise.bytes, promise.sha256, stop or threading.Event()
    make_folder(path.parent)
    partial = path.with_name(f".part-{sha256[:32]}")
    with locked(partial):
        if path.exists():  # the process that held the lock before has brought it
            partial.unlink(missing_ok=True)
            return False
        for trusted in (True, False):
            if not trusted:
                os.truncate(partial, 0)
            try:
                received = retried(url, lambda: _continue(url, partial, size, stop), pause=stop.wait)
            except RemoteFileCorrupt:
                if not trusted:
                    raise
                warn_counted(
                    log,
                    "downloads that began anew",
                    "%s: what has come does not go on as it began; fetching it from its start",
                    url,
                )
                continue
            if received.sha256 == sha256:
                return publish_partial(partial, path)
            warn_counted(
                log,
                "downloads that began anew",
                "%s has SHA-256 %s…, not %s…; fetching it from its start",
                url,
                received.sha256[:12],
                sha256[:12],
            )
        os.truncate(partial, 0)
    raise RemoteFileCorrupt(
        f"{url} has SHA-256 {received.sha256[:12]}…, {sha256[:12]}… is promised: it was changed or replaced"
    )


def _continue(url: str, partial: Path, size: int, stop: threading.Event) -> Received:
    """Receive what is missing of a file behind what is here of it."""

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
            return receive(url, file, size=size, start=here, check=check)
        except Interrupted:
            check(here)  # a process that is ended loses its connections first
            raise
