"""`bench inference`: images per second of trained networks, for several sizes of batch."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UsageError
from pipeline.machine.ranks import device_name, forward_dtype, free_unused_memory, ran_out_of_memory, resolve_device
from pipeline.machine.timing import row_s, synchronise
from pipeline.storage.atomic import replace_file
from pipeline.storage.json import pretty_json
from pipeline.text import aligned, count
from trainer.config import InferenceConfig
from trainer.evidence.networks import find_networks
from trainer.student import Student

ROUNDS = 5  # in which the networks take turns, so that a slow moment of the machine meets all of them
LARGEST = 8192  # images in a batch, at most


@dataclass(frozen=True, kw_only=True)
class Rate:
    """The speed of a network with one size of batch.

    Attributes:
        name: name of the network.
        weights: folder of its weights, or `timm:NAME`.
        model: timm name of its architecture.
        parameters: number of its parameters.
        img_size: height and width of its images, in pixels.
        batch_size: number of images in a batch.
        dtype: number format of the forward pass.
        compiled: whether torch.compile compiled it.
        images_per_s: images per second, the median over the rounds.
        batch_ms: milliseconds of a batch, likewise.
    """

    name: str
    weights: str
    model: str
    parameters: int
    img_size: int
    batch_size: int
    dtype: str
    compiled: bool
    images_per_s: float
    batch_ms: float


class _Timed:
    """A network on its device, in evaluation mode, and how it answers a batch."""

    def __init__(
        self, student: Student, device: torch.device, dtype: torch.dtype, *, compiled: bool, weights: str = ""
    ) -> None:
        self.student, self.device, self.dtype, self.weights = student, device, dtype, weights
        self._answer: Any = torch.compile(self.student) if compiled else self.student

    def batch(self, size: int) -> Tensor:
        """Return a batch of images, float32 [size, 3, H, W], on the device. On zeros a GPU would need less power, and run faster."""
        shape = (size, 3, self.student.img_size, self.student.img_size)
        return (torch.arange(math.prod(shape), device=self.device) % 251 / 62.5 - 2).reshape(shape)

    def answer(self, images: Tensor) -> object:
        """Return the logits of both heads."""
        with torch.inference_mode(), torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self._answer(images)

    def seconds(self, images: Tensor, calls: int) -> float:
        """Return the mean seconds of an answer."""
        return row_s(lambda: self.answer(images), calls, self.device)

    def largest(self) -> int:
        """Return the largest power of two of images that fits into the memory of the GPU."""
        size = 1
        while size < LARGEST:
            try:
                self.answer(self.batch(2 * size))
                synchronise(self.device)
            except RuntimeError as error:
                if not ran_out_of_memory(error):
                    raise
                free_unused_memory(self.device)
                break
            size *= 2
        return size


def bench_inference(config: InferenceConfig, locations: Sequence[str]) -> dict[str, Any]:
    """Time networks, and return content of kind `speed`; it is also written to `--out`.

    Args:
        config: settings of the measurement.
        locations: networks, see `networks.find_networks`.

    Raises:
        UsageError: `--largest` on a CPU, which swaps instead of refusing.
        CheckpointError: a location holds no network.
    """
    device = resolve_device(config.device)
    if config.largest and device.type == "cpu":
        raise UsageError("--largest looks for the limit of a GPU's memory; here is none", fix="Pass --batch-size")
    dtype = forward_dtype(config.amp_dtype, device)
    timed = {
        network.name: _Timed(network.open(device), device, dtype, compiled=config.compile, weights=network.shown)
        for network in find_networks(locations)
    }
    rows = [asdict(rate) for rate in _rates(config, timed)]
    gpu = None if device.type == "cpu" else device_name(device)
    result = {"kind": "speed", "version": 1, "device": device.type, "gpu": gpu, "torch": torch.__version__}
    result |= {"threads": torch.get_num_threads() if device.type == "cpu" else None, "rows": rows}
    if config.out is not None:
        replace_file(config.out, pretty_json(result))
    return result


def _rates(config: InferenceConfig, timed: Mapping[str, _Timed]) -> list[Rate]:
    work: list[tuple[str, Tensor]] = []
    for name, each in timed.items():
        sizes = {*config.batch_size, *([each.largest()] if config.largest else [])}
        work += [(name, each.batch(size)) for size in sorted(sizes)]
    for name, images in work:  # the first call does not count: it warms caches and may compile
        timed[name].seconds(images, 1)
    rounds: list[list[float]] = []
    for _ in range(ROUNDS):
        rounds.append([])
        for name, images in work:
            calls = max(1, round(config.seconds / ROUNDS / timed[name].seconds(images, 1)))
            rounds[-1].append(timed[name].seconds(images, calls))
    return [
        _rate(name, timed[name], len(images), statistics.median(batch_s), compiled=config.compile)
        for (name, images), batch_s in zip(work, zip(*rounds, strict=True), strict=True)
    ]


def _rate(name: str, timed: _Timed, size: int, batch_s: float, *, compiled: bool) -> Rate:
    student = timed.student
    return Rate(
        name=name,
        weights=timed.weights,
        model=str(student.model.pretrained_cfg.get("architecture")),
        parameters=sum(parameter.numel() for parameter in student.parameters()),
        img_size=student.img_size,
        batch_size=size,
        dtype=str(timed.dtype).removeprefix("torch."),
        compiled=compiled,
        images_per_s=size / batch_s,
        batch_ms=1000 * batch_s,
    )


def speed_table(result: dict[str, Any]) -> str:
    """Return the result of `bench_inference` as a table."""
    rows = [("network", "parameters", "pixels", "batch", "images/s", "ms a batch")]
    for row in result["rows"]:
        rows.append((
            row["name"],
            f"{row['parameters'] / 1e6:.1f} M",
            str(row["img_size"]),
            f"{row['batch_size']:,}",
            f"{row['images_per_s']:,.1f}",
            f"{row['batch_ms']:,.2f}",
        ))  # fmt: skip
    compiled = ", compiled" if result["rows"][0]["compiled"] else ""
    where = result["gpu"] or f"CPU, {count(result['threads'], 'thread')}"
    measured = f"{result['rows'][0]['dtype']}{compiled}, {where}: medians of {ROUNDS} alternating rounds"
    return f"{aligned(rows)}\n{measured}"
