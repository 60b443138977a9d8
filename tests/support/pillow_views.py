"""Views as timm's transforms make them of Pillow images: what docs/views-v2.md is proved against."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from timm.data import auto_augment

from pipeline.views.draws import Draws
from pipeline.views.noise import IMAGENET_MEAN, IMAGENET_STD
from pipeline.views.view import Erase, View

Pixels = NDArray[np.uint8]
FILL = (124, 116, 104)
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def render_with_pillow(image: Pixels, view: View) -> Pixels:
    """Return the pixels of a view, uint8 [img_size, img_size, 3]."""
    top, left, height, width = view.crop
    picture = Image.fromarray(image).crop((left, top, left + width, top + height))
    picture = resize_rows_first(picture, view.resize, view.interpolation)
    top, left = view.window
    picture = picture.crop((left, top, left + view.img_size, top + view.img_size))
    if view.flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for op in view.ops:
        picture = operate_with_timm(picture, op.name, op.argument, op.interpolation)
    pixels = np.array(picture)
    if view.erase:
        top, left, height, width = view.erase.box
        pixels[top : top + height, left : left + width] = noise_with_numpy(view.erase)
    return pixels


def resize_rows_first(picture: Image.Image, size: tuple[int, int], interpolation: str) -> Image.Image:
    """Resize to (h, w), every row first and then every column.

    Until version 12, Pillow's `resize` does just this in one call. Pillow 13 begins with the columns where they shrink most (H > h and
    H - h > 2 (W - w)), which gives other levels where it does. A resize that changes one dimension is a single pass in all versions.
    """
    height, width = size
    rows = picture.resize((width, picture.height), FILTERS[interpolation])
    return rows.resize((width, height), FILTERS[interpolation])


def operate_with_timm(picture: Image.Image, name: str, argument: float, interpolation: str) -> Image.Image:
    """Apply timm's function for an operation of RandAugment, as its training transforms call it."""
    if name.startswith("Posterize") and argument <= 0:
        return Image.new("RGB", picture.size)  # what Pillow gave until version 13, which refuses to keep no bit
    arguments = () if auto_augment.LEVEL_TO_ARG[name] is None else (argument,)
    return auto_augment.NAME_TO_OP[name](picture, *arguments, fillcolor=FILL, resample=FILTERS[interpolation])


def noise_with_numpy(erase: Erase) -> Pixels:
    """Return the noise of an erased box, by NumPy's Philox and SciPy's quantile."""
    from scipy.special import ndtri

    height, width = erase.box[2:]
    draws, count = Draws(erase.noise.to_bytes(8, "little")), 3 * height * width
    words = np.random.Philox(key=np.array([draws.bits(), draws.bits()], np.uint64)).random_raw(-(-count // 4))
    numbers = (words[:, None] >> np.arange(0, 64, 16, dtype=np.uint64) & np.uint64(0xFFFF)).ravel()[:count]
    quantiles = ndtri((numbers + 0.5) / 65536).reshape(3, height, width).transpose(1, 2, 0)
    return np.clip(np.rint(255 * (np.array(IMAGENET_MEAN) + np.array(IMAGENET_STD) * quantiles)), 0, 255).astype(
        np.uint8
    )
