"""Loader processes: work for them in, ready batches out, and a named error when one of them is lost."""

import contextlib
import itertools
import logging
import math
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from pipeline.errors import WorkerError
from pipeline.machine.threads import usable_cores
from pipeline.repeats import FirstOfEachKind

# A batch that takes longer than this will not come any more: a process hangs, or a network file system does.
TIMEOUT_S = 900
# How often to look whether a loader still lives. They are not children of this process, so no signal tells of their end.
LOOK_S = 5
PREFETCH = 2  # items that each process is ahead
SHARED_MEMORY = Path("/dev/shm")  # where Linux keeps it; elsewhere it has no limit of its own
_NOTE_BYTES = 256


class Slots:
    """Shared memory for the images of batches, used over and over.

    Fresh memory costs a page fault every 4 kB, in the process that writes and in the one that reads: a quarter of the
    time that rendering takes.

    Attributes:
        pixels: uint8 [slots, *shape]; without loader processes it is plain memory.
    """

    def __init__(self, shape: tuple[int, ...], *, workers: int, held: int) -> None:
        """Take memory for batches of at most this shape.

        Args:
            shape: of the images of one batch.
            workers: loader processes.
            held: batches whose images the caller may hold while it asks for another one.

        Raises:
            WorkerError: there is not enough shared memory; to write there would kill a process without a word.
        """
        # Item i is begun when item i - workers * PREFETCH is handed out; the caller then holds `held` that came before it.
        whole = (workers * PREFETCH + held + 1, *shape)
        self.pixels = _shared_pixels(*whole) if workers else torch.empty(whole, dtype=torch.uint8)

    def number(self, items: Iterable[Any]) -> Iterator[tuple[int, Any] | None]:
        """Give items the slots in turn; None, a turn without an item, takes none."""
        turns = itertools.cycle(range(len(self.pixels)))
        for item in items:
            yield None if item is None else (next(turns), item)

    def pin(self) -> None:
        """Lock the pages of the memory for this process, so that a GPU copies from them beside its work.

        Raises:
            RuntimeError: CUDA refused.
        """
        cudart: Any = torch.cuda.cudart()
        torch.cuda.check_error(cudart.cudaHostRegister(self.pixels.data_ptr(), self.pixels.nbytes, 0))
        # Before the memory goes, its pages must be given back.
        weakref.finalize(self.pixels, cudart.cudaHostUnregister, self.pixels.data_ptr())


def _shared_pixels(*shape: int) -> Tensor:
    """Return an uninitialised uint8 tensor in shared memory, whose pages come when they are written to."""
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else math.inf
    if math.prod(shape) > free:
        raise WorkerError(
            f"loader processes need {math.prod(shape) / 1e6:,.0f} MB of shared memory, {SHARED_MEMORY} has"
            f" {free / 1e6:,.0f} MB: use fewer --workers, or enlarge it (docker run --shm-size)"
        )
    storage = torch.UntypedStorage._new_shared(math.prod(shape), device="cpu")  # as torch's default_collate does
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)  # pyright: ignore[reportCallIssue, reportArgumentType]


class Whereabouts:
    """What each loader process is at, in shared memory: so that the image at which one was lost can be named."""

    def __init__(self, workers: int) -> None:
        self._notes = torch.zeros(max(1, workers), _NOTE_BYTES, dtype=torch.uint8).share_memory_()

    def note(self, what: str) -> None:
        """Say what this process is at now."""
        worker = get_worker_info()
        text = f"{os.getpid()} {what}".encode()[:_NOTE_BYTES].ljust(_NOTE_BYTES, b"\0")
        self._notes[worker.id if worker else 0].numpy()[:] = memoryview(text)

    def of(self, pids: Iterable[int]) -> list[str]:
        """Return what these processes said last; of all processes, if there are no pids."""
        lines = [bytes(note.tolist()).rstrip(b"\0").decode(errors="replace") for note in self._notes]
        notes = {int(pid): what for pid, _, what in (line.partition(" ") for line in lines if line)}
        wanted = set(pids) or set(notes)
        return [what for pid, what in notes.items() if pid in wanted]


def plan_workers(asked: int | None, device: torch.device, cores: int | None = None) -> int:
    """Return how many loader processes to start, and leave the other cores to the threads of a network on the CPU.

    A thread that waits for a core that a loader holds makes the whole forward pass wait, so the two share the cores.
    OMP_NUM_THREADS decides the threads where it is set: float32 results on the CPU depend on it in their last bits.

    Args:
        asked: how many the user wants; None: as many as there are cores for.
        device: of the network.
        cores: of this process; None: all that it may use.
    """
    cores = cores or usable_cores()
    on_cpu = device.type == "cpu"
    workers = max(1, cores // 2 if on_cpu else cores - 1) if asked is None else asked
    if on_cpu and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores - workers))
    return workers


def start_loader(
    dataset: Dataset[Any], *, workers: int, sampler: Any = None, pin_memory: bool = False
) -> DataLoader[Any]:
    """Return a loader of ready batches over worker processes; 0 workers loads in this process.

    Workers start from a clean server process (no fork of a process that runs threads), and each uses one thread.
    Item i of the sampler goes to worker i modulo their number, and results come in the order of the sampler.
    """
    options: dict[str, Any] = {}
    if workers:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "cv2", "pipeline.stage1.rendering"])
        _start_server()
        options = {
            "multiprocessing_context": context,
            "worker_init_fn": _start_worker,
            "prefetch_factor": PREFETCH,
            "timeout": LOOK_S,
        }
    with _any_number_of_processes():
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # its own, so that loading never moves the global random state
            **options,
        )


def checked(loader: Iterable[Any], whereabouts: Whereabouts | None = None) -> Iterator[Any]:
    """Yield what a loader brings, and raise the errors that its processes sent instead.

    Errors cross processes as values: a DataLoader would wrap a raised one in its worker's traceback.

    Raises:
        WorkerError: a process was lost, or hangs; it names the images that they were at.
    """
    with _any_number_of_processes():
        batches = iter(loader)
    while True:
        try:
            batch = _next(batches, whereabouts)
        except StopIteration:
            return
        if isinstance(batch, Exception):
            raise batch
        yield batch


@contextlib.contextmanager
def _any_number_of_processes() -> Iterator[None]:
    """A DataLoader warns of more processes than cores; how many there are is the user's choice, or ours."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        yield


def _next(batches: Iterator[Any], whereabouts: Whereabouts | None) -> Any:
    """Wait for a batch until for TIMEOUT_S no process has come to another image.

    A DataLoader that timed out may be asked again, and loses nothing.
    """
    began, seen = time.monotonic(), None
    while True:
        try:
            return next(batches)
        except RuntimeError as error:
            if "DataLoader" not in str(error):
                raise
            if whereabouts and (now := whereabouts.of(())) != seen:
                began, seen = time.monotonic(), now
            if "timed out" not in str(error) or time.monotonic() - began > TIMEOUT_S:
                raise _lost(error, whereabouts) from error


def _lost(error: RuntimeError, whereabouts: Whereabouts | None) -> WorkerError:
    first = str(error).splitlines()[0]
    pids = [int(pid) for listed in re.findall(r"pid\S* ([\d, ]+)", first) for pid in re.findall(r"\d+", listed)]
    notes = whereabouts.of(pids) if whereabouts else []
    hangs = "timed out" in first
    return WorkerError(
        (f"no batch came for {TIMEOUT_S} s" if hangs else f"a loader process was lost ({first})")
        + (f", at {', '.join(notes[:8])}" if notes else "")
        + ". Killed for memory? Use fewer --workers, or enlarge /dev/shm; the same command continues (train: with --resume)"
    )


def _start_server() -> None:
    """Start the server that forks loaders, deaf to the signals that a scheduler or Ctrl-C sends to every process of a job.

    This process then decides when to stop, and loaders end with it. Only the main thread may say so.
    """
    _kill_loaders_at_the_end_of(os.getpid())
    if threading.current_thread() is not threading.main_thread():
        return
    # What is ignored stays ignored in a new program.
    before = {each: signal.signal(each, signal.SIG_IGN) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        forkserver.ensure_running()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@lru_cache
def _kill_loaders_at_the_end_of(_: int) -> None:
    """Once for each process."""
    Finalize(None, _kill_loaders, exitpriority=0)


def _kill_loaders() -> None:
    """End loaders that are left when this process ends: Python would send them SIGTERM, and wait for ever.

    It runs where Python would do that, which in a process of multiprocessing's own is before `atexit`.
    """
    for process in multiprocessing.active_children():
        if isinstance(process, ForkServerProcess):
            process.kill()


def _start_worker(_: int) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C goes to every process of a terminal
        signal.signal(each, signal.SIG_IGN)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    if logging.lastResort is not None:  # what shows the warnings of a process whose messages nobody arranged
        logging.lastResort.addFilter(FirstOfEachKind())
    threading.Thread(target=_end_with_parent, daemon=True).start()


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Let this process work as a loader process does: with one thread."""
    before, before_cv2 = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        cv2.setNumThreads(before_cv2)


def _end_with_parent() -> None:
    """A killed process cannot end its loaders, and they are children of the server that forked them, not its own."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _as_it_is(batch: Any) -> Any:
    return batch


MapFunction = Callable[[Any], Any]


class Mapped(Dataset[Any]):
    """Item i is `function(i)`: lets worker processes call any picklable function on what a sampler gives, or a range."""

    def __init__(self, function: MapFunction, size: int = 0) -> None:
        self._function, self._size = function, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: Any) -> Any:
        return self._function(index)
