"""Progress of a command: what its processes report, and what people and log files see of it."""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import StorageError, UsageError
from pipeline.text import byte_size

log = logging.getLogger("deit_cli")


@dataclass(frozen=True)
class Tick:
    """The progress of one phase of a run.

    Attributes:
        phase: name of the phase, such as `label`.
        done: number of things that are done, including those that existed before this run.
        total: number of things to do.
        elapsed_s: seconds since the phase began.
        made: number of things that this run made itself.
        teacher_busy: share of the time in which the teachers computed, 0..1; None if there is no teacher.
        bytes_written: bytes of label shards that were written, or of files that were moved.
        unit: what the phase counts, such as `views`.
    """

    phase: str
    done: int
    total: int
    elapsed_s: float = 0.0
    made: int = 0
    teacher_busy: float | None = None
    bytes_written: int = 0
    unit: str = "things"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        values = dataclasses.asdict(self) | {"per_second": self.per_second, "left_s": self.left_s}
        del values["unit"]
        return values

    @property
    def per_second(self) -> float:
        """Number of things that this run makes per second."""
        return self.made / self.elapsed_s if self.elapsed_s else 0.0

    @property
    def left_s(self) -> float | None:
        """Seconds that the rest will take at the current rate; None if there is no rate yet."""
        if self.done >= self.total:
            return 0.0
        return (self.total - self.done) / self.per_second if self.per_second else None


Progress = Callable[[Tick], None]


@dataclass(frozen=True)
class WorkDone:
    """The work of one process since its last report.

    Attributes:
        views: number of views that its teacher answered for.
        busy_s: seconds in which its teacher computed.
        bytes: size of the label shards that it wrote.
        found: number of views in label shards that were complete before.
    """

    views: int = 0
    busy_s: float = 0.0
    bytes: int = 0
    found: int = 0


@dataclass
class Tally:
    """Sum of the work of all processes, reported to `progress`."""

    total: int
    processes: int
    progress: Progress
    _began: float = field(default_factory=time.monotonic)
    _made: int = 0
    _found: int = 0
    _busy_s: float = 0.0
    _bytes: int = 0

    def add(self, work: WorkDone) -> None:
        """Add the work of a process. Empty work means that it begins now: the clock restarts if nothing has been made yet."""
        if work == WorkDone() and not self._made:
            self._began = time.monotonic()
        self._made += work.views
        self._found += work.found
        self._busy_s += work.busy_s
        self._bytes += work.bytes
        self.progress(self.tick())

    def tick(self) -> Tick:
        """Return the progress of all processes together."""
        elapsed = time.monotonic() - self._began
        return Tick(
            phase="label",
            done=min(self.total, self._made + self._found),
            total=self.total,
            elapsed_s=elapsed,
            made=self._made,
            teacher_busy=min(1.0, self._busy_s / (elapsed * self.processes)) if elapsed else None,  # reports come late
            bytes_written=self._bytes,
            unit="views",
        )


class Throttle:
    """Timer that says when something is due again: at most once every `every_s` seconds."""

    def __init__(self, every_s: float, *, due: bool = False) -> None:
        """Start the timer; with `due`, the first time is due at once."""
        self._every_s = every_s
        self._since = -math.inf if due else time.monotonic()

    @property
    def due(self) -> bool:
        """True once the time is over."""
        return time.monotonic() - self._since >= self._every_s

    def restart(self) -> None:
        """Restart the timer."""
        self._since = time.monotonic()


@contextmanager
def throttled(tell: Progress, every_s: float) -> Iterator[Progress]:
    """Pass on at most one tick in `every_s` seconds, and the last tick of each phase, even if the block fails."""
    throttles: dict[str, Throttle] = {}
    kept: list[Tick] = []

    def flush() -> None:
        while kept:
            tell(kept.pop())

    def update(tick: Tick) -> None:
        if kept and kept[0].phase != tick.phase:
            flush()
        kept[:] = [tick]
        throttle = throttles.setdefault(tick.phase, Throttle(every_s))
        if throttle.due:
            throttle.restart()
            flush()

    try:
        yield update
    finally:
        flush()


def log_tick(tick: Tick) -> None:
    """Log how far a run is."""
    log.info("%s %s of %s  %s", tick.phase, f"{tick.done:,}", f"{tick.total:,}", tick_text(tick))


def tick_text(tick: Tick) -> str:
    """Return the known ones of rate, time left, busy share of the teacher and bytes written, as text."""
    parts = []
    if found := tick.done - tick.made:
        parts.append(f"{found:,} of them there before")
    if tick.made:
        parts.append(f"{tick.per_second:,.{0 if tick.per_second >= 10 else 2}f} {tick.unit}/s")
    if tick.made and tick.left_s:
        hours, rest = divmod(int(tick.left_s), 3600)
        parts.append(f"{hours}:{rest // 60:02}:{rest % 60:02} left")
    if tick.made and tick.teacher_busy is not None:
        parts.append(f"teacher busy {100 * tick.teacher_busy:.0f} %")
    if tick.bytes_written:
        parts.append(f"{byte_size(tick.bytes_written)} written")
    return ", ".join(parts)


@contextmanager
def json_log(path: Path | None, every_s: float = 10.0) -> Iterator[Progress]:
    """Append log messages and progress (as `throttled` passes it) to a file, one JSON object in each line.

    Raises:
        UsageError: the file cannot be opened.
        StorageError: it cannot be written.
    """
    if path is None:
        yield lambda _: None
        return
    try:
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--log-json {path}: {error.strerror}") from error

    def write(event: str, values: dict[str, Any]) -> None:
        try:
            file.write(json.dumps({"time": round(time.time(), 3), "event": event} | values) + "\n")
            file.flush()
        except OSError as error:
            raise StorageError(f"--log-json {path}: {error.strerror}") from error

    class Messages(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            write("message", {"level": record.levelname, "from": record.name, "text": record.getMessage()})

    def tell(tick: Tick) -> None:
        write("progress", tick.to_dict())

    messages = Messages()
    log.addHandler(messages)
    try:
        with throttled(tell, every_s) as update:
            yield update
        write("ended", {})
    except BaseException as error:
        with suppress(StorageError):  # this may be the error that stopped the run
            write("stopped", {"error": type(error).__name__, "text": str(error)})
        raise
    finally:
        log.removeHandler(messages)
        with suppress(OSError):  # the failed write was reported before
            file.close()
