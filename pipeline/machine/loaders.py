"""Loader processes: they take work, return what they made of it, and a lost one becomes a named error.

`in_processes` calls a function for each item. `SlotStream` does the same for a function that renders batches: their images
lie in shared memory, and only the rest of a batch is sent from process to process.
"""

import contextlib
import io
import itertools
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerProcess
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from pipeline.errors import DeitCliError, LoaderLostError, WorkerError
from pipeline.machine.ranks import plan_loaders
from pipeline.machine.scripts import IMPORTED_AGAIN, unguarded
from pipeline.machine.threads import usable_cores
from pipeline.repeats import MessagePipe, forward_messages

# A batch that takes longer than this never comes: a process hangs, or a network file system does.
TIMEOUT_S = 900
# How often to check that the loaders are alive. They are not children of this process, so no signal tells when one ends.
LOOK_S = 5
GRACE_S = (
    4  # how long loaders may finish what they have begun when nobody wants it any more; a DataLoader joins each for 5 s
)
PREFETCH = 2  # number of items that each process works ahead
SHARED_MEMORY = Path("/dev/shm")  # where Linux keeps it; elsewhere it has no limit of its own
_NOTE_BYTES = 256

Note = Callable[[str], None]  # records the image that a process works on; the error for a lost process names it
Item = TypeVar("Item")
Made = TypeVar("Made")


class Imaged(Protocol):
    """A batch of images: a frozen dataclass with its pixels in `images`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def images(self) -> Tensor:
        """Return uint8 [B, ...]."""
        ...


AnyBatch = TypeVar("AnyBatch", bound=Imaged)


def in_processes(work: Callable[[Item, Note], Made], items: Iterable[Item], *, workers: int) -> Iterator[Made]:
    """Yield `work(item, note)` for each item, in order.

    Args:
        work: function that loader processes call; it is pickled once for each. It calls `note` with each image that it begins.
        items: inputs, read one by one shortly before they are needed; item i goes to process i modulo `workers`.
        workers: number of loader processes; 0: the work is done in this process.

    Raises:
        DeitCliError: `work` raised it; the earlier results have been yielded.
        LoaderLostError: a process was lost or hangs; the error names the images that the processes worked on.
    """
    whereabouts = _Whereabouts(workers)
    with MessagePipe() as messages:
        start = partial(_start_worker, messages)
        loader = _start_loader(_Work(work, whereabouts), items, workers=workers, module=_module_of(work), start=start)
        yield from _checked(loader, whereabouts)


class SlotStream(Generic[AnyBatch]):
    """Batches that loader processes render into shared memory, which is used over and over.

    The images of a batch stay valid until the caller has asked for more than `held` further batches; then they are overwritten.
    For a GPU, the pages of the memory stay locked as long as the stream or the images of a batch exist.
    """

    def __init__(
        self,
        render: Callable[[Any, Tensor, Note], AnyBatch],
        items: Iterable[Any],
        shape: tuple[int, ...],
        *,
        workers: int,
        held: int,
        device: torch.device | None = None,
    ) -> None:
        """Allocate the shared memory; the processes start when the first batch is asked for.

        Args:
            render: `render(item, out, note)` writes the images of a batch into the first rows of `out`, uint8 of `shape`, and
                returns the batch with these rows as its `images`. Called in loader processes, as `work` of `in_processes`.
            items: one for each batch; None gives the process whose turn it is nothing to do.
            shape: shape of the images of the largest batch.
            workers: loader processes; 0: in this one.
            held: batches that the caller may hold while it asks for another one: those that it uses, and those that a
                device has yet to copy.
            device: device to which the caller copies batches; None: the caller copies nothing.

        Raises:
            WorkerError: there is not enough shared memory.
        """
        self._render, self._items, self._workers = render, items, workers
        self._slots = Slots(shape, workers=workers, held=held)
        if device is not None and device.type == "cuda":
            self._slots.pin(device)

    def __iter__(self) -> Iterator[AnyBatch]:
        """Yield the batch of each item, in order; raise as `in_processes` does."""
        pixels = self._slots.pixels
        work, numbered = _IntoSlot(self._render, pixels), self._slots.number(self._items)
        for rendered in in_processes(work, numbered, workers=self._workers):
            if rendered is not None:
                slot, size, batch = rendered
                yield replace(pickle.loads(batch), images=pixels[slot, :size])


class _IntoSlot:
    """Function that renders into the slot of an item and returns the slot, the number of images and the rest of the batch."""

    def __init__(self, render: Callable[[Any, Tensor, Note], Imaged], pixels: Tensor) -> None:
        self.render, self._pixels = render, pixels

    def __call__(self, numbered: tuple[int, Any] | None, note: Note) -> tuple[int, int, bytes] | None:
        if numbered is None:
            return None
        slot, item = numbered
        batch = self.render(item, self._pixels[slot], note)
        rest = io.BytesIO()
        _ArrayPickler(rest, pickle.HIGHEST_PROTOCOL).dump(replace(batch, images=torch.empty(0)))
        return slot, len(batch.images), rest.getvalue()


class _ArrayPickler(pickle.Pickler):
    """Pickler that writes tensors as arrays: torch would open a shared memory file for each tensor sent to another process."""

    def reducer_override(self, obj: Any) -> Any:
        return (torch.from_numpy, (obj.numpy(),)) if isinstance(obj, Tensor) else NotImplemented


class Slots:
    """Reused shared memory for the images of batches.

    New memory costs a page fault for every 4 kB, both in the process that writes and in the process that reads: together a
    quarter of the rendering time.

    Attributes:
        pixels: uint8 [slots, *shape]; ordinary memory if there are no loader processes.
    """

    def __init__(self, shape: tuple[int, ...], *, workers: int, held: int) -> None:
        """Allocate memory for batches of at most this shape.

        Args:
            shape: shape of the images of one batch.
            workers: loader processes.
            held: batches whose images the caller may hold while it asks for another one.

        Raises:
            WorkerError: there is not enough shared memory; writing to it would kill a process without a message.
        """
        # Work on item i begins when item i - workers * PREFETCH is yielded; the caller then still holds `held` earlier items.
        whole = (workers * PREFETCH + held + 1, *shape)
        self.pixels = _shared_pixels(*whole) if workers else torch.empty(whole, dtype=torch.uint8)

    def number(self, items: Iterable[Any]) -> Iterator[tuple[int, Any] | None]:
        """Yield each item with its slot, using the slots in turn; None (a turn without an item) takes no slot."""
        turns = itertools.cycle(range(len(self.pixels)))
        for item in items:
            yield None if item is None else (next(turns), item)

    def pin(self, device: torch.device) -> None:
        """Lock the pages of the memory for this process, so that a GPU can copy from them while it computes.

        Raises:
            RuntimeError: CUDA refused.
        """
        cudart: Any = torch.cuda.cudart()
        with torch.cuda.device(device):  # otherwise CUDA would allocate memory on the first GPU
            torch.cuda.check_error(cudart.cudaHostRegister(self.pixels.data_ptr(), self.pixels.nbytes, 0))
        # The pages must be unlocked before the memory is freed.
        weakref.finalize(self.pixels, _unpin, self.pixels.data_ptr(), device)


def _unpin(address: int, device: torch.device) -> None:
    with contextlib.suppress(RuntimeError), torch.cuda.device(device):  # a GPU that has failed takes no call
        torch.cuda.cudart().cudaHostUnregister(address)  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]


def _shared_pixels(*shape: int) -> Tensor:
    """Return an uninitialised uint8 tensor in shared memory; each page is allocated when it is first written."""
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else math.inf
    if math.prod(shape) > free:
        raise WorkerError(
            f"loader processes need {math.prod(shape) / 1e6:,.0f} MB of shared memory, {SHARED_MEMORY} has"
            f" {free / 1e6:,.0f} MB: use fewer --workers, or enlarge it (docker run --shm-size)"
        )
    storage = torch.UntypedStorage._new_shared(math.prod(shape), device="cpu")  # as torch's default_collate does
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)  # pyright: ignore[reportCallIssue, reportArgumentType]


class _Whereabouts:
    """A board in shared memory that names the image on which each loader process works: a lost process leaves its image there."""

    def __init__(self, workers: int) -> None:
        self._notes = torch.zeros(max(1, workers), _NOTE_BYTES, dtype=torch.uint8).share_memory_()

    def note(self, what: str) -> None:
        """Write down what this process works on now."""
        worker = get_worker_info()
        text = f"{os.getpid()} {what}".encode()[:_NOTE_BYTES].ljust(_NOTE_BYTES, b"\0")
        self._notes[worker.id if worker else 0].numpy()[:] = memoryview(text)

    def of(self, pids: Iterable[int]) -> list[str]:
        """Return what these processes wrote down last; without pids, what all processes wrote."""
        lines = [bytes(note.tolist()).rstrip(b"\0").decode(errors="replace") for note in self._notes]
        notes = {int(pid): what for pid, _, what in (line.partition(" ") for line in lines if line)}
        wanted = set(pids) or set(notes)
        return [what for pid, what in notes.items() if pid in wanted]


def plan_workers(asked: int | None, device: torch.device, cores: int | None = None) -> int:
    """Return the number of loader processes to start; a network on the CPU gets the other cores for its threads.

    If a thread of the network waits for a core that a loader uses, the whole forward pass waits, so each gets its own cores.
    OMP_NUM_THREADS, if set, decides the number of threads: the last bits of float32 results on the CPU depend on it.

    Args:
        asked: how many the user wants; None: as many as there are cores for.
        device: device of the network.
        cores: number of cores for this process; None: all cores that it may use.
    """
    cores = cores or usable_cores()
    workers = plan_loaders(asked, cores, device.type)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores - workers))
    return workers


class _Work(Dataset[Any]):
    """Dataset whose items come from the sampler; its values are results of a function, or errors that it raised."""

    def __init__(self, work: Callable[[Any, Note], Any], whereabouts: _Whereabouts) -> None:
        self._work, self._whereabouts = work, whereabouts

    def __getitem__(self, item: Any) -> Any:
        try:
            return self._work(item, self._whereabouts.note)
        except DeitCliError as error:  # returned, not raised: a DataLoader would wrap it in the traceback of its worker
            return error


def _module_of(work: Callable[..., Any]) -> str:
    """Return the name of the module that defines a function, or the class of a callable object."""
    if isinstance(work, _IntoSlot):
        return _module_of(work.render)
    return _module_of(work.func) if isinstance(work, partial) else work.__module__


def _start_loader(
    work: Dataset[Any], items: Iterable[Any], *, workers: int, module: str, start: Callable[[int], None]
) -> DataLoader[Any]:
    """Return a loader that uses worker processes; with 0 workers it loads in this process.

    Workers are forked from a clean server process, which runs no threads and has imported the module of the work. Each
    worker uses one thread. Item i goes to worker i modulo the number of workers, and results come in order.
    """
    options: dict[str, Any] = {}
    if workers:
        prepare_loaders(module)
        options = {
            "multiprocessing_context": multiprocessing.get_context("forkserver"),
            "worker_init_fn": start,
            "prefetch_factor": PREFETCH,
            "timeout": LOOK_S,
        }
    with _any_number_of_processes():
        return DataLoader(
            work,
            batch_size=None,
            sampler=items,
            num_workers=workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # separate, so that loading never changes the global random state
            **options,
        )


def _checked(loader: Iterable[Any], whereabouts: _Whereabouts) -> Iterator[Any]:
    """Yield the results of a loader, and raise the errors that its processes returned.

    Raises:
        LoaderLostError: a process was lost or hangs; the error names the images that the processes worked on.
    """
    with _any_number_of_processes():
        results = iter(loader)
    try:
        while True:
            try:
                result = _next(results, whereabouts)
            except StopIteration:
                return
            if isinstance(result, Exception):
                raise result
            yield result
    finally:
        result = None  # an error must not keep itself, and so all that its traceback refers to
        _end(results)


def _end(results: Iterator[Any]) -> None:
    """End the processes of a DataLoader now.

    It ends them itself when nothing refers to it any more, but an error's traceback does. If the garbage collector comes upon
    it, it may close their queues first, and then they wait for work forever: SIGTERM is blocked.
    """
    processes = [process for process in getattr(results, "_workers", ()) if process.is_alive()]
    if not processes or sys.is_finalizing():  # then they have been killed, see `_kill_loaders`
        return
    last = threading.Timer(GRACE_S, lambda: [process.kill() for process in processes])
    last.start()
    try:
        results._shutdown_workers()  # pyright: ignore[reportAttributeAccessIssue]
    finally:
        last.cancel()


@contextlib.contextmanager
def _any_number_of_processes() -> Iterator[None]:
    """Silence the DataLoader warning about more processes than cores: the user or `plan_workers` chose the number."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        yield


def _next(results: Iterator[Any], whereabouts: _Whereabouts) -> Any:
    """Return the next result; fail once no process has begun another image for TIMEOUT_S seconds.

    A DataLoader that timed out can be asked again without losing a result.
    """
    began, seen = time.monotonic(), None
    while True:
        try:
            return next(results)
        except Exception as error:
            if str(error).startswith("Caught "):  # by a loader
                error.__traceback__ = None  # torch's frames say nothing of it, and there it refers to itself
                raise
            if not (isinstance(error, RuntimeError) and str(error).startswith("DataLoader ")):
                raise
            if any(process.exitcode == IMPORTED_AGAIN for process in getattr(results, "_workers", ())):
                raise unguarded() from None  # and not with what torch says of it
            if (now := whereabouts.of(())) != seen:
                began, seen = time.monotonic(), now
            if "timed out" not in str(error) or time.monotonic() - began > TIMEOUT_S:
                for process in getattr(results, "_workers", ()):  # one that hangs is deaf to a DataLoader's SIGTERM
                    process.kill()
                raise _lost(error, whereabouts) from error


def _lost(error: RuntimeError, whereabouts: _Whereabouts) -> LoaderLostError:
    first = str(error).splitlines()[0]
    pids = [int(pid) for listed in re.findall(r"pid\S* ([\d, ]+)", first) for pid in re.findall(r"\d+", listed)]
    notes = whereabouts.of(pids)
    hangs = "timed out" in first
    return LoaderLostError(
        (f"no batch came for {TIMEOUT_S} s" if hangs else f"a loader process was lost ({first})")
        + (f", at {', '.join(notes[:8])}" if notes else ""),
        fix="Killed for memory? Use fewer --workers, or enlarge /dev/shm",
    )


def prepare_loaders(module: str) -> None:
    """Start the server that forks loaders. Its imports take seconds: called early, they go on while this process does other work.

    Args:
        module: name of the module that defines the work of the loaders.
    """
    preload = ["pipeline.machine.server", __name__, *({module} - {"__main__"})]
    multiprocessing.get_context("forkserver").set_forkserver_preload(preload)
    _start_server()


def _start_server() -> None:
    """Start the server that forks loaders, with SIGINT and SIGTERM blocked.

    A scheduler or Ctrl-C sends these signals to every process of a job. This process decides when to stop, and the loaders
    end with it.
    """
    _kill_loaders_at_the_end_of(os.getpid())
    resource_tracker.ensure_running()  # first, because it unblocks both signals when it starts its process
    # A new program and its forks inherit blocked signals, even if a DataLoader sets handlers in them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@lru_cache
def _kill_loaders_at_the_end_of(_: int) -> None:
    """Arrange, once for each process, that its loaders are killed when it ends."""
    Finalize(None, _kill_loaders, exitpriority=0)


def _kill_loaders() -> None:
    """Kill the loaders that still run when this process ends: Python would send them SIGTERM and wait forever.

    It runs just before Python would do that; in a process that multiprocessing started, this is before `atexit`.
    """
    for process in multiprocessing.active_children():
        if isinstance(process, ForkServerProcess):
            process.kill()


def _start_worker(messages: MessagePipe, _: int) -> None:
    torch.set_num_threads(1)
    forward_messages(messages.send)
    threading.Thread(target=_end_with_parent, daemon=True).start()


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Use one thread in this process, as a loader process does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _end_with_parent() -> None:
    """End this loader when its parent ends.

    A killed parent cannot end its loaders, which are children of the server that forked them.
    """
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _as_it_is(batch: Any) -> Any:
    return batch
