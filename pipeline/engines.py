"""Who runs the label shards: this process, one process for each GPU, a Ray cluster; and which of them are this rank's.

Every engine hands out label shards one by one, so that fast workers get more of them; a lost worker's go to another.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from pipeline.config import PrecomputeConfig, TeacherConfig
from pipeline.errors import DeitCliError, TeacherError, UsageError, WorkerError
from pipeline.labelling import Job, LabelTask, label_shards
from pipeline.loading import usable_cores
from pipeline.progress import Report, Tally
from pipeline.teacher import Teacher
from pipeline.teacher_loading import load_teacher

log = logging.getLogger("deit_cli.engines")

TRIES = 3  # a label shard that costs so many workers is set aside, and the others are finished
END_S = 10  # that a process gets to end when it is told to
ANSWER_S = 10  # that a Ray cluster gets to answer


# --- which label shards are ours ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rank:
    """Which share of a static split is ours, as launchers say it in the environment.

    Attributes:
        rank: 0 <= rank < world_size.
        local_rank: the same among those on this machine.
        local_world_size: how many of them there are.
        cores: that the launcher gave to this rank alone; None: the ranks of a machine share its cores out.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    cores: int | None = None

    def share(self, tasks: Sequence[LabelTask]) -> list[LabelTask]:
        """Return every world_size-th task, from ours on."""
        return list(tasks[self.rank :: self.world_size])


def rank_from(environment: Mapping[str, str]) -> Rank:
    """Read torchrun's variables, else those of a Slurm job array and of srun.

    Raises:
        UsageError: they are not numbers, or contradict each other.
    """

    def number(name: str, default: int) -> int:
        value = environment.get(name) or f"{default}"
        try:
            return int(value)
        except ValueError:
            raise UsageError(f"{name} must be a whole number, got {value!r}") from None

    cores = None
    if "RANK" in environment or "WORLD_SIZE" in environment:
        rank, size = number("RANK", 0), number("WORLD_SIZE", 1)
        local, locals_ = number("LOCAL_RANK", 0), number("LOCAL_WORLD_SIZE", 1)
    else:
        first, step = number("SLURM_ARRAY_TASK_MIN", 0), max(1, number("SLURM_ARRAY_TASK_STEP", 1))
        rank, size = (number("SLURM_ARRAY_TASK_ID", first) - first) // step, number("SLURM_ARRAY_TASK_COUNT", 1)
        local, locals_ = 0, 1
        if "SLURM_STEP_ID" in environment or "SLURM_STEPID" in environment:  # started by srun, not by sbatch
            tasks = number("SLURM_NTASKS", 1)
            rank, size = rank * tasks + number("SLURM_PROCID", 0), size * tasks
            local, locals_ = number("SLURM_LOCALID", 0), number("SLURM_NTASKS_PER_NODE", 1)
            cores = number("SLURM_CPUS_PER_TASK", 0) or None
    if not 0 <= rank < size or not 0 <= local < max(locals_, local + 1):
        raise UsageError(f"the launcher says rank {rank} of {size}: it must be in 0..{size - 1}")
    return Rank(rank, size, local, locals_, cores)


# --- devices --------------------------------------------------------------------------------------------------


def plan_devices(device: str, processes: int | None, rank: Rank) -> list[str]:
    """Return one torch device for each teacher process of this machine.

    Args:
        device: what was asked; `auto` is every visible GPU, or the CPU.
        processes: how many were asked; None is one for each GPU, or one, which uses all cores, on a CPU.
        rank: several ranks on one machine share its GPUs out.
    """
    if device == "auto" and torch.cuda.is_available():
        visible = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        if rank.local_world_size > 1 and len(visible) > 1:
            visible = visible[rank.local_rank % len(visible) :: rank.local_world_size]
        return [visible[i % len(visible)] for i in range(processes or len(visible))]
    return ["cpu" if device == "auto" else device] * (processes or 1)


def plan_cores(devices: Sequence[str], rank: Rank) -> int:
    """Return how many cores each teacher process of this machine may count as its own."""
    ours = min(usable_cores(), rank.cores) if rank.cores else usable_cores() // rank.local_world_size
    return max(1, ours // len(devices))


def plan_loaders(asked: int | None, cores: int, device: str) -> int:
    """Return how many loader processes a teacher process starts: all its cores but one, or half on a CPU.

    On a CPU the teacher has a thread for each core too: whichever is slower, teacher or rendering, then gets them.
    """
    return max(1, cores // 2 if device == "cpu" else cores - 1) if asked is None else asked


# --- handing out ----------------------------------------------------------------------------------------------


@dataclass
class Dispatcher:
    """Hands out label shards, and knows who has which.

    Attributes:
        waiting: tasks that nobody has; those that were lost come last.
        taken: worker to the tasks that it has.
        losses: how many workers each task has cost.
        set_aside: tasks that cost too many.
        gone: workers that were given up. One that wakes up again gets nothing more; what it finishes is whole all the same.
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

    def check(self) -> None:
        """Raise WorkerError if tasks were set aside."""
        if self.set_aside:
            names = ", ".join(f"{t.shard} views {t.views.start}:{t.views.stop}" for t in self.set_aside[:8])
            raise WorkerError(
                f"{len(self.set_aside)} label shards were set aside after {TRIES} workers were lost over each: {names}."
                " Everything else is complete. Look for an image that needs much memory; the same command tries again"
            )


# --- this machine ---------------------------------------------------------------------------------------------


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
    dispatcher.check()


@dataclass
class _Worker:
    """A process, our end of its pipe, and its device."""

    name: str
    device: str
    process: Any
    pipe: Connection


class _Crew:
    """The teacher processes of this machine. They are asked nothing: each takes a task when it needs one."""

    def __init__(self, job: Job, teacher: Teacher, dispatcher: Dispatcher) -> None:
        self._job, self._teacher, self._dispatcher = job, teacher, dispatcher
        self._context = multiprocessing.get_context("spawn")
        self._started = self._stillborn = 0
        self.workers: list[_Worker] = []

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
        elif kind == "error":
            raise value
        elif kind == "end":
            self._part(worker)
            if self._dispatcher.waiting:  # given back by a worker that was lost meanwhile
                self.start(worker.device)

    def _mourn(self, worker: _Worker) -> None:
        """A worker is lost: another takes its place, as long as there is work."""
        self._part(worker)
        had = self._dispatcher.lose(worker.name)
        code = worker.process.exitcode
        log.warning(
            "teacher process on %s was lost (%s): its %d label shards go to another",
            *(worker.device, signal.Signals(-code).name if code and code < 0 else f"exit code {code}", had),
        )
        self._stillborn += not had
        if self._stillborn >= TRIES:
            raise WorkerError(
                f"{TRIES} teacher processes died before they took any work. Killed for memory? Use fewer --processes"
            )
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


def _work(pipe: Connection, job: Job, config: TeacherConfig, num_classes: int | None, device: str) -> None:
    """One teacher process: takes tasks through its pipe, and says what became of them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, _leave)
    try:
        teacher = load_same(job, config, num_classes, device)

        def take() -> Iterator[LabelTask]:
            while True:
                pipe.send(("take", None))
                task = pipe.recv()
                if task is None:
                    return
                yield task

        label_shards(
            job,
            teacher,
            take(),
            tell=lambda report: pipe.send(("report", report)),
            finish=lambda task: pipe.send(("finish", task)),
        )
        pipe.send(("end", None))
    except DeitCliError as error:
        pipe.send(("error", error))
    except (BrokenPipeError, EOFError):
        raise SystemExit(1) from None  # the parent is gone
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
    teacher.limit_threads(int(asked) if asked.isdecimal() else cores)


# --- a Ray cluster --------------------------------------------------------------------------------------------


def connect_ray(address: str) -> None:
    """Connect this process to a Ray cluster.

    Raises:
        UsageError: Ray is not installed.
        WorkerError: no cluster answers there.
    """
    try:
        import ray
    except ImportError:
        raise UsageError("--engine ray needs Ray: pip install 'deit-cli[ray]'") from None
    try:
        _check_answers(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, ignore_reinit_error=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise WorkerError(
            f"--address {address}: no Ray cluster answers ({str(error).splitlines()[0]}). Start one with"
            " `ray start --head`, or pass --address local for a Ray of this machine alone"
        ) from error


def _check_answers(address: str) -> None:
    """Raise OSError if nothing listens at HOST:PORT. Ray itself would try for minutes, and then exit the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()


def plan_ray(nodes: Iterable[Mapping[str, float]], device: str, processes: int | None) -> tuple[str, int, int]:
    """Return the device of each worker of a Ray cluster, how many workers, and the cores of each.

    Args:
        nodes: resources of each node that is alive, as Ray names them.
        device: what was asked; `auto` is every GPU of the cluster, or its cores where it has none.
        processes: how many workers were asked.
    """
    nodes = list(nodes)
    with_gpus = [node for node in nodes if node.get("GPU", 0) >= 1]
    if with_gpus and (device == "auto" or device.startswith("cuda")):
        cores = min(int(node.get("CPU", 1) // node["GPU"]) for node in with_gpus)
        return "cuda", processes or sum(int(node["GPU"]) for node in with_gpus), max(1, cores)
    count = processes or sum(int(node.get("CPU", 0)) for node in nodes)
    return "cpu" if device == "auto" else device, max(1, count), 1


def run_ray(job: Job, teacher: Teacher, processes: int | None, tasks: Sequence[LabelTask], tally: Tally) -> None:
    """Label on all GPUs of the cluster that `connect_ray` found, or on its cores; a lost node's work goes elsewhere."""
    import ray

    _RayCrew(ray, job, teacher, processes, tasks).run(tally)


class _RayCrew:
    """Actors, one for each GPU, that take their tasks from one dispatcher."""

    def __init__(self, ray: Any, job: Job, teacher: Teacher, processes: int | None, tasks: Sequence[LabelTask]) -> None:
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._device, count, cores = plan_ray(alive, teacher.config.device, processes)
        needs = {"num_gpus": 1} if self._device == "cuda" else {}
        workers = plan_loaders(job.config.workers, cores, self._device)
        self._ray, self._teacher = ray, teacher
        self._job = ray.put(replace(job, cores=cores, workers=workers))
        self._count = min(len(tasks), count)
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            node_id=ray.get_runtime_context().get_node_id(), soft=False
        )  # with this process the run ends, but it must not end with another node
        self._desk = ray.remote(num_cpus=0, scheduling_strategy=here)(_RayDesk).remote(tasks)
        self._actor = ray.remote(max_restarts=0, num_cpus=cores, **needs)(_RayWorker)
        self._running: dict[Any, tuple[str, Any]] = {}
        self._started = self._stillborn = 0

    def run(self, tally: Tally) -> None:
        """Start the actors, replace those that are lost, and stop when every task is done or set aside."""
        ray = self._ray
        tally.processes = max(1, self._count)
        try:
            for _ in range(self._count):
                self._start()
            finished = not self._count
            while not finished:
                ended, _ = ray.wait(list(self._running), timeout=1.0)
                for run in ended:
                    self._end(run)
                reports, finished, waiting = ray.get(self._desk.news.remote())
                for report in reports:
                    tally.add(report)
                if waiting and len(self._running) < self._count:
                    self._start()
            set_aside = ray.get(self._desk.set_aside.remote())
        finally:
            for _, actor in self._running.values():
                ray.kill(actor)
        Dispatcher(deque(), set_aside=set_aside).check()

    def _start(self) -> None:
        name = f"{self._started}"
        self._started += 1
        actor = self._actor.remote()
        teacher = self._teacher
        run = actor.run.remote(name, self._job, teacher.config, teacher.num_classes_asked, self._device, self._desk)
        self._running[run] = (name, actor)

    def _end(self, run: Any) -> None:
        """An actor has ended: with an error of ours, because its node is lost, or because nothing is left to do."""
        ray = self._ray
        name, actor = self._running.pop(run)
        try:
            ray.get(run)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, DeitCliError):
                raise error.cause from None
            raise WorkerError(f"a Ray worker failed: {str(error).splitlines()[-1]}") from error
        except ray.exceptions.RayError as error:
            ray.kill(actor)  # it may only have been out of reach
            had = ray.get(self._desk.lose.remote(name))
            log.warning(
                "Ray worker %s was lost (%s): its %d label shards go to another", name, type(error).__name__, had
            )
            self._stillborn += not had
            if self._stillborn >= TRIES:
                raise WorkerError(f"{TRIES} Ray workers died before they took any work: {error}") from error
            self._start()


class _RayDesk:
    """The dispatcher as an actor, and the reports that the driver has not yet heard."""

    def __init__(self, tasks: Sequence[LabelTask]) -> None:
        self._dispatcher = Dispatcher(deque(tasks))
        self._reports: list[Report] = []

    def take(self, worker: str) -> LabelTask | None:
        return self._dispatcher.take(worker)

    def finish(self, worker: str, task: LabelTask) -> None:
        self._dispatcher.finish(worker, task)

    def lose(self, worker: str) -> int:
        return self._dispatcher.lose(worker)

    def report(self, report: Report) -> None:
        self._reports.append(report)

    def set_aside(self) -> list[LabelTask]:
        return self._dispatcher.set_aside

    def news(self) -> tuple[list[Report], bool, int]:
        reports, self._reports = self._reports, []
        return reports, self._dispatcher.finished, len(self._dispatcher.waiting)


class _RayWorker:
    """A teacher process on some node."""

    def run(self, name: str, job: Job, config: TeacherConfig, num_classes: int | None, device: str, desk: Any) -> None:
        import ray

        teacher = load_same(job, config, num_classes, device)
        tasks = iter(lambda: ray.get(desk.take.remote(name)), None)
        label_shards(
            job,
            teacher,
            tasks,
            tell=lambda report: desk.report.remote(report),
            finish=lambda task: ray.get(desk.finish.remote(name, task)),
        )
