"""The local engine: label shards in this process, or in one process for each device, which take them as they need them."""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

from pipeline.crash import CRASHED, Crash, crash_of
from pipeline.errors import DeitCliError, TeacherError, WorkerError
from pipeline.images.source import Source, open_source
from pipeline.machine.progress import Tally
from pipeline.machine.ranks import plan_cores, plan_devices, rank_from
from pipeline.machine.threads import usable_cores
from pipeline.repeats import forward_messages, log_forwarded, warn_counted
from pipeline.settings.configs import PrecomputeConfig, TeacherConfig
from pipeline.stage1.dispatch import TRIES, Dispatcher
from pipeline.stage1.loop import Job, LabelTask, label_shards
from pipeline.teacher.loading import load_teacher
from pipeline.teacher.teacher import Teacher

log = logging.getLogger("deit_cli.engines")

END_S = 10  # that a process gets to end when it is told to


def run_here(job: Job, teacher: Teacher, tasks: Sequence[LabelTask], tally: Tally) -> None:
    """Label in this process."""
    label_shards(job, teacher, tasks, tell=tally.add)


def run_processes(job: Job, teacher: Teacher, devices: Sequence[str], tasks: Sequence[LabelTask], tally: Tally) -> None:
    """Label in one process for each device; one that dies is replaced, and its label shards go to the others."""
    dispatcher = Dispatcher(deque(tasks))
    crew = _Crew(job, teacher, dispatcher)
    try:
        for device in devices:
            crew.start(device)
        while crew.workers:
            for worker in crew.ready():
                crew.serve(worker, tally)
    finally:
        crew.stop()
    dispatcher.check(crew.cause)


@dataclass
class _Worker:
    """A process, our end of its pipe, and its device."""

    name: str
    device: str
    process: Any
    pipe: Connection
    crash: Crash | None = None  # what it died of, where it could say so


class _Crew:
    """The teacher processes of this machine. They are asked nothing: each takes a task when it needs one."""

    def __init__(self, job: Job, teacher: Teacher, dispatcher: Dispatcher) -> None:
        self._job, self._teacher, self._dispatcher = job, teacher, dispatcher
        self._context = multiprocessing.get_context("spawn")
        self._started = self._stillborn = 0
        self.workers: list[_Worker] = []
        self.cause: str | None = None  # of the last loss, where the process could say it

    def start(self, device: str) -> None:
        """Start one process."""
        ours, theirs = self._context.Pipe()
        teacher = self._teacher
        process = self._context.Process(
            target=_work,
            args=(theirs, self._job, teacher.config, teacher.num_classes_asked, device),
            name=f"teacher-{self._started} on {device}",
        )
        process.start()
        theirs.close()
        self.workers.append(_Worker(f"{self._started}", device, process, ours))
        self._started += 1

    def ready(self) -> list[_Worker]:
        """Wait for workers that have something to say, or whose pipe has closed."""
        pipes = {worker.pipe: worker for worker in self.workers}
        return [pipes[pipe] for pipe in wait(list(pipes)) if isinstance(pipe, Connection)]

    def serve(self, worker: _Worker, tally: Tally) -> None:
        """Answer one message of a worker."""
        try:
            kind, value = worker.pipe.recv()
            if kind == "take":
                worker.pipe.send(self._dispatcher.take(worker.name))
        except (EOFError, ConnectionError, OSError):
            self._mourn(worker)
            return
        if kind == "report":
            tally.add(value)
        elif kind == "finish":
            self._dispatcher.finish(worker.name, value)
        elif kind == "message":
            log_forwarded(value)
        elif kind == "error":
            raise value
        elif kind == "crash":
            worker.crash = value
        elif kind == "end":
            self._part(worker)
            if self._dispatcher.waiting:  # given back by a worker that was lost meanwhile
                self.start(worker.device)

    def _mourn(self, worker: _Worker) -> None:
        """A worker is lost: another takes its place, as long as there is work."""
        self._part(worker)
        had = self._dispatcher.lose(worker.name)
        if worker.crash:
            self.cause = worker.crash.summary
            log.debug("%s", worker.crash.traceback)
        warn_counted(
            log,
            "lost teacher processes",
            "teacher process on %s was lost (%s): its %d label shards go to another",
            *(worker.device, _death_of(worker), had),
        )
        self._stillborn += not had
        if self._stillborn >= TRIES:
            why = f"The last of {self.cause}" if self.cause else "Killed for memory? Use fewer --processes"
            raise WorkerError(f"{TRIES} teacher processes died before they took any work. {why}")
        if self._dispatcher.waiting:
            self.start(worker.device)

    def _part(self, worker: _Worker) -> None:
        self.workers.remove(worker)
        worker.pipe.close()
        worker.process.join(END_S)

    def stop(self) -> None:
        """End all processes: they finish the file that they are writing."""
        for worker in self.workers:
            with contextlib.suppress(ProcessLookupError):
                worker.process.terminate()
        for worker in list(self.workers):
            self._part(worker)
            if worker.process.is_alive():
                worker.process.kill()


def _death_of(worker: _Worker) -> str:
    """Return what a lost process died of."""
    code = worker.process.exitcode
    if worker.crash:
        return worker.crash.summary
    return signal.Signals(-code).name if code and code < 0 else f"exit code {code}"


def _work(pipe: Connection, job: Job, config: TeacherConfig, num_classes: int | None, device: str) -> None:
    """One teacher process: takes tasks through its pipe, and says what became of them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, _leave)
    one_at_a_time = threading.Lock()  # the writer's thread has messages too

    def send(kind: str, value: Any) -> None:
        with one_at_a_time:
            pipe.send((kind, value))

    forward_messages(partial(send, "message"))
    try:
        teacher = load_same(job, config, num_classes, device)

        def take() -> Iterator[LabelTask]:
            while True:
                send("take", None)
                task = pipe.recv()
                if task is None:
                    return
                yield task

        label_shards(
            job,
            teacher,
            take(),
            tell=partial(send, "report"),
            finish=partial(send, "finish"),
        )
        send("end", None)
    except DeitCliError as error:
        send("error", error)
    except (BrokenPipeError, EOFError):
        raise SystemExit(1) from None  # the parent is gone
    except Exception as error:  # nobody foresaw it; another process may fare better
        with contextlib.suppress(OSError):  # the parent is gone
            send("crash", crash_of(error))
        raise SystemExit(CRASHED) from None
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what is left is Python's own end


def _leave(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def load_same(job: Job, config: TeacherConfig, num_classes: int | None, device: str) -> Teacher:
    """Load the teacher of the plan on a device.

    Raises:
        TeacherError: what is found under its name now is another one.
    """
    teacher = load_teacher(config, num_classes=num_classes, device=device)
    if teacher.identity != job.plan.teacher:
        raise TeacherError(
            f"teacher {teacher.identity.name} on {device} is not the one that this run began with: did its weights change?"
        )
    limit(teacher, job.config, job.cores)
    return teacher


def limit(teacher: Teacher, config: PrecomputeConfig, cores: int) -> None:
    """Apply --batch-size (auto: what a mix block holds, halved when memory does not suffice), and share the cores out."""
    if config.batch_size != "auto":
        teacher.limit_batch(config.batch_size)
    asked = os.environ.get("OMP_NUM_THREADS", "")
    teacher.limit_threads(min(int(asked), usable_cores()) if asked.isdecimal() else cores)


def load_here(config: PrecomputeConfig, asked: TeacherConfig) -> tuple[Teacher, Source]:
    """Open the source, load the teacher that labels it onto this process's device, and say what they are."""
    source = open_source(config.data)
    log.info("source %s", source.describe())
    rank = rank_from(os.environ)
    devices = plan_devices(asked.device, config.processes, rank)
    teacher = load_teacher(asked, num_classes=source.num_classes, device=devices[0])
    limit(teacher, config, plan_cores(devices, rank))
    for member in teacher.identity.members:
        log.info(
            "teacher %s: %d classes, sees %d px, weights %s",
            *(member.name, member.num_classes, member.img_size, member.weights_sha256[:12]),
        )
    return teacher, source
