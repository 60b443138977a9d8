"""Work beside a test: threads that can never outlive it."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE_S = 300  # a test waits for what happens, not for a time; this ends one whose event never comes
POLL_S = 0.002  # shorter than a file takes to be published


@contextmanager
def in_background(*works: Callable[[threading.Event], object]) -> Iterator[None]:
    """Run each function in a thread of its own while the block runs, then wait for all of them.

    Each gets an event that is set when the block ends: a function that waits for something else gives up then.

    Raises:
        AssertionError: a function has not ended five minutes after the block.
        BaseException: the first error that a function raised, if the block itself raised none.
    """
    ended, errors = threading.Event(), []

    def run(work: Callable[[threading.Event], object]) -> None:
        try:
            work(ended)
        except BaseException as error:
            errors.append(error)

    # Daemons: pytest would wait for any other thread at its exit, for ever if what that waits for never comes.
    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads), f"a thread still runs {PATIENCE_S} s after its block"
    if errors:
        raise errors[0]


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Wait until a condition holds; fail after five minutes, and say what never came."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"waited {PATIENCE_S} s in vain: {what}"
        time.sleep(POLL_S)
