"""Mixup and CutMix of a batch of views: the same arithmetic, on the same device, in both stages."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.views.pairs import Mix, Pairs


@dataclass(frozen=True)
class MixBatch:
    """The mixes of one batch, as arrays.

    Attributes:
        partner: int64 [B], position of each sample's partner in the batch; its own position if it is not mixed.
        lam: float32 [B], weight of the sample's own view.
        box: int64 [B, 4], top, left, height, width of the partner's box; zeros if there is no box.
    """

    partner: Tensor
    lam: Tensor
    box: Tensor

    def to(self, device: torch.device | str) -> "MixBatch":
        """Return the same mixes on a device; copies to CUDA do not wait."""
        later = torch.device(device).type == "cuda"
        return MixBatch(*(tensor.to(device, non_blocking=later) for tensor in (self.partner, self.lam, self.box)))


def mix_batch(pairs: Sequence[tuple[int, int]], mixes: Sequence[Mix], size: int) -> MixBatch:
    """Return the mixes of pairs as arrays of a batch.

    Args:
        pairs: batch positions of the two samples of each pair; the second is -1 for a sample without a partner.
        mixes: one mix for each pair.
        size: number of samples of the batch, B.
    """
    partner = np.arange(size)
    lam = np.ones(size, np.float32)
    box = np.zeros((size, 4), np.int64)
    for (first, second), mix in zip(pairs, mixes, strict=True):
        if second < 0 or mix == Mix():
            continue
        partner[first], partner[second] = second, first
        lam[[first, second]] = mix.lam
        if mix.box is not None:
            box[[first, second]] = mix.box
    return MixBatch(torch.from_numpy(partner), torch.from_numpy(lam), torch.from_numpy(box))


@dataclass(frozen=True)
class Layout:
    """The positions of the views of some pairs in a batch: pair after pair, each view after view, in each the two samples.

    Attributes:
        rows: int64 [B], row of the sample at each position.
        places: int64 [P, V, 2], positions of the views of each pair; -1 if there is no partner.
        mix: partners and mixes, by position.
    """

    rows: NDArray[np.int64]
    places: NDArray[np.int64]
    mix: MixBatch


def lay_out(pairs: Pairs, views: range) -> Layout:
    """Return the layout of V views of P pairs in a batch."""
    rows = np.broadcast_to(pairs.rows[:, None], (len(pairs.rows), len(views), 2))
    there = rows >= 0
    places = np.where(there, np.cumsum(there).reshape(there.shape) - 1, -1)
    mixes = [mix for of_pair in zip(*(pairs.mixes(view) for view in views), strict=True) for mix in of_pair]
    positions = [(first, second) for first, second in places.reshape(-1, 2).tolist()]
    return Layout(rows[there], places, mix_batch(positions, mixes, int(there.sum())))


def apply_mix(images: Tensor, mix: MixBatch) -> Tensor:
    """Mix a batch of views: the same function, on the same device type, in both stages.

    Args:
        images: uint8 [B, H, W, 3].
        mix: mixes of the batch, on the same device.

    Returns:
        float32 [B, 3, H, W], values 0..255, channels last in memory if `images` is contiguous.
    """
    own = images.permute(0, 3, 1, 2).float()
    top, left, height, width = (edge[:, None, None] for edge in mix.box.unbind(1))
    y = torch.arange(own.shape[2], device=images.device)[None, :, None]
    x = torch.arange(own.shape[3], device=images.device)[None, None, :]
    inside = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
    cut = mix.box[:, 2:].prod(dim=1).gt(0)[:, None, None]
    weight = torch.where(cut, (~inside).float(), mix.lam[:, None, None])[:, None]
    return weight * own + (1 - weight) * own[mix.partner]
