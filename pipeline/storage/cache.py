"""Remote files on the local disk: a folder with a size limit that many processes share.

A file is downloaded once, under a lock that dies with its holder, to a temporary name; measured, hashed, and only then
given its name. Beside it stands a small JSON with its length and hash: without that, or with another length, it is no
file of the cache. When room is needed, the file that was used longest ago goes; whoever wants it fetches it again. So
every opening goes through `fetch` (or `read_local`), and nothing is decided by a date but the order of eviction.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from pipeline.errors import DeitCliError, RemoteFileCorrupt, StorageError
from pipeline.repeats import warn_counted
from pipeline.storage import remote
from pipeline.storage.atomic import TEMPORARY_PREFIX, locked, refusals_named, replace_file, sweep_temporaries
from pipeline.storage.json import pretty_json
from pipeline.storage.urls import join_url, parent_url, url_name, user_cache
from pipeline.text import byte_size, parse_bytes

log = logging.getLogger("deit_cli.cache")

DEFAULT_SIZE = "100GB"
IN_USE_S = 60.0  # what was used so lately is not given up for a file fetched ahead
AHEAD_S = 900.0  # for so long a file that was fetched ahead counts as not used yet
AHEAD_FILES = 256
AHEAD_THREADS = 4
_POLL_S = 0.2
_OPENINGS = 8  # a file that is evicted between `fetch` and `open` so many times is a cache far too small

Result = TypeVar("Result")


class NoRoom(Exception):
    """Everything in the cache is being downloaded, or (for a file fetched ahead) in use."""


class _Stopped(Exception):
    """Whoever fetched ahead was told to end."""


@dataclass(frozen=True)
class ShardCache:
    """A folder of downloaded files, at most `max_bytes` of them. It is two values, and pickles as such.

    The limit holds for files and for downloads of known length, which take their room before their first byte; one of
    unknown length takes it when it has come.
    """

    folder: Path
    max_bytes: int

    def fetch(self, url: str, *, size: int | None = None, sha256: str | None = None) -> Path:
        """Return the local path of a remote file; download it if it is not here.

        Exactly one process downloads, others wait for it. The path is good until the file is evicted, at any time:
        open it at once and fetch it again if it is gone, or use `read_local`.

        Args:
            url: http(s)://, s3://, gs:// or hf://.
            size: promised bytes, or None.
            sha256: promised hash, or None.

        Raises:
            RemoteFileMissing: there is no such file.
            RemoteFileCorrupt: it has not the promised length or hash, the second time too.
            StorageError: it cannot be downloaded, or does not fit into the cache.
        """
        path = self._path(url, size, sha256)
        if not self._is_here(path, use=True):
            began = time.monotonic()
            while True:
                try:
                    self._bring(url, path, size, sha256)
                    break
                except NoRoom as error:
                    if time.monotonic() - began > remote.DEADLINE_S:
                        raise StorageError(
                            f"{url}: no room in the cache {self.folder}: other downloads fill its"
                            f" {byte_size(self.max_bytes)}",
                            fix="Raise --cache-size",
                        ) from error
                    time.sleep(_POLL_S)
        return path

    def discard(self, url: str, *, size: int | None = None, sha256: str | None = None) -> None:
        """Forget a file that has turned out to be damaged on this disk."""
        self._evict(self._path(url, size, sha256))

    def _path(self, url: str, size: int | None, sha256: str | None) -> Path:
        """Return where a file lies; what is promised of it is in its name, so a changed promise is another file."""
        digest = hashlib.blake2b(json.dumps([url, size, sha256]).encode(), digest_size=16).hexdigest()
        return self.folder / f"{digest}-{re.sub('[^A-Za-z0-9._-]', '_', url_name(url))[-80:]}"

    def _is_here(self, path: Path, *, use: bool) -> bool:
        """Return whether a whole file is here; `use` dates it."""
        try:
            promised = json.loads(_sidecar(path).read_bytes())["bytes"]
            found = os.stat(path)
        except (OSError, ValueError, KeyError, TypeError):
            return False
        if found.st_size != promised:
            warn_counted(
                log,
                "files that were downloaded again",
                "%s has %d bytes, %s were downloaded: fetching it again",
                path,
                found.st_size,
                promised,
            )
            return False
        if use and abs(time.time() - found.st_mtime) > 1:
            _date(path, time.time())
        return True

    def _bring(
        self,
        url: str,
        path: Path,
        size: int | None,
        sha256: str | None,
        ahead: threading.Event | None = None,
    ) -> bool:
        """Have a file here; `ahead` of its use, return False where another process is at it.

        Raises:
            NoRoom: not now.
        """
        with refusals_named(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with locked(_lock(path), wait=ahead is None) as mine:
            if not mine:
                return False
            if not self._is_here(path, use=ahead is None):  # else another process was quicker
                self._download(url, path, size, sha256, ahead)
        return True

    def _download(
        self, url: str, path: Path, size: int | None, sha256: str | None, ahead: threading.Event | None
    ) -> None:
        pause = time.sleep if ahead is None else ahead.wait
        try:
            remote.retried(url, lambda: self._download_once(url, path, size, sha256, ahead), pause=pause)
        except RemoteFileCorrupt as error:
            warn_counted(log, "files that were downloaded again", "%s; downloading it once more", error)
            remote.retried(url, lambda: self._download_once(url, path, size, sha256, ahead), pause=pause)

    def _download_once(
        self, url: str, path: Path, size: int | None, sha256: str | None, ahead: threading.Event | None
    ) -> None:
        def write(file: BinaryIO) -> None:
            nonlocal received
            received = remote.receive(
                url,
                file,
                size=size,
                begin=lambda announced: self._take_room(url, file, announced or size, ahead),
                check=check,
            )
            with contextlib.suppress(NoRoom), locked(self.folder / ".lock"):
                self._make_room(0, older_than=None)  # for what came without an announced length
            if sha256 is not None and received.sha256 != sha256:
                raise RemoteFileCorrupt(
                    f"{url} has SHA-256 {received.sha256[:12]}…, {sha256[:12]}… is promised: it was changed or replaced"
                )

        def check(length: int) -> None:
            if ahead is not None and ahead.is_set():
                raise _Stopped
            self._refuse_larger(url, length)

        received = remote.Received(0, "")
        with refusals_named(path):
            _sidecar(path).unlink(missing_ok=True)
        replace_file(path, write)
        about = {"url": url, "bytes": received.bytes, "sha256": received.sha256}
        replace_file(_sidecar(path), pretty_json(about))

    def _take_room(self, url: str, file: BinaryIO, need: int | None, ahead: threading.Event | None) -> None:
        """Make room for a download, and take it: its file has its full length from its first byte on."""
        self._refuse_larger(url, need or 0)
        with locked(self.folder / ".lock"):
            self._make_room(need or 0, older_than=None if ahead is None else time.time() - IN_USE_S)
            if need:
                file.truncate(need)

    def _refuse_larger(self, url: str, size: int) -> None:
        if size > self.max_bytes:
            raise StorageError(
                f"{url} has {byte_size(size)} or more, the whole cache {self.folder} has {byte_size(self.max_bytes)}",
                fix="Raise --cache-size",
            )

    def _make_room(self, need: int, *, older_than: float | None) -> None:
        """Evict what was used longest ago until `need` bytes fit.

        Args:
            need: bytes.
            older_than: only files whose last use was before this date; None: any.

        Raises:
            NoRoom: what is left is newer, or being downloaded.
        """
        used, files = self._contents()
        for date, size, path in sorted(files):
            if used + need <= self.max_bytes or (older_than is not None and date >= older_than):
                break
            used -= size if self._evict(path) else 0
        if used + need > self.max_bytes:
            raise NoRoom

    def _contents(self) -> tuple[int, list[tuple[float, int, Path]]]:
        """Return the bytes here, downloads in progress too, and date of last use, size and path of every file."""
        with refusals_named(self.folder):
            if any(name.startswith(TEMPORARY_PREFIX) for name in os.listdir(self.folder)):
                sweep_temporaries(self.folder)
            used, files = 0, []
            for entry in os.scandir(self.folder):
                if entry.name.endswith((".lock", ".json")):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    stat = entry.stat()
                    used += stat.st_size
                    if not entry.name.startswith(TEMPORARY_PREFIX):
                        files.append((stat.st_mtime, stat.st_size, Path(entry.path)))
        return used, files

    def _evict(self, path: Path) -> bool:
        """Delete a file, unless it is being downloaded; its sidecar goes first, so that no half of it is believed."""
        with refusals_named(path), locked(_lock(path), wait=False) as mine:
            if mine:
                for part in (_sidecar(path), path, _lock(path)):
                    part.unlink(missing_ok=True)
            return mine


@dataclass(frozen=True)
class RemoteFile:
    """A file behind a URL, and the cache that it is read through; as text it is its URL."""

    url: str
    cache: ShardCache
    size: int | None = None
    sha256: str | None = None

    def __str__(self) -> str:
        return self.url

    @property
    def stem(self) -> str:
        """Its name without the extension."""
        return os.path.splitext(url_name(self.url))[0]

    @property
    def suffix(self) -> str:
        """Its extension, with the dot."""
        return os.path.splitext(url_name(self.url))[1]

    @property
    def parent(self) -> "RemoteFolder":
        """The folder that it lies in."""
        return RemoteFolder(parent_url(self.url), self.cache)

    def fetch(self) -> Path:
        """Return its local path, see `ShardCache.fetch`."""
        return self.cache.fetch(self.url, size=self.size, sha256=self.sha256)

    def discard(self) -> None:
        """Forget its local copy."""
        self.cache.discard(self.url, size=self.size, sha256=self.sha256)


@dataclass(frozen=True)
class RemoteFolder:
    """A folder behind a URL; `/` gives the files below it, as with a path."""

    url: str
    cache: ShardCache

    def __str__(self) -> str:
        return self.url

    def __lt__(self, other: "RemoteFolder") -> bool:
        return self.url < other.url

    def __truediv__(self, name: object) -> RemoteFile:
        return RemoteFile(join_url(self.url, str(name)), self.cache)


class Prefetch:
    """Fetches files in the order of their first use, in threads of its own, until it is closed or there are no more.

    How far it runs ahead is seen on the disk, so that nobody needs to tell it who has come how far: a file that it
    fetched is dated AHEAD_S into the future, and its first use dates it back. It stops while more than AHEAD_FILES, or
    half of the cache, are so dated; for room it takes only what nobody has used for IN_USE_S. It never fails: what it
    could not fetch is fetched, or refused by name, by whoever opens it. Several of them (one for each rank) share the
    work, because each leaves alone what another is downloading.
    """

    def __init__(self, files: Iterable[RemoteFile]) -> None:
        self._files, self._turn, self._stop = iter(files), threading.Lock(), threading.Event()
        self._ahead: dict[Path, int] = {}  # and the bytes of each
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(AHEAD_THREADS)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End it; a download that does not stall ends within a second."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=2)

    def wait(self) -> None:
        """Wait until it is closed or every file was seen to."""
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while (file := self._next()) is not None:
            try:
                self._fetch(file)
            except (DeitCliError, _Stopped) as error:
                log.debug("not fetched ahead: %s", error)

    def _next(self) -> RemoteFile | None:
        """Return the next file as soon as there may be one more, or None at the end."""
        with self._turn:
            file = None if self._stop.is_set() else next(self._files, None)
            while file is not None and self._is_far_ahead(file.cache):
                if self._stop.wait(_POLL_S):
                    return None
            return file

    def _is_far_ahead(self, cache: ShardCache) -> bool:
        now = time.time()
        for path in [path for path in list(self._ahead) if _last_use(path) <= now]:
            del self._ahead[path]
        return len(self._ahead) >= AHEAD_FILES or sum(self._ahead.values()) > cache.max_bytes // 2

    def _fetch(self, file: RemoteFile) -> None:
        cache = file.cache
        path = cache._path(file.url, file.size, file.sha256)
        brought = False
        while not cache._is_here(path, use=False):
            try:
                brought = cache._bring(file.url, path, file.size, file.sha256, self._stop)
                if not brought:
                    return
            except NoRoom:
                if self._stop.wait(_POLL_S):
                    return
        if brought or time.time() - _last_use(path) > IN_USE_S:
            _date(path, time.time() + AHEAD_S)
        with contextlib.suppress(OSError):
            self._ahead[path] = path.stat().st_size


def prefetch(files: Iterable[RemoteFile]) -> Prefetch:
    """Start to fetch files ahead of their use; see `Prefetch`. Close it, or use it in a `with`."""
    return Prefetch(files)


def read_local(file: Path | RemoteFile, use: Callable[[Path], Result]) -> Result:
    """Return `use(path)` of a local file, or of the local copy of a remote one: the one door for both.

    A copy that is evicted between `fetch` and `open` is fetched again; one that is open may be evicted unharmed.
    """
    if isinstance(file, Path):
        return use(file)
    for _ in range(_OPENINGS):
        with contextlib.suppress(FileNotFoundError):
            return use(file.fetch())
    raise StorageError(
        f"{file}: evicted from the cache {file.cache.folder} {_OPENINGS} times before it was opened",
        fix="Raise --cache-size",
    )


def open_cache(folder: Path | None = None, size: str = DEFAULT_SIZE) -> ShardCache:
    """Return the cache in a folder (None: `deit-cli` in the user's cache folder) of a size such as `50GB`."""
    folder = folder.expanduser().absolute() if folder else user_cache() / "deit-cli"
    return ShardCache(folder, parse_bytes(size, what="--cache-size"))


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _lock(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _date(path: Path, when: float) -> None:
    """Date the last use; it only moves a file in the order of eviction, so a refusal is no error."""
    with contextlib.suppress(OSError):
        os.utime(path, (when, when))


def _last_use(path: Path) -> float:
    """Return the date of the last use; 0 for a file that is not here."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0
