"""Places and their files: a local folder or one behind a URL, and how its files are read and written.

A `LocalFile` and a `RemoteFile` have the same methods, so code outside this package need not know which one a `File` is: a
reader opens it with `use`, and a writer stores it whole, create-only, checked against its promise; only `update` changes what
is there. What differs for users shows in `path`, which is None behind a URL.
"""

import hashlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pipeline.errors import LabelSetCorrupt, StorageError
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
    receive_whole,
)
from pipeline.storage.stores import store_of
from pipeline.storage.urls import join_url, local_path, parent_url, url_name

BLOCK_BYTES = 1 << 20

Result = TypeVar("Result")


@dataclass(frozen=True)
class RemoteFile:
    """A file behind a URL, the cache for reading it, and the promise of its content. As text it is its URL."""

    path = None
    url: str
    cache: Cache
    promise: Promise = NO_PROMISE

    def __str__(self) -> str:
        return self.url

    @property
    def stem(self) -> str:
        """Return the name without the extension."""
        return os.path.splitext(url_name(self.url))[0]

    @property
    def suffix(self) -> str:
        """Return the extension, with the dot."""
        return os.path.splitext(url_name(self.url))[1]

    def beside(self, name: str) -> "RemoteFile":
        """Return the file of this name in the same folder."""
        return RemoteFile(join_url(parent_url(self.url), name), self.cache)

    @property
    def to_download(self) -> tuple["RemoteFile", ...]:
        """Return the files to download when this one is used: the file itself."""
        return (self,)

    def read(self, *, max_bytes: int = MAX_JSON_BYTES) -> bytes | None:
        """Return the current bytes of a small file, never from a cache; None if it does not exist.

        Raises:
            StorageError: the file has more than `max_bytes`, or cannot be read.
        """
        return read_url(self.url, max_bytes=max_bytes, min_rate=self.cache.min_rate)

    def use(self, use: Callable[[Path], Result]) -> Result:
        """Return `use(path)` of the local copy, which may be evicted while it is open; see `Cache.fetch` for its errors."""
        return self.cache.use(self.url, self.promise, use)

    def use_ranges(self, use: Callable[[Any], Result]) -> Result:
        """Return `use(file)` of the open file; only the ranges that `use` reads are received.

        Raises:
            StorageError: the file cannot be read, or its server does not support ranges.
        """
        return read_ranges(self.url, use, min_rate=self.cache.min_rate)

    def discard(self) -> None:
        """Delete the local copy because it is damaged."""
        self.cache.discard(self.url, self.promise)

    def copy_to(self, out: BinaryIO) -> Received:
        """Write the current content to an open file from its start; return length and hash of the received bytes."""
        return receive_whole(self.url, out, size=self.promise.bytes, min_rate=self.cache.min_rate)

    def holds(self, copy: Path | None = None) -> bool | None:
        """Return True if the file has the promised content, None if it does not exist; `copy` is a local file of that content.

        Length and the store's own checksum are compared, or the SHA-256 of the bytes read back.
        """
        assert copy is not None
        return uploads.holds(self.url, copy, self.promise)

    def store(self, path: Path) -> bool:
        """Upload a local file, create-only; return False if the name has other content. Damaged files are refused."""
        return uploads.put_file(path, self.url, sha256=self.promise.sha256)

    def fetch(self, path: Path, stop: threading.Event) -> bool:
        """Download the file to a path, create-only; return False if the path exists. An interrupted download is continued."""
        return download(self.url, path, self.promise, stop=stop, min_rate=self.cache.min_rate)

    def put(self, data: bytes, *, replace: bool = False) -> bool:
        """Store a small file; return False if the name has other content."""
        return uploads.put_bytes(data, self.url, replace=replace)

    def refuse_unwritable(self) -> None:
        """Raise StorageError for a file on a web server."""
        uploads.refuse_unwritable(self.url)

    def update(self, change: Callable[[bytes | None], bytes]) -> bytes:
        """Replace a small file by `change(old)` if it is still unchanged; return its new content.

        If another writer was faster, `change` is applied to its file, so that no change is lost.
        """
        return uploads.update_url(self.url, change, max_bytes=MAX_JSON_BYTES)


@dataclass(frozen=True)
class LocalFile:
    """A local file and the promise of its content; see `RemoteFile`."""

    path: Path
    promise: Promise = NO_PROMISE

    def __str__(self) -> str:
        return str(self.path)

    @property
    def stem(self) -> str:
        """Return the name without the extension."""
        return self.path.stem

    @property
    def suffix(self) -> str:
        """Return the extension, with the dot."""
        return self.path.suffix

    def beside(self, name: str) -> "LocalFile":
        """Return the file of this name in the same folder."""
        return LocalFile(self.path.parent / name)

    @property
    def to_download(self) -> tuple[RemoteFile, ...]:
        """Return (): a local file needs no download."""
        return ()

    def read(self, *, max_bytes: int = MAX_JSON_BYTES) -> bytes | None:
        """Return the bytes of a small file, or None if it does not exist."""
        return read_small(self.path, max_bytes=max_bytes) if os.path.isfile(self.path) else None

    def use(self, use: Callable[[Path], Result]) -> Result:
        """Return `use(path)`."""
        return use(self.path)

    def discard(self) -> None:
        """Do nothing: a local file has no copy."""

    def copy_to(self, out: BinaryIO) -> Received:
        """Copy the content to an open file; return length and hash."""
        return _copy(self.path, out, threading.Event())

    def holds(self, copy: Path | None = None) -> bool | None:
        """Return True if length and SHA-256 are the promised ones; None if the file does not exist."""
        with refusals_named(self.path):
            if not self.path.is_file():
                return None
            return self.path.stat().st_size == self.promise.bytes and sha256_file(self.path) == self.promise.sha256

    def store(self, path: Path) -> bool:
        """Copy a local file to this one, create-only."""
        return _publish_copy(path, self.path, self.promise, threading.Event()) or bool(self.holds())

    def fetch(self, path: Path, stop: threading.Event) -> bool:
        """Copy the file to a path, create-only."""
        return _publish_copy(self.path, path, self.promise, stop)

    def put(self, data: bytes, *, replace: bool = False) -> bool:
        """Store a small file."""
        if replace:
            replace_file(self.path, data)
            return True
        return publish_file(self.path, data) or self.read() == data

    def refuse_unwritable(self) -> None:
        """Raise StorageError if the file is a folder, or if its folder, or the nearest that exists, cannot be written."""
        folder = next(parent for parent in self.path.absolute().parents if parent.exists())
        if self.path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise StorageError(f"{self.path} cannot be written")

    def update(self, change: Callable[[bytes | None], bytes]) -> bytes:
        """Replace a small file under a lock of its folder."""
        make_folder(self.path.parent)
        with locked_folder(self.path.parent):
            old = self.read()
            new = change(old)
            if new != old:
                replace_file(self.path, new)
            return new


File = LocalFile | RemoteFile


@dataclass(frozen=True)
class Place:
    """A local folder or one behind a URL. As text it is the path or URL that was opened.

    Attributes:
        path: path of a local folder; None for a URL.
        url: URL of the folder; None for a local folder.
        cache: cache for reading files behind the URL.
    """

    path: Path | None
    url: str | None = None
    cache: Cache | None = None

    def __str__(self) -> str:
        return str(self.path) if self.url is None else self.url

    def __truediv__(self, name: object) -> File:
        return self.file(name)

    def file(self, name: object, promise: Promise = NO_PROMISE) -> File:
        """Return the file of this name below the folder; it need not exist."""
        if self.path is not None:
            return LocalFile(self.path / str(name), promise)
        assert self.url is not None
        assert self.cache is not None
        return RemoteFile(join_url(self.url, str(name)), self.cache, promise)

    def refuse_unwritable(self) -> None:
        """Raise StorageError for a web server; an unwritable local folder raises when it is written to."""
        if self.url is not None:
            uploads.refuse_unwritable(self.url)

    @property
    def takes_one_at_a_time(self) -> bool:
        """Return True if the store takes one file at a time."""
        return self.url is not None and store_of(self.url).commits


def open_place(location: str | os.PathLike[str], cache: Cache | None = None) -> Place:
    """Return the place that a path or URL names, without accessing it.

    Args:
        location: path or URL of a folder.
        cache: cache for reading files behind a URL; None: the default cache.

    Raises:
        StorageError: the URL's scheme is not supported.
    """
    if (path := local_path(location)) is not None:
        return Place(path)
    url = os.fspath(location)
    store_of(url)
    return Place(None, url, cache or open_cache())


def open_file(location: str | os.PathLike[str], cache: Cache | None = None) -> File:
    """Return the file that a path or URL names, as `open_place` does for a folder."""
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
