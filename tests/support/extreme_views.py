"""Views at the limits: sizes, crops, resizes and arguments that recipes allow and hardly ever draw."""

from random import Random

import numpy as np
from numpy.typing import NDArray

from pipeline.images.samples import Box
from pipeline.views.randaugment import INCREASING, PLAIN, op_argument
from pipeline.views.recipe import MAX_LAYERS
from pipeline.views.view import DrawnOp, Erase, View
from support.photographs import photo

Pixels = NDArray[np.uint8]
FACTORS = (0.0, 1.0, 0.1, 0.5, 1.9, 2.0, -1.0, -300.0, 1e3, 1e30)
SHEARS = (0.0, 1e-16, -1e-12, 1e-9, 1 / 3, 0.5, 1.0, -1.0, 2.0, 30.0, -1e3)
MOVES = (0.0, 1e-17, 1e-10, 1 / 3, 0.5, -0.25, 1.0, -1.0, 0.999, 2.0, -45.0, 1e6, -1e12)
TURNS = (0.0, 1e-14, -1e-14, 1e-9, -1e-6, 30.0, 45.0, 90.0, -90.0, 180.0, 270.0, 360.0, 359.9999, -719.0, 3000.0)
ARGUMENTS = {
    "Rotate": TURNS,
    "Posterize": (8, 7, 1, 0, -396),
    "Solarize": (0, 1, 128, 255, 256),
    "SolarizeAdd": (0, 1, 127, 128),
    **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), FACTORS),
    **dict.fromkeys(("ShearX", "ShearY"), SHEARS),
    **dict.fromkeys(("TranslateXRel", "TranslateYRel"), MOVES),
}


def extreme_views(seed: int, count: int, *, most: int = 70, layers: int = MAX_LAYERS) -> list[tuple[Pixels, View]]:
    """Return images and views of them.

    Args:
        seed: decides everything.
        count: number of views.
        most: largest height and width of a view.
        layers: largest number of operations of a view.
    """
    random = Random(seed)
    return [_extreme_view(random, most, layers) for _ in range(count)]


def _extreme_view(random: Random, most: int, layers: int) -> tuple[Pixels, View]:
    size = random.choice((1, 2, 3, random.randint(1, most), random.randint(1, most), most))
    image = _image(random, *_shape(random, size))
    height, width = image.shape[:2]
    crop = random.choice(((0, 0, height, width), _box(random, height, width), _corner(random, height, width)))
    resize = random.choice(((size, size), (size + random.randrange(3), size + random.randrange(200)), crop[2:]))
    if min(resize) < size:
        resize = (size, size)
    view = View(
        crop=crop,
        resize=resize,
        window=(random.randint(0, resize[0] - size), random.randint(0, resize[1] - size)),
        img_size=size,
        flip=random.random() < 0.5,
        ops=tuple(_op(random, size) for _ in range(random.choice((0, 1, 1, 2, random.randint(0, layers))))),
        erase=_erase(random, size),
        interpolation=random.choice(("bilinear", "bicubic")),
    )
    return image, view


def _shape(random: Random, size: int) -> tuple[int, int]:
    """Return a height and a width: tiny, that of the view, strips, or so large that each output has hundreds of inputs."""
    any_side, long = random.randint(1, 90), random.choice((700, 4000))
    shapes = [(1, 1), (size, size), (any_side, random.randint(1, 90)), (1, any_side), (any_side, 1)]
    shape = random.choice([*shapes, (any_side, long)])
    return shape if random.random() < 0.5 else (shape[1], shape[0])


def _image(random: Random, height: int, width: int) -> Pixels:
    """Return a photograph, black and white noise, one colour, stripes, a slope (its warps are nearly whole numbers), or noise."""
    noise = np.random.default_rng(random.getrandbits(32))
    y, x = np.indices((height, width))
    match random.randrange(8):
        case 0:
            return (noise.integers(0, 2, (height, width, 3)) * 255).astype(np.uint8)
        case 1:
            return np.full((height, width, 3), random.choice((0, 255, noise.integers(0, 256, 3))), np.uint8)
        case 2:
            return np.repeat((random.choice((x, y)) % 2 * 255)[..., None], 3, axis=2).astype(np.uint8)
        case 3:
            return np.stack(
                [(random.randint(-3, 3) * x + random.randint(-3, 3) * y) % 256 for _ in range(3)], 2
            ).astype(np.uint8)
        case 4:
            return noise.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return photo(height, width, random.getrandbits(32))


def _box(random: Random, height: int, width: int) -> Box:
    tall, wide = (random.choice((side, 1, random.randint(1, side))) for side in (height, width))
    return random.randint(0, height - tall), random.randint(0, width - wide), tall, wide


def _corner(random: Random, height: int, width: int) -> Box:
    """Return a box that ends with the last byte of the image."""
    tall, wide = random.randint(1, height), random.randint(1, width)
    return height - tall, width - wide, tall, wide


def _erase(random: Random, size: int) -> Erase | None:
    boxes = (_box(random, size, size), _corner(random, size, size), (0, 0, size, size), (size, 0, 0, 0))
    return Erase(random.choice(boxes), random.getrandbits(64)) if random.random() < 0.5 else None


def _op(random: Random, size: int) -> DrawnOp:
    name, interpolation = random.choice(INCREASING + PLAIN), random.choice(("bilinear", "bicubic"))
    argument = op_argument(name, random.choice((random.uniform(0, 12), 1e3)), negate=random.random() < 0.5)
    extremes = ARGUMENTS.get(name.removesuffix("Increasing"), ())
    if name.startswith("Translate"):
        extremes += (random.randint(-2 * size, 2 * size) / size, random.randint(-4 * size, 4 * size) / 2 / size)
    if extremes and random.random() < 0.6:
        argument = random.choice(extremes)
    return DrawnOp(name, argument, interpolation)
