"""Work in threads: every item once, the first failure raised, and no thread left behind."""

import threading

import pytest

from pipeline.machine.threads import in_threads


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "worker"]


@pytest.mark.parametrize("threads", [1, 3, 50])
def test_every_item_is_worked_on_once_and_no_thread_is_left(threads):
    assert sorted(in_threads(range(20), lambda item: item**2, threads)) == [(item, item**2) for item in range(20)]
    assert workers() == []


def test_nothing_to_do_is_done():
    assert list(in_threads([], str, 4)) == []


def test_the_first_failure_is_raised_and_no_thread_is_left():
    def do(item: int) -> int:
        if item == 3:
            raise ValueError("item 3")
        return item

    with pytest.raises(ValueError, match="item 3"):
        list(in_threads(range(1000), do, 4))
    assert workers() == []


def test_a_caller_that_stops_listening_stops_the_work():
    stop, begun = threading.Event(), []

    def do(item: int) -> None:
        begun.append(item)
        stop.wait(0.01)

    results = in_threads(range(10_000), do, 2, stop=stop)
    next(results)
    results.close()
    assert stop.is_set()
    for thread in workers():
        thread.join(5)
    assert len(begun) < 10_000
