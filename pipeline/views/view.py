"""Views: `draw_view` chooses every parameter of a view at random. `pipeline.pixels` makes its pixels, without randomness.

A view is a pure function of (recipe id, sample key, view number) and of the image's size; it does not depend on
order, batch, worker, rank or machine.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

from pipeline.images.samples import Box
from pipeline.views import exact
from pipeline.views.draws import Draws, draws_for
from pipeline.views.randaugment import INCREASING, PLAIN, op_argument
from pipeline.views.recipe import RENDERER, Interpolation, RandAugment, Recipe

ATTEMPTS = 10  # as in timm, for crops and for erasing boxes
ERASE_AREA = (0.02, 1 / 3)  # share of the view (timm's RandomErasing)
ERASE_ASPECT = (0.3, 1 / 0.3)


@dataclass(frozen=True)
class Erase:
    """A box of pixel noise.

    Attributes:
        box: top, left, height, width in the view.
        noise: name of the noise stream.
    """

    box: Box
    noise: int


class DrawnOp(NamedTuple):
    """An operation of RandAugment that is applied: its name in timm, its argument (see `Op.argument`), its filter."""

    name: str
    argument: float = 0.0
    interpolation: Interpolation = "bicubic"


@dataclass(frozen=True)
class View:
    """Every parameter of one rendering, before mixing.

    Attributes:
        crop: top, left, height, width in the image.
        resize: height and width to which the crop is resized.
        window: top and left of the view in the resized crop.
        img_size: height and width of the view.
        flip: True if the view is mirrored left to right.
        ops: RandAugment's operations with their arguments, in order.
        erase: the erased box, if any.
        interpolation: filter of the resize.
        renderer: version of the definition of pixels.
    """

    crop: Box
    resize: tuple[int, int]
    window: tuple[int, int]
    img_size: int
    flip: bool = False
    ops: tuple[DrawnOp, ...] = ()
    erase: Erase | None = None
    interpolation: Interpolation = "bicubic"
    renderer: int = RENDERER


@dataclass(frozen=True)
class _Functions:
    """The functions between random bits and parameters that a machine's library could decide."""

    exp: Callable[[float], float]
    log: Callable[[float], float]
    normal_quantile: Callable[[float], float]


_FUNCTIONS = {
    1: _Functions(math.exp, math.log, NormalDist().inv_cdf),
    2: _Functions(exact.exp, exact.log, exact.normal_quantile),
}


def draw_view(recipe: Recipe, key: str, view: int, *, height: int, width: int) -> View:
    """Draw the parameters of one view of one sample.

    Args:
        recipe: the augmentation.
        key: sample key.
        view: view number, 0 or more.
        height: height of the image, pixels.
        width: width of the image, pixels.
    """
    recipe_id, functions = recipe.id, _FUNCTIONS[recipe.renderer]
    if recipe.crop == "center":
        crop, resize, window = _centre(recipe, height, width)
    else:
        crop = _random_crop(draws_for(recipe_id, key, view, "crop"), functions, recipe, height, width)
        resize, window = (recipe.img_size, recipe.img_size), (0, 0)
    filters = _filters(recipe, key, view)
    return View(
        crop=crop,
        resize=resize,
        window=window,
        img_size=recipe.img_size,
        flip=draws_for(recipe_id, key, view, "flip").chance(recipe.hflip),
        ops=_random_ops(draws_for(recipe_id, key, view, "randaug"), functions, recipe.randaugment, filters[1:]),
        erase=_random_erase(draws_for(recipe_id, key, view, "erase"), functions, recipe),
        interpolation=filters[0],
        renderer=recipe.renderer,
    )


def _filters(recipe: Recipe, key: str, view: int) -> list[Interpolation]:
    """Return the filters of the resize and of each layer of RandAugment."""
    layers = recipe.randaugment.layers if recipe.randaugment else 0
    if recipe.interpolation != "random":
        return [recipe.interpolation] * (1 + layers)
    draws = draws_for(recipe.id, key, view, "interpolation")
    return ["bilinear" if draws.chance(0.5) else "bicubic" for _ in range(1 + layers)]


def _random_crop(draws: Draws, functions: _Functions, recipe: Recipe, height: int, width: int) -> Box:
    """Draw a random resized crop like torchvision and timm: ten attempts, then a centre crop."""
    log_ratio = (functions.log(recipe.ratio[0]), functions.log(recipe.ratio[1]))
    for _ in range(ATTEMPTS):
        area = draws.uniform(*recipe.scale) * height * width
        ratio = functions.exp(draws.uniform(*log_ratio))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = draws.integer(height - crop_height + 1), draws.integer(width - crop_width + 1)
            return top, left, crop_height, crop_width
    crop_height = min(height, max(1, round(width / recipe.ratio[0])))
    crop_width = min(width, max(1, round(height * recipe.ratio[1])))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def _centre(recipe: Recipe, height: int, width: int) -> tuple[Box, tuple[int, int], tuple[int, int]]:
    """Return the crop, resize and window of timm's evaluation: shorter side img_size / crop_pct, then the centre."""
    # Only the centre of a strip is visible, and resizing all of a 1 x 5000 image would take gigabytes.
    crop_height, crop_width = min(height, 8 * width), min(width, 8 * height)
    crop = ((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)
    short = math.floor(recipe.img_size / recipe.crop_pct)
    if crop_height <= crop_width:
        resized = (short, short * crop_width // crop_height)
    else:
        resized = (short * crop_height // crop_width, short)
    return crop, resized, (round((resized[0] - recipe.img_size) / 2), round((resized[1] - recipe.img_size) / 2))


def _random_ops(
    draws: Draws, functions: _Functions, config: RandAugment | None, filters: list[Interpolation]
) -> tuple[DrawnOp, ...]:
    if config is None:
        return ()
    names = INCREASING if config.increasing else PLAIN
    ops: list[DrawnOp] = []
    for interpolation in filters:
        name = names[draws.integer(len(names))]
        applied, level, negate = draws.chance(config.prob), _random_level(draws, functions, config), draws.chance(0.5)
        if applied:
            ops.append(DrawnOp(name, op_argument(name, level, negate=negate), interpolation))
    return tuple(ops)


def _random_level(draws: Draws, functions: _Functions, config: RandAugment) -> float:
    if config.magnitude_std > 100:
        level = draws.uniform(0, config.magnitude)
    else:
        level = config.magnitude + config.magnitude_std * draws.normal(functions.normal_quantile)
    return max(0.0, min(level, config.magnitude_max))


def _random_erase(draws: Draws, functions: _Functions, recipe: Recipe) -> Erase | None:
    """Return one box of pixel noise with probability `reprob`, as timm's RandomErasing chooses it."""
    if not draws.chance(recipe.reprob):
        return None
    size, log_aspect = recipe.img_size, (functions.log(ERASE_ASPECT[0]), functions.log(ERASE_ASPECT[1]))
    for _ in range(ATTEMPTS):
        area = draws.uniform(*ERASE_AREA) * size * size
        aspect = functions.exp(draws.uniform(*log_aspect))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < size and width < size:
            box = (draws.integer(size - height + 1), draws.integer(size - width + 1), height, width)
            return Erase(box=box, noise=draws.bits())
    return None
