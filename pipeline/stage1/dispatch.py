"""Which worker has which label shard: fast workers get more of them, and a lost worker's go to another."""

import logging
from collections import deque
from dataclasses import dataclass, field

from pipeline.errors import WorkerError
from pipeline.repeats import warn_counted
from pipeline.stage1.loop import LabelTask

TRIES = 3  # a label shard that costs so many workers is set aside, and the others are finished


@dataclass
class Dispatcher:
    """Hands out label shards, and knows which worker has which.

    Attributes:
        waiting: tasks that nobody has; those that were lost come last.
        taken: worker to the tasks that it has.
        losses: how many workers each task has cost.
        set_aside: tasks that cost too many.
        gone: workers that were given up. One that wakes up again gets nothing more; what it still finishes is whole.
    """

    waiting: deque[LabelTask]
    taken: dict[str, list[LabelTask]] = field(default_factory=dict)
    losses: dict[LabelTask, int] = field(default_factory=dict)
    set_aside: list[LabelTask] = field(default_factory=list)
    gone: set[str] = field(default_factory=set)

    def take(self, worker: str) -> LabelTask | None:
        """Return the next task for a worker, or None if it should end.

        A task that has cost a worker is given to one that has nothing else, so that only the guilty one is set aside.
        """
        mine = self.taken.setdefault(worker, [])
        suspect = bool(self.waiting) and self.waiting[0] in self.losses
        if not self.waiting or worker in self.gone or (suspect and mine) or any(task in self.losses for task in mine):
            return None
        mine.append(self.waiting.popleft())
        return mine[-1]

    def finish(self, worker: str, task: LabelTask) -> None:
        """Note that a worker's task is complete."""
        if worker not in self.gone:
            self.taken[worker].remove(task)

    def lose(self, worker: str) -> int:
        """Give a lost worker's tasks to the others, or set them aside; return how many it had."""
        self.gone.add(worker)
        lost = self.taken.pop(worker, [])
        for task in lost:
            self.losses[task] = self.losses.get(task, 0) + 1
            (self.set_aside if self.losses[task] >= TRIES else self.waiting).append(task)
        return len(lost)

    @property
    def finished(self) -> bool:
        """Whether no task is waiting or taken."""
        return not self.waiting and not any(self.taken.values())

    def check(self, cause: str | None = None) -> None:
        """Raise WorkerError if tasks were set aside.

        Args:
            cause: error that ended the last worker, if it could send one.
        """
        if self.set_aside:
            names = ", ".join(f"{t.shard} views {t.views.start}:{t.views.stop}" for t in self.set_aside[:8])
            raise WorkerError(
                f"{len(self.set_aside)} label shards were set aside after {TRIES} workers were lost over each: {names}",
                fix=(
                    "Everything else is complete."
                    f" {f'The last worker died of {cause}' if cause else 'Look for an image that needs much memory'};"
                    " the same command tries again"
                ),
            )


class WorkersLost:
    """Warns of workers that were lost, and gives up when too many of them died before their first task."""

    def __init__(self, logger: logging.Logger, workers: str) -> None:
        """Count from 0.

        Args:
            logger: logger of the engine.
            workers: what its workers are called, in the plural.
        """
        self._log, self._workers = logger, workers
        self._died_before_first_task = 0

    def add(self, worker: str, reason: str, *, tasks: int, cause: str | None) -> None:
        """Warn of one more.

        Args:
            worker: what a person calls it.
            reason: why it was lost.
            tasks: how many tasks it had.
            cause: error that ended it, if it could send one.

        Raises:
            WorkerError: TRIES workers died before their first task.
        """
        message = "%s was lost (%s): its %d label shards go to another"
        warn_counted(self._log, f"lost {self._workers}", message, worker, reason, tasks)
        self._died_before_first_task += not tasks
        if self._died_before_first_task >= TRIES:
            known = f"; the last one died of {cause}" if cause else ""
            raise WorkerError(
                f"{TRIES} {self._workers} died before they took any work{known}",
                fix=None if cause else "Killed for memory? Use fewer --processes",
            )
