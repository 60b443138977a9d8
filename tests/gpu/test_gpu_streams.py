"""What lies between loader processes and a GPU: page-locked memory that is used again, and memory that stays flat."""

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from on_gpu import CNN, busy, labels_of, load, run_config, views_in
from torch import Tensor

from pipeline.images.source import open_source
from pipeline.machine.loaders import PREFETCH, Slots
from pipeline.stage1.loop import AHEAD, ShardsInProgress
from pipeline.teacher.teacher import PendingAnswer
from pipeline.views.mixing import MixBatch
from trainer import loop
from trainer.run import make_order, open_data
from trainer.stream import Batch, BatchRenderer, Catalogue, on_device, stream_batches

pytestmark = pytest.mark.gpu

WORKERS = 2
LATE_S = 0.01


def test_the_pages_of_slots_are_locked_while_there_are_slots(gpu):
    """Given back at the end: memory that another process takes at the same address could else not be locked."""
    for value in (7, 8):
        slots = Slots((4, 8, 8, 3), workers=1, held=1)
        assert not slots.pixels.is_pinned()
        slots.pin(gpu)
        slots.pixels.fill_(value)
        assert slots.pixels.is_pinned()
        copied = slots.pixels.to(gpu, non_blocking=True)
        torch.cuda.synchronize()
        assert copied.eq(value).all()
        del slots


def test_stage_1_sees_the_rendered_pixels_however_late_a_gpu_copies_them(device, data, label_set, tmp_path):
    """Sixty batches go through seven page-locked slots, whose memory loader processes write to again."""
    views = range(12)
    teacher = load(CNN, device)
    compute, ask = teacher._compute, teacher.ask
    arrived: list[Tensor] = []

    def noting(images: Tensor, mix: MixBatch, topk: int) -> Any:
        busy(device, LATE_S)
        arrived.append(images.clone())
        return compute(images, mix, topk)

    def asking(images: Tensor, mix: MixBatch, topk: int) -> PendingAnswer:
        if teacher._copies is not None:
            assert images.is_pinned()
            with torch.cuda.stream(teacher._copies):
                busy(device, LATE_S)
        return ask(images, mix, topk)

    teacher._compute, teacher.ask = noting, asking
    labels_of(teacher, tmp_path / "set", data, views=(0, 12), workers=WORKERS)
    expected = list(views_in(label_set, open_source(data), views, workers=WORKERS))
    assert len(arrived) == len(expected) >= 5 * (WORKERS * PREFETCH + AHEAD + 1)
    apart = [at for at, (mine, batch) in enumerate(zip(arrived, expected, strict=True)) if not torch.equal(mine.cpu(), batch.images)]  # fmt: skip
    assert apart == []


def test_stage_2_sees_the_rendered_pixels_however_late_a_gpu_copies_them(device, label_set, tmp_path, monkeypatch):
    """Forty batches go through six page-locked slots, whose memory loader processes write to again."""
    config = run_config(label_set, tmp_path / "run", device)
    data = open_data(config)
    order = make_order(config, data)
    renderer = BatchRenderer(Catalogue(data.source, data.label_set), data.recipe, order)
    total = range(40)
    real = Batch.to

    def late(self: Batch, where: torch.device) -> Batch:
        assert self.images.is_pinned() == (where.type == "cuda")
        busy(where, LATE_S)  # on the stream of the copies
        return real(self, where)

    monkeypatch.setattr(Batch, "to", late)
    arrived: list[tuple[int, tuple[str, ...], dict[str, Tensor]]] = []
    for batch in on_device(stream_batches(renderer, total, workers=WORKERS, device=device), device):
        busy(device, LATE_S / 2)
        arrived.append((batch.index, batch.keys, {name: values.clone() for name, values in tensors_of(batch)}))
    assert [index for index, _, _ in arrived] == list(total)
    assert len(arrived) >= 5 * (WORKERS * PREFETCH + 1 + 1)
    again = BatchRenderer(Catalogue(data.source, data.label_set), data.recipe, order)
    for index, keys, tensors in arrived:
        expected = again.render_here(index)
        assert keys == expected.keys
        assert [name for name, value in tensors_of(expected) if not torch.equal(tensors[name].cpu(), value)] == []


def tensors_of(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    assert batch.teacher is not None
    yield "images", batch.images
    for record in (batch.mix, batch.classes, batch.teacher):
        yield from vars(record).items()


class Meter:
    """What torch has taken of a GPU's memory, after each batch."""

    def __init__(self, gpu: torch.device) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        self._gpu = gpu
        self.allocated: list[int] = []
        self.reserved: list[int] = []

    def look(self) -> None:
        self.allocated.append(torch.cuda.memory_allocated(self._gpu))
        self.reserved.append(torch.cuda.memory_reserved(self._gpu))

    def check(self, batches: int) -> None:
        """From the hundredth batch to the end nothing grows; batches on their way differ by a few kilobytes."""
        assert len(self.allocated) == batches
        early, late = (np.max(self.allocated[part]) for part in (slice(75, 125), slice(-50, None)))
        assert abs(int(late) - int(early)) <= 2**16
        assert self.reserved[-1] == self.reserved[99]


def test_stage_1_takes_no_more_memory_after_300_batches_than_after_100(gpu, data, tmp_path, monkeypatch):
    meter, real = Meter(gpu), ShardsInProgress.store_answer

    def store(self: ShardsInProgress, *arguments: Any) -> None:
        real(self, *arguments)
        meter.look()

    monkeypatch.setattr(ShardsInProgress, "store_answer", store)
    labels_of(load(CNN, gpu, dtype="auto"), tmp_path / "set", data, views=(0, 60))
    meter.check(300)


def test_stage_2_takes_no_more_memory_after_300_updates_than_after_100(gpu, label_set, tmp_path, monkeypatch):
    meter, real = Meter(gpu), loop.update_weights

    def step(*arguments: Any) -> dict[str, Tensor]:
        extra = real(*arguments)
        meter.look()
        return extra

    monkeypatch.setattr(loop, "update_weights", step)
    loop.train(run_config(label_set, tmp_path / "run", gpu, epochs=100, log_interval=50))
    meter.check(300)
