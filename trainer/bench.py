"""`bench stage2`: time the student alone, the stream of batches alone, and both together."""

import contextlib
import copy
import logging
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle, islice
from typing import Any, Literal

import numpy as np
import torch

from pipeline.images.decode import decode, decode_for, image_size
from pipeline.images.samples import Sample
from pipeline.labels.combined import sets_of
from pipeline.labels.encoding import Answers
from pipeline.labels.labelset import LabelSet
from pipeline.labels.replay import check_image
from pipeline.machine.loaders import PREFETCH, one_core
from pipeline.machine.ranks import forward_dtype
from pipeline.machine.threads import usable_cores
from pipeline.machine.timing import DOES_NOT_MATCH, Enough, Work, median_s, steady_s, synchronise
from pipeline.pixels.handover import UnrenderedViews, bytes_for, slot_shape
from pipeline.pixels.render import MOST_IN_A_PART, Pixels, Take, draw_encoded, render_into
from pipeline.text import count
from pipeline.views.recipe import Recipe
from pipeline.views.view import View, draw_view
from trainer.checkpoint import BackgroundWriter
from trainer.config import TrainConfig
from trainer.loop import Run, only_deterministic, update_weights
from trainer.losses import TeacherTarget
from trainer.order import Share
from trainer.pace import Pace, Step
from trainer.parallel import Running, StopRequest, joined_world
from trainer.run import Data
from trainer.stream import Batch, BatchRenderer, Catalogue, ShardTable, on_device, stream_batches

IMAGES = 64  # maximum number of images for timing reading, decoding and rendering
SHARING = 8  # images that share the memory of a batch: a large one has some of what the others do not need
ENDLESS = 10**6  # epochs: more than fit into the time of a measurement
Limit = Literal["student", "stream"]


@dataclass(frozen=True, kw_only=True)
class StreamParts:
    """Seconds that each part of the stream takes for one view, on one core of a loader process.

    Attributes:
        read_s: time to read the encoded image and compare it with the labelled one.
        decode_s: time to decode the image, or the part of it that a single view needs.
        render_s: time to draw the parameters of the view, and to compute its pixels or to hand it over to a GPU.
        plan_s: time to choose the views of a batch and how they are mixed.
        labels_s: time to find the label, including a share of reading the files; None without a label set.
        copy_s: time to copy the view to the GPU, and to render it there if the GPU renders, while nothing else runs; None
            without a GPU.
    """

    read_s: float
    decode_s: float
    render_s: float
    plan_s: float
    labels_s: float | None
    copy_s: float | None


@dataclass(frozen=True, kw_only=True)
class LoopRate:
    """Speed of the training loop when student and stream run together.

    Attributes:
        images_per_s: number of views trained on in a second.
        data_wait: share of the time in which the loop waited for data, 0..1.
        updates: number of updates that were timed.
        elapsed_s: seconds of these updates.
    """

    images_per_s: float
    data_wait: float
    updates: int
    elapsed_s: float


@dataclass(frozen=True, kw_only=True)
class TrainingBench:
    """The parts of stage 2 on one machine.

    Attributes:
        model: name of the student.
        device: `cpu` or `cuda`.
        threads: number of threads of a student on a CPU; None for a GPU.
        cores: number of cores that this process may use.
        loaders: number of loader processes; 0: student and stream take turns in one process.
        views_per_update: number of views that an update is computed from.
        views_per_decode: number of views made from each decoded image.
        on_gpu: whether the GPU renders the views.
        student: views/s of the student with batches in memory.
        stream: views/s of all loader processes together, with nothing using their batches.
        parts: parts of the stream, each alone.
        together: student and stream together.
    """

    model: str
    device: str
    threads: int | None
    cores: int
    loaders: int
    views_per_update: int
    views_per_decode: int
    on_gpu: bool
    student: float
    stream: float
    parts: StreamParts
    together: LoopRate

    @property
    def limit(self) -> Limit:
        """Return the slower part: the student or the stream."""
        return "student" if self.student <= self.stream else "stream"

    @property
    def reachable(self) -> float:
        """Return the views/s of the slower part; if one process does both in turn, their common rate."""
        if self.loaders == 0:
            return 1 / (1 / self.student + 1 / self.stream)
        return min(self.student, self.stream)

    @property
    def loaders_enough(self) -> int:
        """Return the minimum number of loader processes, each on its own core, with which the stream is not the limit."""
        return math.ceil(self.student * max(1, self.loaders) / self.stream)

    @property
    def label_share(self) -> float | None:
        """Return the share of a loader process's time that labels take if the stream is as fast as the student."""
        labels_s = self.parts.labels_s
        return None if labels_s is None else labels_s * self.student / max(1, self.loaders)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: the measurements, and what follows from them."""
        derived = ("limit", "reachable", "loaders_enough", "label_share")
        return asdict(self) | {name: getattr(self, name) for name in derived}

    def table(self) -> str:
        """Return a table with the time of each part, the slowest part, and the sufficient number of loader processes."""
        parts, together, loaders = self.parts, self.together, count(self.loaders, "loader process", "es")
        share = "" if self.label_share is None else f", {100 * self.label_share:.2g} % of a step"
        on = self.device if self.threads is None else f"{self.device}, {count(self.threads, 'thread')}"
        rows = [
            ("read", parts.read_s, "one core"),
            ("decode", parts.decode_s, "one core"),
            ("hand over" if self.on_gpu else "render", parts.render_s, "one core"),
            ("plan and mix", parts.plan_s, "one core"),
            ("labels", parts.labels_s, f"one core{share}"),
            (
                "copy and render" if self.on_gpu else "copy",
                parts.copy_s,
                f"{'on' if self.on_gpu else 'to'} {self.device}, while it computes",
            ),
            ("student", 1 / self.student, on),
        ]
        lines = [f"{'':17}{'us a view':>12}{'views/s':>12}  on"]
        lines += [f"{name:17}{1e6 * s:12,.1f}{1 / s:12,.1f}  {where}" for name, s, where in rows if s is not None]
        if self.views_per_decode > 1:
            lines.append(f"read and decode are shared by the {self.views_per_decode} views of an image")
        update = f"{1000 * self.views_per_update / self.student:,.4g} ms for an update of {count(self.views_per_update, 'view')}"
        of_best = together.images_per_s / self.reachable
        lines += [
            f"{'student alone':29}{self.student:12,.1f}  {on}, {update}",
            f"{'stream alone':29}{self.stream:12,.1f}  {loaders if self.loaders else 'in this process'}",
            f"{'together, measured':29}{together.images_per_s:12,.1f}  {100 * of_best:.0f} % of"
            f" {'the slower of these' if self.loaders else 'both in turn'}, waiting for data"
            f" {100 * together.data_wait:.0f} % of the time",
            self._verdict(),
        ]
        if not 0.5 <= of_best <= 1.2:
            lines.append(DOES_NOT_MATCH)
        return "\n".join(lines)

    def _verdict(self) -> str:
        """Return the slower part, by how much it is slower, and the sufficient number of loader processes."""
        enough = f"{count(self.loaders_enough, 'loader process', 'es')} would be enough"
        if self.loaders == 0:
            return f"student and stream take turns in one process: {enough} (--workers) to keep the student busy"
        if self.limit == "student":
            return f"the student is the limit: the stream could feed {self.stream / self.student:.2f} times as much; {enough}"
        more = f"; this machine has {count(self.cores, 'core')}" if self.loaders_enough > self.cores else ""
        return f"the stream is the limit: the student could take {self.student / self.stream:.2f} times as much; {enough}{more}"


def bench_training(config: TrainConfig, recipe: Recipe | None = None, *, seconds: float) -> TrainingBench:
    """Time student, stream and parts of the stream for about `seconds` each, then the loop for five times as long.

    The run writes into a temporary folder. Ranks that a launcher started are not joined.

    Args:
        config: settings of the run; its output, length and evaluation do not matter.
        recipe: recipe of the views, see `train`.
        seconds: time for each measurement, without the warm-up; at least one update is made, even if it takes longer.
    """
    with opened_run(config, recipe) as run:
        world = run.running.world
        batches = batches_in_memory(run)
        views = sum(len(batch.keys) for batch in batches)
        update_s = steady_s(update_on(run, batches), world.device, seconds)
        return TrainingBench(
            model=config.model,
            device=world.device.type,
            threads=torch.get_num_threads() if world.device.type == "cpu" else None,
            cores=usable_cores(),
            loaders=world.workers,
            views_per_update=views,
            views_per_decode=run.order.repeated_aug,
            on_gpu=run.on_gpu,
            student=views / update_s,
            parts=measure_parts(run, least_s=seconds),
            stream=measure_stream(run, seconds=seconds),
            together=measure_loop(run, seconds=5 * seconds),
        )


@contextlib.contextmanager
def opened_run(config: TrainConfig, recipe: Recipe | None = None) -> Iterator[Run]:
    """Prepare a run that never ends, logs nothing, saves no checkpoint and leaves no file behind."""
    changes: dict[str, Any] = {
        "epochs": ENDLESS,
        "view_policy": "cycle",  # few views must not end it
        "checkpoint_interval": ENDLESS,
        "recovery_interval": 0,
        "eval_data": None,
        "resume": "never",
        "log_tensorboard": False,
        "log_wandb": False,
    }
    with (
        only_deterministic() if config.deterministic else contextlib.nullcontext(),
        joined_world(config.device, config.workers, {}) as world,
        tempfile.TemporaryDirectory() as folder,
        _only_errors(),
    ):
        asked = replace(config, output=os.path.join(folder, "run"), **changes)
        dtype = forward_dtype(config.amp_dtype, world.device)
        running = Running(world=world, dtype=dtype, batch_size=config.batch_size)
        run = Run(asked, recipe, Share(passes=config.grad_accum_steps), running, None)
        with run.begun():
            yield run


@contextlib.contextmanager
def _only_errors() -> Iterator[None]:
    """Log only errors inside the block: messages about the epochs of a timed run are of no use."""
    log = logging.getLogger("deit_cli.train")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def batches_in_memory(run: Run) -> list[Batch]:
    """Return the batches of one update, real views with their labels, on the device of the run."""
    renderer, device = _renderer_of(run), run.running.device
    return [renderer.render_here(number).to(device) for number in range(run.share.passes)]


def update_on(run: Run, batches: list[Batch]) -> Work:
    """Return a function that computes an update as the loop does, always from these batches."""

    def update() -> None:
        run.accumulate(batches)
        update_weights(run.config, run.state, run.state.next_update)

    return update


def measure_stream(run: Run, *, seconds: float) -> float:
    """Return the views/s of the loader processes, and of the GPU if it renders, when nothing uses the batches."""
    workers, device = run.running.world.workers, run.running.device
    turn = max(1, workers)  # batches arrive in bursts, one from each process: count whole bursts
    indices = range(run.order.steps_per_epoch * ENDLESS)
    stream = stream_batches(_renderer_of(run), indices, workers=workers, device=device, unrendered=run.on_gpu)
    batches = on_device(stream, device) if run.on_gpu else stream
    for _ in islice(batches, (PREFETCH + 1) * turn):  # processes start, and fill their queues
        pass
    made, began = 0, time.perf_counter()
    for number, batch in enumerate(batches, 1):
        made += len(batch.keys)
        if number % turn == 0 and time.perf_counter() - began > seconds:
            break
    return made / (time.perf_counter() - began)


def measure_loop(run: Run, *, seconds: float) -> LoopRate:
    """Train for `seconds` after the queues have filled and run empty again; return the measured speed."""
    device = run.running.device
    first = -(-(PREFETCH * run.running.world.workers + 1) // run.share.passes)
    marks: list[tuple[float, Step]] = []

    def progress(step: Step) -> None:
        if not marks and step.made >= first:
            synchronise(device)
            marks.append((time.perf_counter(), step))
        elif marks and step.made > marks[0][1].made and time.perf_counter() - marks[0][0] > seconds:
            synchronise(device)
            marks.append((time.perf_counter(), step))
            raise Enough

    run.pace = Pace(total=run.order.steps_per_epoch * ENDLESS, per_epoch=run.order.steps_per_epoch, progress=progress)
    with contextlib.suppress(Enough), BackgroundWriter() as writer:
        run.train(writer, StopRequest())
    (began, before), (ended, after) = marks
    elapsed_s = ended - began
    return LoopRate(
        images_per_s=(after.images - before.images) / elapsed_s,
        data_wait=min(1.0, (after.waited_s - before.waited_s) / elapsed_s),
        updates=after.made - before.made,
        elapsed_s=elapsed_s,
    )


def measure_parts(run: Run, *, least_s: float) -> StreamParts:
    """Time each part of the stream alone on the first images, for about `least_s` seconds each; return medians."""
    data, views, host = run.data, run.order.views_of_epoch(0), torch.device("cpu")
    catalogue = Catalogue(data.source, data.label_set)
    places = list(islice(_usable(catalogue), IMAGES))
    samples = [_read(catalogue, *place) for place in places]
    decoding = [_decoding(sample, data, views) for sample in samples]
    take = _handing_over(data.recipe, len(views)) if run.on_gpu else _rendering(data.recipe, len(views))
    work: dict[str, Work] = {
        "read_s": lambda: [_read(catalogue, *place) for place in places],
        "decode_s": lambda: [each() for each in decoding],
        "made_s": lambda: [draw_encoded(sample.image, data.recipe, sample.key, views, take) for sample in samples],
    }
    with one_core():
        spent = {name: median_s(each, host, least_s) / len(samples) / len(views) for name, each in work.items()}
        plan_s, find_s = _planning_s(run, least_s)
        sets = sets_of(data.label_set) if data.label_set else ()
        labels_s = find_s + sum(_label_files_s(run, each, least_s) for each in sets) if sets else None
    return StreamParts(
        read_s=spent["read_s"],
        decode_s=spent["decode_s"],
        render_s=max(spent["made_s"] - spent["decode_s"], 0.01 * spent["made_s"]),  # both are noisy
        plan_s=plan_s,
        labels_s=labels_s,
        copy_s=_copy_s(run, least_s),
    )


def _usable(catalogue: Catalogue) -> Iterator[tuple[int, int, ShardTable]]:
    """Yield shard number, row, and samples of the shard for each usable sample."""
    for shard in range(len(catalogue.names)):
        table = catalogue.table(shard)
        for row in table.usable.tolist():
            yield shard, row, table


def _read(catalogue: Catalogue, shard: int, row: int, table: ShardTable) -> Sample:
    sample = catalogue.source.shards[shard][row]
    if table.samples is not None:
        check_image(sample, table.samples, row, shard=catalogue.names[shard])
    return sample


def _decoding(sample: Sample, data: Data, views: range) -> Work:
    """Return a function that decodes an image as the stream does: only the part that its crops need, if there are few."""
    if len(views) > MOST_IN_A_PART or data.label_set is None:
        return lambda: decode(sample.image, key=sample.key)
    height, width = image_size(sample.image, key=sample.key)
    crops = [draw_view(data.recipe, sample.key, view, height=height, width=width).crop for view in views]
    return lambda: decode_for(sample.image, crops, key=sample.key)


def _rendering(recipe: Recipe, num_views: int) -> Take:
    """Return a function that renders the views of an image, always into the same memory."""
    return partial(render_into, list(np.empty((num_views, recipe.img_size, recipe.img_size, 3), np.uint8)))


def _handing_over(recipe: Recipe, num_views: int) -> Take:
    """Return a function that hands the views of an image over, as part of a batch, always in the same memory."""
    memory = torch.empty(bytes_for(SHARING * num_views, recipe.img_size), dtype=torch.uint8)

    def take(image: Pixels, views: Sequence[View]) -> None:
        UnrenderedViews(memory, num_views, recipe.img_size).add(range(num_views), image, views)

    return take


class _Planner(BatchRenderer):
    """A renderer that makes no pixels, and measures the time to find labels."""

    label_s = 0.0

    def _labels_of(self, *args: Any) -> Answers | None:
        with self._timed():
            return super()._labels_of(*args)

    def _target_of(self, *args: Any) -> TeacherTarget | None:
        with self._timed():
            return super()._target_of(*args)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.label_s += time.perf_counter() - began

    def _draw_images(self, *_: Any) -> None:
        pass


def _planning_s(run: Run, least_s: float) -> tuple[float, float]:
    """Return the seconds to choose and mix one view, and the seconds to find its label after files have been read."""
    planner = _renderer_of(run, _Planner)
    out = torch.empty(planner.most, planner.img_size, planner.img_size, 3, dtype=torch.uint8)
    plans, finds = [], []
    began = time.perf_counter()
    for index in cycle(range(min(8, run.order.steps_per_epoch * run.share.passes))):
        planner(index, out, lambda _: None)  # reads what is not in memory yet
        planner.label_s, start = 0.0, time.perf_counter()
        size = len(planner(index, out, lambda _: None).keys)
        took = time.perf_counter() - start
        plans.append((took - planner.label_s) / size)
        finds.append(planner.label_s / size)
        if time.perf_counter() - began > least_s:
            return statistics.median(plans), statistics.median(finds)
    raise AssertionError("a cycle does not end")


def _label_files_s(run: Run, label_set: LabelSet, least_s: float) -> float:
    """Return the seconds of reading label shards, divided over the views of a loader process.

    Every process gets batches from every source shard, so each process reads all labels and uses only its own part. If there
    are more shards than it keeps in memory, it reads them again in each epoch that uses the same views.
    """
    block = label_set.manifest.blocks[0]
    entry = max(
        (entry for entry in label_set.manifest.files if entry.kind == "labels" and entry.view_start == block.start),
        key=lambda entry: entry.rows,
    )

    def read() -> None:
        fresh = copy.copy(label_set)  # has no files in memory: they are read and hashed once for all views
        for view in block:
            fresh.read(entry.shard, view)

    labels = len(label_set.read(entry.shard, block.start)) * len(block)
    again = run.order.repeated_aug if len(label_set.shards) > _renderer_of(run).shards_kept else 1
    return median_s(read, torch.device("cpu"), least_s) / labels * max(1, run.running.world.workers) * again


def _copy_s(run: Run, least_s: float) -> float | None:
    """Return the seconds to copy one view from page-locked memory to a GPU, and to render it there if it renders, while nothing
    else runs; None without a GPU."""
    device = run.running.device
    if device.type == "cpu":
        return None
    renderer = _renderer_of(run)
    out = torch.empty(slot_shape(renderer.most, renderer.img_size, unrendered=run.on_gpu), dtype=torch.uint8)
    batch = renderer(0, out, lambda _: None)
    if device.type == "cuda":
        batch = replace(batch, images=batch.images.pin_memory())
    return median_s(lambda: batch.to(device), device, least_s) / len(batch.keys)


def _renderer_of(run: Run, kind: type[BatchRenderer] = BatchRenderer) -> Any:
    """Return a renderer of the run's batches that has read nothing yet."""
    return kind(Catalogue(run.data.source, run.data.label_set), run.data.recipe, run.order, run.share)
