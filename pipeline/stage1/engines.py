"""The local engine: it labels in this process, or in one process for each device. Each process takes shards as it needs them."""

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

from pipeline.crash import CRASHED, Crash, crash_of
from pipeline.errors import DeitCliError, TeacherError
from pipeline.images.source import Source, open_source
from pipeline.machine.progress import Tally
from pipeline.machine.ranks import plan_cores, plan_devices, rank_from
from pipeline.machine.scripts import IMPORTED_AGAIN, unguarded
from pipeline.machine.threads import usable_cores
from pipeline.overview.summary import weights_text
from pipeline.repeats import forward_messages, log_forwarded
from pipeline.settings.configs import PrecomputeConfig, TeacherConfig
from pipeline.stage1.dispatch import Dispatcher, WorkersLost
from pipeline.stage1.loop import Job, LabelTask, label_shards
from pipeline.teacher.given import GivenTeacher, packed
from pipeline.teacher.loading import load_teacher
from pipeline.teacher.teacher import Teacher

log = logging.getLogger("deit_cli.engines")

END_S = 10  # time for a process to end after it is told to


def run_processes(job: Job, teacher: Teacher, devices: Sequence[str], tasks: Sequence[LabelTask], tally: Tally) -> None:
    """Label in one process for each device; a process that dies is replaced, and its label shards go to the others."""
    dispatcher = Dispatcher(deque(tasks))
    processes = TeacherProcesses(job, teacher, dispatcher, tally)
    try:
        for device in devices:
            processes.start(device)
        while processes.running:
            processes.handle_messages()
    finally:
        processes.stop()
    dispatcher.check(processes.cause_of_loss)


@dataclass
class _TeacherProcess:
    """A teacher process, the parent's end of its pipe, and its device."""

    name: str
    device: str
    process: Any
    pipe: Connection
    crash: Crash | None = None  # error that ended the process, if it could be reported


class TeacherProcesses:
    """The teacher processes of this machine. Each takes a label shard when it needs one.

    Attributes:
        running: processes that have not ended.
        cause_of_loss: error that ended the last lost process, if it could be reported.
    """

    def __init__(self, job: Job, teacher: Teacher, dispatcher: Dispatcher, tally: Tally) -> None:
        self._job, self._teacher, self._dispatcher, self._tally = job, teacher, dispatcher, tally
        # As bytes: multiprocessing would put each tensor of a network into shared memory, which may be small.
        self._given = packed(teacher.given) if teacher.given else None
        self._context = multiprocessing.get_context("spawn")
        self._started = 0
        self._lost = WorkersLost(log, "teacher processes")
        self.running: list[_TeacherProcess] = []
        self.cause_of_loss: str | None = None

    def start(self, device: str) -> None:
        """Start one process."""
        ours, theirs = self._context.Pipe()
        teacher = self._teacher
        process = self._context.Process(
            target=_run_worker,
            args=(theirs, self._job, teacher.config, teacher.num_classes_asked, device, self._given),
            name=f"teacher-{self._started} on {device}",
        )
        process.start()
        theirs.close()
        self.running.append(_TeacherProcess(f"{self._started}", device, process, ours))
        self._started += 1

    def handle_messages(self) -> None:
        """Wait until processes send messages or end, and handle one message or end of each."""
        workers = {worker.pipe: worker for worker in self.running}
        for pipe in wait(list(workers)):
            if isinstance(pipe, Connection):
                self._handle_message(workers[pipe])

    def _handle_message(self, worker: _TeacherProcess) -> None:
        try:
            kind, value = worker.pipe.recv()
            if kind == "take":
                worker.pipe.send(self._dispatcher.take(worker.name))
        except (EOFError, ConnectionError, OSError):
            self._worker_lost(worker)
            return
        if kind == "report":
            self._tally.add(value)
        elif kind == "finished":
            self._dispatcher.finish(worker.name, value)
        elif kind == "message":
            log_forwarded(value)
        elif kind == "error":
            raise value
        elif kind == "crash":
            worker.crash = value
        elif kind == "end":
            self._join(worker)
            self._replace(worker)

    def _worker_lost(self, worker: _TeacherProcess) -> None:
        self._join(worker)
        if worker.process.exitcode == IMPORTED_AGAIN:
            raise unguarded() from None
        tasks = self._dispatcher.lose(worker.name)
        if worker.crash:
            self.cause_of_loss = worker.crash.summary
            log.debug("%s", worker.crash.traceback)
        name, reason = f"teacher process on {worker.device}", _cause_of_death(worker)
        self._lost.add(name, reason, tasks=tasks, cause=self.cause_of_loss)
        self._replace(worker)

    def _replace(self, worker: _TeacherProcess) -> None:
        """Start another process on the device of a process that has ended, if tasks are waiting."""
        if self._dispatcher.waiting:
            self.start(worker.device)

    def _join(self, worker: _TeacherProcess) -> None:
        self.running.remove(worker)
        worker.pipe.close()
        worker.process.join(END_S)

    def stop(self) -> None:
        """End all processes after they finish the file that they are writing."""
        for worker in self.running:
            with contextlib.suppress(ProcessLookupError):
                worker.process.terminate()
        for worker in list(self.running):
            self._join(worker)
            if worker.process.is_alive():
                worker.process.kill()


def _cause_of_death(worker: _TeacherProcess) -> str:
    code = worker.process.exitcode
    if worker.crash:
        return worker.crash.summary
    return signal.Signals(-code).name if code and code < 0 else f"exit code {code}"


def _run_worker(
    pipe: Connection,
    job: Job,
    config: TeacherConfig,
    num_classes: int | None,
    device: str,
    given: bytes | None,
) -> None:
    """Run one teacher process: take tasks through its pipe, and send reports."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, _exit_on_sigterm)
    one_at_a_time = threading.Lock()  # the writer's thread sends messages too

    def send(kind: str, value: Any) -> None:
        with one_at_a_time:
            pipe.send((kind, value))

    def take_tasks() -> Iterator[LabelTask]:
        while True:
            send("take", None)
            task = pipe.recv()
            if task is None:
                return
            yield task

    forward_messages(partial(send, "message"))
    try:
        teacher = load_same(job, config, num_classes, device, given=pickle.loads(given) if given else None)
        label_shards(job, teacher, take_tasks(), report=partial(send, "report"), finished=partial(send, "finished"))
        send("end", None)
    except DeitCliError as error:
        send("error", error)
    except (BrokenPipeError, EOFError):
        raise SystemExit(1) from None  # the parent is gone
    except Exception as error:  # an unforeseen error; another process may succeed
        with contextlib.suppress(OSError):  # the parent is gone
            send("crash", crash_of(error))
        raise SystemExit(CRASHED) from None
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # only Python's own shutdown is left


def _exit_on_sigterm(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def load_same(
    job: Job, config: TeacherConfig, num_classes: int | None, device: str, *, given: GivenTeacher | None = None
) -> Teacher:
    """Load the teacher of the plan on a device, and return it.

    Raises:
        TeacherError: the loaded teacher differs from the plan's teacher.
    """
    teacher = load_teacher(config, num_classes=num_classes, device=device, given=given)
    if teacher.identity != job.plan.teacher:
        raise TeacherError(
            f"teacher {teacher.identity.name} on {device} is not the teacher that this run began with: its weights may have changed"
        )
    limit(teacher, job.config, job.cores)
    return teacher


def limit(teacher: Teacher, config: PrecomputeConfig, cores: int) -> None:
    """Apply --batch-size (auto: one mix block, halved if memory is too small), and limit the teacher's threads."""
    if config.batch_size != "auto":
        teacher.limit_batch(config.batch_size)
    asked = os.environ.get("OMP_NUM_THREADS", "")
    teacher.limit_threads(min(int(asked), usable_cores()) if asked.isdecimal() else cores)


def load_here(
    config: PrecomputeConfig, asked: TeacherConfig, source: Source | None = None, *, given: GivenTeacher | None = None
) -> tuple[Teacher, Source]:
    """Open the source (unless it is open), load the teacher onto this process's device, log both, and return them."""
    source = source or open_source(config.data, options=config.options)
    log.info("source %s", source.describe())
    rank = rank_from(os.environ)
    devices = plan_devices(asked.device, config.processes, rank)
    teacher = load_teacher(asked, num_classes=source.num_classes, device=devices[0], given=given)
    limit(teacher, config, plan_cores(devices, rank))
    for member in teacher.identity.members:
        log.info(
            "teacher %s: %d classes, sees %d px, %s",
            *(member.name, member.num_classes, member.img_size, weights_text(member.model_dump())),
        )
    return teacher, source
