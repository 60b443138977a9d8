"""A place where a label set lies, or is to lie: a folder of this machine, or one behind a URL.

Both give and take files whole, create-only, checked against a hash; only `update` changes what is there.
"""

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from pipeline.errors import LabelSetCorrupt, RemoteFileMissing
from pipeline.storage import uploads
from pipeline.storage.atomic import locked_folder, make_folder, publish_file, refusals_named, replace_file, sha256_file
from pipeline.storage.json import MAX_JSON_BYTES, read_small
from pipeline.storage.remote import Stopped, download, read_url
from pipeline.storage.urls import check_url, is_url, join_url

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Promise:
    """A file of a label set: its name in it, and what its content is to be."""

    name: str
    bytes: int
    sha256: str


class Place(Protocol):
    """What push and pull need of either kind."""

    def read(self, name: str) -> bytes | None:
        """Return a small file as it is now, or None."""
        ...

    def holds(self, file: Promise, copy: Path | None) -> bool | None:
        """Return whether the promised content is there, None for no file; `copy` is a local file of that content."""
        ...

    def take(self, file: Promise, path: Path) -> bool:
        """Store a local file; return False if another content has the name. Damaged files are refused."""
        ...

    def give(self, file: Promise, path: Path, stop: threading.Event) -> bool:
        """Bring a file to a path of this machine, create-only; return False if another file has that name."""
        ...

    def put(self, data: bytes, name: str, *, replace: bool = False) -> bool:
        """Store a small file; return False if another content has the name."""
        ...

    def update(self, name: str, change: Callable[[bytes | None], bytes]) -> bytes:
        """Replace a small file by what `change` makes of it, losing no other writer's change; return what is there."""
        ...


def open_place(location: str) -> Place:
    """Return the place that a path or URL names."""
    if not is_url(location):
        return Folder(Path(location))
    check_url(location)
    return Bucket(location)


@dataclass(frozen=True)
class Folder:
    """A folder of this machine."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def read(self, name: str) -> bytes | None:
        """Return a small file as it is now, or None."""
        return read_small(self.path / name) if (self.path / name).is_file() else None

    def holds(self, file: Promise, copy: Path | None) -> bool | None:
        """Compare length and SHA-256."""
        path = self.path / file.name
        with refusals_named(path):
            if not path.is_file():
                return None
            return path.stat().st_size == file.bytes and sha256_file(path) == file.sha256

    def take(self, file: Promise, path: Path) -> bool:
        """Copy a local file to here."""
        return _copy(path, self.path / file.name, file, threading.Event()) or bool(self.holds(file, None))

    def give(self, file: Promise, path: Path, stop: threading.Event) -> bool:
        """Copy a file from here."""
        return _copy(self.path / file.name, path, file, stop)

    def put(self, data: bytes, name: str, *, replace: bool = False) -> bool:
        """Store a small file."""
        if replace:
            replace_file(self.path / name, data)
            return True
        return publish_file(self.path / name, data) or self.read(name) == data

    def update(self, name: str, change: Callable[[bytes | None], bytes]) -> bytes:
        """Replace a small file under a lock of the folder."""
        make_folder(self.path)
        with locked_folder(self.path):
            old = self.read(name)
            new = change(old)
            if new != old:
                replace_file(self.path / name, new)
            return new


@dataclass(frozen=True)
class Bucket:
    """A folder behind a URL."""

    url: str

    def __str__(self) -> str:
        return self.url

    def read(self, name: str) -> bytes | None:
        """Return a small file as it is now, or None."""
        try:
            return read_url(join_url(self.url, name), max_bytes=MAX_JSON_BYTES)
        except RemoteFileMissing:
            return None

    def holds(self, file: Promise, copy: Path | None) -> bool | None:
        """Compare length, and the store's checksum with that of the local copy, or the SHA-256 of what it gives."""
        assert copy is not None
        return uploads.holds(join_url(self.url, file.name), copy, size=file.bytes, sha256=file.sha256)

    def take(self, file: Promise, path: Path) -> bool:
        """Upload a local file."""
        return uploads.put_file(path, join_url(self.url, file.name), sha256=file.sha256)

    def give(self, file: Promise, path: Path, stop: threading.Event) -> bool:
        """Download a file; a cut download is continued."""
        return download(join_url(self.url, file.name), path, size=file.bytes, sha256=file.sha256, stop=stop)

    def put(self, data: bytes, name: str, *, replace: bool = False) -> bool:
        """Store a small file."""
        return uploads.put_bytes(data, join_url(self.url, name), replace=replace)

    def update(self, name: str, change: Callable[[bytes | None], bytes]) -> bytes:
        """Replace a small file on the condition that it is still the one that was read."""
        return uploads.update_url(join_url(self.url, name), change, max_bytes=MAX_JSON_BYTES)


def _copy(source: Path, path: Path, file: Promise, stop: threading.Event) -> bool:
    def write(out: BinaryIO) -> None:
        digest, length = hashlib.sha256(), 0
        with refusals_named(source), source.open("rb") as data:
            while block := data.read(BLOCK_BYTES):
                if stop.is_set():
                    raise Stopped
                digest.update(block)
                length += len(block)
                out.write(block)
        if (length, digest.hexdigest()) != (file.bytes, file.sha256):
            raise LabelSetCorrupt(
                f"{source} has {length} bytes and SHA-256 {digest.hexdigest()[:12]}…, the manifest says {file.bytes} and"
                f" {file.sha256[:12]}…: it is damaged"
            )

    return publish_file(path, write)
