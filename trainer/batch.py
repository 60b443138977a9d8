"""One batch of training: replayed views, their mixes and labels; how it crosses processes, and how it gets to a GPU."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.views.mixing import MixBatch


@dataclass(frozen=True)
class Batch:
    """Views of one forward pass, before mixing, with everything known of them.

    Attributes:
        index: of the forward pass among those of this rank in the run; with it the stream can go on from anywhere.
        views: view numbers in it.
        keys: sample keys, B of them.
        images: uint8 [B, H, W, 3].
        mix: partners and mixes.
        class_label: int64 [B], 0 where not labelled.
        labelled: bool [B].
        hard: int64 [B], the teacher's argmax; empty without a label set.
        topk_index: int64 [B, K].
        topk_prob: float32 [B, K].
        tail_mass: float32 [B], zeros where K = 0.
    """

    index: int
    views: range
    keys: tuple[str, ...]
    images: Tensor
    mix: MixBatch
    class_label: Tensor
    labelled: Tensor
    hard: Tensor
    topk_index: Tensor
    topk_prob: Tensor
    tail_mass: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Return the same batch on a device; copies from page-locked memory run on the current stream."""
        if device.type == "cpu":
            return self
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in _TENSORS}
        return replace(self, mix=self.mix.to(device), **moved)

    def record_stream(self, stream: "torch.cuda.Stream") -> None:
        """Tell the allocator that this stream will use the batch, which another one has made."""
        for tensor in (*(getattr(self, name) for name in _TENSORS), self.mix.partner, self.mix.lam, self.mix.box):
            tensor.record_stream(stream)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle tensors as arrays: torch would open a file of shared memory for each of them."""
        plain = {name: getattr(self, name).numpy() for name in _TENSORS}
        mix = (self.mix.partner.numpy(), self.mix.lam.numpy(), self.mix.box.numpy())
        return _restored, (self.index, self.views, self.keys, mix, plain)


_TENSORS = ("images", "class_label", "labelled", "hard", "topk_index", "topk_prob", "tail_mass")


def _restored(index: int, views: range, keys: tuple[str, ...], mix: tuple[Any, ...], plain: dict[str, Any]) -> Batch:
    tensors = {name: torch.from_numpy(array) for name, array in plain.items()}
    return Batch(index=index, views=views, keys=keys, mix=MixBatch(*map(torch.from_numpy, mix)), **tensors)


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield batches on a device; on CUDA the next one is copied while the one before is computed with.

    The copies are done before the next batch is asked for, so that what they were copied from may be used again: one
    batch is held.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    copies, computing = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    waiting: Batch | None = None
    for batch in batches:
        with torch.cuda.stream(copies):
            moved = batch.to(device)
        if waiting is not None:
            yield waiting
        copies.synchronize()
        moved.record_stream(computing)
        waiting = moved
    if waiting is not None:
        yield waiting
