"""How long a call takes: for the parts of either stage, on a CPU or a GPU."""

import statistics
import time
from collections.abc import Callable

import torch

Work = Callable[[], object]
ROWS = 5  # of calls, in `steady_s`


def median_s(work: Work, device: torch.device, least_s: float) -> float:
    """Return the median seconds of one call; the first call, which warms caches and may compile, does not count."""
    row_s(work, 1, device)
    return statistics.median(_rows_s(work, 1, device, least_s))


def steady_s(work: Work, device: torch.device, least_s: float) -> float:
    """Return the seconds of a call among others: the median of some rows of calls.

    A GPU is waited for at the end of a row, not of each call, because a training loop does not wait for it either. The
    first two calls do not count.
    """
    row_s(work, 1, device)
    calls = max(1, int(least_s / ROWS / max(row_s(work, 1, device), 1e-9)))
    return statistics.median(_rows_s(work, calls, device, least_s))


def _rows_s(work: Work, calls: int, device: torch.device, least_s: float) -> list[float]:
    """Return the mean seconds of a call in each row of so many, for at least so long.

    The time is added up as it passes: a sum over the rows after each of them takes minutes where a call takes microseconds.
    """
    times, spent_s = [], 0.0
    while not times or spent_s < least_s:
        times.append(row_s(work, calls, device))
        spent_s += times[-1] * calls
    return times


def row_s(work: Work, calls: int, device: torch.device) -> float:
    """Return the mean seconds of so many calls, one after the other."""
    began = time.perf_counter()
    for _ in range(calls):
        work()
    synchronise(device)
    return (time.perf_counter() - began) / calls


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was asked to; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
