"""Places and their files: a folder of this machine, or one behind a URL, and how each of its files is read and written.

Outside this package nobody asks which of the two it is: a reader opens a `File` with `use`, and a writer stores it whole,
create-only, checked against its promise; only `update` changes what is there. What differs for users shows in `path`, which a
place or file behind a URL does not have.
"""

import hashlib
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pipeline.errors import LabelSetCorrupt, RemoteFileMissing
from pipeline.storage import uploads
from pipeline.storage.atomic import locked_folder, make_folder, publish_file, refusals_named, replace_file, sha256_file
from pipeline.storage.cache import Cache, open_cache
from pipeline.storage.json import MAX_JSON_BYTES, read_small
from pipeline.storage.remote import (
    NO_PROMISE,
    Promise,
    Received,
    Stopped,
    download,
    read_ranges,
    read_url,
    receive,
    retried,
)
from pipeline.storage.stores import store_of
from pipeline.storage.urls import join_url, local_path, parent_url, url_name

BLOCK_BYTES = 1 << 20

Result = TypeVar("Result")


class File(ABC):
    """One file of a place, with what is promised of its content. As text it is its path or URL. It pickles as a few values.

    Attributes:
        path: its path on this machine; None behind a URL.
        promise: length and hash of the content, as far as they are known.
    """

    path: Path | None
    promise: Promise

    @property
    @abstractmethod
    def name(self) -> str:
        """Its name in its folder."""

    @property
    def stem(self) -> str:
        """Its name without the extension."""
        return os.path.splitext(self.name)[0]

    @property
    def suffix(self) -> str:
        """Its extension, with the dot."""
        return os.path.splitext(self.name)[1]

    @abstractmethod
    def beside(self, name: str) -> "File":
        """Return the file of this name in the same folder."""

    @abstractmethod
    def read(self, *, max_bytes: int = MAX_JSON_BYTES) -> bytes | None:
        """Return a small file as it is now, never from a cache; None where there is none.

        Raises:
            StorageError: it has more than `max_bytes`, or cannot be read.
        """

    @abstractmethod
    def use(self, use: Callable[[Path], Result]) -> Result:
        """Return `use(path)` of the file, or of the local copy of a remote one, which may be evicted while it is open."""

    @abstractmethod
    def use_ranges(self, use: Callable[[Any], Result]) -> Result:
        """Return `use(file)` of the open file; of a remote one only the ranges that are asked for are received.

        Raises:
            StorageError: it cannot be read, or its server gives no ranges.
        """

    @abstractmethod
    def copy_to(self, out: BinaryIO) -> Received:
        """Write the whole file, as it is now, to an open one from its start; return length and hash of what came."""

    @abstractmethod
    def holds(self, copy: Path | None = None) -> bool | None:
        """Return whether the promised content is there, None for no file; `copy` is a local file of that content."""

    @abstractmethod
    def store(self, path: Path) -> bool:
        """Store a local file here, create-only; return False if another content has the name. Damaged files are refused."""

    @abstractmethod
    def fetch(self, path: Path, stop: threading.Event) -> bool:
        """Bring the file to a path of this machine, create-only; return False if another file has that name."""

    @abstractmethod
    def put(self, data: bytes, *, replace: bool = False) -> bool:
        """Store a small file; return False if another content has the name."""

    @abstractmethod
    def update(self, change: Callable[[bytes | None], bytes]) -> bytes:
        """Replace a small file by what `change` makes of it, losing no other writer's change; return what is there."""

    @abstractmethod
    def discard(self) -> None:
        """Forget the local copy of a remote file, which has turned out to be damaged."""

    @property
    @abstractmethod
    def to_download(self) -> tuple["RemoteFile", ...]:
        """What is downloaded when the file is used: the file itself, or nothing of a local one."""


@dataclass(frozen=True)
class LocalFile(File):
    """A file of this machine."""

    path: Path
    promise: Promise = NO_PROMISE

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """Its name in its folder."""
        return self.path.name

    def beside(self, name: str) -> "LocalFile":
        """Return the file of this name in the same folder."""
        return LocalFile(self.path.parent / name)

    def read(self, *, max_bytes: int = MAX_JSON_BYTES) -> bytes | None:
        """Return a small file as it is now, or None."""
        return read_small(self.path, max_bytes=max_bytes) if os.path.isfile(self.path) else None

    def use(self, use: Callable[[Path], Result]) -> Result:
        """Return `use(path)`."""
        return use(self.path)

    def use_ranges(self, use: Callable[[Any], Result]) -> Result:
        """Return `use(file)` of the open file."""
        with refusals_named(self.path), self.path.open("rb") as file:
            return use(file)

    def copy_to(self, out: BinaryIO) -> Received:
        """Copy the file to an open one."""
        return _copy(self.path, out, threading.Event())

    def holds(self, copy: Path | None = None) -> bool | None:
        """Compare length and SHA-256."""
        with refusals_named(self.path):
            if not self.path.is_file():
                return None
            return self.path.stat().st_size == self.promise.bytes and sha256_file(self.path) == self.promise.sha256

    def store(self, path: Path) -> bool:
        """Copy a local file to here."""
        return _publish_copy(path, self.path, self.promise, threading.Event()) or bool(self.holds())

    def fetch(self, path: Path, stop: threading.Event) -> bool:
        """Copy the file to a path."""
        return _publish_copy(self.path, path, self.promise, stop)

    def put(self, data: bytes, *, replace: bool = False) -> bool:
        """Store a small file."""
        if replace:
            replace_file(self.path, data)
            return True
        return publish_file(self.path, data) or self.read() == data

    def update(self, change: Callable[[bytes | None], bytes]) -> bytes:
        """Replace a small file under a lock of its folder."""
        make_folder(self.path.parent)
        with locked_folder(self.path.parent):
            old = self.read()
            new = change(old)
            if new != old:
                replace_file(self.path, new)
            return new

    def discard(self) -> None:
        """There is no copy of a local file."""

    @property
    def to_download(self) -> tuple["RemoteFile", ...]:
        """Nothing."""
        return ()


@dataclass(frozen=True)
class RemoteFile(File):
    """A file behind a URL, and the cache that it is read through."""

    path = None
    url: str
    cache: Cache
    promise: Promise = NO_PROMISE

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """Its name in its folder."""
        return url_name(self.url)

    def beside(self, name: str) -> "RemoteFile":
        """Return the file of this name in the same folder."""
        return RemoteFile(join_url(parent_url(self.url), name), self.cache)

    def read(self, *, max_bytes: int = MAX_JSON_BYTES) -> bytes | None:
        """Return a small file as it is now, or None."""
        try:
            return read_url(self.url, max_bytes=max_bytes)
        except RemoteFileMissing:
            return None

    def use(self, use: Callable[[Path], Result]) -> Result:
        """Return `use(path)` of the copy in the cache."""
        return self.cache.use(self.url, self.promise, use)

    def use_ranges(self, use: Callable[[Any], Result]) -> Result:
        """Return `use(file)` of the open file, of which only the ranges that are asked for are received."""
        return read_ranges(self.url, use)

    def copy_to(self, out: BinaryIO) -> Received:
        """Receive the file, past the cache."""

        def attempt() -> Received:
            out.seek(0)
            out.truncate()
            return receive(self.url, out, size=self.promise.bytes)

        return retried(self.url, attempt)

    def holds(self, copy: Path | None = None) -> bool | None:
        """Compare length, and the store's checksum with that of the local copy, or the SHA-256 of what it gives."""
        assert copy is not None
        return uploads.holds(self.url, copy, self.promise)

    def store(self, path: Path) -> bool:
        """Upload a local file."""
        return uploads.put_file(path, self.url, sha256=self.promise.sha256)

    def fetch(self, path: Path, stop: threading.Event) -> bool:
        """Download the file; a cut download is continued."""
        return download(self.url, path, self.promise, stop=stop)

    def put(self, data: bytes, *, replace: bool = False) -> bool:
        """Store a small file."""
        return uploads.put_bytes(data, self.url, replace=replace)

    def update(self, change: Callable[[bytes | None], bytes]) -> bytes:
        """Replace a small file on the condition that it is still the one that was read."""
        return uploads.update_url(self.url, change, max_bytes=MAX_JSON_BYTES)

    def discard(self) -> None:
        """Forget the copy in the cache."""
        self.cache.discard(self.url, self.promise)

    @property
    def to_download(self) -> tuple["RemoteFile", ...]:
        """The file itself."""
        return (self,)


@dataclass(frozen=True)
class Place:
    """A folder, here or behind a URL. As text it is the path or URL that was opened.

    Attributes:
        path: its path on this machine; None behind a URL.
        url: its URL; None on this machine.
        cache: through which files behind the URL are read.
    """

    path: Path | None
    url: str | None = None
    cache: Cache | None = None

    def __str__(self) -> str:
        return str(self.path) if self.url is None else self.url

    def __truediv__(self, name: object) -> File:
        return self.file(name)

    def file(self, name: object, promise: Promise = NO_PROMISE) -> File:
        """Return the file of this name below the folder, whether it is there or not."""
        if self.path is not None:
            return LocalFile(self.path / str(name), promise)
        assert self.url is not None
        assert self.cache is not None
        return RemoteFile(join_url(self.url, str(name)), self.cache, promise)

    def refuse_unwritable(self) -> None:
        """Raise StorageError for a web server; a folder says so when it is written to."""
        if self.url is not None:
            uploads.refuse_unwritable(self.url)

    @property
    def takes_one_at_a_time(self) -> bool:
        """Whether each file that is written must wait for the one before."""
        return self.url is not None and store_of(self.url).commits


def open_place(location: str | os.PathLike[str], cache: Cache | None = None) -> Place:
    """Return the place that a path or URL names; nothing is looked at yet.

    Args:
        location: a path or URL of a folder.
        cache: through which files behind a URL are read; None: the default one.

    Raises:
        StorageError: the URL leads to no store that we know.
    """
    if (path := local_path(location)) is not None:
        return Place(path)
    url = os.fspath(location)
    store_of(url)
    return Place(None, url, cache or open_cache())


def open_file(location: str | os.PathLike[str], cache: Cache | None = None) -> File:
    """Return the file that a path or URL names, as `open_place` does a folder."""
    if (path := local_path(location)) is not None:
        return LocalFile(path)
    url = os.fspath(location)
    store_of(url)
    return RemoteFile(url, cache or open_cache())


def _copy(source: Path, out: BinaryIO, stop: threading.Event) -> Received:
    digest, length = hashlib.sha256(), 0
    with refusals_named(source), source.open("rb") as data:
        while block := data.read(BLOCK_BYTES):
            if stop.is_set():
                raise Stopped
            digest.update(block)
            length += len(block)
            out.write(block)
    return Received(length, digest.hexdigest())


def _publish_copy(source: Path, path: Path, promise: Promise, stop: threading.Event) -> bool:
    def write(out: BinaryIO) -> None:
        came = _copy(source, out, stop)
        if (came.bytes, came.sha256) != (promise.bytes, promise.sha256):
            raise LabelSetCorrupt(
                f"{source} has {came.bytes} bytes and SHA-256 {came.sha256[:12]}…, the manifest says {promise.bytes} and"
                f" {str(promise.sha256)[:12]}…: it is damaged"
            )

    return publish_file(path, write)
