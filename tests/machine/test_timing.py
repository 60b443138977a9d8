"""How calls are timed, on a clock that only they move."""

import time

import pytest
import torch

from pipeline.machine.loaders import one_core
from pipeline.machine.timing import ROWS, median_s, steady_s

CPU = torch.device("cpu")


class Timed:
    """Work whose calls take the given seconds, the last of them again and again."""

    def __init__(self, monkeypatch, *costs: float) -> None:
        self.now, self.calls, self.costs = 0.0, 0, costs
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def __call__(self) -> None:
        self.now += self.costs[min(self.calls, len(self.costs) - 1)]
        self.calls += 1


def test_the_first_call_does_not_count(monkeypatch):
    work = Timed(monkeypatch, 100.0, 1.0, 2.0, 3.0, 9.0)
    assert median_s(work, CPU, least_s=5.0) == 2.0  # of 1, 2 and 3; it stops once 5 s have passed


def test_a_steady_call_is_the_median_of_rows_and_the_first_two_do_not_count(monkeypatch):
    row = [1.0, 1.0]
    work = Timed(monkeypatch, 100.0, 1.0, *row, 3.0, 5.0, *row, *row)
    assert (
        steady_s(work, CPU, least_s=10.5) == 1.0
    )  # rows of two calls, with a mean of 1, 4 and 1 s: then 12 s are over
    assert work.calls == 2 + 2 * 3


@pytest.mark.timeout(60)
def test_many_short_calls_cost_no_more_than_themselves(monkeypatch):
    """A sum over all calls after each of them would take a quarter of an hour here."""
    work = Timed(monkeypatch, 2.0**-19)
    assert median_s(work, CPU, least_s=0.5) == 2.0**-19
    assert work.calls == 2**18 + 1


@pytest.mark.parametrize(("cost", "calls"), [(7.0, 1), (0.1, ROWS * 4)])
def test_a_slow_call_is_made_once_and_a_quick_one_in_rows(monkeypatch, cost, calls):
    work = Timed(monkeypatch, cost)
    assert steady_s(work, CPU, least_s=2.0 + 1e-9) == pytest.approx(cost)
    assert work.calls - 2 in (calls, calls + 4)  # rounding may ask for another row


def test_one_core_means_one_thread_and_ends():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_core():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
