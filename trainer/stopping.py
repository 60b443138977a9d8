"""Signals while training: finish the update, save, and say so with the exit code."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether a signal has asked the run to stop, and which.

    Attributes:
        signal: the first one; None: go on.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Catch Ctrl-C and SIGTERM (what Slurm sends before it takes a machine away) as a request to stop.

    A second Ctrl-C does what it did before, at once: the last checkpoint stays. A second SIGTERM changes nothing,
    because schedulers repeat it. In other threads than the main one signals are left alone.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {each: signal.getsignal(each) for each in SIGNALS}

    def note(number: int, _: FrameType | None) -> None:
        if request.signal is None:
            request.signal = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    for each in SIGNALS:
        signal.signal(each, note)
    try:
        yield request
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
