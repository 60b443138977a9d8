"""Background downloads of remote files into the cache before their first use."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from pipeline.errors import DeitCliError
from pipeline.storage.cache import POLL_S, Cache, last_use
from pipeline.storage.place import RemoteFile
from pipeline.storage.remote import Stopped

log = logging.getLogger("deit_cli.cache")

AHEAD_FILES = 256
AHEAD_THREADS = 4


class Prefetch:
    """A background download of files in the order of their first use, until it is closed or all are done.

    The dates of the files show how far ahead it is, so readers need not report their progress: a file downloaded ahead
    is dated into the future, and its first use resets the date. Prefetching pauses while more than AHEAD_FILES, or half of the
    cache, have such a date. It never raises: the reader of a file downloads it if it is missing, and reports errors. Several
    prefetches (one for each rank) share the work, because each skips files that another is downloading.
    """

    def __init__(self, files: Iterable[RemoteFile]) -> None:
        self._files, self._turn, self._stop = iter(files), threading.Lock(), threading.Event()
        self._ahead: dict[Path, int] = {}  # path -> bytes
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(AHEAD_THREADS)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop prefetching; a download that does not stall ends within a second."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=2)

    def wait(self) -> None:
        """Wait until it is closed or every file has been handled."""
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
            except (DeitCliError, Stopped) as error:
                log.debug("not fetched ahead: %s", error)

    def _next(self) -> RemoteFile | None:
        """Wait until another file may be downloaded, and return it; None at the end."""
        with self._turn:
            file = None if self._stop.is_set() else next(self._files, None)
            while file is not None and self._is_far_ahead(file.cache):
                if self._stop.wait(POLL_S):
                    return None
            return file

    def _is_far_ahead(self, cache: Cache) -> bool:
        now = time.time()
        for path in [path for path in list(self._ahead) if last_use(path) <= now]:
            del self._ahead[path]
        return len(self._ahead) >= AHEAD_FILES or sum(self._ahead.values()) > cache.max_bytes // 2

    def _fetch(self, file: RemoteFile) -> None:
        path = file.cache.fetch_ahead(file.url, file.promise, self._stop)
        if path is not None:
            with contextlib.suppress(OSError):
                self._ahead[path] = path.stat().st_size
