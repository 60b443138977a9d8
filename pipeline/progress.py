"""How far a run is: what its processes report, and what a person is told."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Tick:
    """How far one phase of a run is.

    Attributes:
        phase: `index` counts source shards, `label` counts views.
        done: of them, those that were there before included.
        total: of them.
        elapsed_s: seconds since the phase began.
        made: of `done`, what this run made itself.
        teacher_busy: share of the time in which the teachers computed, 0..1; None where there is none.
        bytes_written: of label shards.
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
        """Count one report."""
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
            teacher_busy=self._busy_s / (elapsed * self.processes) if elapsed else None,
            bytes_written=self._bytes,
        )
