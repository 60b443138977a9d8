"""Many things at a time in threads, for work that waits for disks and servers, hashes or unpacks: all of it without the GIL."""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

from pipeline.machine.progress import Progress, Tick

Item = TypeVar("Item")
Made = TypeVar("Made")


class Telling:
    """Counts what is done, and tells how far it is."""

    def __init__(self, phase: str, total: int, progress: Progress, *, unit: str) -> None:
        self._phase, self._total, self._progress, self._unit = phase, total, progress, unit
        self._done, self._began = 0, time.monotonic()

    def __call__(self) -> None:
        """Count one more."""
        self._done += 1
        elapsed = time.monotonic() - self._began
        self._progress(Tick(self._phase, self._done, self._total, elapsed, made=self._done, unit=self._unit))


def in_threads(items: Iterable[Item], do: Callable[[Item], Made], threads: int) -> Iterator[tuple[Item, Made]]:
    """Yield each item with what was made of it, as soon as it is."""
    with ThreadPoolExecutor(threads, "verify") as pool:
        futures = {pool.submit(do, item): item for item in items}
        try:
            for future in as_completed(futures):
                yield futures.pop(future), future.result()
        finally:
            for future in futures:
                future.cancel()  # after an error nothing more is begun
