"""Erasing noise: N(0, 1) per channel in ImageNet-normalised space, mapped back to uint8 and clipped."""

from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from pipeline.images.samples import Box
from pipeline.views.draws import Draws

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def noise_key(noise: int) -> tuple[int, int]:
    """Return the two words of the Philox key of a noise stream, from the 64 bits that name it."""
    draws = Draws(noise.to_bytes(8, "little"))
    return draws.bits(), draws.bits()


def fill_with_noise(pixels: NDArray[np.uint8], box: Box, noise: int) -> None:
    """Fill a box (top, left, height, width) of uint8 [H, W, 3] with the noise of a stream, in place."""
    top, left, height, width = box
    count = height * width * 3
    words = Draws(noise.to_bytes(8, "little")).raw(-(-count // 4))
    numbers = words.astype("<u8", copy=False).view("<u2")[:count].reshape(3, height, width)
    for levels, of_channel, channel in zip(noise_levels(), numbers, range(3), strict=True):
        pixels[top : top + height, left : left + width, channel] = levels.take(of_channel)


@cache
def noise_levels() -> NDArray[np.uint8]:
    """Return the table that turns 16 random bits into a level of noise.

    Integer lookups give the same noise on every machine; logarithms and cosines do not. No entry is nearer than 5e-7 to a
    rounding boundary, which is far more than any library's error, so the table is the same everywhere.

    Returns:
        uint8 [3, 65536]; entry i of a channel is its quantile (i + 0.5) / 65536.
    """
    normal = NormalDist()
    quantiles = np.array([normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)])
    levels = np.asarray(IMAGENET_MEAN)[:, None] + np.asarray(IMAGENET_STD)[:, None] * quantiles[None]
    table = np.clip(np.rint(levels * 255), 0, 255).astype(np.uint8)
    table.setflags(write=False)  # all callers share it
    return table
