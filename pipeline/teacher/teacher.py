"""The frozen teacher: computes its answers for batches of views, so that its device never waits for the host."""

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
from pipeline.machine.ranks import forward_dtype, free_unused_memory, ran_out_of_memory
from pipeline.pixels.handover import rendered
from pipeline.repeats import warn_counted
from pipeline.settings.configs import TeacherConfig
from pipeline.teacher.given import GivenTeacher
from pipeline.views.mixing import MixBatch, apply_mix

log = logging.getLogger("deit_cli.teacher")

# On a CPU, the last bits of float32 answers depend on the batch size and on the number of threads. So a forward pass
# there always takes 32 views and uses one thread; several passes run in parallel.
CPU_BATCH = 32


@dataclass(frozen=True)
class Answer:
    """The teacher's answer for a batch.

    Attributes:
        hard: argmax classes, int64 [B].
        topk_index: the K most probable classes, most probable first, int64 [B, K].
        topk_prob: probabilities of these classes at temperature 1, float32 [B, K].
    """

    hard: NDArray[np.int64]
    topk_index: NDArray[np.int64]
    topk_prob: NDArray[np.float32]


@dataclass(frozen=True)
class Network:
    """A frozen network and its identity.

    Attributes:
        module: network from normalised float images [B, 3, H, W] to logits [B, C].
        identity: name, weights, image size, normalisation and classes of the network.
        crop_pct: share of the shorter side that the network's centre crop keeps, 0..1.
    """

    module: nn.Module
    identity: TeacherIdentity
    crop_pct: float


@dataclass(frozen=True)
class _ForwardPass:
    """A forward pass that has been launched.

    Attributes:
        images: views, uint8 [B, H, W, 3] on the device.
        mix: partners and mixes of these views, on the device.
        hard, index, prob: the columns of `Answer` on the host; on a CUDA device they are valid only after `done`.
        finite: bool [B] on the host, True for views whose logits are all finite; valid when `hard` is.
        busy_s: compute time in seconds, on a CPU divided by the number of passes that run in parallel; 0 on a CUDA device.
        began, done: start and end of the pass on a CUDA device; None on any other.
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


class PendingAnswer:
    """An answer that the teacher is still computing."""

    def __init__(self, teacher: "Teacher", passes: Sequence["_ForwardPass | Future[_ForwardPass]"]) -> None:
        self._teacher, self._passes = teacher, passes

    def result(self) -> Answer:
        """Wait for the answer and return it.

        Raises:
            NonFiniteTeacherError: some outputs are NaN or infinite even in float32; carries their positions in the batch.
        """
        answers, start = [], 0
        for each in self._passes:
            forward_pass = each.result() if isinstance(each, Future) else each
            answers.append(self._teacher.answer_of(forward_pass, start))
            start += len(forward_pass.images)
        columns = zip(*((a.hard, a.topk_index, a.topk_prob) for a in answers), strict=True)
        return Answer(*(np.concatenate(column) for column in columns))


class Teacher:
    """A teacher on a device: one frozen network, or several whose probabilities are averaged.

    Attributes:
        identity: everything that determines the answers: names, weights, image sizes, normalisation, classes.
        config: settings with which another process can load the same teacher.
        num_classes_asked: class count for a network with random weights; None means 1,000.
        given: the object that a program passed as the teacher; None: `config` names it.
        device: torch device of the networks.
        dtype: precision of the forward passes.
        img_size: maximum image size of the networks, in pixels.
        crop_pct: share of the shorter side that the first network's centre crop keeps, 0..1.
        batch_size: maximum number of views in a forward pass; halved when the device runs out of memory.
        threads: forward passes that run in parallel on a CPU; 1 on a GPU.
        busy_s: time of all forward passes so far in seconds, without copies to the device.
        networks: the networks on the device.
    """

    def __init__(
        self,
        networks: Sequence[Network],
        identity: AnyTeacher,
        config: TeacherConfig,
        num_classes_asked: int | None = None,
        *,
        device: torch.device,
        given: GivenTeacher | None = None,
    ) -> None:
        self.identity, self.config, self.num_classes_asked = identity, config, num_classes_asked
        self.given = given
        self.device, self.dtype = device, forward_dtype(config.dtype, device)
        self.img_size = max(network.identity.img_size for network in networks)
        self.crop_pct = networks[0].crop_pct
        self.batch_size = CPU_BATCH if device.type == "cpu" else 2**16
        self.busy_s = 0.0
        self.limit_threads(1)
        self.networks = [_NetworkOnDevice(network, device, compiled=config.compile) for network in networks]
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def limit_batch(self, size: int) -> None:
        """Limit a GPU's forward passes to `size` views; a CPU always uses `CPU_BATCH`."""
        if self.device.type != "cpu":
            self.batch_size = min(self.batch_size, size - size % 2)

    def limit_threads(self, threads: int) -> None:
        """Limit the number of forward passes that run in parallel on a CPU."""
        self.threads = max(1, threads) if self.device.type == "cpu" else 1
        self._pool = ThreadPoolExecutor(self.threads, "teacher") if self.device.type == "cpu" else None

    def ask(self, images: Tensor, mix: MixBatch, topk: int) -> PendingAnswer:
        """Start to compute the answer for a batch, without waiting for the device.

        Args:
            images: views, uint8 [B, H, W, 3] on the host, pinned if the device is a GPU, or on the device; each pair starts at an
                even position.
            mix: partners and mixes of these views, by position in the batch.
            topk: number of classes to keep, K, 0..C.

        Raises:
            RuntimeError: the device is a CPU and the call is outside `one_thread`, so that the last bits of the answer
                would depend on the number of threads.
        """
        if self._pool and torch.get_num_threads() != 1:
            raise RuntimeError("a teacher on a CPU must be asked inside `with one_thread(device)`")
        passes: list[_ForwardPass | Future[_ForwardPass]] = []
        start = 0
        while start < len(images):
            piece = slice(start, min(start + self.batch_size, len(images)))
            cut = MixBatch(mix.partner[piece] - start, mix.lam[piece], mix.box[piece])
            if self._pool:
                launched = self._pool.submit(self._compute, images[piece], cut, topk)
            else:
                launched = self._launch_or_halve(images[piece], cut, topk)
            if launched is not None:
                passes.append(launched)
                start = piece.stop
        return PendingAnswer(self, passes)

    def rendered(self, images: Tensor, num_views: int) -> Tensor:
        """Return the views of an unrendered batch (see `pipeline.pixels.handover`), uint8 [B, H, W, 3] on the device.

        They are rendered while the previous forward pass still runs.
        """
        if self._copies is None:
            return rendered(images, num_views, self.device)
        with torch.cuda.stream(self._copies):
            views = rendered(images, num_views, self.device)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._copies)
        views.record_stream(computing)
        return views

    def answer_of(self, launched: _ForwardPass, start: int) -> Answer:
        """Wait for a forward pass and return its answer; views with non-finite outputs are computed again in float32.

        Args:
            launched: the forward pass.
            start: position in the batch of the first view of the pass.

        Raises:
            NonFiniteTeacherError: some outputs are NaN or infinite even in float32; carries their positions in the batch.
        """
        if launched.began and launched.done:
            launched.done.synchronize()
            self.busy_s += launched.began.elapsed_time(launched.done) / 1000
        self.busy_s += launched.busy_s
        bad = ~launched.finite
        if bad.any():
            with torch.inference_mode():
                mixed = apply_mix(launched.images, launched.mix)
                again = self._compute_in_float32(mixed, bad.to(self.device), launched.index.shape[1], start)
                for column, values in zip((launched.hard, launched.index, launched.prob), again, strict=True):
                    column[bad] = values.cpu()
        return Answer(launched.hard.numpy(), launched.index.numpy(), launched.prob.numpy())

    def _launch_or_halve(self, images: Tensor, mix: MixBatch, topk: int) -> _ForwardPass | None:
        """Launch a forward pass; if the device runs out of memory, halve the batch size and return None."""
        try:
            return self._launch(images, mix, topk)
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            if len(images) <= 2:
                raise TeacherError(
                    f"teacher {self.identity.name}: two views of {self.img_size} pixels do not fit into the memory of"
                    f" {self.device}: {str(error).splitlines()[0]}"
                ) from None
        free_unused_memory(self.device)
        half = len(images) // 2
        self.batch_size = half - half % 2 or 2
        log.warning("out of memory on %s: continuing with %d views per forward pass", self.device, self.batch_size)
        return None

    def _compute(self, images: Tensor, mix: MixBatch, topk: int) -> _ForwardPass:
        """Run a forward pass of views and mixes on the device, and copy its answer to the host."""
        with torch.inference_mode():
            began = time.perf_counter()
            columns = self.top_classes(self.logits(apply_mix(images, mix)), topk)
            # From a CUDA device, these copies go into pinned memory and do not wait: an event says when they have ended.
            later = self._copies is not None
            hard, index, prob, finite = (column.to("cpu", non_blocking=later) for column in columns)
            return _ForwardPass(images, mix, hard, index, prob, finite, (time.perf_counter() - began) / self.threads)

    def _launch(self, images: Tensor, mix: MixBatch, topk: int) -> _ForwardPass:
        """Queue a forward pass on the device; its views are copied while the previous pass still runs."""
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
        launched = self._compute(pixels, mix, topk)
        done.record(computing)
        return replace(launched, busy_s=0.0, began=began, done=done)

    def logits(self, images: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Return the logits of each network.

        Args:
            images: mixed views, float32 [B, 3, H, W] in 0..255, on the device.
            dtype: precision of the forward pass; None for the teacher's.

        Returns:
            logits, float32 [B, C], one tensor per network.
        """
        return [network.logits(images, dtype or self.dtype) for network in self.networks]

    def top_classes(self, logits: Sequence[Tensor], topk: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the most probable classes and their probabilities, averaged over the networks.

        Args:
            logits: logits of each network, float32 [B, C].
            topk: number of classes to keep, K, 0..C.

        Returns:
            hard int64 [B], index int64 [B, K] and prob float32 [B, K] as in `Answer`; finite bool [B], True for views
            whose logits are all finite. All are on the device of the logits.
        """
        finite = torch.stack([each.isfinite().all(dim=1) for each in logits]).all(dim=0)
        score = logits[0] if len(logits) == 1 else torch.stack([each.softmax(dim=1) for each in logits]).mean(dim=0)
        top = score.topk(max(topk, 1), dim=1)
        prob = score.softmax(dim=1).gather(1, top.indices) if len(logits) == 1 else top.values
        return top.indices[:, 0], top.indices[:, :topk], prob[:, :topk], finite

    def _compute_in_float32(self, images: Tensor, bad: Tensor, topk: int, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return hard, index and prob (see `top_classes`) of the views in `bad`, computed in float32.

        Non-finite outputs must never be stored: their argmax would be a valid class.
        """
        if self.dtype != torch.float32:
            kind = "batches with non-finite outputs that were computed again in float32"
            message = "%d views gave non-finite outputs in %s: computing them again in float32"
            warn_counted(log, kind, message, int(bad.sum()), self.dtype)
            hard, index, prob, finite = self.top_classes(self.logits(images[bad], torch.float32), topk)
            if finite.all():
                return hard, index, prob
            bad = bad.clone()
            bad[bad.nonzero().ravel()[finite]] = False
        raise NonFiniteTeacherError(
            f"teacher {self.identity.name} answered NaN or infinity in float32",
            tuple(start + position for position in bad.nonzero().ravel().tolist()),
        )


class _NetworkOnDevice:
    """A network on its device, with its normalisation."""

    def __init__(self, network: Network, device: torch.device, *, compiled: bool) -> None:
        identity = network.identity
        module = network.module.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)  # pyright: ignore[reportCallIssue]
        self.module: nn.Module = torch.compile(module) if compiled else module  # pyright: ignore[reportAttributeAccessIssue]
        scale = torch.tensor([identity.mean, identity.std], device=device)[:, None, :, None, None] * 255
        self._mean, self._std = scale
        self.img_size = identity.img_size

    def logits(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return float32 logits [B, C] for float32 images [B, 3, H, W] in 0..255, resized and normalised first."""
        size = (self.img_size, self.img_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(0, 255)
        images = ((images - self._mean) / self._std).contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return self.module(images).float()


def check_classes(teacher: AnyTeacher, class_names: tuple[str, ...] | None, highest_label: int | None) -> None:
    """Check that the teacher's classes are those of the source.

    Args:
        teacher: identity of the teacher.
        class_names: class names of the source, None if it has none.
        highest_label: maximum class label of the source, None if no image is labelled.

    Raises:
        TeacherError: the classes differ in number, names or order.
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
            " names or order of the classes differ"
        )


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Limit every torch operation on a CPU to one thread inside the block; the teacher starts its own threads.

    A new thread adopts this limit at its first operation. So each thread of the teacher must start inside such a block:
    a thread that started outside would sum in another order, and change the last bits of stored probabilities.
    """
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
