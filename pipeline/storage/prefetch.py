"""Background downloads of remote files into the cache before their first use."""

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from pipeline.errors import DeitCliError
from pipeline.storage.cache import POLL_S, last_use
from pipeline.storage.place import RemoteFile
from pipeline.storage.remote import Stopped

log = logging.getLogger("deit_cli.cache")

AHEAD_THREADS = 16  # transfers at once, of small files: each waits for its server most of the time
LARGE_AT_ONCE = 4  # transfers at once, of files of any size
SMALL_BYTES = 256 << 20  # more transfers than LARGE_AT_ONCE are begun only while all of them have fewer bytes than this
TYPICAL_BYTES = 64 << 20  # expected size of a file without a promise, until one has arrived
_LOOKS = 1024  # files whose use is looked for at once; they are used about in order, so these are the next ones


class Prefetch:
    """A background download of files in the order of their first use, until it is closed or all are done.

    The dates of the files show how far ahead it is, so readers need not report their progress: a file downloaded ahead
    is dated into the future, and its first use resets the date. Prefetching pauses while the files with such a date, and those on
    their way, are more than half of the cache, whatever their number. Several files are on their way at once, so a slow one does
    not stop the others; whoever needs it waits for it. It never raises: the reader of a file downloads it if it is missing,
    and reports errors. Several prefetches (one for each rank) share the work, because each skips files that another is
    downloading.
    """

    def __init__(self, files: Iterable[RemoteFile]) -> None:
        self._files, self._turn, self._stop = iter(files), threading.Lock(), threading.Event()
        self._changed = threading.Condition()
        self._ahead: dict[Path, int] = {}  # downloaded and not used: path -> bytes
        self._ahead_bytes = 0
        self._coming: dict[int, int] = {}  # number of a file on its way -> bytes expected
        self._numbers = itertools.count()
        self._sizes = (0, 0)  # bytes, and number of files that had no promise
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(AHEAD_THREADS)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop prefetching; a download that does not stall ends within a second."""
        self._stop.set()
        until = time.monotonic() + 2
        for thread in self._threads:
            thread.join(timeout=max(0.0, until - time.monotonic()))

    def wait(self) -> None:
        """Wait until it is closed or every file has been handled."""
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while (begun := self._begin_next()) is not None:
            number, file = begun
            path = None
            try:
                path = file.cache.fetch_ahead(file.url, file.promise, self._stop)
            except (DeitCliError, Stopped) as error:
                log.debug("not fetched ahead: %s", error)
            finally:
                self._end(number, file, path)

    def _begin_next(self) -> tuple[int, RemoteFile] | None:
        """Wait until another file may be downloaded, and return it with its number; None at the end."""
        with self._turn:
            file = None if self._stop.is_set() else next(self._files, None)
            if file is None:
                return None
            with self._changed:
                while self._is_busy(file) or self._is_far_ahead(file):
                    if self._stop.is_set():
                        return None
                    self._changed.wait(POLL_S)
                number = next(self._numbers)
                self._coming[number] = self._expected(file)
                return number, file

    def _end(self, number: int, file: RemoteFile, path: Path | None) -> None:
        """Count a file that has arrived (`path`), or that has not."""
        with self._changed, contextlib.suppress(OSError):
            del self._coming[number]
            self._changed.notify()
            if path is not None:
                self._ahead[path] = size = path.stat().st_size
                self._ahead_bytes += size
                if file.promise.bytes is None:
                    self._sizes = (self._sizes[0] + size, self._sizes[1] + 1)

    def _expected(self, file: RemoteFile) -> int:
        """Return the bytes of a file that are promised, or the mean of those without a promise."""
        if file.promise.bytes is not None:
            return file.promise.bytes
        total, files = self._sizes
        # At first not so much that the first file would fill the room alone: it may be the slow one.
        return total // files if files else min(TYPICAL_BYTES, file.cache.max_bytes // (2 * LARGE_AT_ONCE))

    def _is_busy(self, file: RemoteFile) -> bool:
        """Return True if enough files are on their way; large ones side by side would only delay the first."""
        coming = sum(self._coming.values()) + self._expected(file)
        return len(self._coming) >= LARGE_AT_ONCE and coming > SMALL_BYTES

    def _is_far_ahead(self, file: RemoteFile) -> bool:
        room = file.cache.max_bytes // 2 - sum(self._coming.values())
        if self._ahead_bytes > room:
            now = time.time()
            for path in list(itertools.islice(self._ahead, _LOOKS)):
                if last_use(path) <= now:
                    self._ahead_bytes -= self._ahead.pop(path)
        return self._ahead_bytes > room
