"""Work in threads, for functions that release the GIL: waiting for disks and servers, hashing, unpacking."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from pipeline.machine.progress import Progress, Tick

Item = TypeVar("Item")
Made = TypeVar("Made")


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ProgressCounter:
    """Counter of the finished things of a phase, which reports each count to a `Progress`."""

    def __init__(self, phase: str, total: int, progress: Progress, *, unit: str) -> None:
        self._phase, self._total, self._progress, self._unit = phase, total, progress, unit
        self._done, self._began = 0, time.monotonic()

    def __call__(self, more: int = 1) -> None:
        """Add some things, and report the count."""
        self._done += more
        elapsed = time.monotonic() - self._began
        self._progress(Tick(self._phase, self._done, self._total, elapsed, made=self._done, unit=self._unit))


def in_threads(
    items: Iterable[Item], do: Callable[[Item], Made], threads: int, *, stop: threading.Event | None = None
) -> Generator[tuple[Item, Made], None, None]:
    """Yield each item with its result, as soon as the result is ready.

    After a failure, the threads finish their current items, and then the first failure is raised. The threads are daemons:
    a process that is told to end does not wait for them.

    Args:
        items: work is begun in this order.
        do: makes something of one item.
        threads: items that are worked on at a time.
        stop: event that is set when no more results are wanted, also after a failure; `do` may check it to end early.
    """
    waiting: SimpleQueue[Item] = SimpleQueue()
    results: SimpleQueue[tuple[Item, Any, BaseException | None]] = SimpleQueue()
    for item in items:
        waiting.put(item)
    left, failure = waiting.qsize(), None
    stop = threading.Event() if stop is None else stop

    def work() -> None:
        while not stop.is_set():
            try:
                item = waiting.get_nowait()
            except Empty:
                return
            try:
                results.put((item, do(item), None))
            except BaseException as error:
                results.put((item, None, error))

    workers = [threading.Thread(target=work, daemon=True, name="worker") for _ in range(min(threads, left))]
    try:
        for worker in workers:
            worker.start()
        while left and failure is None:
            with contextlib.suppress(Empty):
                item, made, failure = results.get(timeout=0.2)  # a timeout, so that signals are handled
                left -= 1
                if failure is None:
                    yield item, made
    finally:
        stop.set()
    # A thread that still ends while the interpreter does may abort the process: wait, unless the process is told to end.
    for worker in workers:
        worker.join()
    if failure is not None:
        raise failure
