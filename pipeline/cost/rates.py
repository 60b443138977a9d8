"""Seconds that each part of labelling takes alone on this machine, for `estimate` and `bench stage1`."""

import io
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.errors import BadImageError, SourceError, UsageError
from pipeline.images.decode import decode
from pipeline.images.samples import Sample
from pipeline.images.source import Source
from pipeline.labels.encoding import codec_of
from pipeline.labels.format import Precision
from pipeline.labels.tables import LabelsFooter, write_labels
from pipeline.machine.ranks import forward_dtype, ran_out_of_memory
from pipeline.machine.timing import median_s
from pipeline.pixels.handover import UnrenderedViews, slot_shape
from pipeline.pixels.render import draw_decoded, render_view
from pipeline.teacher.teacher import CPU_BATCH, Teacher, one_thread
from pipeline.views.mixing import mix_batch
from pipeline.views.pairs import draw_mix
from pipeline.views.recipe import Recipe

IMAGES = 64  # maximum number of images for timing reading, decoding and rendering
GPU_BATCH = 256
WRITTEN = (8, 1000)  # views and rows of the label shard for timing the writer


@dataclass(frozen=True)
class Rates:
    """Seconds that each part takes: on one core, or on one device.

    Attributes:
        read_s: seconds to read one encoded image, on one core.
        decode_s: seconds to decode one image, on one core.
        render_s: seconds to draw one view of a decoded image, and to render it or to hand it over, on one core.
        copy_s: seconds to copy one view to the device.
        teacher_s: seconds to mix and normalise one view and run the teacher on it.
        topk_s: seconds to turn the logits of one view into an answer on the host.
        write_s: seconds to write one label, on one core.
        device_render_s: seconds to copy one view to the device and render it there; 0 if the cores render.
    """

    read_s: float
    decode_s: float
    render_s: float
    copy_s: float
    teacher_s: float
    topk_s: float
    write_s: float
    device_render_s: float = 0.0

    def view_s(self, views_per_decode: int) -> float:
        """Return the seconds that one core takes to make one view, if `views_per_decode` views come from one decode."""
        return (self.read_s + self.decode_s) / views_per_decode + self.render_s

    @property
    def answer_s(self) -> float:
        """Seconds that one device takes to label one view; copies run at the same time."""
        return self.teacher_s + self.topk_s + self.device_render_s


def measure_rates(
    source: Source,
    recipe: Recipe,
    teacher: Teacher,
    *,
    topk: int,
    precision: Precision,
    least_s: float = 1.0,
    on_gpu: bool = False,
) -> Rates:
    """Time each part alone, for about `least_s` seconds each, and return medians; `on_gpu`: the teacher's device renders.

    Raises:
        SourceError: no image can be decoded.
    """
    places, samples, images = _first_images(source, least_s)

    def views(number: int) -> list[np.ndarray]:
        keyed = zip(images, samples, strict=True)
        return [render_view(image, recipe, sample.key, number) for image, sample in keyed]

    def handed_over(number: int) -> Tensor:
        batch = UnrenderedViews(memory, len(samples), recipe.img_size)
        for at, (image, sample) in enumerate(zip(images, samples, strict=True)):
            draw_decoded(image, recipe, sample.key, range(number, number + 1), partial(batch.add, [at]))
        return batch.images

    rendered = np.stack(views(0))
    numbers = itertools.count()
    memory = torch.empty(slot_shape(len(samples), recipe.img_size, unrendered=True), dtype=torch.uint8)
    with torch.inference_mode(), one_thread(teacher.device):
        answer_s = _answer_s(rendered, recipe, teacher, topk, least_s)
        batch = CPU_BATCH if teacher.device.type == "cpu" else GPU_BATCH
        pixels = _filled(rendered, batch, teacher.device)
        logits = [
            torch.randn(batch, teacher.identity.num_classes, device=teacher.device)
            for _ in range(len(teacher.networks))
        ]
        timed = {
            "read_s": (lambda: [shard[row] for shard, row in places], len(places)),
            "decode_s": (lambda: [decode(sample.image, key=sample.key) for sample in samples], len(samples)),
            "render_s": (lambda: (handed_over if on_gpu else views)(next(numbers)), len(samples)),
            "copy_s": (lambda: pixels.to(teacher.device, copy=True), batch),
            "topk_s": (lambda: [column.cpu() for column in teacher.top_classes(logits, topk)], batch),
            "write_s": (_writing(teacher.identity.num_classes, topk, precision), WRITTEN[0] * WRITTEN[1]),
        }
        if on_gpu:
            batch_of_views = _pinned(handed_over(0).clone(), teacher.device)
            timed["device_render_s"] = (lambda: teacher.rendered(batch_of_views, len(samples)), len(samples))
        seconds = {name: median_s(work, teacher.device, least_s) / count for name, (work, count) in timed.items()}
    beside = seconds["topk_s"] + (0 if teacher.device.type == "cpu" else seconds["copy_s"])
    return Rates(**seconds, teacher_s=max(answer_s - beside, 0.01 * answer_s))  # both times are noisy


def _first_images(source: Source, least_s: float) -> tuple[list[Any], list[Sample], list[np.ndarray]]:
    """Return places, samples and pixels of the first images: at most IMAGES, fewer if reading is slow."""
    places, samples, images = [], [], []
    bad: BadImageError | None = None
    began = time.perf_counter()
    for shard, row in ((each, row) for each in source.shards for row in range(len(each))):
        sample = shard[row]
        try:
            images.append(decode(sample.image, key=sample.key))
        except BadImageError as error:
            bad = error
            continue
        places.append((shard, row))
        samples.append(sample)
        if len(images) == IMAGES or time.perf_counter() - began > least_s:
            break
    if not images:
        raise bad or SourceError(f"{source.location} holds no image")
    return places, samples, images


def _filled(rendered: np.ndarray, batch: int, device: torch.device) -> Tensor:
    """Return views repeated to fill a batch, uint8 [batch, H, W, 3] on the host, pinned for a GPU."""
    return _pinned(torch.from_numpy(np.resize(rendered, (batch, *rendered.shape[1:]))), device)


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor in page-locked memory if the device is a CUDA device, as the batches of a run are."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _answer_s(rendered: np.ndarray, recipe: Recipe, teacher: Teacher, topk: int, least_s: float) -> float:
    """Return the teacher's seconds for one view in full forward passes, or in small passes if it is slow."""
    few = _asking(teacher, recipe, _filled(rendered, 2 * teacher.threads, teacher.device), topk)
    few()  # the first call warms caches
    began = time.perf_counter()
    few()
    took = time.perf_counter() - began
    most = CPU_BATCH if teacher.device.type == "cpu" else GPU_BATCH
    size = next((size for size in (most, most // 2, most // 4) if took * size / 2 < least_s), 2)
    if size == 2:
        return took / (2 * teacher.threads)
    batch = size * teacher.threads
    full = _asking(teacher, recipe, _filled(rendered, batch, teacher.device), topk)
    return median_s(full, teacher.device, least_s) / batch


def _asking(teacher: Teacher, recipe: Recipe, pixels: Tensor, topk: int) -> Callable[[], object]:
    """Return a function that lets every thread of the teacher answer for an equal share of mixed views."""
    size = len(pixels) // teacher.threads
    pairs = [(at, at + 1) for at in range(0, size, 2)]
    mix = mix_batch(pairs, [draw_mix(recipe, "timing", at) for at, _ in pairs], size)

    def ask() -> None:
        for pending in [teacher.ask(part, mix, topk) for part in pixels.split(size)]:
            pending.result()

    return ask


def forward_flops(module: nn.Module, img_size: int) -> int:
    """Return the floating-point operations of one image's forward pass, two for each multiply-add.

    A network without parameters (a formula) is counted too. The result is 1 if no operation is counted.
    """
    tensors = itertools.chain(module.parameters(), module.buffers())
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    # The fused attention kernel on a CPU is not counted; attention as separate matrix products is counted.
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module.eval()(torch.zeros(1, 3, img_size, img_size, device=device))
    return max(1, counter.get_total_flops())


def training_step_s(module: nn.Module, img_size: int, device: torch.device, *, least_s: float = 1.0) -> float:
    """Return the seconds of a forward and backward pass for one image, on images in memory; bfloat16 on a GPU.

    Args:
        module: network from images [B, 3, H, W] to logits [B, C], or to a tuple of logits.
        img_size: height and width of the images.
        device: device of both passes.
        least_s: approximate number of seconds to spend.

    Raises:
        UsageError: not even two images fit into the memory of the device.
    """
    module.to(device).train()
    batch = 2 if device.type == "cpu" else GPU_BATCH
    while batch >= 2:
        try:
            return median_s(_training_step(module, batch, img_size, device), device, least_s) / batch
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
        batch //= 2
    raise UsageError(f"two images of {img_size} pixels in training do not fit into the memory of {device}")


def _training_step(module: nn.Module, batch: int, img_size: int, device: torch.device) -> Callable[[], object]:
    images = torch.randn(batch, 3, img_size, img_size, device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=forward_dtype("auto", device) == torch.bfloat16):
            output = module(images)
        heads = output if isinstance(output, tuple) else (output,)
        torch.stack([head.float().square().mean() for head in heads]).sum().backward()
        module.zero_grad()

    return step


def _writing(num_classes: int, topk: int, precision: Precision) -> Callable[[], object]:
    """Return a function that writes a label shard of made-up answers into memory."""
    numbers = np.random.Philox(key=0).random_raw(WRITTEN[0] * WRITTEN[1] * (topk + 1)) / 2.0**64
    parts = numbers.reshape(*WRITTEN, topk + 1).astype(np.float32) ** 4
    prob = -np.sort(-(parts / parts.sum(-1, keepdims=True)), axis=-1)[..., :topk]
    index = (np.arange(topk) * 7919 + np.arange(WRITTEN[1])[:, None]) % num_classes
    hard = index[:, 0] if topk else np.arange(WRITTEN[1]) % num_classes
    zeros: dict[str, Any] = dict.fromkeys(("labelset_id", "recipe_id", "teacher_id", "source_id"), "0" * 64)

    def write() -> None:
        rows, codec = np.arange(WRITTEN[1]), codec_of(precision, num_classes, topk)
        views = [codec.encode(rows, hard, index, each) for each in prob]
        footer = LabelsFooter(
            **zeros,
            shard="timing",
            view_start=0,
            view_stop=WRITTEN[0],
            rows_per_view=WRITTEN[1],
            num_classes=num_classes,
            topk=topk,
            precision=precision,
            content_xxh3=codec.content_xxh3(views),
            probes=[],
            environment={},
        )
        write_labels(io.BytesIO(), views, footer)

    return write
