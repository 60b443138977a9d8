"""Training on several ranks: joining them, computing together, and stopping after the same update."""

import contextlib
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.errors import UsageError, WorkerError
from pipeline.machine.loaders import plan_workers
from pipeline.machine.ranks import Rank, accelerator, plan_cores, plan_devices, rank_from, resolve_device
from trainer.student import Heads, Student

# How long a rank waits for the others. Evaluation, compilation or a slow file system may delay a rank; torch's default of
# ten minutes was too short for a first step that is compiled.
TIMEOUT = timedelta(minutes=30)
_LOST = ("Connection closed by peer", "Connection reset", "Broken pipe", "Timed out", "NCCL", "gloo", "ProcessGroup")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
STORE_KEY = "deit_cli/store"  # address of the store of the last start, in the store of torchrun's agents
POLL_S = 1.0


@dataclass(frozen=True)
class World:
    """The ranks of a run, and the resources of this one.

    Attributes:
        rank: 0 <= rank < size; rank 0 writes the run's files.
        size: number of ranks.
        device: device of this rank.
        workers: number of loader processes of this rank.
    """

    rank: int
    size: int
    device: torch.device
    workers: int

    @property
    def leads(self) -> bool:
        """Return True if this rank writes files and log lines."""
        return self.rank == 0

    def total(self, counts: Tensor) -> Tensor:
        """Return the sum over all ranks of an int64 or float64 tensor on the CPU."""
        if self.size == 1:
            return counts
        summed = counts.to(self.device)
        dist.all_reduce(summed)
        return summed.cpu()

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over all ranks of float values on this rank's device."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, by rank; a value is any object that can be pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def check_same(self, value: Any, what: str) -> None:
        """Raise UsageError on every rank unless all ranks have the same value."""
        values = self.gather(value)
        if other := next((rank for rank, each in enumerate(values) if each != values[0]), None):
            raise UsageError(
                f"all ranks must have the same {what}: rank 0 has {values[0]!r}, rank {other} {values[other]!r}"
            )

    def share_buffers(self, module: nn.Module) -> None:
        """Copy the buffers of rank 0, such as batch norm statistics, to every rank."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)


def device_of(device: str, rank: Rank) -> str:
    """Return the device of a rank; `cuda` or `xpu` without a number means the rank's own GPU, as `auto` does."""
    own = device == accelerator()
    return plan_devices("auto" if own else device, None, rank)[0]


@contextlib.contextmanager
def joined_world(device: str, workers: int | None, environment: Mapping[str, str] = os.environ) -> Iterator[World]:
    """Join the other ranks that torchrun or srun started, if there are any, and leave them at the end.

    Args:
        device: requested device; `auto`: the GPU of this rank, or the CPU.
        workers: number of loader processes for each rank; None: by the number of cores of the rank.
        environment: variables in which launchers pass rank and address.

    Raises:
        UsageError: the launcher's variables contradict each other.
    """
    rank = rank_from(environment, arrays=False)
    where = resolve_device(device_of(device, rank))
    if rank.world_size == 1:
        yield World(0, 1, where, plan_workers(workers, where))
        return
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]:
        raise UsageError(
            f"{rank.world_size} ranks were started, but {' and '.join(missing)} are not set: use torchrun,"
            " or export both before srun"
        )
    if where.type == "mps":
        raise UsageError(
            f"{rank.world_size} ranks cannot share Apple's GPU", fix="Start one process, or pass --device cpu"
        )
    if where.type != "cpu":
        torch.get_device_module(where).set_device(where)
    backend = dist.get_default_backend_for_device(where)  # nccl for cuda, xccl for xpu, gloo for cpu
    try:
        store = _store_of_this_start(rank.rank, environment)
        dist.init_process_group(backend, store=store, rank=rank.rank, world_size=rank.world_size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:  # torch raises RuntimeError for network errors
        where_to = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
        raise WorkerError(
            f"rank {rank.rank} of {rank.world_size} cannot connect to the others at {where_to}:"
            f" {' '.join(str(error).split())[:200]}",
            fix=(
                "Set MASTER_ADDR and MASTER_PORT to a machine and a free port that all ranks can reach, or use torchrun"
            ),
        ) from error
    try:
        cores = plan_cores([str(where)], rank)
        yield World(rank.rank, rank.world_size, where, plan_workers(workers, where, cores))
    finally:
        dist.destroy_process_group()


def _store_of_this_start(rank: int, environment: Mapping[str, str]) -> dist.Store | None:
    """Return a new store that the ranks of one start share, if torchrun may start them again; else None, torch makes one.

    Without it torchrun's agents keep one store for all starts, and ranks that were started again find in it the addresses of
    those that are gone (pytorch/pytorch#135712; with torch 2.14 they hang or fail). Rank 0 writes the address of the new
    store into the agents' store. The process of an older address has ended, so nobody answers there.
    """
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or environment.get("TORCHELASTIC_MAX_RESTARTS") == "0":
        return None
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    agents = dist.TCPStore(host, port, is_master=False, timeout=TIMEOUT)
    if rank == 0:
        with socket.create_connection((host, port)) as line:
            # The address of this machine on the way to the agents, or theirs if they are on this machine.
            own, theirs = line.getsockname()[0], line.getpeername()[0]
        host = host if own == theirs else own
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        agents.set(STORE_KEY, f"{host} {store.port}")
        return store
    end = time.monotonic() + TIMEOUT.total_seconds()
    while True:
        host, port = agents.get(STORE_KEY).decode().split()
        try:
            socket.create_connection((host, int(port)), timeout=POLL_S).close()
            return dist.TCPStore(host, int(port), is_master=False, timeout=TIMEOUT)
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(POLL_S)


class OnRank(nn.Module):
    """The student of this rank for forward passes, compiled and wrapped with DDP as needed.

    Gradients are averaged over the ranks in the backward pass, except inside `accumulating`.
    """

    def __init__(self, student: Student, world: World, *, compiled: bool, unused: bool) -> None:
        """Wrap a student.

        Args:
            student: student on the device of `world`.
            world: ranks of the run.
            compiled: whether to compile the student with torch.compile.
            unused: whether some parameters get no gradient.
        """
        super().__init__()
        answering = _Answers(student)
        self._call: Any = torch.compile(answering) if compiled else answering
        if world.size > 1:
            # Looking for unused parameters keeps the order in which gradients are summed. Otherwise DDP would change it
            # after the first step, and a resumed run could differ in the last bits from one that went on. On a GPU,
            # equal bits are promised only with --deterministic, and the search would cost time.
            exact = world.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
            warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")  # on purpose
            devices = None if world.device.type == "cpu" else [world.device]
            self._call = DistributedDataParallel(self._call, device_ids=devices, find_unused_parameters=unused or exact)

    def forward(self, images: Tensor) -> Heads:
        """Return the logits of both heads for normalised images, float [B, 3, H, W]."""
        return Heads(*self._call(images))

    def accumulating(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which backward passes add up gradients on this rank only."""
        return self._call.no_sync() if isinstance(self._call, DistributedDataParallel) else contextlib.nullcontext()


class _Answers(nn.Module):
    """The student's two answers as a tuple, which DDP and torch.compile can inspect."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        heads = self.student(images)
        return heads.class_logits, heads.distill_logits


class Consensus:
    """An agreement of the ranks to stop after the same update, even if a signal reaches them at different times.

    In every update, each rank sends whether a signal asked it to stop, and reads the result of the previous update. That
    result has arrived by then, so no rank waits for it.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        # Communicate through the CPU, so that the GPU's queue does not have to run empty.
        self._group: Any = dist.new_group(backend="gloo", timeout=TIMEOUT) if world.size > 1 else None
        self._sent: tuple[Tensor, Any] | None = None

    def stops(self, asked: bool) -> bool:
        """Send whether this rank was asked to stop; return whether all ranks stop now."""
        if self._world.size == 1:
            return asked
        answer = False
        if self._sent is not None:
            any_asked, work = self._sent
            work.wait()
            answer = bool(any_asked)
        any_asked = torch.tensor([int(asked)])
        self._sent = (any_asked, dist.all_reduce(any_asked, dist.ReduceOp.MAX, group=self._group, async_op=True))
        return answer


@contextlib.contextmanager
def lost_ranks_named(world: World) -> Iterator[None]:
    """Turn the communication library's error about a lost rank into a one-line error."""
    try:
        yield
    except (dist.DistBackendError, dist.DistNetworkError, RuntimeError) as error:
        text = " ".join(str(error).split())
        if world.size == 1 or not any(mark in text for mark in _LOST):
            raise
        raise WorkerError(
            f"rank {world.rank} of {world.size} has lost another rank ({text[:160]})",
            fix="Start all ranks again with --resume auto: the run continues from its last checkpoint",
        ) from error


class StopRequest:
    """A request to stop the run, made by a signal.

    Attributes:
        signal: first signal that was received; None: no request.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Treat Ctrl-C and SIGTERM (which Slurm sends before it ends a job) as a request to stop.

    A second Ctrl-C stops the process at once, as usual: the last checkpoint is kept. A second SIGTERM changes nothing,
    because schedulers repeat it. Outside the main thread, signals are not caught.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {each: signal.getsignal(each) for each in SIGNALS}

    def note(number: int, _: FrameType | None) -> None:
        if request.signal is None:
            request.signal = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    for each in SIGNALS:
        signal.signal(each, note)
    try:
        yield request
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@dataclass(frozen=True, kw_only=True)
class Running:
    """Settings for running networks: the ranks and their devices, dtype of the forward pass, views in a batch."""

    world: World
    dtype: torch.dtype
    batch_size: int

    @property
    def device(self) -> torch.device:
        """Return the device of this rank."""
        return self.world.device
