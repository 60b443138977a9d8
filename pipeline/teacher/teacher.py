"""The frozen teacher: what it answers for a batch of views, without ever making its device wait for the host."""

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.errors import NonFiniteTeacherError, TeacherError
from pipeline.labels.manifest import AnyTeacher, TeacherIdentity
from pipeline.repeats import warn_again
from pipeline.settings.configs import Dtype, TeacherConfig
from pipeline.views.mixing import MixBatch, apply_mix

log = logging.getLogger("deit_cli.teacher")

# On a CPU, float32 answers depend in their last bit on the shape of the batch and on the number of threads. So there a
# forward pass is always of 32 views and one thread, and as many of them run at a time as there are cores.
CPU_BATCH = 32


@dataclass(frozen=True)
class Answer:
    """What the teacher says of a batch.

    Attributes:
        hard: int64 [B], argmax class.
        topk_index: int64 [B, K], most probable first.
        topk_prob: float32 [B, K], probabilities at temperature 1.
    """

    hard: NDArray[np.int64]
    topk_index: NDArray[np.int64]
    topk_prob: NDArray[np.float32]


@dataclass(frozen=True)
class Network:
    """One frozen network.

    Attributes:
        module: float images [B, 3, H, W], normalised, to logits [B, C].
        identity: its name, weights, size, normalisation and classes.
        crop_pct: share of the shorter side that its centre crop keeps.
    """

    module: nn.Module
    identity: TeacherIdentity
    crop_pct: float


@dataclass(frozen=True)
class _Part:
    """One forward pass on its way: what it was asked, on the device, and host tensors that fill when `done` has passed.

    `hard`, `index` and `prob` are those of Answer, `finite` is bool [B], `busy_s` is the share of the device's time.
    """

    images: Tensor
    mix: MixBatch
    hard: Tensor
    index: Tensor
    prob: Tensor
    finite: Tensor
    busy_s: float = 0.0
    began: torch.cuda.Event | None = None
    done: torch.cuda.Event | None = None


class Pending:
    """An answer on its way."""

    def __init__(self, teacher: "Teacher", parts: Sequence["_Part | Future[_Part]"]) -> None:
        self._teacher, self._parts = teacher, parts

    def result(self) -> Answer:
        """Wait for the answer.

        Raises:
            NonFiniteTeacherError: NaN or infinity, also in float32; it carries the positions in the batch.
        """
        answers, start = [], 0
        for waiting in self._parts:
            part = waiting.result() if isinstance(waiting, Future) else waiting
            answers.append(self._teacher.settle(part, start))
            start += len(part.images)
        columns = zip(*((a.hard, a.topk_index, a.topk_prob) for a in answers), strict=True)
        return Answer(*(np.concatenate(column) for column in columns))


class Teacher:
    """One frozen network, or several whose probabilities are averaged, on one device.

    Attributes:
        identity: what decides its answers.
        config: how it was asked for, so that another process can load it again.
        num_classes_asked: likewise, of a network with random weights.
        batch_size: views in one forward pass, at most; halved when the device's memory does not suffice.
        threads: forward passes at a time, on a CPU.
        busy_s: seconds that forward passes have taken, copies to the device apart.
    """

    def __init__(
        self,
        networks: Sequence[Network],
        identity: AnyTeacher,
        config: TeacherConfig,
        num_classes_asked: int | None = None,
        *,
        device: torch.device,
    ) -> None:
        self.identity, self.config, self.num_classes_asked = identity, config, num_classes_asked
        self.device, self.dtype = device, _resolve_dtype(config.dtype, device)
        self.img_size = max(network.identity.img_size for network in networks)
        self.crop_pct = networks[0].crop_pct
        self.batch_size = CPU_BATCH if device.type == "cpu" else 2**16
        self.busy_s = 0.0
        self.limit_threads(1)
        self.networks = [_Placed(network, device, compiled=config.compile) for network in networks]
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def limit_batch(self, size: int) -> None:
        """Use at most `size` views in one forward pass; on a CPU that is always the same number."""
        if self.device.type != "cpu":
            self.batch_size = min(self.batch_size, size - size % 2)

    def limit_threads(self, threads: int) -> None:
        """Run at most so many forward passes at a time on a CPU."""
        self.threads = max(1, threads) if self.device.type == "cpu" else 1
        self._pool = ThreadPoolExecutor(self.threads, "teacher") if self.device.type == "cpu" else None

    def ask(self, images: Tensor, mix: MixBatch, topk: int) -> Pending:
        """Begin to label a batch, and return before the device is done.

        Args:
            images: uint8 [B, H, W, 3] on the host, pinned where the device is a GPU; pairs lie at even positions.
            mix: partners and mixes, by position in the batch.
            topk: K, 0..C.

        Raises:
            RuntimeError: on a CPU, outside `one_thread`: the last bits of answers would depend on the number of threads.
        """
        if self._pool and torch.get_num_threads() != 1:
            raise RuntimeError("a teacher on a CPU answers inside `with one_thread(device)` only")
        parts: list[_Part | Future[_Part]] = []
        start = 0
        while start < len(images):
            piece = slice(start, min(start + self.batch_size, len(images)))
            cut = MixBatch(mix.partner[piece] - start, mix.lam[piece], mix.box[piece])
            if self._pool:
                part = self._pool.submit(self._compute, images[piece], cut, topk)
            else:
                part = self._try(images[piece], cut, topk)
            if part is not None:
                parts.append(part)
                start = piece.stop
        return Pending(self, parts)

    def settle(self, part: _Part, start: int) -> Answer:
        """Wait for one forward pass that began at position `start` of its batch; views of NaN are asked again."""
        if part.began and part.done:
            part.done.synchronize()
            self.busy_s += part.began.elapsed_time(part.done) / 1000
        self.busy_s += part.busy_s
        bad = ~part.finite
        if bad.any():
            with torch.inference_mode():
                mixed = apply_mix(part.images.permute(0, 3, 1, 2), part.mix)
                again = self._again(mixed, bad.to(self.device), part.index.shape[1], start)
                for column, values in zip((part.hard, part.index, part.prob), again, strict=True):
                    column[bad] = values.cpu()
        return Answer(part.hard.numpy(), part.index.numpy(), part.prob.numpy())

    def _try(self, images: Tensor, mix: MixBatch, topk: int) -> _Part | None:
        """Launch one forward pass; None if the device's memory did not suffice, and half as many are to be tried."""
        try:
            return self._launch(images, mix, topk)
        except torch.OutOfMemoryError as error:
            if len(images) <= 2:
                raise TeacherError(
                    f"teacher {self.identity.name}: two views of {self.img_size} pixels do not fit into the memory of"
                    f" {self.device}: {str(error).splitlines()[0]}"
                ) from None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        half = len(images) // 2
        self.batch_size = half - half % 2 or 2
        log.warning("out of memory on %s: going on with %d views in one forward pass", self.device, self.batch_size)
        return None

    def _compute(self, images: Tensor, mix: MixBatch, topk: int) -> _Part:
        """One forward pass of views and mixes that are on the device, and its answer on the host."""
        with torch.inference_mode():
            began = time.perf_counter()
            top = self.rank(self.logits(apply_mix(images.permute(0, 3, 1, 2), mix)), topk)
            hard, index, prob, finite = (column.to("cpu", non_blocking=True) for column in top)  # into pinned memory
            return _Part(images, mix, hard, index, prob, finite, (time.perf_counter() - began) / self.threads)

    def _launch(self, images: Tensor, mix: MixBatch, topk: int) -> _Part:
        """Queue one forward pass on the device; its views travel while the pass before it still runs."""
        if self._copies is None:
            return self._compute(images.to(self.device), mix.to(self.device), topk)
        computing = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._copies):
            pixels, mix = images.to(self.device, non_blocking=True), mix.to(self.device)
        computing.wait_stream(self._copies)
        for tensor in (pixels, mix.partner, mix.lam, mix.box):
            tensor.record_stream(computing)
        began, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record(computing)
        part = self._compute(pixels, mix, topk)
        done.record(computing)
        return replace(part, busy_s=0.0, began=began, done=done)

    def logits(self, images: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Return each network's logits, float32 [B, C], for mixed images, float32 [B, 3, H, W] of 0..255."""
        return [network.logits(images, dtype or self.dtype) for network in self.networks]

    def rank(self, logits: Sequence[Tensor], topk: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return hard int64 [B], index int64 [B, K], prob float32 [B, K], finite bool [B], on the device."""
        finite = torch.stack([each.isfinite().all(dim=1) for each in logits]).all(dim=0)
        score = logits[0] if len(logits) == 1 else torch.stack([each.softmax(dim=1) for each in logits]).mean(dim=0)
        top = score.topk(max(topk, 1), dim=1)
        prob = score.softmax(dim=1).gather(1, top.indices) if len(logits) == 1 else top.values
        return top.indices[:, 0], top.indices[:, :topk], prob[:, :topk], finite

    def _again(self, images: Tensor, bad: Tensor, topk: int, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """The argmax of NaN is a valid class: such views are asked again in float32, and never stored."""
        if self.dtype != torch.float32:
            warn_again(
                log,
                "batches with non-finite outputs that were computed again in float32",
                "%d views gave non-finite outputs in %s: trying float32",
                int(bad.sum()),
                self.dtype,
            )
            hard, index, prob, finite = self.rank(self.logits(images[bad], torch.float32), topk)
            if finite.all():
                return hard, index, prob
            bad = bad.clone()
            bad[bad.nonzero().ravel()[finite]] = False
        raise NonFiniteTeacherError(
            f"teacher {self.identity.name} answered NaN or infinity in float32",
            tuple(start + position for position in bad.nonzero().ravel().tolist()),
        )


class _Placed:
    """A network on its device, with its normalisation."""

    def __init__(self, network: Network, device: torch.device, *, compiled: bool) -> None:
        identity = network.identity
        module = network.module.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)  # pyright: ignore[reportCallIssue]
        self.module: nn.Module = torch.compile(module) if compiled else module  # pyright: ignore[reportAttributeAccessIssue]
        scale = torch.tensor([identity.mean, identity.std], device=device)[:, None, :, None, None] * 255
        self._mean, self._std = scale
        self.img_size = identity.img_size

    def logits(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return float32 logits [B, C] for float32 images [B, 3, H, W] of 0..255."""
        size = (self.img_size, self.img_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(0, 255)
        images = ((images - self._mean) / self._std).contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return self.module(images).float()


def check_classes(teacher: AnyTeacher, class_names: tuple[str, ...] | None, highest_label: int | None) -> None:
    """Raise TeacherError unless the teacher's classes are those of the source.

    Args:
        teacher: identity of the teacher.
        class_names: of the source, where it has them.
        highest_label: of the source, None where nothing is labelled.
    """
    if class_names is not None and len(class_names) != teacher.num_classes:
        raise TeacherError(
            f"teacher {teacher.name} has {teacher.num_classes} classes, the source has {len(class_names)}"
        )
    if highest_label is not None and highest_label >= teacher.num_classes:
        raise TeacherError(
            f"teacher {teacher.name} has {teacher.num_classes} classes, the source has class labels up to {highest_label}"
        )
    if class_names is not None and teacher.class_names is not None and class_names != teacher.class_names:
        place = next(i for i, (a, b) in enumerate(zip(class_names, teacher.class_names, strict=True)) if a != b)
        raise TeacherError(
            f"class {place} is {class_names[place]!r} in the source and {teacher.class_names[place]!r} for teacher {teacher.name}:"
            " the order of classes differs"
        )


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU, let every operation use one thread for as long as the block runs: the teacher brings its own threads.

    A thread takes over this number when it first computes. So every thread of the teacher must begin inside such a block;
    one that began outside would split sums in another way, and change the last bits of stored probabilities.
    """
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
