"""The time that a call takes, on a CPU or a GPU."""

import statistics
import time
from collections.abc import Callable

import torch

Work = Callable[[], object]
ROWS = 5  # rows of calls in `steady_s`
DOES_NOT_MATCH = (
    "the measured speed does not match the parts: other programs may have run meanwhile. Try longer --seconds"
)


class Enough(Exception):
    """The exception that stops a run which has been timed for long enough."""


def median_s(work: Work, device: torch.device, least_s: float) -> float:
    """Return the median seconds of one call, measured for at least `least_s` seconds.

    The first call does not count: it warms caches and may compile.
    """
    row_s(work, 1, device)
    return statistics.median(_rows_s(work, 1, device, least_s))


def steady_s(work: Work, device: torch.device, least_s: float) -> float:
    """Return the seconds per call in a series: the median over rows of calls, measured for about `least_s` seconds.

    It waits for a GPU only at the end of each row, because a training loop does not wait after each call either. The first
    two calls do not count.
    """
    row_s(work, 1, device)
    calls = max(1, int(least_s / ROWS / max(row_s(work, 1, device), 1e-9)))
    return statistics.median(_rows_s(work, calls, device, least_s))


def _rows_s(work: Work, calls: int, device: torch.device, least_s: float) -> list[float]:
    """Return the mean seconds of a call in each row of `calls` calls; rows are made for at least `least_s` seconds.

    It keeps a running total: to sum all rows again after each row would take minutes if a call takes microseconds.
    """
    times, spent_s = [], 0.0
    while not times or spent_s < least_s:
        times.append(row_s(work, calls, device))
        spent_s += times[-1] * calls
    return times


def row_s(work: Work, calls: int, device: torch.device) -> float:
    """Return the mean seconds of `calls` calls, one after the other."""
    began = time.perf_counter()
    for _ in range(calls):
        work()
    synchronise(device)
    return (time.perf_counter() - began) / calls


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has finished its work; return at once for a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
