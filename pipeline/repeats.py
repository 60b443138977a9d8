"""Warnings that a loop may repeat, and log messages of worker processes.

A person reads the first warning of each kind, and at the end how many there were; `--log-json` gets every one. Worker
processes forward their messages to the process that started them, which filters and counts them.
"""

import contextlib
import logging
import pickle
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from logging.handlers import QueueHandler
from typing import Any, NamedTuple, Self, cast

_KIND = "repeats"  # attribute of a log record that holds its kind
_TEXT_BYTES = 2000  # longest message of a process that shares a pipe; Linux writes 4,096 bytes to a pipe as a whole

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


@contextlib.contextmanager
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


def say_again(told: Iterable[Told]) -> None:
    """Log messages that were heard before."""
    for message in told:
        extra = None if message.kind is None else {_KIND: message.kind}
        logging.getLogger(message.logger).log(message.level, "%s", message.text, extra=extra)


@contextlib.contextmanager
def counted_at_the_end() -> Iterator[None]:
    """Say repeated warnings once, and their counts at the end of the block, also in a program that has not set up logging."""
    handler, first = logging.lastResort, FirstOfEachKind()
    if handler is None:
        yield
        return
    handler.addFilter(first)
    try:
        yield
    finally:
        handler.removeFilter(first)
        first.log_counts()


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


class MessagePipe:
    """The messages of worker processes, which this process logs as its own, as they come, while a block runs.

    All processes write to one pipe. None of them locks it, because a process that is killed would never unlock it: a short
    write is whole, and a long text is cut.
    """

    def __init__(self) -> None:
        from multiprocessing import Pipe  # here, so that commands without processes start sooner

        self._receiver, self._sender = Pipe(duplex=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"_sender": self._sender}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def send(self, record: logging.LogRecord) -> None:
        """Send a message from a worker process."""
        record.msg = str(record.msg).encode()[:_TEXT_BYTES].decode(errors="ignore")
        record.message = record.msg
        self._sender.send_bytes(pickle.dumps(record))

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._log, daemon=True, name="messages")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._sender.send_bytes(b"")
        self._thread.join(timeout=5)
        self._sender.close()
        self._receiver.close()

    def _log(self) -> None:
        while data := self._receiver.recv_bytes():
            log_forwarded(pickle.loads(data))
