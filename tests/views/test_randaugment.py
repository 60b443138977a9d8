"""RandAugment's operations against timm's: the same list, the same arguments, and Pillow's pixels."""

import io
import math
import os
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageStat
from support.photographs import difference, needs_photographs, photo
from timm.data import auto_augment

from pipeline.views.randaugment import FILL, INCREASING, OPERATIONS, PLAIN, apply_op, op_argument
from pipeline.views.recipe import MAX_LAYERS

NAMES = sorted({*INCREASING, *PLAIN})
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
POINT = ("AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd", "Contrast", "Brightness")
BLENDED = ("Color", "Sharpness")


def photographs() -> list[np.ndarray]:
    """Return ten real photographs at 224 x 224."""
    with tarfile.open(Path(os.environ["DEIT_CLI_DATA"], "imagenet-sample", "train-000000.tar")) as tar:
        names = sorted(name for name in tar.getnames() if name.endswith(".jpg"))[::12][:10]
        files = [tar.extractfile(name).read() for name in names]
    return [np.array(Image.open(io.BytesIO(file)).convert("RGB").resize((224, 224))) for file in files]


def timms(image: np.ndarray, name: str, argument: float) -> np.ndarray:
    """Apply timm's function for this operation, as its training transforms set it up for DeiT."""
    if name.startswith("Posterize") and argument == 0:
        return np.zeros_like(image)  # what Pillow gave until it began to refuse 0 bits
    arguments = () if auto_augment.LEVEL_TO_ARG[name] is None else (argument,)
    options = {"fillcolor": FILL, "resample": Image.Resampling.BICUBIC}
    return np.array(auto_augment.NAME_TO_OP[name](Image.fromarray(image), *arguments, **options))


# --- arguments ------------------------------------------------------------------------------------------------


def test_the_lists_are_timms():
    assert list(INCREASING) == auto_augment._RAND_INCREASING_TRANSFORMS
    assert list(PLAIN) == auto_augment._RAND_TRANSFORMS
    assert len(INCREASING) == len(OPERATIONS) == MAX_LAYERS == 15


def test_the_filling_is_timms_for_the_imagenet_mean():
    assert list(FILL) == [round(255 * mean) for mean in (0.485, 0.456, 0.406)]


# 0.05 steps meet every step of the whole-numbered arguments; above 10 only with `mmax`
LEVELS = [*np.arange(0, 10.001, 0.05).tolist(), 9.999999, 12.5, 20.0]


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_timms_at_every_level_and_for_both_sides_of_the_coin(name, monkeypatch):
    level_to_argument = auto_augment.LEVEL_TO_ARG[name]
    for negate in (False, True):
        monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value, sign=negate: -value if sign else value)
        for level in LEVELS:
            theirs = level_to_argument(level, {})[0] if level_to_argument else 0.0
            assert op_argument(name, level, negate=negate) == pytest.approx(theirs, abs=1e-12), (level, negate)


def test_timms_coin_has_two_sides():
    """What the test above replaces: a sign, and nothing else."""
    assert {auto_augment._randomly_negate(3.0) for _ in range(100)} == {-3.0, 3.0}


def test_whole_numbered_arguments_are_whole():
    for name in ("Posterize", "PosterizeIncreasing", "Solarize", "SolarizeIncreasing", "SolarizeAdd"):
        assert all(isinstance(op_argument(name, level, negate=False), int) for level in LEVELS)


# --- pixels ---------------------------------------------------------------------------------------------------

SIZES = [
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


@pytest.mark.parametrize("size", SIZES, ids=str)
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


@pytest.mark.parametrize("size", SIZES, ids=str)
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
