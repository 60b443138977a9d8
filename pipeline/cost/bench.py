"""`bench stage1`: measure the speed of each part of labelling alone, and of all parts together in a real run."""

import contextlib
import os
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.cost.rates import Rates, measure_rates
from pipeline.cost.reach import LIMITS, Machine, ReachableRates, plan_machine, reachable_rates
from pipeline.errors import SourceError
from pipeline.images.samples import ShardIndex, SourceShard
from pipeline.images.source import Source
from pipeline.machine.progress import Tick
from pipeline.machine.timing import DOES_NOT_MATCH, Enough
from pipeline.pixels.handover import renders_on_gpu
from pipeline.settings.configs import MAX_VIEW, BenchConfig, PrecomputeConfig, TeacherConfig
from pipeline.stage1.engines import load_here
from pipeline.stage1.loop import AHEAD
from pipeline.stage1.plan import choose_topk
from pipeline.stage1.precompute import precompute
from pipeline.teacher.teacher import Teacher
from pipeline.text import count
from pipeline.views.recipe import Recipe

FILLING = AHEAD + 2  # number of answers after which the queues of a run are full
MANY_VIEWS = 50_000  # number of views of each image, more than can be made in the measured time


@dataclass(frozen=True, kw_only=True)
class LabellingBench:
    """The parts of stage 1 on one machine, each measured alone and all together.

    Attributes:
        rates: seconds of each part alone.
        together: progress of a run of all parts in the measured time.
        machine: devices, processes and cores that are used.
        reachable: rates that this machine can reach.
    """

    rates: Rates
    together: Tick
    machine: Machine
    reachable: ReachableRates

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        together = self.together.to_dict()
        del together["left_s"]  # the run stops when the time is up, so this has no meaning
        found = {"parts": asdict(self.rates), "together": together, "reachable": asdict(self.reachable)}
        return found | {"limit": self.reachable.limit} | asdict(self.machine)

    def table(self) -> str:
        """Return the time of each part of stage 1 as text for people."""
        rates, together, machine, reachable = self.rates, self.together, self.machine, self.reachable
        shared, device, threads = machine.views_per_decode, machine.device, machine.threads
        parts = [
            ("read", rates.read_s / shared, "one core"),
            ("decode", rates.decode_s / shared, "one core"),
            ("hand over" if rates.device_render_s else "render", rates.render_s, "one core"),
            ("copy", rates.copy_s, "in memory; not needed here" if threads else f"to one {device}, while it computes"),
            ("teacher", rates.teacher_s, f"one {device}" + (f", {count(threads, 'thread')}" if threads else "")),
            ("top-k", rates.topk_s, f"one {device}"),
            ("write", rates.write_s, "one core"),
        ]
        if rates.device_render_s:
            parts[3:4] = [("copy and render", rates.device_render_s, f"one {device}")]
        lines = [f"{'':17}{'us a view':>12}{'views/s':>12}  on"]
        lines += [f"{name:17}{1e6 * s:12,.1f}{1 / s if s else 0:12,.1f}  {where}" for name, s, where in parts]
        of_best = together.per_second / reachable.together
        share = together.teacher_busy
        busy = "" if share is None else f", teacher busy {100 * share:.0f} % of the time"
        lines += [
            f"read and decode are shared by the {shared} views of an image" if shared > 1 else "",
            f"{'teacher alone':29}{reachable.teacher:12,.1f}  {machine.devices} x {device}",
            f"{'rendering alone':29}{reachable.rendering:12,.1f}  {count(machine.loaders, 'loader process', 'es')}",
            f"{'both on these cores':29}{reachable.cores:12,.1f}  {count(machine.cores, 'core')}" if threads else "",
            f"{'together, measured':29}{together.per_second:12,.1f}  {100 * of_best:.0f} % of the slowest of these{busy}",
            LIMITS[reachable.limit],
        ]
        if not 0.5 <= of_best <= 1.2:
            lines.append(DOES_NOT_MATCH)
        return "\n".join(line for line in lines if line)


def bench_labelling(
    config: PrecomputeConfig, teacher_config: TeacherConfig, recipe: Recipe, asked: BenchConfig
) -> LabellingBench:
    """Time each part of stage 1 alone on the first images, then all parts together for five times as long; return both."""
    teacher, source = load_here(config, teacher_config)
    topk = choose_topk(config.topk, teacher.identity.num_classes)
    on_gpu = renders_on_gpu(config.render, recipe, teacher.device)
    rates = measure_rates(
        source, recipe, teacher, topk=topk, precision=config.precision, least_s=asked.seconds, on_gpu=on_gpu
    )
    images = min(asked.images, max(2, int(0.5 / rates.answer_s)))  # for at least two answers per second
    together = measure_run(source, recipe, teacher, config, num_images=images, seconds=5 * asked.seconds)
    machine = plan_machine(config, teacher)
    return LabellingBench(rates=rates, together=together, machine=machine, reachable=reachable_rates(rates, machine))


def measure_run(
    source: Source, recipe: Recipe, teacher: Teacher, config: PrecomputeConfig, *, num_images: int, seconds: float
) -> Tick:
    """Run stage 1 on the first images into a temporary folder for some seconds, and return its progress.

    Time and views are counted after all queues are full, so that the start of processes is not included.
    """
    shard = next((shard for shard in source.shards if len(shard)), None)
    if shard is None:
        raise SourceError(f"{source.location} holds no image")
    head = replace(source, shards=(Head(shard, num_images),))
    ticks: list[tuple[float, Tick]] = []

    def progress(tick: Tick) -> None:
        if tick.phase == "label" and tick.made:
            ticks.append((time.monotonic(), tick))
            if len(ticks) > FILLING and ticks[-1][0] - ticks[FILLING - 1][0] > seconds:
                raise Enough

    start, stop = config.views
    changes: dict[str, Any] = {
        "views": (start, min(MAX_VIEW, start + MANY_VIEWS)),  # enough views for few images
        "views_per_shard": min(config.views_per_shard, stop - start),
        "on_bad_image": "skip",
        "accuracy_samples": 0,
        "min_teacher_accuracy": 0,
    }
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Enough):
        precompute(
            replace(config, out=os.path.join(folder, "labels"), **changes), recipe, teacher, head, progress=progress
        )
    (began, first), (ended, last) = ticks[min(FILLING, len(ticks)) - 1], ticks[-1]
    busy = None
    if first.teacher_busy is not None and last.teacher_busy is not None and ended > began:
        busy = (last.teacher_busy * last.elapsed_s - first.teacher_busy * first.elapsed_s) / (ended - began)
        busy = min(busy, 1.0)  # the first counted answers were computed before
    return replace(last, made=last.made - first.made, elapsed_s=ended - began, teacher_busy=busy)


class Head(SourceShard[Any]):
    """The first samples of a source shard."""

    def __init__(self, shard: SourceShard[Any], num_samples: int) -> None:
        self.name, self._shard, self._num_samples = shard.name, shard, num_samples
        self.place_type = shard.place_type  # pyright: ignore[reportAttributeAccessIssue]

    def build_index(self) -> ShardIndex[Any]:
        """Return the index of the first samples only."""
        index, stop = self._shard.index, self._num_samples
        return ShardIndex(index.keys[:stop], index.class_labels[:stop], index.places[:stop])

    def read_image(self, position: int) -> bytes:
        """Read an image as the shard does."""
        return self._shard.read_image(position)
