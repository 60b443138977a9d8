"""Warnings that a loop may repeat, and messages of other processes: a person reads the first of each kind, and its count.

Every message still reaches the other handlers, such as `--log-json`.
"""

import logging
from collections import Counter
from collections.abc import Callable
from logging.handlers import QueueHandler
from typing import Any, cast

_KIND = "repeats"  # attribute of a record: what is counted

log = logging.getLogger("deit_cli")


def warn_again(logger: logging.Logger, kind: str, message: str, *args: object) -> None:
    """Log a warning that a loop may repeat.

    Args:
        logger: of the module that warns.
        kind: what is counted, as a plural: `lost teacher processes`.
        message: of this time.
        args: of the message.
    """
    logger.warning(message, *args, extra={_KIND: kind})


class FirstOfEachKind(logging.Filter):
    """Let the first warning of each kind pass, and count them all."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: Counter[str] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is to be said."""
        kind = getattr(record, _KIND, None)
        if kind is None:
            return True
        self._counts[kind] += 1
        return self._counts[kind] == 1

    def say_counts(self) -> None:
        """Log how often each kind came that came more than once, and begin to count anew."""
        counts, self._counts = self._counts, Counter()
        for kind, count in counts.items():
            if count > 1:
                log.warning("%s: %s in all", kind, f"{count:,}")


def send_messages(send: Callable[[logging.LogRecord], object]) -> None:
    """Hand all messages of this process, which another one started, to that one's `hear`; `send` may be called by any thread."""

    class Sending(QueueHandler):
        def enqueue(self, record: logging.LogRecord) -> None:
            send(record)

        def handleError(self, record: logging.LogRecord) -> None:
            """The process that would hear it is gone, and this one will be told so when it asks for more work."""

    logging.getLogger().handlers = [Sending(cast(Any, None))]


def hear(record: logging.LogRecord) -> None:
    """Log a message of another process here."""
    logging.getLogger(record.name).handle(record)
