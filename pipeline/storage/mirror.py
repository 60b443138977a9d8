"""A folder that is worked on here and kept behind a URL: brought before the work begins, sent while it goes on.

What is behind the URL is the truth: a file that changed there replaces ours, one that was deleted there is deleted here.
What changed only here (a run was killed before it was sent) stays, and is sent. Whether something changed is told by
tokens that a store or a file system changes with the content, never by comparing dates or clocks.
"""

import contextlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import DeitCliError, StorageError, UsageError
from pipeline.repeats import warn_counted
from pipeline.storage import remote
from pipeline.storage.atomic import TEMPORARY_PREFIX, locked, refusals_named, replace_file
from pipeline.storage.json import MAX_JSON_BYTES, pretty_json
from pipeline.storage.uploads import put_file, update_url
from pipeline.storage.urls import is_url, is_web, join_url

log = logging.getLogger("deit_cli.mirror")

SEND_S = 10.0  # between looks at what changed here

COPIED_BYTES = 16 << 20  # a smaller file may be one that grows, and is copied before it is sent
_REPLACED = frozenset({"README.md"})  # vouches for nothing, and may be written anew

Adopt = Callable[[Path, Path], None]


class ChangedElsewhere(UsageError):
    """Another machine wrote to a URL that only one may write to."""


class Mirror:
    """One folder, and its copy behind a URL.

    Attributes:
        url: of the copy.
        folder: where this machine works.
    """

    def __init__(
        self,
        url: str,
        folder: Path,
        *,
        last: str,
        shared: bool = False,
        adopt: Adopt = lambda ours, theirs: None,
        leave: frozenset[str] = frozenset(),
    ) -> None:
        """Make a mirror that does nothing yet.

        Args:
            url: of a folder in a bucket.
            folder: the local one, which belongs to this mirror.
            last: name of the file that vouches for the others: sent after them.
            shared: several machines write to the URL at a time: every file but `last` is created, never replaced, and
                where another machine was first, its file replaces ours.
            adopt: is called with our file and another machine's before that replaces ours; may raise.
            leave: names that stay here.
        """
        if is_web(url):
            raise UsageError(
                f"{url}: a web server takes no files",
                fix="Write to a bucket (s3://, gs://, hf://) or a folder",
            )
        self.url, self.folder = url.rstrip("/"), folder
        self._last, self._shared, self._adopt, self._leave = last, shared, adopt, leave
        self._book, self._lock = folder.with_name(folder.name + ".json"), threading.Lock()
        self._ended = threading.Event()
        self._lost: ChangedElsewhere | None = None
        self._brought: bytes | None = None

    def bring(self) -> None:
        """Have here what is behind the URL, but for files that changed only here."""
        with refusals_named(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone():
            known, theirs = self._read_book(), remote.list_tree(self.url)
            for name in sorted(known.keys() - theirs.keys()):  # it was deleted there
                (self.folder / name).unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # others are in it
                    os.removedirs((self.folder / name).parent)
                del known[name]
            for name, token in theirs.items():
                if name not in known or known[name][0] != token or _state(self.folder / name) is None:
                    known[name] = [token, self._fetch(name)]
                    self._write_book(known)
            if self._shared and self._last in theirs:  # what this machine would vouch for is made anew
                known[self._last] = [theirs[self._last], self._fetch(self._last)]
                self._brought = (self.folder / self._last).read_bytes()
            self._write_book(known)

    def send(self, *, commit: bool = False) -> None:
        """Send what changed here.

        Args:
            commit: where the URL is shared, send the file that vouches for the others too.

        Raises:
            ChangedElsewhere: another machine wrote to the URL where only one may.
            StorageError: it cannot be sent.
        """
        with self._alone():
            known = self._read_book()
            changed = [name for name in self._names() if known.get(name, [None, None])[1] != _state(self.folder / name)]
            for name in sorted(changed, key=lambda name: (name == self._last, name.startswith("labels/"), name)):
                if name != self._last or commit or not self._shared:
                    known[name] = self._send_one(name, known.get(name, [None])[0])
                    self._write_book(known)

    @contextlib.contextmanager
    def sending(self) -> Iterator[None]:
        """Send what changes for as long as the block runs, and at its end, however it ends."""
        thread = threading.Thread(target=self._keep_sending, daemon=True, name="mirror")
        thread.start()
        try:
            yield
        except BaseException as error:
            self._end(thread)
            if not isinstance(error, ChangedElsewhere):
                with contextlib.suppress(DeitCliError):  # what stopped the work is what is to be said
                    self.send()
            raise
        self._end(thread)
        self.check()
        self.send()

    def check(self) -> None:
        """Raise what made it stop sending: another machine that writes to the same URL."""
        if self._lost is not None:
            raise self._lost

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One thread of one process of this machine at a time."""
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
        """Send one file as it is now; return its token there and its state here."""
        url, path = join_url(self.url, name), self.folder / name
        state = _state(path)
        with self._held(path) as held:
            if self._shared and name not in (self._last, *_REPLACED):
                if not put_file(held, url):
                    return self._take_theirs(name)
            elif self._shared and name == self._last:
                self._commit(url, held.read_bytes())
            else:
                if name == self._last and remote.token_of(url) != token:
                    raise ChangedElsewhere(
                        f"{url} was changed by another machine since it was brought here: only one run may write to"
                        f" {self.url}. Choose another URL, or run the same command again to go on from what is there"
                    )
                put_file(held, url, replace=True)
        return [remote.token_of(url), state]

    def _commit(self, url: str, new: bytes) -> None:
        """Swap the file that vouches for the others, unless it is not the one any more that was brought here."""

        def change(old: bytes | None) -> bytes:
            if old not in (self._brought, new):
                raise ChangedElsewhere(f"{url} was changed by another machine since it was brought here")
            return new

        self._brought = update_url(url, change, max_bytes=MAX_JSON_BYTES)

    def _take_theirs(self, name: str) -> list[Any]:
        """Another machine was first: its file is the one."""
        url, path = join_url(self.url, name), self.folder / name
        theirs = path.with_name(f"{TEMPORARY_PREFIX}theirs-{path.name}")
        try:
            remote.receive_file(url, theirs)
            if theirs.read_bytes() != path.read_bytes():
                self._adopt(path, theirs)
                log.info("%s: another machine was first, its file is taken", url)
                os.replace(theirs, path)
        finally:
            theirs.unlink(missing_ok=True)
        return [remote.token_of(url), _state(path)]

    @contextlib.contextmanager
    def _held(self, path: Path) -> Iterator[Path]:
        """Keep a file as it is while it is sent: it may grow meanwhile, or a new one take its name."""
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
        return [name for path in files if (name := path.relative_to(self.folder).as_posix()) not in self._leave]

    def _read_book(self) -> dict[str, list[Any]]:
        """Return the token there and the state here of each file, when both were last the same."""
        try:
            return json.loads(self._book.read_bytes())
        except (OSError, ValueError):
            return {}

    def _write_book(self, known: dict[str, list[Any]]) -> None:
        replace_file(self._book, pretty_json(known))


def mirror_of(location: str, folder: Path, **how: Any) -> Mirror | None:
    """Return the mirror of a folder that stands for a URL, or None for a local one; see `Mirror`."""
    return Mirror(location, folder, **how) if is_url(location) else None


def _state(path: Path) -> list[int] | None:
    """Return what changes whenever the file does: every replacement is another inode."""
    with contextlib.suppress(FileNotFoundError):
        found = path.stat()
        return [found.st_ino, found.st_size, found.st_mtime_ns]
    return None
