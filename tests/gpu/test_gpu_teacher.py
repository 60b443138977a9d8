"""The teacher on a GPU: no race, no view lost to a full memory, no answer that is no number."""

import gc
import logging
import re
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from on_gpu import busy, columns, labels_of, load, mixed, same_bits, teacher_of_module, views_in
from support.builders import small_recipe
from torch import Tensor, nn

from pipeline.errors import NonFiniteTeacherError
from pipeline.images.source import open_source
from pipeline.stage1.loop import AHEAD
from pipeline.teacher.teacher import Teacher
from pipeline.views.mixing import MixBatch, mix_batch
from pipeline.views.pairs import draw_mix

pytestmark = pytest.mark.gpu

Question = tuple[Tensor, MixBatch]


def question(seed: int, size: int, batch: int) -> Question:
    """Return views of coloured squares, uint8 [batch, size, size, 3], no two alike, mixed pair by pair."""
    rng = torch.Generator().manual_seed(seed)
    squares = torch.randint(0, 256, (batch, 4, 4, 3), dtype=torch.uint8, generator=rng)
    images = squares.repeat_interleave(size // 4, 1).repeat_interleave(size // 4, 2).contiguous()
    pairs = [(at, at + 1) for at in range(0, batch, 2)]
    mixes = [draw_mix(small_recipe(img_size=size), f"img-{at:04}", seed) for at, _ in pairs]
    return images, mix_batch(pairs, mixes, batch)


def ask_and_wait(teacher: Teacher, images: Tensor, mix: MixBatch, topk: int) -> Any:
    """Ask with everything one after the other: copy, compute, copy back, wait."""
    copies, teacher._copies = teacher._copies, None
    pending = teacher.ask(images, mix, topk)
    if teacher.device.type == "cuda":
        torch.cuda.synchronize()
    answer = pending.result()
    teacher._copies = copies
    return answer


def poison(teacher: Teacher, images: Tensor) -> None:
    """Take memory of the sizes that the teacher takes, on both of its streams, spoil it, and give it back."""
    if teacher._copies is None:
        return
    for stream in (teacher._copies, torch.cuda.current_stream(teacher.device)):
        with torch.cuda.stream(stream):
            torch.full(images.shape, 255, dtype=torch.uint8, device=teacher.device)
            torch.full(images.shape, float("nan"), device=teacher.device)


@pytest.mark.usefixtures("full_float32")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_copies_that_overlap_with_computing_change_no_bit_of_an_answer(device, dtype):
    """Sixty batches through three host buffers, each spoiled as soon as its answer is there. Now the copies are late, now the
    forward passes, and freed memory is spoiled all the time: whatever is read too early or reused too early is garbage."""
    cuda = device.type == "cuda"
    name, size, batch, turns = ("resnet18", 224, 128, 60) if cuda else ("test_resnet", 32, 8, 12)
    teacher = load(name, device, pretrained=False, num_classes=50, teacher_img_size=size, dtype=dtype)
    questions = [question(seed, size, batch) for seed in range(4)]
    expected = [ask_and_wait(teacher, *each, 5) for each in questions]
    assert not any(same_bits(expected[0], other) for other in expected[1:])
    again = [ask_and_wait(teacher, *each, 5) for each in questions]
    assert all(same_bits(one, two) for one, two in zip(expected, again, strict=True))  # or the rest would say nothing
    buffers = [torch.empty_like(questions[0][0], pin_memory=cuda) for _ in range(AHEAD + 1)]
    waiting: deque[tuple[int, Any]] = deque()
    wrong: list[int] = []

    def settle() -> None:
        turn, pending = waiting.popleft()
        answer = pending.result()
        buffers[turn % len(buffers)].fill_(turn % 256)
        if not same_bits(answer, expected[turn % len(questions)]):
            wrong.append(turn)

    for turn in range(turns):
        images, mix = questions[turn % len(questions)]
        buffer = buffers[turn % len(buffers)]
        buffer.copy_(images)
        if turn % 2 and teacher._copies is not None:
            with torch.cuda.stream(teacher._copies):
                busy(device, 0.005)
        else:
            busy(device, 0.005)
        waiting.append((turn, teacher.ask(buffer, mix, 5)))
        poison(teacher, images)
        if len(waiting) > AHEAD:
            settle()
    while waiting:
        settle()
    assert wrong == []


class Hungry(nn.Module):
    """Answers with mean colours, for which it needs about 3 MB of float32 for each image of 64 pixels."""

    def forward(self, images: Tensor) -> Tensor:
        wide = images.repeat(1, 32, 1, 1)
        return (wide * wide.sigmoid()).mean(dim=(2, 3))[:, :3] * 10


def test_a_full_memory_halves_the_batch_and_changes_no_label(gpu, caplog):
    """A real torch.OutOfMemoryError: this process may take less than a pass of 64 views needs, more than one of 32 does."""
    images, mix = question(0, 64, 64)
    images = images.pin_memory()
    gc.collect()  # what earlier tests have left must not go in between

    def reserved(size: int) -> tuple[Any, int]:
        teacher = teacher_of_module(Hungry(), gpu, img_size=64)
        teacher.limit_batch(size)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(gpu)
        return teacher.ask(images, mix, 3).result(), torch.cuda.max_memory_reserved(gpu)

    (expected, whole), (_, half) = reserved(64), reserved(32)
    assert whole - half > 2**26  # far more than the allocator rounds
    teacher = teacher_of_module(Hungry(), gpu, img_size=64)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((whole + half) / 2 / torch.cuda.mem_get_info(gpu)[1], gpu)
    try:
        with caplog.at_level(logging.WARNING, logger="deit_cli"):
            found = [pending.result() for pending in [teacher.ask(images, mix, 3) for _ in range(3)]]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, gpu)
        torch.cuda.empty_cache()
    sizes = [int(size) for size in re.findall(r"continuing with (\d+) views per forward pass", caplog.text)]
    assert sizes
    assert 2 <= sizes[-1] <= 32
    assert teacher.batch_size == sizes[-1]
    for answer in found:
        np.testing.assert_array_equal(answer.hard, expected.hard)
        np.testing.assert_allclose(answer.topk_prob, expected.topk_prob, atol=1e-6)


class Overflows(nn.Module):
    """Answers with mean colours times 4; on the way they are so large that float16 holds only the smaller ones."""

    large: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("large", 3e4 * torch.eye(3))

    def forward(self, images: Tensor) -> Tensor:
        return F.linear(4 * images.mean(dim=(2, 3)), self.large) / 3e4


LARGEST = 65504 / 3e4  # logit of Overflows from which on float16 is infinite


def test_views_that_overflow_in_float16_are_stored_as_float32_answers(device, data, label_set, tmp_path):
    exact = labels_of(
        teacher_of_module(Overflows(), device, img_size=16), tmp_path / "exact", data, precision="float32"
    )
    teacher = teacher_of_module(Overflows(), device, img_size=16, dtype="float16")
    stored = labels_of(teacher, tmp_path / "stored", data, precision="float32")
    over: dict[tuple[str, int, int], bool] = {}
    for batch in views_in(label_set, open_source(data), range(3)):
        largest = (4 * (mixed(batch) / 127.5 - 1).mean(dim=(2, 3))).abs().amax(dim=1)
        for row, value in zip(batch.rows.tolist(), largest.tolist(), strict=True):
            if abs(value / LARGEST - 1) > 0.002:  # nearer to the edge rounding decides
                over[batch.shard, batch.view, row] = value > LARGEST
    apart: dict[bool, list[float]] = {False: [], True: []}
    for (shard, view, row), overflows in over.items():
        mine, theirs = stored.read(shard, view), exact.read(shard, view)
        assert np.isfinite(mine.topk_prob[row]).all()
        apart[overflows].append(float(np.abs(mine.topk_prob[row] - theirs.topk_prob[row]).max()))
    assert min(len(apart[True]), len(apart[False])) >= 5
    assert max(apart[True]) < 1e-5  # asked again in float32
    assert max(apart[False]) > 1e-5  # and these were not
    assert columns(stored, "hard").shape == (120,)


class Blind(nn.Module):
    """Answers NaN where the mean of the first channel is above a limit, in every dtype."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, images: Tensor) -> Tensor:
        colours = images.float().mean(dim=(2, 3))
        return torch.where(colours[:, :1] > self.limit, torch.nan, colours)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_view_without_an_answer_is_named_and_nothing_of_it_is_stored(device, data, label_set, tmp_path, dtype):
    red = {
        (batch.shard, batch.view, row): value
        for batch in views_in(label_set, open_source(data), range(3))
        for row, value in zip(
            batch.rows.tolist(), (mixed(batch) / 127.5 - 1).mean(dim=(2, 3))[:, 0].tolist(), strict=True
        )
    }
    ranked = sorted(red.values())
    below = max(range(90, 118), key=lambda at: ranked[at + 1] - ranked[at])  # the widest gap near the top
    limit = (ranked[below] + ranked[below + 1]) / 2
    teacher = teacher_of_module(Blind(limit), device, img_size=16, dtype=dtype)
    with pytest.raises(NonFiniteTeacherError, match="answered NaN or infinity in float32 for view") as caught:
        labels_of(teacher, tmp_path / "set", data)
    said = re.search(r"for view (\d+) of (.*) in (train-\d+): these labels were not stored", str(caught.value))
    assert said is not None
    view, shard = int(said[1]), said[3]
    keys = label_set.samples(shard).key
    named = {keys.index(key) for key in re.findall(r"'([^']+)'", said[2])}
    blind = {row for (a, b, row), value in red.items() if (a, b) == (shard, view) and value > limit}
    assert named
    assert named == {row for row in blind if row // 8 == min(named) // 8}  # all that are in this batch, a mix block
    assert not list((tmp_path / "set").glob("labels/**/*.parquet"))
