"""Mixup and CutMix of a batch of views: the same arithmetic, on the same device, in both stages."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.views.pairs import Mix


@dataclass(frozen=True)
class MixBatch:
    """The mixes of one batch, as arrays.

    Attributes:
        partner: int64 [B], position in the batch of each sample's partner; its own where unmixed.
        lam: float32 [B], weight of the sample's own view.
        box: int64 [B, 4], top, left, height, width of the partner's box; zeros where there is none.
    """

    partner: Tensor
    lam: Tensor
    box: Tensor

    def to(self, device: torch.device | str) -> "MixBatch":
        """Return the same mixes on a device."""
        return MixBatch(*(tensor.to(device, non_blocking=True) for tensor in (self.partner, self.lam, self.box)))


def mix_batch(pairs: Sequence[tuple[int, int]], mixes: Sequence[Mix], size: int) -> MixBatch:
    """Lay the mixes of pairs out as batch arrays.

    Args:
        pairs: batch positions of the two samples of each pair; second -1 for a sample without a partner.
        mixes: one for each pair.
        size: B.
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


def apply_mix(images: Tensor, mix: MixBatch) -> Tensor:
    """Mix a batch of views: the same function, on the same device type, in both stages.

    Args:
        images: uint8 [B, 3, H, W].
        mix: the batch's mixes, on the same device.

    Returns:
        float32 [B, 3, H, W], values 0..255, in the memory format of `images`.
    """
    own = images.float()
    height, width = images.shape[-2:]
    top, left, tall, wide = (edge[:, None, None] for edge in mix.box.unbind(1))
    y = torch.arange(height, device=images.device)[None, :, None]
    x = torch.arange(width, device=images.device)[None, None, :]
    inside = (y >= top) & (y < top + tall) & (x >= left) & (x < left + wide)
    cut = mix.box[:, 2:].prod(dim=1).gt(0)[:, None, None]
    weight = torch.where(cut, (~inside).float(), mix.lam[:, None, None])[:, None]
    return weight * own + (1 - weight) * own[mix.partner]
