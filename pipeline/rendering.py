"""Loader processes: they read a mix block, decode it once for several views, and hand over batches of views."""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from pipeline.decode import decode
from pipeline.errors import DeitCliError
from pipeline.labels import SampleRows
from pipeline.mixing import Mix, MixBatch, draw_mix, draw_pairs, mix_batch
from pipeline.recipe import Recipe
from pipeline.replay import check_image
from pipeline.sources import Source
from pipeline.views import draw_view, render

# Views of a mix block that wait rendered in a worker. Eight DeiT views of 256 images are 308 MB; more views at once
# would save decodes (already an eighth of one per view) and cost memory.
RENDER_BYTES = 320 * 2**20


@dataclass(frozen=True)
class BlockTask:
    """One mix block of one label shard.

    Attributes:
        shard: name of the source shard.
        views: the label shard's block of views.
        rows: int64 [N], usable rows of the mix block.
        samples: the source shard's samples.
    """

    shard: str
    views: range
    rows: NDArray[np.int64]
    samples: SampleRows


@dataclass(frozen=True)
class ViewBatch:
    """One view of one mix block, ready for the teacher.

    Attributes:
        shard: name of the source shard.
        views: the label shard's block of views.
        view: which view this is.
        rows: int64 [B], samples' rows; the two of a pair stand together.
        images: uint8 [B, H, W, 3].
        mix: partners and mixes, by position in the batch.
    """

    shard: str
    views: range
    view: int
    rows: Tensor
    images: Tensor
    mix: MixBatch


class BlockRenderer(IterableDataset[ViewBatch | Exception]):
    """Renders the blocks of a list of tasks; worker w of W takes every W-th, and ends with the error that stops it."""

    def __init__(self, source: Source, recipe: Recipe, tasks: Sequence[BlockTask]) -> None:
        self._source, self._recipe, self._tasks = source, recipe, tasks

    def __iter__(self) -> Iterator[ViewBatch | Exception]:
        worker = get_worker_info()
        start, step = (worker.id, worker.num_workers) if worker else (0, 1)
        try:
            for task in self._tasks[start::step]:
                yield from self._render_task(task)
        except DeitCliError as error:
            yield error

    def _render_task(self, task: BlockTask) -> Iterator[ViewBatch]:
        per_view = len(task.rows) * self._recipe.img_size**2 * 3
        chunk = max(1, RENDER_BYTES // max(1, per_view))
        for start in range(task.views.start, task.views.stop, chunk):
            yield from self._render_views(task, range(start, min(start + chunk, task.views.stop)))

    def _render_views(self, task: BlockTask, views: range) -> Iterator[ViewBatch]:
        """Decode each image of the block once and render it for all `views`."""
        size = self._recipe.img_size
        keys = tuple(task.samples.key[row] for row in task.rows.tolist())
        pairs = [draw_pairs(self._recipe, keys, view) for view in views]
        orders = [flat[flat >= 0] for flat in (pair.ravel() for pair in pairs)]
        slots = [np.argsort(order) for order in orders]
        images = [np.empty((len(keys), size, size, 3), np.uint8) for _ in views]
        shard = self._source.shard(task.shard)
        for position, row in enumerate(task.rows.tolist()):
            sample = shard[row]
            check_image(sample, task.samples, row, shard=task.shard)
            image = decode(sample.image, key=sample.key)
            for i, view in enumerate(views):
                drawn = draw_view(self._recipe, sample.key, view, height=image.shape[0], width=image.shape[1])
                images[i][slots[i][position]] = render(image, drawn)
        for i, view in enumerate(views):
            mix = self._mixes(keys, pairs[i], view)
            rows = torch.from_numpy(task.rows[orders[i]])
            yield ViewBatch(task.shard, task.views, view, rows, torch.from_numpy(images[i]), mix)

    def _mixes(self, keys: tuple[str, ...], pairs: NDArray[np.int64], view: int) -> MixBatch:
        mixes = [draw_mix(self._recipe, keys[a], view) if b >= 0 else Mix() for a, b in pairs.tolist()]
        return mix_batch(paired_positions(pairs), mixes, len(keys))


def paired_positions(pairs: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return where each pair lies in a batch that holds pair after pair; -1 for the partner of a single sample."""
    positions: list[tuple[int, int]] = []
    at = 0
    for second in pairs[:, 1].tolist():
        positions.append((at, at + 1 if second >= 0 else -1))
        at += 2 if second >= 0 else 1
    return positions


def plan_workers(asked: int | None, device: torch.device) -> int:
    """Return how many loader processes to start, and leave the other cores to the threads of a network on the CPU.

    A thread that waits for a core that a loader holds makes the whole forward pass wait, so the two share the cores.
    OMP_NUM_THREADS decides the threads where it is set: float32 results on the CPU depend on it in their last bits.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    on_cpu = device.type == "cpu"
    workers = max(1, cores // 2 if on_cpu else cores - 1) if asked is None else asked
    if on_cpu and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores - workers))
    return workers


def start_loader(
    dataset: Dataset[Any], *, workers: int, sampler: Any = None, pin_memory: bool = False
) -> DataLoader[Any]:
    """Return a loader of ready batches over worker processes; 0 workers renders in this process.

    Workers start from a clean server process (no fork of a process that runs threads), and each uses one thread.
    """
    options: dict[str, Any] = {}
    if workers:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "cv2", "pipeline.rendering"])
        options = {"multiprocessing_context": context, "worker_init_fn": _start_worker, "prefetch_factor": 2}
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


def checked(loader: Iterable[Any]) -> Iterator[Any]:
    """Yield what a loader brings, and raise the errors that its processes sent instead.

    Errors cross processes as values: a DataLoader would wrap a raised one in its worker's traceback.
    """
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


def _as_it_is(batch: Any) -> Any:
    return batch


MapFunction = Callable[[int], Any]


class MappedRange(Dataset[Any]):
    """Position i is `function(i)`: lets worker processes call any picklable function."""

    def __init__(self, function: MapFunction, size: int) -> None:
        self._function, self._size = function, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Any:
        return self._function(index)
