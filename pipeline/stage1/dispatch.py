"""Dispatch label shards to workers: fast workers get more shards, and other workers get the shards of a lost worker."""

import logging
from collections import deque
from dataclasses import dataclass, field

from pipeline.errors import WorkerError
from pipeline.repeats import warn_counted
from pipeline.stage1.loop import LabelTask

TRIES = 3  # a label shard over which so many workers were lost is set aside, and the others are finished


@dataclass
class Dispatcher:
    """Hands out label shards and records which worker has which shard.

    Attributes:
        waiting: tasks that no worker has; tasks of lost workers come last.
        taken: maps each worker to its tasks.
        losses: number of workers that were lost over each task.
        set_aside: tasks over which TRIES workers were lost.
        gone: lost workers. If such a worker continues after all, it gets no more tasks; a file that it finishes is still valid.
    """

    waiting: deque[LabelTask]
    taken: dict[str, list[LabelTask]] = field(default_factory=dict)
    losses: dict[LabelTask, int] = field(default_factory=dict)
    set_aside: list[LabelTask] = field(default_factory=list)
    gone: set[str] = field(default_factory=set)

    def take(self, worker: str) -> LabelTask | None:
        """Return the next task for a worker, or None if the worker should end.

        A task over which a worker was lost is given to a worker without other tasks, so that only the faulty task is set aside.
        """
        mine = self.taken.setdefault(worker, [])
        suspect = bool(self.waiting) and self.waiting[0] in self.losses
        if not self.waiting or worker in self.gone or (suspect and mine) or any(task in self.losses for task in mine):
            return None
        mine.append(self.waiting.popleft())
        return mine[-1]

    def finish(self, worker: str, task: LabelTask) -> None:
        """Record that a worker's task is complete."""
        if worker not in self.gone:
            self.taken[worker].remove(task)

    def lose(self, worker: str) -> int:
        """Give a lost worker's tasks to the others, or set them aside; return the number of these tasks."""
        self.gone.add(worker)
        lost = self.taken.pop(worker, [])
        for task in lost:
            self.losses[task] = self.losses.get(task, 0) + 1
            (self.set_aside if self.losses[task] >= TRIES else self.waiting).append(task)
        return len(lost)

    @property
    def finished(self) -> bool:
        """Return whether no task is waiting or taken."""
        return not self.waiting and not any(self.taken.values())

    def check(self, cause: str | None = None) -> None:
        """Raise WorkerError if tasks were set aside.

        Args:
            cause: error that ended the last lost worker, if it could be reported.
        """
        if self.set_aside:
            names = ", ".join(f"{t.shard} views {t.views.start}:{t.views.stop}" for t in self.set_aside[:8])
            raise WorkerError(
                f"{len(self.set_aside)} label shards were set aside after {TRIES} workers were lost over each: {names}",
                fix=(
                    "Everything else is complete."
                    f" {f'The last worker died of {cause}' if cause else 'Look for an image that needs much memory'};"
                    " run the same command to try again"
                ),
            )


class WorkersLost:
    """Warns about lost workers, and gives up when too many workers died before their first task."""

    def __init__(self, logger: logging.Logger, workers: str) -> None:
        """Count from 0.

        Args:
            logger: logger of the engine.
            workers: name of the workers in messages, in the plural.
        """
        self._log, self._workers = logger, workers
        self._died_before_first_task = 0

    def add(self, worker: str, reason: str, *, tasks: int, cause: str | None) -> None:
        """Warn about another lost worker.

        Args:
            worker: name of the worker in messages.
            reason: why the worker was lost.
            tasks: number of tasks that the worker had.
            cause: error that ended the worker, if it could be reported.

        Raises:
            WorkerError: TRIES workers died before their first task.
        """
        message = "%s was lost (%s): its %d label shards go to another"
        warn_counted(self._log, f"lost {self._workers}", message, worker, reason, tasks)
        self._died_before_first_task += not tasks
        if self._died_before_first_task >= TRIES:
            known = f"; the last one died of {cause}" if cause else ""
            raise WorkerError(
                f"{TRIES} {self._workers} died before their first task{known}",
                fix=None if cause else "They may have run out of memory: use fewer --processes",
            )
