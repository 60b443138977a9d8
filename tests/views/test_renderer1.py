"""Renderer 1: old label sets train as before. Its ids, draws and pixels are pinned, and equal to those of a plain renderer.

Nothing new is labelled with it. How far its pixels are from Pillow's is measured here, too.
"""

import io
import itertools
import math
import os
import sys
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageStat
from support import builders
from support.builders import shared_data
from support.golden_views import images, sha256
from support.photographs import difference, needs_photographs, photo
from support.pillow_views import operate_with_timm, render_with_pillow, resize_rows_first
from support.plain_views import grey, operate, render_plainly, warped
from timm.data import auto_augment

from pipeline import pixels
from pipeline.errors import UsageError
from pipeline.images.decode import decode
from pipeline.pixels.render import check_renderer, render, render_view
from pipeline.pixels.renderer1 import _grey, _mirror, apply_op
from pipeline.settings.files import load_recipe
from pipeline.views.draws import draws_for
from pipeline.views.randaugment import FILL, INCREASING, PLAIN, op_argument
from pipeline.views.recipe import Recipe
from pipeline.views.view import DrawnOp, Erase, View, draw_view

NAMES = sorted({*INCREASING, *PLAIN})
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
POINT = ("AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd", "Contrast", "Brightness")
BLENDED = ("Color", "Sharpness")


def of_renderer_1(preset: str, **changes) -> Recipe:
    """Return a preset as it was before renderer 2."""
    return load_recipe(preset, changes | {"renderer": 1})


def whole(image: np.ndarray, size: int, **parts) -> View:
    """Return a view that resizes the whole image to size x size."""
    return View(crop=(0, 0, *image.shape[:2]), resize=(size, size), window=(0, 0), img_size=size, renderer=1, **parts)


# --- ids and draws --------------------------------------------------------------------------------------------

IDS = [
    # the recipe ids of label sets that were made before renderer 2
    ("deit", "20ad9f5bf9d15dc7d5b1ee6db1b261d32bd76efab7332f85a25aee2d1ccf9bec"),
    ("deit-384", "b82591ece12cfbc1e44418099498f7917c4d7a09efdae360a392d982e3eb91e7"),
    ("crop-flip", "cdaae066d67b163adc40977afda9d0820d8aeb76576285126245bd108bc9bf57"),
    ("none", "9a0d39e1359cb4ee35b54a2f6100ad4635a973717938f3bcabffb485ff2791cb"),
]


@pytest.mark.parametrize(("preset", "recipe_id"), IDS)
def test_ids_of_old_recipes_are_what_they_were(preset, recipe_id):
    assert of_renderer_1(preset).id == recipe_id, "with another id no old label set can be trained on"


GOLDEN = [
    # preset, key, view number, view of a 375 x 500 image
    (
        "deit",
        "n01440764/n01440764_10026",
        5,
        View(
            crop=(8, 101, 346, 286),
            resize=(224, 224),
            window=(0, 0),
            img_size=224,
            flip=True,
            ops=(DrawnOp("ColorIncreasing", 0.22458060417352055), DrawnOp("Rotate", 26.088167431433)),
            erase=Erase(box=(54, 111, 48, 106), noise=689913030093198665),
            renderer=1,
        ),
    ),
    (
        "crop-flip",
        "a",
        0,
        View(crop=(93, 343, 137, 149), resize=(224, 224), window=(0, 0), img_size=224, flip=True, renderer=1),
    ),
    ("none", "a", 7, View(crop=(0, 0, 375, 500), resize=(256, 341), window=(16, 58), img_size=224, renderer=1)),
]


@pytest.mark.parametrize(("preset", "key", "view", "pinned"), GOLDEN)
def test_views_of_old_recipes_are_pinned(preset, key, view, pinned):
    drawn = draw_view(of_renderer_1(preset), key, view, height=375, width=500)
    assert drawn == pinned, "views of stored labels move"


def test_old_crops_are_drawn_with_the_functions_of_the_machine():
    """In an image so large the size of a crop shows every bit of them."""
    recipe, side = of_renderer_1("crop-flip"), 2**46
    for key in ("a", "b", "c", "d"):
        draws = draws_for(recipe.id, key, 0, "crop")
        crop = draw_view(recipe, key, 0, height=side, width=side).crop
        for _ in range(10):
            area = draws.uniform(*recipe.scale) * side * side
            ratio = math.exp(draws.uniform(math.log(recipe.ratio[0]), math.log(recipe.ratio[1])))
            height, width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if max(height, width) <= side:
                break
        assert crop[2:] == (height, width)


def test_pixels_of_old_views_are_pinned():
    """Of the steps that no library decides: a resize to the same size, tables and noise. `test_golden.py` replays a whole old label set."""
    ops = (
        DrawnOp("PosterizeIncreasing", 5),
        DrawnOp("SolarizeAdd", 77),
        DrawnOp("ContrastIncreasing", 1.43),
        DrawnOp("Equalize"),
        DrawnOp("SolarizeIncreasing", 200),
        DrawnOp("AutoContrast"),
        DrawnOp("BrightnessIncreasing", 0.61),
        DrawnOp("Invert"),
    )
    image, erase = images()["noise"], Erase(box=(5, 9, 20, 31), noise=2**64 - 1)
    view = whole(image, 64, flip=True, ops=ops, erase=erase)
    assert sha256(render(image, view)) == "c20b256eed30940fa17f6051a58fc2348a0d64a0c4f6b42261b64832d168e700"


# --- against a plain renderer ---------------------------------------------------------------------------------

RECIPES = [
    ("deit", {"img_size": 48}, 24),
    ("deit", {"img_size": 33, "reprob": 1.0}, 8),  # every view is erased, and rows are no multiple of four
    ("deit", {"img_size": 48, "aa": "rand-m9-n4-p1"}, 12),  # four operations, none left out
    ("deit-384", {"img_size": 40}, 6),
    ("crop-flip", {"img_size": 48}, 8),
    ("none", {"img_size": 48}, 1),
    ("deit", {"img_size": 8}, 6),
]
SIZES = [(1, 1), (1, 400), (400, 1), (3, 2), (24, 32), (97, 61), (220, 300)]


@pytest.mark.parametrize(("name", "changes", "views"), RECIPES)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_views_equal_the_plain_ones(name, changes, views, height, width):
    recipe = of_renderer_1(name, **changes)
    image = (
        builders.photo(height * 1000 + width, 50, 60)[:height, :width]
        if width < 50
        else builders.photo(7, max(height, 4), max(width, 5))
    )
    image = np.ascontiguousarray(np.resize(image, (height, width, 3)))
    for view in range(views):
        drawn = draw_view(recipe, f"{height}x{width}", view, height=height, width=width)
        np.testing.assert_array_equal(render(image, drawn), render_plainly(image, drawn), err_msg=str(drawn))


def test_views_of_photographs_equal_the_plain_ones():
    recipe = of_renderer_1("deit")
    seen: set[str] = set()
    with tarfile.open(next(shared_data("imagenet-sample").glob("*.tar"))) as tar:
        photographs = [tar.extractfile(member) for member in tar if member.name.endswith(".jpg")][:40]
        for number, file in enumerate(photographs):
            assert file is not None
            image = decode(file.read(), key="photo")
            for view in range(4):
                drawn = draw_view(recipe, str(number), view, height=image.shape[0], width=image.shape[1])
                np.testing.assert_array_equal(render(image, drawn), render_plainly(image, drawn), err_msg=str(drawn))
                seen |= {op.name for op in drawn.ops}
    assert seen == set(INCREASING)


KINDS = {
    "noise": lambda rng: rng.integers(0, 256, (24, 31, 3), dtype=np.uint8),
    "flat": lambda rng: np.full((9, 9, 3), 77, np.uint8),
    "narrow": lambda rng: rng.integers(100, 104, (24, 31, 3), dtype=np.uint8),
    "black and white": lambda rng: (rng.integers(0, 2, (16, 16, 3)) * 255).astype(np.uint8),
    "one pixel": lambda rng: rng.integers(0, 256, (1, 1, 3), dtype=np.uint8),
    "a line": lambda rng: rng.integers(0, 256, (2, 40, 3), dtype=np.uint8),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_pair_of_operations_equals_the_plain_ones(kind):
    image = KINDS[kind](np.random.default_rng(5))
    for first, second in itertools.product(PLAIN, PLAIN):
        fast, plain = image.copy(), image.copy()
        for name in (first, second):
            argument = op_argument(name, 7.3, negate=name == first)
            fast, plain = apply_op(fast, name, argument), operate(plain, name, argument)
        np.testing.assert_array_equal(fast, plain, err_msg=f"{first}, {second}")
    assert image.tobytes() == KINDS[kind](np.random.default_rng(5)).tobytes()


def test_luma_is_exact_for_every_level_of_every_channel():
    ramp = np.arange(256, dtype=np.uint8)
    others = np.array([0, 1, 77, 128, 254, 255], np.uint8)
    for order in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        grid = np.stack(np.meshgrid(ramp, ramp, others, indexing="ij"), axis=-1)[..., order].reshape(-1, 256, 3)
        np.testing.assert_array_equal(_grey(np.ascontiguousarray(grid)), grey(grid))


def test_shears_and_translations_are_opencv_s_cubic_warp_up_to_rounding():
    image, far = np.random.default_rng(3).integers(0, 256, (120, 90, 3), dtype=np.uint8), []
    for share in (-1.3, -0.3, -0.07, 0.0, 0.21, 0.405):
        for name, matrix in {
            "ShearX": [[1, share, 0], [0, 1, 0]],
            "ShearY": [[1, 0, 0], [share, 1, 0]],
            "TranslateXRel": [[1, 0, 90 * share], [0, 1, 0]],
            "TranslateYRel": [[1, 0, 0], [0, 1, 120 * share]],
        }.items():
            difference = np.abs(apply_op(image, name, share).astype(int) - warped(image, matrix))
            assert difference.max() <= 1, (name, share)
            far.append(difference.mean())
    assert np.mean(far) < 1e-3  # one level, in fewer than one value of a thousand


def test_a_mirrored_image_is_contiguous():
    pixels = np.random.default_rng(0).integers(0, 256, (7, 11, 3), dtype=np.uint8)
    np.testing.assert_array_equal(_mirror(pixels), pixels[:, ::-1])
    assert _mirror(pixels).flags.c_contiguous


def test_the_comparison_notices_one_changed_level():
    view = View(crop=(0, 0, 24, 32), resize=(16, 16), window=(0, 0), img_size=16, renderer=1)
    image = builders.photo(1)
    changed = image.copy()
    changed[12, 16] ^= 64
    assert (render(image, view) != render_plainly(changed, view)).any()


# --- operations against Pillow --------------------------------------------------------------------------------


def photographs() -> list[np.ndarray]:
    """Return ten real photographs at 224 x 224."""
    with tarfile.open(Path(os.environ["DEIT_CLI_DATA"], "imagenet-sample", "train-000000.tar")) as tar:
        names = sorted(name for name in tar.getnames() if name.endswith(".jpg"))[::12][:10]
        files = [tar.extractfile(name).read() for name in names]
    return [np.array(Image.open(io.BytesIO(file)).convert("RGB").resize((224, 224))) for file in files]


def timms(image: np.ndarray, name: str, argument: float) -> np.ndarray:
    """Apply timm's function for this operation, as its training transforms set it up for DeiT."""
    return np.array(operate_with_timm(Image.fromarray(image), name, argument, "bicubic"))


OP_SIZES = [
    # height, width
    (224, 224),
    (61, 120),
    # few pixels: Equalize's step is small and its table would pass 255
    (23, 23),
    (17, 31),
    (16, 16),
    (1, 7),
    (7, 1),
    (2, 2),
    (1, 1),
    (3, 2),
]
STRENGTHS = [(level, negate) for level in (0.0, 0.5, 3.3, 9.0, 10.0) for negate in (False, True)]
BASES = {name: name.removesuffix("Increasing") for name in NAMES}


@pytest.mark.parametrize("size", OP_SIZES, ids=str)
@pytest.mark.parametrize("name", [name for name in NAMES if BASES[name] in POINT])
def test_point_operations_are_pillows_exactly(name, size):
    for seed in range(2):
        image = photo(*size, seed)
        for level, negate in STRENGTHS:
            argument = op_argument(name, level, negate=negate)
            np.testing.assert_array_equal(
                apply_op(image, name, argument), timms(image, name, argument), err_msg=f"{argument}, seed {seed}"
            )


@pytest.mark.parametrize("name", ["Contrast", "Brightness"])
def test_blends_are_pillows_at_every_factor(name):
    """Truncation in float32: another width or order of operations shows at some factor."""
    ramp = np.stack([np.arange(256), np.arange(256)[::-1], np.full(256, 77)], axis=-1)[None].astype(np.uint8)
    for factor in np.linspace(0.1, 1.9, 361).tolist():
        np.testing.assert_array_equal(apply_op(ramp, name, factor), timms(ramp, name, factor), err_msg=str(factor))


def test_equalize_and_autocontrast_are_pillows_for_odd_histograms():
    rng = np.random.default_rng(5)
    tables = [
        # levels to draw from
        [0, 255],
        [128, 129],
        [7],
        [0, 1, 2, 253, 254, 255],
        list(range(100, 140)),
        list(range(256)),
    ]
    for levels in tables:
        for size in ((5, 5), (16, 16), (40, 37)):
            image = rng.choice(np.array(levels, np.uint8), (*size, 3))
            for name in ("Equalize", "AutoContrast"):
                np.testing.assert_array_equal(apply_op(image, name, 0), timms(image, name, 0), err_msg=f"{levels}")


@pytest.mark.parametrize("size", OP_SIZES, ids=str)
@pytest.mark.parametrize("name", [name for name in NAMES if BASES[name] in BLENDED])
def test_colour_and_sharpness_differ_from_pillows_by_one_level_at_most(name, size):
    image = photo(*size)
    for level, negate in STRENGTHS:
        argument = op_argument(name, level, negate=negate)
        assert difference(apply_op(image, name, argument), timms(image, name, argument)).max() <= 1, argument


def test_the_comparison_would_see_two_swapped_blends():
    image = photo(61, 120)
    assert difference(apply_op(image, "Color", 1.5), timms(image, "Color", 0.5)).max() > 10
    assert difference(apply_op(image, "Sharpness", 1.9), timms(image, "Sharpness", 0.1)).max() > 10


def covered(size: tuple[int, int], name: str, argument: float) -> np.ndarray:
    """Return the pixels that Pillow samples inside of the image, bool [H, W]."""
    white = Image.fromarray(np.full(size, 255, np.uint8))
    return np.array(auto_augment.NAME_TO_OP[name](white, argument, fillcolor=0, resample=Image.Resampling.NEAREST)) > 0


def core(area: np.ndarray) -> np.ndarray:
    """Return the pixels of an area that are more than four pixels from its border, bool [H, W]."""
    return cv2.erode(area.astype(np.uint8), np.ones((9, 9)), borderValue=0) > 0


@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometric_operations_are_close_to_pillows(name):
    """The kernels differ (OpenCV's cubic has a = -0.75, Pillow's -0.5), and so do the two outermost pixels."""
    for size in ((224, 224), (97, 181)):
        image = photo(*size)
        for level, negate in STRENGTHS:
            argument = op_argument(name, level, negate=negate)
            ours, theirs = apply_op(image, name, argument), timms(image, name, argument)
            assert difference(ours, theirs).mean() < 1.0, argument
            # Away from the border nothing is far off, and the uncovered corners are filled with the same colour.
            inside = covered(size, name, argument)
            assert difference(ours, theirs)[core(inside)].mean() < 0.8, argument
            assert (ours[core(~inside)] == FILL).all(), argument


@needs_photographs
@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometric_operations_are_close_to_pillows_on_photographs(name):
    means = []
    for image in photographs():
        for level, negate in ((9.0, False), (9.0, True), (3.3, False)):
            argument = op_argument(name, level, negate=negate)
            means.append(difference(apply_op(image, name, argument), timms(image, name, argument)).mean())
    assert np.mean(means) < 1.0
    assert max(means) < 2.0  # measured: 1.7, a rotated lattice of fine lines


def sampled(image: np.ndarray, matrix: tuple[float, ...]) -> np.ndarray:
    """Return the image sampled at matrix * position, slowly: cubic with a = -0.75, FILL outside, pixel centres at 1/2."""
    height, width = image.shape[:2]
    framed = np.full((height + 12, width + 12, 3), FILL, np.float64)
    framed[6:-6, 6:-6] = image
    out = np.empty(image.shape)
    for y in range(height):
        for x in range(width):
            a, b, c, d, e, f = matrix
            u, v = a * (x + 0.5) + b * (y + 0.5) + c - 0.5, d * (x + 0.5) + e * (y + 0.5) + f - 0.5
            u, v = min(max(u, -3), width + 2), min(max(v, -3), height + 2)
            left, top = math.floor(u) - 1, math.floor(v) - 1
            weight = np.outer([cubic(v - top - i) for i in range(4)], [cubic(u - left - i) for i in range(4)])
            out[y, x] = (weight[..., None] * framed[top + 6 : top + 10, left + 6 : left + 10]).sum((0, 1))
    return np.clip(np.rint(out), 0, 255)


def cubic(t: float, a: float = -0.75) -> float:
    t = abs(t)
    if t < 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def rotation(degrees: float, height: int, width: int) -> tuple[float, ...]:
    """Return Pillow's matrix of Image.rotate: output position to input position, about the middle."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y


MATRICES = [
    # operation, argument, matrix for an image of 40 x 52
    ("Rotate", 27.0, rotation(27, 40, 52)),
    ("Rotate", -13.0, rotation(-13, 40, 52)),
    ("ShearX", 0.27, (1, 0.27, 0, 0, 1, 0)),
    ("ShearY", -0.3, (1, 0, 0, -0.3, 1, 0)),
    ("TranslateXRel", 0.405, (1, 0, 0.405 * 52, 0, 1, 0)),
    ("TranslateYRel", -0.33, (1, 0, 0, 0, 1, -0.33 * 40)),
]


@pytest.mark.parametrize(("name", "argument", "matrix"), MATRICES)
def test_geometric_operations_sample_where_pillow_samples(name, argument, matrix):
    image = photo(40, 52, 3)
    error = difference(apply_op(image, name, argument), sampled(image, matrix))
    shifted = difference(apply_op(image, name, argument), sampled(image, (*matrix[:2], matrix[2] + 0.25, *matrix[3:])))
    assert error.mean() < 0.3  # OpenCV rounds positions to 1/32 of a pixel
    assert shifted.mean() > 2 * error.mean() + 0.5, "the test would not see a shift of a quarter of a pixel"


DIRECTIONS = [
    # operation, argument, where the dot at (left 80, top 30) of a 100 x 120 image goes to: left, top
    ("TranslateXRel", 0.25, (50, 30)),  # a positive share moves the image to the left
    ("TranslateXRel", -0.25, (110, 30)),
    ("TranslateYRel", 0.2, (80, 10)),  # and up
    ("TranslateYRel", -0.2, (80, 50)),
    ("ShearX", 0.3, (71, 30)),  # rows move to the left, the lower the more
    ("ShearX", -0.3, (89, 30)),
    ("ShearY", 0.3, (80, 6)),
    ("ShearY", -0.3, (80, 54)),
    ("Rotate", 30.0, (67.3, 22.7)),  # counter-clockwise, about (60, 50)
    ("Rotate", -30.0, (87.3, 42.7)),
]


@pytest.mark.parametrize(("name", "argument", "target"), DIRECTIONS)
def test_geometric_operations_move_a_dot_as_pillow_does(name, argument, target):
    dot = np.zeros((100, 120, 3), np.uint8)
    dot[28:32, 78:82] = 255
    for image in (apply_op(dot, name, argument), timms(dot, name, argument)):
        bright = image.astype(float).min(-1) * (image != FILL).any(-1) * (image.min(-1) > 130)
        y, x = np.mgrid[0.5:100, 0.5:120]
        centre = (bright * x).sum() / bright.sum(), (bright * y).sum() / bright.sum()
        assert centre == pytest.approx(target, abs=0.35)


@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometric_operations_at_level_zero_do_nothing(name):
    image = photo(33, 48)
    np.testing.assert_array_equal(apply_op(image, name, op_argument(name, 0.0, negate=False)), image)


@pytest.mark.parametrize("name", NAMES)
def test_every_operation_survives_constant_and_tiny_images(name):
    sizes = [(1, 1), (2, 2), (1, 2), (3, 1), (1, 300), (300, 1), (5, 5)]
    for height, width in sizes:
        for colour in ((0, 0, 0), (255, 255, 255), (9, 200, 90)):
            image = np.full((height, width, 3), colour, np.uint8)
            for level, negate in STRENGTHS:
                changed = apply_op(image, name, op_argument(name, level, negate=negate))
                assert (changed.shape, changed.dtype) == (image.shape, np.uint8)
                if name not in GEOMETRIC:
                    assert len(np.unique(changed.reshape(-1, 3), axis=0)) == 1, "a constant image stays constant"


@pytest.mark.parametrize("name", NAMES)
def test_no_operation_writes_to_its_input_or_returns_it(name):
    image = photo(20, 30)
    before = image.copy()
    for level, negate in STRENGTHS:
        changed = apply_op(image, name, op_argument(name, level, negate=negate))
        assert not np.shares_memory(changed, image), level
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("name", NAMES)
def test_every_operation_takes_images_that_are_not_contiguous(name):
    image = photo(21, 32)
    argument = op_argument(name, 7.0, negate=False)
    mirrored = apply_op(image[:, ::-1], name, argument)
    np.testing.assert_array_equal(mirrored, apply_op(np.ascontiguousarray(image[:, ::-1]), name, argument))


def test_increasing_operations_change_more_at_a_higher_level():
    image = photo(64, 64)
    for name in sorted(set(INCREASING) - {"AutoContrast", "Equalize", "Invert"}):
        low, high = (
            difference(apply_op(image, name, op_argument(name, level, negate=False)), image).mean()
            for level in (2.0, 9.0)
        )
        assert low < high, name


def test_grey_is_pillows_luma():
    """Contrast turns about the mean luma: a wrong weight of a channel would move it."""
    for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 13, 77)):
        image = np.full((4, 4, 3), colour, np.uint8)
        mean = int(ImageStat.Stat(Image.fromarray(image).convert("L")).mean[0] + 0.5)
        np.testing.assert_array_equal(apply_op(image, "Contrast", 0.0), np.full_like(image, mean))


def test_posterize_beyond_its_last_bit_is_black():
    """`mmax` above 10 lets the argument fall below zero, where there is nothing left to keep."""
    image = np.full((4, 4, 3), 200, np.uint8)
    for bits in (0, -1, -5):
        assert apply_op(image, "PosterizeIncreasing", bits).max() == 0


# --- resize against Pillow ------------------------------------------------------------------------------------


def spread(count: int) -> list[np.ndarray]:
    """Return real photographs, spread over the sample."""
    with tarfile.open(Path(os.environ["DEIT_CLI_DATA"], "imagenet-sample", "train-000000.tar")) as tar:
        names = sorted(name for name in tar.getnames() if name.endswith(".jpg"))
        files = [tar.extractfile(name).read() for name in names[:: len(names) // count][:count]]
    return [np.array(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]


def pillow_resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))


def pillow_resize_rows_first(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.array(resize_rows_first(Image.fromarray(image), size, "bicubic"))


RESIZES = [
    # height, width of the image; height, width of the crop; size of the view
    ((375, 500), (375, 500), 224),
    ((375, 500), (110, 93), 224),  # up
    ((375, 500), (224, 224), 224),  # no resize at all
    ((401, 333), (399, 121), 224),  # down in one direction, up in the other
    ((97, 61), (45, 33), 384),
    ((1000, 1300), (900, 1200), 32),  # far down: antialiasing
    ((50, 50), (1, 1), 16),
    ((50, 50), (2, 50), 31),
]


@pytest.mark.parametrize(("size", "crop", "img_size"), RESIZES)
def test_resize_is_pillows_bicubic(size, crop, img_size):
    image = photo(*size)
    top, left = (size[0] - crop[0]) // 2, (size[1] - crop[1]) // 3
    view = View(crop=(top, left, *crop), resize=(img_size, img_size), window=(0, 0), img_size=img_size, renderer=1)
    region = image[top : top + crop[0], left : left + crop[1]]
    assert difference(render(image, view), pillow_resize(region, (img_size, img_size))).mean() < 0.5
    error = difference(render(image, view), pillow_resize_rows_first(region, (img_size, img_size)))
    assert error.mean() < 0.03
    assert error.max() <= 2


@needs_photographs
def test_resize_is_pillows_bicubic_on_photographs():
    for number, image in enumerate(spread(25)):
        drawn = draw_view(of_renderer_1("crop-flip"), str(number), 0, height=image.shape[0], width=image.shape[1])
        top, left, tall, wide = drawn.crop
        region = image[top : top + tall, left : left + wide]
        pixels = render(image, drawn)[:, ::-1] if drawn.flip else render(image, drawn)
        assert difference(pixels, pillow_resize(region, (224, 224))).mean() < 0.5
        error = difference(pixels, pillow_resize_rows_first(region, (224, 224)))
        assert error.mean() < 0.03
        assert error.max() <= 2


def test_the_comparison_with_pillow_would_see_another_filter_or_half_a_pixel():
    image = photo(375, 500)
    ours = render(image, whole(image, 224))
    for other in (Image.Resampling.BILINEAR, Image.Resampling.LANCZOS):
        assert difference(ours, np.array(Image.fromarray(image).resize((224, 224), other))).mean() > 0.2
    box = (0.5, 0, 500, 375)
    shifted = np.array(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC, box=box))
    assert difference(ours, shifted).mean() > 0.2


def test_the_view_is_the_window_of_the_resized_crop():
    image = photo(60, 80)
    view = View(crop=(10, 20, 30, 40), resize=(48, 64), window=(5, 17), img_size=32, renderer=1)
    expected = pillow_resize(image[10:40, 20:60], (48, 64))[5:37, 17:49]
    assert difference(render(image, view), expected).max() <= 1


# --- views against Pillow and timm ----------------------------------------------------------------------------


def assert_close_to_reference(image: np.ndarray, recipe: Recipe, *, count: int, typical: float, worst: float) -> None:
    means = []
    for view in range(count):
        drawn = draw_view(recipe, "reference", view, height=image.shape[0], width=image.shape[1])
        ours, theirs = render(image, drawn), render_with_pillow(image, drawn)
        if drawn.erase:
            top, left, tall, wide = drawn.erase.box
            box = np.s_[top : top + tall, left : left + wide]
            np.testing.assert_array_equal(ours[box], theirs[box])
        means.append(difference(ours, theirs).mean())
    assert np.median(means) < typical
    assert max(means) < worst, f"view {int(np.argmax(means))}"


REFERENCES = [
    # recipe, mean difference of a typical view and of the worst, in levels of 255
    (of_renderer_1("deit"), 0.1, 2.0),
    (Recipe(img_size=96, aa="rand-m9-n4-p1-inc1", reprob=1.0, renderer=1), 1.0, 4.0),
    (of_renderer_1("crop-flip"), 0.1, 0.5),
    (of_renderer_1("none"), 0.1, 0.1),
]


@pytest.mark.parametrize(("recipe", "typical", "worst"), REFERENCES, ids=["deit", "four ops", "crop-flip", "none"])
def test_pixels_are_those_of_a_slow_reference(recipe, typical, worst):
    assert_close_to_reference(photo(181, 240), recipe, count=25, typical=typical, worst=worst)


@needs_photographs
def test_pixels_are_those_of_a_slow_reference_on_photographs():
    for image in spread(8):
        assert_close_to_reference(image, of_renderer_1("deit"), count=5, typical=1.0, worst=4.0)


def test_without_opencv_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.delitem(sys.modules, "pipeline.pixels.renderer1", raising=False)
    monkeypatch.delattr(pixels, "renderer1", raising=False)
    check_renderer(load_recipe("deit", {}))
    for asked in (check_renderer, lambda recipe: render_view(builders.photo(1), recipe, "a", 0)):
        with pytest.raises(UsageError, match=r'renderer 1 need a package .*cv2.* pip install "deit-cli\[renderer1\]"'):
            asked(of_renderer_1("deit"))
