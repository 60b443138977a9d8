"""How far a run is: what its processes report, and what a person is told."""

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import StorageError, UsageError
from pipeline.text import byte_size

log = logging.getLogger("deit_cli")


_UNITS = {  # what each phase counts
    "pack": "source shards",
    "index": "source shards",
    "label": "views",
    "verify": "files",
    "compare": "source shards",
    "relabel": "views",
    "push": "files",
    "pull": "files",
    "export": "tars",
    "merge": "files",
}


@dataclass(frozen=True)
class Tick:
    """How far one phase of a run is.

    Attributes:
        phase: `pack` and `index` count source shards, `label` counts views; others as `_UNITS` says.
        done: of them, those that were there before included.
        total: of them.
        elapsed_s: seconds since the phase began.
        made: of `done`, what this run made itself.
        teacher_busy: share of the time in which the teachers computed, 0..1; None where there is none.
        bytes_written: of label shards, or of files that were moved.
    """

    phase: str
    done: int
    total: int
    elapsed_s: float = 0.0
    made: int = 0
    teacher_busy: float | None = None
    bytes_written: int = 0

    @property
    def per_second(self) -> float:
        """How many of them this run makes in a second."""
        return self.made / self.elapsed_s if self.elapsed_s else 0.0

    @property
    def left_s(self) -> float | None:
        """Seconds that the rest will take at this rate; None before there is a rate."""
        if self.done >= self.total:
            return 0.0
        return (self.total - self.done) / self.per_second if self.per_second else None


Progress = Callable[[Tick], None]


@dataclass(frozen=True)
class Report:
    """What one process did since its last report.

    Attributes:
        views: that its teacher answered for.
        busy_s: seconds that its teacher computed.
        bytes: of label shards that it wrote.
        found: views of label shards that were complete before.
    """

    views: int = 0
    busy_s: float = 0.0
    bytes: int = 0
    found: int = 0


@dataclass
class Tally:
    """Adds the reports of all processes up, and tells `progress`."""

    total: int
    processes: int
    progress: Progress
    _began: float = field(default_factory=time.monotonic)
    _made: int = 0
    _found: int = 0
    _busy_s: float = 0.0
    _bytes: int = 0

    def add(self, report: Report) -> None:
        """Count one report; an empty one says that a process begins now, for until then nobody could do anything."""
        if report == Report() and not self._made:
            self._began = time.monotonic()
        self._made += report.views
        self._found += report.found
        self._busy_s += report.busy_s
        self._bytes += report.bytes
        self.progress(self.tick())

    def tick(self) -> Tick:
        """Return how far all of them are."""
        elapsed = time.monotonic() - self._began
        return Tick(
            phase="label",
            done=min(self.total, self._made + self._found),
            total=self.total,
            elapsed_s=elapsed,
            made=self._made,
            teacher_busy=min(1.0, self._busy_s / (elapsed * self.processes)) if elapsed else None,  # reports come late
            bytes_written=self._bytes,
        )


@contextmanager
def now_and_then(say: Progress, every_s: float) -> Iterator[Progress]:
    """Pass a tick on every so many seconds, and the last one of each phase, however it ends."""
    began: dict[str, float] = {}
    kept: list[Tick] = []

    def flush() -> None:
        while kept:
            say(kept.pop())

    def update(tick: Tick) -> None:
        if kept and kept[0].phase != tick.phase:
            flush()
        kept[:] = [tick]
        now = time.monotonic()
        if now - began.setdefault(tick.phase, now) >= every_s:
            began[tick.phase] = now
            flush()

    try:
        yield update
    finally:
        flush()


def say(tick: Tick) -> None:
    """Log how far a run is."""
    log.info("%s %s of %s  %s", tick.phase, f"{tick.done:,}", f"{tick.total:,}", state(tick))


def state(tick: Tick) -> str:
    """Return rate, time left, how busy the teacher is, and bytes written, as far as they are known."""
    parts = []
    if found := tick.done - tick.made:
        parts.append(f"{found:,} of them {'there' if tick.phase in ('push', 'pull') else 'made'} before")
    if tick.made:
        unit = _UNITS.get(tick.phase, tick.phase)
        parts.append(f"{tick.per_second:,.{0 if tick.per_second >= 10 else 2}f} {unit}/s")
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
    """Append progress (every so many seconds, and the last of each phase) and log messages to a file, an object a line."""
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
        write("progress", dataclasses.asdict(tick) | {"per_second": tick.per_second, "left_s": tick.left_s})

    messages = Messages()
    log.addHandler(messages)
    try:
        with now_and_then(tell, every_s) as update:
            yield update
        write("ended", {})
    except BaseException as error:
        with suppress(StorageError):  # it may be the very reason
            write("stopped", {"error": type(error).__name__, "text": str(error)})
        raise
    finally:
        log.removeHandler(messages)
        with suppress(OSError):  # what it could not write has been named
            file.close()
