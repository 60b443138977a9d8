"""Mirrors: a local folder synchronised with a URL, downloaded before the work begins and uploaded during the work.

The files behind the URL decide: one that changed there replaces ours, one that was deleted there is deleted here.
Files that changed only here (a run was killed before sending them) stay, and are sent. Changes are detected by
tokens that the store or file system changes with the content, never by comparing dates or clocks.
"""

import contextlib
import json
import logging
import os
import shutil
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from pipeline.errors import DeitCliError, StorageError, UsageError
from pipeline.repeats import warn_counted
from pipeline.storage import remote
from pipeline.storage.atomic import TEMPORARY_PREFIX, locked, refusals_named, replace_file
from pipeline.storage.json import MAX_JSON_BYTES, pretty_json
from pipeline.storage.stores import store_of
from pipeline.storage.uploads import put_file, update_url
from pipeline.storage.urls import join_url, local_path

log = logging.getLogger("deit_cli.mirror")

SEND_S = 10.0  # time between checks for local changes

COPIED_BYTES = 16 << 20  # smaller files may still grow, and are copied before they are sent
_REPLACED = frozenset({"README.md"})  # does not list other files, and may be replaced

Adopt = Callable[[Path, Path], None]
Book = dict[str, list[Any]]  # file name -> remote token and local state when both were last the same


class ChangedElsewhere(UsageError):
    """Error: another machine wrote to a URL that only one machine may write to."""


class Mirror(ABC):
    """A local folder and its copy behind a URL.

    Attributes:
        url: URL of the copy.
        folder: local folder that this machine works in.
    """

    def __init__(self, url: str, folder: Path, *, last: str) -> None:
        """Create a mirror without transferring anything.

        Args:
            url: URL of a folder in a bucket.
            folder: local folder, used by this mirror only.
            last: name of the file that lists the others and is therefore sent last.

        Raises:
            UsageError: the URL is not writable.
        """
        if not store_of(url).takes_files:
            raise UsageError(
                f"{url}: a web server takes no files", fix="Write to a bucket (s3://, gs://, hf://) or a folder"
            )
        self.url, self.folder = url.rstrip("/"), folder
        self._last = last
        self._book, self._lock = folder.with_name(folder.name + ".json"), threading.Lock()
        self._ended = threading.Event()
        self._lost: ChangedElsewhere | None = None

    @classmethod
    def of(cls, location: str, folder: Path, **how: Any) -> Self | None:
        """Return the mirror of a URL, with `folder` as its local folder; None if the location is a local folder."""
        return None if local_path(location) is not None else cls(location, folder, **how)

    def bring(self) -> None:
        """Download new and changed files from the URL; files that changed only here stay."""
        with refusals_named(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone():
            known, there = self._read_book(), remote.list_tree(self.url)
            for name in sorted(known.keys() - there.keys()):  # deleted behind the URL
                (self.folder / name).unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # the folder may have other files
                    os.removedirs((self.folder / name).parent)
                del known[name]
            for name, token in there.items():
                if name not in known or known[name][0] != token or _state(self.folder / name) is None:
                    known[name] = [token, self._fetch(name)]
                    self._write_book(known)
            self._write_book(known)
            if self._last in there:
                self._bring_last(known, there[self._last])

    @abstractmethod
    def _bring_last(self, known: Book, token: str) -> None:
        """Update the file that lists the others, if it is behind the URL; `token` is its current token."""

    def send(self) -> None:
        """Upload the files that changed here.

        Raises:
            ChangedElsewhere: another machine wrote to a URL that only one machine may write to.
            StorageError: a file cannot be sent.
        """
        self._send_some(self._is_sent)

    def _send_some(self, wanted: Callable[[str], bool]) -> None:
        with self._alone():
            known = self._read_book()
            changed = [name for name in self._names() if known.get(name, [None, None])[1] != _state(self.folder / name)]
            for name in sorted(changed, key=lambda name: (name == self._last, name.startswith("labels/"), name)):
                if wanted(name):
                    known[name] = self._send_one(name, known.get(name, [None])[0])
                    self._write_book(known)

    @contextlib.contextmanager
    def sending(self) -> Iterator[None]:
        """Upload changed files while the block runs, and once more when it ends, even with an error."""
        thread = threading.Thread(target=self._keep_sending, daemon=True, name="mirror")
        thread.start()
        try:
            yield
        except BaseException as error:
            self._end(thread)
            if not isinstance(error, ChangedElsewhere):
                with contextlib.suppress(DeitCliError):  # report the error that stopped the work, not this one
                    self.send()
            raise
        self._end(thread)
        self.check()
        self.send()

    def check(self) -> None:
        """Raise the error that stopped the uploads: another machine writes to the same URL."""
        if self._lost is not None:
            raise self._lost

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Lock the mirror: the block runs in one thread of one process of this machine at a time."""
        with self._lock, locked(self.folder.with_name(self.folder.name + ".lock")):
            yield

    def _end(self, thread: threading.Thread) -> None:
        self._ended.set()
        thread.join()

    def _keep_sending(self) -> None:
        while not self._ended.wait(SEND_S):
            try:
                self.send()
            except ChangedElsewhere as error:
                self._lost = error
                return
            except StorageError as error:
                warn_counted(
                    log, "failed uploads", "%s; what is to be sent stays in %s and is tried again", error, self.folder
                )

    def _fetch(self, name: str) -> list[int]:
        url, path = join_url(self.url, name), self.folder / name
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise StorageError(f"{url}: its name leads out of the folder")
        remote.receive_file(url, path)
        return _state(path) or []

    def _send_one(self, name: str, token: str | None) -> list[Any]:
        """Upload the current content of one file; return its remote token and its local state."""
        url, path = join_url(self.url, name), self.folder / name
        state = _state(path)
        with self._held(path) as held:
            if not self._send_held(name, held, url, token):
                self._take_other(name)
                state = _state(path)
        return [remote.token_of(url), state]

    def _is_sent(self, name: str) -> bool:
        """Return True if a file of the folder is uploaded as soon as it has changed."""
        return True

    @abstractmethod
    def _send_held(self, name: str, held: Path, url: str, token: str | None) -> bool:
        """Upload a copy of one file; return False if another machine was first, whose file then counts.

        Args:
            name: name of the file in the folder.
            held: path of the copy.
            url: URL of the file.
            token: token of the known content behind the URL; None if the file is not there.
        """

    def _take_other(self, name: str) -> None:
        """Replace a local file by the one that another machine uploaded first."""
        raise NotImplementedError  # with one writer, this cannot happen

    @contextlib.contextmanager
    def _held(self, path: Path) -> Iterator[Path]:
        """Give an unchanging copy of a file for the upload, since the file may grow or be replaced meanwhile."""
        held = self.folder.with_name(f"{self.folder.name}.sending")
        with refusals_named(path):
            held.unlink(missing_ok=True)
            if path.stat().st_size < COPIED_BYTES:
                shutil.copyfile(path, held)
            else:
                os.link(path, held)
        try:
            yield held
        finally:
            held.unlink(missing_ok=True)

    def _names(self) -> list[str]:
        files = (
            path for path in self.folder.rglob("*") if path.is_file() and not path.name.startswith(TEMPORARY_PREFIX)
        )
        return [path.relative_to(self.folder).as_posix() for path in files]

    def _read_book(self) -> Book:
        try:
            return json.loads(self._book.read_bytes())
        except (OSError, ValueError):
            return {}

    def _write_book(self, known: Book) -> None:
        replace_file(self._book, pretty_json(known))


class OneWriterMirror(Mirror):
    """A mirror whose URL one machine writes to at a time: files that changed here replace the remote files."""

    def __init__(self, url: str, folder: Path, *, last: str, leave: frozenset[str] = frozenset()) -> None:
        """Create a mirror as `Mirror` does; `leave` names files that are not uploaded."""
        super().__init__(url, folder, last=last)
        self._leave = leave

    def _bring_last(self, known: Book, token: str) -> None:
        """Do nothing: the file was downloaded like the others, and local changes stay."""

    def _is_sent(self, name: str) -> bool:
        return name not in self._leave

    def _send_held(self, name: str, held: Path, url: str, token: str | None) -> bool:
        if name == self._last and remote.token_of(url) != token:
            raise ChangedElsewhere(
                f"{url} was changed by another machine since it was brought here: only one run may write to"
                f" {self.url}. Choose another URL, or run the same command again to go on from what is there"
            )
        return put_file(held, url, replace=True)


class ManyWritersMirror(Mirror):
    """A mirror whose URL several machines write to at a time.

    Every file is created, never replaced; if another machine was first, its file replaces ours. Only `commit` sends the file
    that lists the others, and only if the remote one has not changed since it was downloaded.
    """

    def __init__(self, url: str, folder: Path, *, last: str, adopt: Adopt = lambda ours, other: None) -> None:
        """Create a mirror as `Mirror` does.

        Args:
            url: URL of a folder in a bucket.
            folder: local folder, used by this mirror only.
            last: name of the file that lists the others.
            adopt: function called with our file and another machine's before the latter replaces ours; it may raise.
        """
        super().__init__(url, folder, last=last)
        self._adopt = adopt
        self._brought: bytes | None = None

    def commit(self) -> None:
        """Upload the files that changed here, and last the file that lists the others.

        Raises:
            ChangedElsewhere: another machine has committed since the last `bring`.
            StorageError: a file cannot be sent.
        """
        self._send_some(lambda name: True)

    def _bring_last(self, known: Book, token: str) -> None:
        """Replace our file even if it changed only here: this machine writes a new one before it commits."""
        known[self._last] = [token, self._fetch(self._last)]
        self._brought = (self.folder / self._last).read_bytes()
        self._write_book(known)

    def _is_sent(self, name: str) -> bool:
        return name != self._last

    def _send_held(self, name: str, held: Path, url: str, token: str | None) -> bool:
        if name == self._last:
            self._swap_last(url, held.read_bytes())
            return True
        return put_file(held, url, replace=name in _REPLACED)

    def _swap_last(self, url: str, new: bytes) -> None:
        """Replace the remote file that lists the others, unless another machine has done so since it was downloaded."""

        def change(old: bytes | None) -> bytes:
            if old not in (self._brought, new):
                raise ChangedElsewhere(f"{url} was changed by another machine since it was brought here")
            return new

        self._brought = update_url(url, change, max_bytes=MAX_JSON_BYTES)

    def _take_other(self, name: str) -> None:
        url, path = join_url(self.url, name), self.folder / name
        other = path.with_name(f"{TEMPORARY_PREFIX}other-{path.name}")
        try:
            remote.receive_file(url, other)
            if other.read_bytes() != path.read_bytes():
                self._adopt(path, other)
                log.info("%s: another machine was first, its file is taken", url)
                os.replace(other, path)
        finally:
            other.unlink(missing_ok=True)


def _state(path: Path) -> list[int] | None:
    """Return values that change whenever the file does; a replaced file has another inode."""
    with contextlib.suppress(FileNotFoundError):
        found = path.stat()
        return [found.st_ino, found.st_size, found.st_mtime_ns]
    return None
