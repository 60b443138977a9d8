"""Warnings that a loop may repeat, and log messages of worker processes.

A person reads the first warning of each kind, and at the end how many there were; `--log-json` gets every one. Worker
processes forward their messages to the process that started them, which filters and counts them.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from logging.handlers import QueueHandler
from typing import Any, NamedTuple, cast

_KIND = "repeats"  # attribute of a log record that holds its kind

log = logging.getLogger("deit_cli")


def warn_counted(logger: logging.Logger, kind: str, message: str, *args: object) -> None:
    """Log a warning that a loop may repeat, with the kind under which it is counted.

    Args:
        logger: logger of the module that warns.
        kind: events that are counted, in the plural: `lost teacher processes`.
        message: text of this warning, with % placeholders.
        args: values for the placeholders.
    """
    logger.warning(message, *args, extra={_KIND: kind})


class FirstOfEachKind(logging.Filter):
    """A filter that passes the first warning of each kind, and counts every one."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: Counter[str] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return True for a record without a kind, and for the first of its kind."""
        kind = getattr(record, _KIND, None)
        if kind is None:
            return True
        self._counts[kind] += 1
        return self._counts[kind] == 1

    def log_counts(self) -> None:
        """Log the count of each kind that occurred more than once, and reset all counts."""
        counts, self._counts = self._counts, Counter()
        for kind, count in counts.items():
            if count > 1:
                log.warning("%s: %s in all", kind, f"{count:,}")


class Told(NamedTuple):
    """A message that was logged, to be said again where its cause is found in a cache: logger, level, text, kind of repeats."""

    logger: str
    level: int
    text: str
    kind: str | None


@contextmanager
def heard() -> Iterator[list[Told]]:
    """Give a list that receives what is logged inside the block."""
    told: list[Told] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(Told(record.name, record.levelno, record.getMessage(), getattr(record, _KIND, None)))

    listener = Listener()
    log.addHandler(listener)
    try:
        yield told
    finally:
        log.removeHandler(listener)


def say_again(told: Iterable[Sequence[Any]]) -> None:
    """Log messages that were heard before."""
    for message in map(Told._make, told):
        extra = None if message.kind is None else {_KIND: message.kind}
        logging.getLogger(message.logger).log(message.level, "%s", message.text, extra=extra)


def forward_messages(send: Callable[[logging.LogRecord], object]) -> None:
    """Send all log messages of this worker process to the process that started it, and to no other handler.

    Args:
        send: sends one record, which the other process passes to `log_forwarded`; must be thread-safe.
    """

    class Forwarding(QueueHandler):
        def enqueue(self, record: logging.LogRecord) -> None:
            send(record)

        def handleError(self, record: logging.LogRecord) -> None:
            """Ignore the error: the other process is gone, and this one notices when it asks for more work."""

    logging.getLogger().handlers = [Forwarding(cast(Any, None))]


def log_forwarded(record: logging.LogRecord) -> None:
    """Log a message of a worker process in this process."""
    logging.getLogger(record.name).handle(record)
