"""Signals while training: the first is a request, a second Ctrl-C is an order."""

import os
import signal
from collections.abc import Iterator

import pytest
from support.background import in_background

from trainer.parallel import SIGNALS, stop_request


class Outer(BaseException):
    pass


@pytest.fixture(autouse=True)
def outer_handlers() -> Iterator[None]:
    """What the command line would have set: both signals end the command at once."""

    def leave(*_: object) -> None:
        raise Outer

    before = {each: signal.signal(each, leave) for each in SIGNALS}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_nothing_is_interrupted(number):
    with stop_request() as told:
        assert not told
        os.kill(os.getpid(), number)
        assert told
        assert told.signal is number


def test_a_second_ctrl_c_ends_at_once():
    with stop_request() as told:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Outer):
            os.kill(os.getpid(), signal.SIGINT)
        assert told.signal is signal.SIGINT


def test_sigterm_may_be_repeated_as_schedulers_do_and_ctrl_c_after_it_too():
    with stop_request() as told:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert told.signal is signal.SIGTERM


def test_afterwards_signals_do_what_they_did_before():
    with stop_request():
        pass
    for number in SIGNALS:
        with pytest.raises(Outer):
            os.kill(os.getpid(), number)


def test_another_thread_than_the_main_one_leaves_signals_alone():
    found: list[object] = []

    def elsewhere(_: object) -> None:
        with stop_request() as told:
            found.append((bool(told), signal.getsignal(signal.SIGINT)))

    handler = signal.getsignal(signal.SIGINT)
    with in_background(elsewhere):
        pass
    assert found == [(False, handler)]
