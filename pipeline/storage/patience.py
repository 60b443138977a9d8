"""Limits how long a remote store may take: a minimum rate, a longest answer, and the time that a server asks to wait.

The libraries below wait for ever for a server that sends a byte now and then, each byte in time. So a transfer runs in a thread
of its own (`watched`), and the thread that needs it looks at its `Rate`.
"""

import datetime
import email.utils
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pipeline.text import byte_size

MIN_RATE = 10_000  # bytes a second
WINDOW_S = 60.0  # the rate is that of the last WINDOW_S seconds
ANSWER_S = 60.0  # longest answer to a question about one file
LISTING_S = 900.0  # longest list of the files in a folder; a million files are a thousand requests
_LOOKS = 20  # number of looks at a transfer in each window

Result = TypeVar("Result")
TooSlow = Callable[[], str | None]  # returns why a call has taken too long, or None


class Interrupted(Exception):
    """Error: a transfer failed in a way that may be temporary, so a retry may succeed.

    Attributes:
        retry_after_s: seconds that the server asks to wait before the next request.
    """

    def __init__(self, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class Rate:
    """The rate at which the bytes of one transfer arrive, over the last WINDOW_S seconds.

    Args:
        minimum: bytes a second that must arrive.
        grain: bytes that a library delivers at once; the window is as long as that many bytes take at the minimum rate, and
            the part of them that is on its way is not missed.
    """

    def __init__(self, minimum: float, *, grain: int = 0) -> None:
        self._minimum, self._grain, self._window = minimum, grain, max(WINDOW_S, grain / minimum)
        self._received = 0
        self._looks = deque([(time.monotonic(), 0)])  # when, and the bytes that had arrived

    def add(self, received: int) -> None:
        """Count bytes that have arrived."""
        self._received += received

    def too_slow(self) -> str | None:
        """Return why the transfer is too slow, or None; call it several times in each window."""
        now = time.monotonic()
        self._looks.append((now, self._received))
        while len(self._looks) > 1 and now - self._looks[1][0] >= self._window:
            self._looks.popleft()
        began, before = self._looks[0]
        needed = max(self._grain, self._minimum * (now - began) - self._grain)
        if now - began < self._window or self._received - before >= needed:
            return None
        rate = (self._received - before) / (now - began)
        return (
            f"{byte_size(rate)} a second arrived in the last {now - began:.0f} s, less than the minimum of"
            f" {byte_size(self._minimum)} a second"
        )


def longer_than(limit_s: float) -> TooSlow:
    """Return a function that says from `limit_s` seconds on that there is no answer."""
    began = time.monotonic()
    return lambda: None if time.monotonic() - began < limit_s else f"no complete answer within {limit_s:.0f} s"


def watched(call: Callable[[], Result], too_slow: TooSlow) -> Result:
    """Return `call()`, or give up waiting for it once `too_slow` returns a reason; `call` runs in a thread of its own.

    A thread cannot be ended from outside. One that nobody waits for any more ends when its connection does, so `call` must do
    no harm then.

    Raises:
        Interrupted: `call` is too slow.
    """
    made: list[Result] = []
    failed: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            made.append(call())
        except BaseException as error:
            failed.append(error)
        done.set()

    threading.Thread(target=run, daemon=True, name="remote-store").start()
    while not done.wait(min(1.0, WINDOW_S / _LOOKS)):
        if (reason := too_slow()) is not None:
            raise Interrupted(reason)
    if failed:
        raise failed.pop()
    return made.pop()


def retry_after_s(error: BaseException | None) -> float:
    """Return the seconds that a server asks to wait in the header Retry-After of an answer, or 0.

    The header has seconds or a date. A date is compared with the date of the answer, because the clocks may differ.
    """
    while error is not None:
        headers = {str(name).lower(): str(value) for name, value in _headers_of(error).items()}
        if asked := headers.get("retry-after", "").strip():
            if asked.isascii() and asked.isdigit():
                return float(asked)
            until, now = _date(asked), _date(headers.get("date", "")) or datetime.datetime.now(datetime.UTC)
            return max(0.0, (until - now).total_seconds()) if until else 0.0
        error = error.__cause__
    return 0.0


def _headers_of(error: BaseException) -> Mapping[Any, Any]:
    """Return the headers of the answer in an error of aiohttp, requests, httpx or botocore."""
    answer = getattr(error, "response", None)
    if isinstance(answer, dict):
        return answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return getattr(answer, "headers", None) or getattr(error, "headers", None) or {}


def _date(text: str) -> datetime.datetime | None:
    try:
        found = email.utils.parsedate_to_datetime(text)
    except (ValueError, TypeError):
        return None
    return found if found.tzinfo else found.replace(tzinfo=datetime.UTC)
