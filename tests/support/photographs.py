"""Images with the detail of photographs for tests of pixels, and the distance between two images."""

import os

import numpy as np
import pytest
from PIL import Image

needs_photographs = pytest.mark.skipif(
    "DEIT_CLI_DATA" not in os.environ, reason="DEIT_CLI_DATA is not set: no photographs"
)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return smooth colours, curved edges and some grain, uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)

    def clouds(cells: int) -> np.ndarray:
        small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.float32)

    objects = np.where(clouds(6)[..., :1] > 128, clouds(5), 255 - clouds(9))
    grain = rng.normal(0, 3, (height, width, 3))
    return np.clip(np.rint(0.5 * objects + 0.5 * clouds(7) + grain), 0, 255).astype(np.uint8)


def difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.abs(one.astype(int) - other.astype(int))
