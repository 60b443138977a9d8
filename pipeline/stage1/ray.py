"""The Ray engine: one actor for each GPU of a cluster; each actor takes label shards as it needs them."""

import logging
import socket
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.errors import DeitCliError, UsageError, WorkerError
from pipeline.machine.progress import Tally, WorkDone
from pipeline.machine.ranks import plan_loaders
from pipeline.repeats import forward_messages, log_forwarded
from pipeline.settings.configs import TeacherConfig
from pipeline.stage1.dispatch import Dispatcher, WorkersLost
from pipeline.stage1.engines import load_same
from pipeline.stage1.loop import Job, LabelTask, label_shards
from pipeline.teacher.teacher import Teacher

log = logging.getLogger("deit_cli.ray_engine")

ANSWER_S = 10  # time for a cluster to answer


def connect_ray(address: str) -> None:
    """Connect this process to a Ray cluster.

    Raises:
        UsageError: Ray is not installed.
        WorkerError: no cluster answers at this address.
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
            f"--address {address}: no Ray cluster answers ({str(error).splitlines()[0]})",
            fix=("Start one with `ray start --head`, or pass --address local to use only this machine"),
        ) from error


def _check_answers(address: str) -> None:
    """Raise OSError if no process listens at HOST:PORT. Ray itself would try for minutes, and then exit the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()


def plan_ray(nodes: Iterable[Mapping[str, float]], device: str, processes: int | None) -> tuple[str, int, int]:
    """Return the device of each worker of a Ray cluster, the number of workers, and the number of cores of each worker.

    Args:
        nodes: resources of each node that is alive, as Ray names them.
        device: requested device; `auto`: every GPU of the cluster (of NVIDIA or AMD), or its cores if it has no GPU.
        processes: requested number of workers.
    """
    nodes = list(nodes)
    with_gpus = [node for node in nodes if node.get("GPU", 0) >= 1]
    if with_gpus and (device == "auto" or device.startswith(("cuda", "xpu"))):
        cores = min(int(node.get("CPU", 1) // node["GPU"]) for node in with_gpus)
        return (
            "xpu" if device.startswith("xpu") else "cuda",
            processes or sum(int(node["GPU"]) for node in with_gpus),
            max(1, cores),
        )
    count = processes or sum(int(node.get("CPU", 0)) for node in nodes)
    return "cpu" if device == "auto" else device, max(1, count), 1


def run_ray(job: Job, teacher: Teacher, processes: int | None, tasks: Sequence[LabelTask], tally: Tally) -> None:
    """Label on all GPUs (or cores) of the cluster of `connect_ray`; other nodes take over the work of a lost node."""
    import ray

    _RayWorkers(ray, job, teacher, processes, tasks).run(tally)


class _RayWorkers:
    """The workers of a cluster, one actor for each GPU. Each takes a label shard when it needs one."""

    def __init__(self, ray: Any, job: Job, teacher: Teacher, processes: int | None, tasks: Sequence[LabelTask]) -> None:
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._device, count, cores = plan_ray(alive, teacher.config.device, processes)
        needs = {"num_gpus": 1} if self._device in ("cuda", "xpu") else {}
        workers = plan_loaders(job.config.workers, cores, self._device)
        self._ray, self._teacher = ray, teacher
        self._job = ray.put(replace(job, cores=cores, workers=workers))
        self._count = min(len(tasks), count)
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            node_id=ray.get_runtime_context().get_node_id(), soft=False
        )  # the run ends with this process, but it must not end with another node
        self._dispatcher = ray.remote(num_cpus=0, scheduling_strategy=here)(_SharedDispatcher).remote(tasks)
        self._actor = ray.remote(max_restarts=0, num_cpus=cores, **needs)(_RayWorker)
        self._running: dict[Any, tuple[str, Any]] = {}  # future of an actor's `run` -> its name, the actor
        self._started = 0
        self._lost = WorkersLost(log, "Ray workers")

    def run(self, tally: Tally) -> None:
        """Start the workers, replace those that are lost, and stop when every task is done or set aside."""
        ray = self._ray
        tally.processes = max(1, self._count)
        try:
            for _ in range(self._count):
                self._start()
            finished = not self._count
            while not finished:
                ended, _ = ray.wait(list(self._running), timeout=1.0)
                for run in ended:
                    self._handle_end(run)
                reports, messages, finished, waiting = ray.get(self._dispatcher.news.remote())
                for report in reports:
                    tally.add(report)
                for message in messages:
                    log_forwarded(message)
                if waiting and len(self._running) < self._count:
                    self._start()
            set_aside = ray.get(self._dispatcher.tasks_set_aside.remote())
        finally:
            for _, actor in self._running.values():
                ray.kill(actor)
        Dispatcher(deque(), set_aside=set_aside).check()

    def _start(self) -> None:
        name = f"{self._started}"
        self._started += 1
        actor = self._actor.remote()
        teacher, shared = self._teacher, self._dispatcher
        run = actor.run.remote(name, self._job, teacher.config, teacher.num_classes_asked, self._device, shared)
        self._running[run] = (name, actor)

    def _handle_end(self, run: Any) -> None:
        """Handle the end of a worker: it raised our error, its node is lost, or no work is left."""
        ray = self._ray
        name, actor = self._running.pop(run)
        try:
            ray.get(run)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, DeitCliError):
                raise error.cause from None
            raise WorkerError(f"a Ray worker failed: {str(error).splitlines()[-1]}") from error
        except ray.exceptions.RayError as error:
            ray.kill(actor)  # its node may only have been unreachable
            tasks = ray.get(self._dispatcher.lose.remote(name))
            self._lost.add(f"Ray worker {name}", type(error).__name__, tasks=tasks, cause=str(error))
            self._start()


class _SharedDispatcher(Dispatcher):
    """The dispatcher as an actor, with the reports and log messages that the driver has not fetched yet."""

    def __init__(self, tasks: Sequence[LabelTask]) -> None:
        super().__init__(deque(tasks))
        self._reports: list[WorkDone] = []
        self._messages: list[logging.LogRecord] = []

    def report(self, report: WorkDone) -> None:
        self._reports.append(report)

    def forward(self, message: logging.LogRecord) -> None:
        self._messages.append(message)

    def tasks_set_aside(self) -> list[LabelTask]:
        return self.set_aside  # an actor has methods, and no fields

    def news(self) -> tuple[list[WorkDone], list[logging.LogRecord], bool, int]:
        """Return new reports, new messages, whether all tasks are finished, and the number of tasks that no worker has."""
        reports, self._reports = self._reports, []
        messages, self._messages = self._messages, []
        return reports, messages, self.finished, len(self.waiting)


class _RayWorker:
    """A teacher process on one node."""

    def run(
        self, name: str, job: Job, config: TeacherConfig, num_classes: int | None, device: str, dispatcher: Any
    ) -> None:
        import ray

        forward_messages(lambda message: dispatcher.forward.remote(message))
        teacher = load_same(job, config, num_classes, device)
        label_shards(
            job,
            teacher,
            iter(lambda: ray.get(dispatcher.take.remote(name)), None),
            report=lambda report: dispatcher.report.remote(report),
            finished=lambda task: ray.get(dispatcher.finish.remote(name, task)),
        )
