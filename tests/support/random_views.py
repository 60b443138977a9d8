"""Views with parameters of every kind, of images of every shape: more than recipes can draw."""

from dataclasses import replace
from random import Random

import numpy as np
from numpy.typing import NDArray

from pipeline.images.samples import Box
from pipeline.pixels.packed import packed, records
from pipeline.views.randaugment import INCREASING, PLAIN, op_argument
from pipeline.views.recipe import Interpolation
from pipeline.views.view import DrawnOp, Erase, View
from support.photographs import photo

Pixels = NDArray[np.uint8]
SHAPES = ((40, 57), (57, 40), (64, 64), (1, 1), (1, 90), (90, 1), (2, 3), (23, 200), (200, 9))


def random_views(seed: int, count: int, size: int, *, layers: int = 3, scale: int = 1) -> list[tuple[Pixels, View]]:
    """Return images and views of them, all of them size x size.

    Args:
        seed: decides everything.
        count: number of views.
        size: height and width of the views.
        layers: largest number of operations of a view.
        scale: the images are so many times larger than SHAPES.
    """
    random = Random(seed)
    return [_random_view(random, number, size, layers, scale) for number in range(count)]


def views_of_each_op(size: int) -> list[tuple[Pixels, View]]:
    """Return a view for each operation at weak and strong magnitudes, both directions and filters."""
    image = photo(size + 5, size + 9, seed=1)
    whole = View(crop=(0, 0, size + 5, size + 9), resize=(size, size), window=(0, 0), img_size=size)
    ops = [
        DrawnOp(name, op_argument(name, level, negate=negate), interpolation)
        for name in sorted({*INCREASING, *PLAIN})
        for level, negate in ((0.0, False), (9.0, False), (9.3, True), (20.0, False))
        for interpolation in ("bilinear", "bicubic")
    ]
    # half pixels: the centres of some pixels come from the very edge
    moves = [DrawnOp(name, half / 2 / size) for name in ("TranslateXRel", "TranslateYRel") for half in (-3, -1, 1, 3)]
    turns = [DrawnOp("Rotate", degrees) for degrees in (0.0, 90.0, -90.0, 180.0, 270.0, 360.0, 45.0, -1e-14)]
    return [(image, replace(whole, ops=(op,))) for op in ops + moves + turns]


def warps_to_whole_numbers(size: int) -> tuple[Pixels, list[tuple[float, ...]]]:
    """Return an image, uint8 [size, size, 3], and matrices of affines whose exact values are often whole numbers, or nearly.

    There the last bit of each product and sum decides the pixel, so an operation that is left out, fused or moved is seen.
    """
    image = (np.random.default_rng(0).integers(0, 3, (size, size, 3)) * 125).astype(np.uint8)
    image[: size // 3] = (np.indices((size // 3, size)).sum(0) * 5 % 250)[..., None]
    fifths = [k / 5 for k in range(-7, 8) if k % 5]
    return image, [(1.0, b, c, 0.0, 1.0, f) for b, c, f in zip((0.0, 0.2) * 8, fifths, fifths[::-1], strict=False)]


def together(images_and_views: list[tuple[Pixels, View]]) -> tuple[Pixels, np.ndarray]:
    """Return the images one after the other, with a byte between them, and the records of the views."""
    buffers, packed_views, offset = [], [], 0
    for image, view in images_and_views:
        packed_views.append(packed(view, height=image.shape[0], width=image.shape[1], offset=offset))
        buffers += [image.reshape(-1), np.zeros(1, np.uint8)]
        offset += image.size + 1
    return np.concatenate(buffers), records(packed_views)


def warp_records(image: Pixels, matrices: list[tuple[float, ...]], interpolation: Interpolation) -> np.ndarray:
    """Return the records of affines of a square image, with any matrices."""
    size = len(image)
    ops = (DrawnOp("ShearX", 0.1, interpolation),)
    view = View(crop=(0, 0, size, size), resize=(size, size), window=(0, 0), img_size=size, ops=ops)
    made = records([packed(view, height=size, width=size)] * len(matrices)).copy()
    made["ops"]["matrix"][:, 0] = matrices
    return made


def _random_view(random: Random, number: int, size: int, layers: int, scale: int) -> tuple[Pixels, View]:
    height, width = (scale * side for side in random.choice(SHAPES))
    image = _image(random, height, width, number)
    resize = (size, size) if random.random() < 0.5 else (size + random.randrange(9), size + random.randrange(30))
    view = View(
        crop=_box(random, height, width),
        resize=resize,
        window=(random.randint(0, resize[0] - size), random.randint(0, resize[1] - size)),
        img_size=size,
        flip=random.random() < 0.5,
        ops=tuple(_op(random) for _ in range(random.randint(0, layers))),
        erase=Erase(box=_box(random, size, size), noise=random.getrandbits(64)) if random.random() < 0.5 else None,
        interpolation=random.choice(("bilinear", "bicubic")),
    )
    return image, view


def _image(random: Random, height: int, width: int, seed: int) -> Pixels:
    """Return a photograph, noise with only black and white, few levels, or one colour."""
    kind = random.randrange(6)
    noise = np.random.default_rng(seed)
    match kind:
        case 0:
            return (noise.integers(0, 2, (height, width, 3)) * 255).astype(np.uint8)
        case 1:
            return noise.integers(100, 104, (height, width, 3)).astype(np.uint8)
        case 2:
            return np.full((height, width, 3), noise.integers(0, 256, 3), np.uint8)
    return photo(height, width, seed)


def _box(random: Random, height: int, width: int) -> Box:
    box_height, box_width = (random.choice((side, 1, random.randint(1, side))) for side in (height, width))
    return random.randint(0, height - box_height), random.randint(0, width - box_width), box_height, box_width


def _op(random: Random) -> DrawnOp:
    name = random.choice(INCREASING + PLAIN)
    argument = op_argument(name, random.uniform(0, 12), negate=random.random() < 0.5)
    if name == "Rotate" and random.random() < 0.3:
        argument = random.choice((0.0, 90.0, 180.0, -90.0, 360.0, 45.0))
    return DrawnOp(name, argument, random.choice(("bilinear", "bicubic")))
