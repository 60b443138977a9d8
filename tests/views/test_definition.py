"""The definition of renderer 2 (docs/views-v2.md), obeyed by `support.defined_views`, against Pillow and timm themselves: no level differs.

Pillow computes its affine transforms, its blends and the weights of a resize in floating point. The definition rounds every operation on its
own, as compilers do for x86-64. A compiler for another processor (ARM64, POWER) may fuse a product and a sum into one instruction, which rounds
once; such a build of Pillow may give another level for a value that is within 1e-13 (blends: 1e-5) of a whole number. These tests may then fail
there, by one level in a few values. What is defined, and what our kernels give, does not change.

Where Pillow's versions differ: version 13 resizes columns first if H > h and H - h > 2 (W - w); see `resize_rows_first`. And it refuses to
keep no bit at all in Posterize, for which it used to give black.
"""

import itertools
import os
import platform
import random
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image
from support.builders import shared_data
from support.defined_views import (
    argument_of,
    draw_by_definition,
    erase,
    luma,
    operate,
    render_by_definition,
    resize,
    smooth,
)
from support.golden_views import images
from support.photographs import difference, photo
from support.pillow_views import FILTERS, operate_with_timm, render_with_pillow, resize_rows_first
from timm.data import auto_augment, transforms_factory

from pipeline.images.decode import decode
from pipeline.views.randaugment import INCREASING, PLAIN
from pipeline.views.recipe import PRESETS, Recipe
from pipeline.views.view import DrawnOp, Erase, View

NAMES = sorted({*INCREASING, *PLAIN})
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
PILLOW = tuple(int(part) for part in PIL.__version__.split(".")[:2])


def kinds() -> dict[str, np.ndarray]:
    """Return images of all kinds, uint8 [H, W, 3], none of them large."""
    rng = np.random.default_rng(0)
    return images() | {
        "photo 61 x 120": photo(61, 120),
        "square": photo(40, 40),
        "two columns": photo(37, 2),
        "two pixels": photo(2, 1),
        "2 x 2": photo(2, 2),
        "3 x 3": photo(3, 3),
        "3 x 2": photo(3, 2),
        "4 x 3": photo(4, 3),
        "few levels": rng.choice(np.array([0, 1, 2, 253, 254, 255], np.uint8), (40, 37, 3)),
        "two levels": rng.choice(np.array([128, 129], np.uint8), (16, 16, 3)),
        "narrow": rng.integers(100, 140, (23, 29, 3), dtype=np.uint8),
        "black": np.zeros((5, 7, 3), np.uint8),
        "white": np.full((5, 7, 3), 255, np.uint8),
    }


KINDS = kinds()


def timms(image: np.ndarray, name: str, argument: float, interpolation: str = "bicubic") -> np.ndarray:
    return np.array(operate_with_timm(Image.fromarray(image), name, argument, interpolation))


# --- operations -----------------------------------------------------------------------------------------------

LEVELS = [0.0, 3.3, 8.51, 9.77, 10.0, 13.9, 27.3]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_operations_are_timms(name, kind):
    base = name.removesuffix("Increasing")
    for level, negate in itertools.product(LEVELS, (False, True)):
        argument = argument_of(base, level, negate, name != base)
        for interpolation in FILTERS if base in GEOMETRIC else ["bicubic"]:
            ours, theirs = (apply(KINDS[kind], name, argument, interpolation) for apply in (operate, timms))
            np.testing.assert_array_equal(ours, theirs, err_msg=f"{argument} {interpolation}")


ANGLES = [
    *(float(degrees) for degrees in range(-360, 721, 45)),  # of these some only move pixels
    *(30.0, 60.0, -30.0, -120.0, 210.0, 330.0),
    *(1e-14, -1e-14, 1e-300, -1e-300, 89.99999999999999, 90.00000000000001, 179.99999999999997, 359.99999999999994),
    *random.Random(0).sample([k / 7 for k in range(-2600, 2600)], 60),
]


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("kind", ["square", "photo 61 x 120", "noise", "one row", "one pixel", "saturated"])
def test_rotations_are_pillows_at_every_angle(kind, interpolation):
    for degrees in ANGLES:
        ours, theirs = (apply(KINDS[kind], "Rotate", degrees, interpolation) for apply in (operate, timms))
        np.testing.assert_array_equal(ours, theirs, err_msg=str(degrees))


SHIFTS = [
    # shears and shares of the size: nothing, whole pixels, halves, nearly a whole pixel, everything, more than everything
    *(0.0, -0.0, 0.025, 0.25, 0.5, -0.5, 0.0125, 1 / 3, 1.0, -1.0, 1.5, -7.0, 1e-16, -1e-16, 0.024999999999999998),
    *random.Random(1).sample([k / 1000 for k in range(-450, 451)], 40),
]


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("name", GEOMETRIC[1:])
def test_shears_and_translations_are_pillows_at_every_argument(name, interpolation):
    for kind in ("square", "photo 61 x 120", "noise", "one row", "two columns", "one pixel"):
        for argument in SHIFTS:
            ours, theirs = (apply(KINDS[kind], name, argument, interpolation) for apply in (operate, timms))
            np.testing.assert_array_equal(ours, theirs, err_msg=f"{kind} {argument}")


def levels_beside_levels() -> np.ndarray:
    """Return an image that has every pair of levels of two channels, uint8 [256, 256, 3]."""
    first, second = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    return np.stack([first, second, (first * 3 + second * 5) % 256], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("name", ["Color", "Contrast", "Brightness", "Sharpness"])
def test_blends_are_pillows_at_many_factors(name):
    """Truncation in real32: another width or order of operations shows at some factor."""
    image, generator = levels_beside_levels(), random.Random(name)
    for factor in [0.0, 0.1, 1.0, 1.9, *(generator.uniform(-1, 4) for _ in range(30))]:
        np.testing.assert_array_equal(
            operate(image, name, factor, "bicubic"), timms(image, name, factor), err_msg=str(factor)
        )


@pytest.mark.parametrize("name", ["Posterize", "Solarize", "SolarizeAdd"])
def test_whole_numbered_arguments_are_pillows_at_every_value(name):
    image = levels_beside_levels()[:, ::16]
    for argument in range(-2, 9) if name == "Posterize" else range(257):
        if argument <= 128 or name == "Solarize":
            np.testing.assert_array_equal(operate(image, name, argument, "bicubic"), timms(image, name, argument))


def test_posterize_to_no_bit_is_black_and_newer_pillows_refuse_it():
    """The one exception: timm asks Pillow for it at magnitudes of 10 and above."""
    picture = Image.fromarray(KINDS["square"])
    assert operate(KINDS["square"], "PosterizeIncreasing", 0, "bicubic").max() == 0
    if PILLOW >= (13, 0):
        with pytest.raises(ValueError, match="bits"):
            auto_augment.posterize(picture, 0)
    else:
        assert np.array(auto_augment.posterize(picture, 0)).max() == 0


def test_luma_and_smoothing_are_pillows():
    image = levels_beside_levels()
    np.testing.assert_array_equal(luma(image), np.array(Image.fromarray(image).convert("L")))
    for kind in KINDS.values():
        theirs = np.array(Image.fromarray(kind).filter(PIL.ImageFilter.SMOOTH))
        np.testing.assert_array_equal(smooth(kind), theirs)


@pytest.mark.parametrize("size", [(1, 300), (5, 61), (16, 16), (16, 17), (23, 23), (40, 37)], ids=str)
def test_equalize_is_pillows_for_histograms_of_every_shape(size):
    """Few pixels make a step of 0, 1 or 2, with which the table would pass 255."""
    rng = np.random.default_rng(size)
    for count in (1, 2, 3, 7, 30, 256):
        for _ in range(10):
            used = rng.choice(256, count, replace=False).astype(np.uint8)
            image = rng.choice(used, (*size, 3), p=rng.dirichlet(np.full(count, 0.5)))
            for name in ("Equalize", "AutoContrast"):
                np.testing.assert_array_equal(operate(image, name, 0, "bicubic"), timms(image, name, 0))


# --- resize ---------------------------------------------------------------------------------------------------

RESIZES = [
    # from height, width, to height, width
    ((375, 500), (224, 224)),
    ((110, 93), (224, 224)),  # up
    ((224, 224), (224, 224)),  # not at all
    ((224, 100), (224, 50)),  # in one direction
    ((100, 224), (50, 224)),
    ((399, 121), (224, 224)),  # up and down
    ((45, 33), (97, 101)),
    ((900, 1200), (32, 32)),  # far down
    ((1, 1), (31, 16)),
    ((2, 50), (31, 16)),
    ((50, 1), (1, 50)),
    ((3, 2), (2, 3)),
    ((1, 3000), (33, 34)),
    ((3000, 1), (33, 34)),
    ((7, 2000), (1, 1)),
    ((13, 17), (1, 400)),
    ((223, 225), (224, 224)),
]


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(("old", "new"), RESIZES)
def test_resize_is_pillows_rows_first(old, new, interpolation):
    for image in (photo(*old), np.resize(KINDS["saturated"], (*old, 3))):
        theirs = resize_rows_first(Image.fromarray(image), new, interpolation)
        np.testing.assert_array_equal(resize(image, new, interpolation), np.array(theirs))


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(("old", "new"), RESIZES)
def test_resize_is_pillows_in_one_call_up_to_the_order_of_its_passes(old, new, interpolation):
    """From version 13 on, Pillow begins with the columns of what shrinks most in height."""
    image = photo(*old)
    theirs = np.array(Image.fromarray(image).resize(new[::-1], FILTERS[interpolation]))
    columns_first = PILLOW >= (13, 0) and old[0] > new[0] and old[0] - new[0] > 2 * (old[1] - new[1])
    if columns_first:
        ours = resize(resize(image, (new[0], old[1]), interpolation), new, interpolation)
        assert difference(resize(image, new, interpolation), theirs).max() <= 3
    else:
        ours = resize(image, new, interpolation)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("interpolation", FILTERS)
def test_resize_is_pillows_at_random_sizes(interpolation):
    rng = np.random.default_rng(3)
    for _ in range(150):
        height, width, *size = (int(x) for x in np.exp(rng.uniform(0, np.log(150), 4)))
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        theirs = resize_rows_first(Image.fromarray(image), (size[0], size[1]), interpolation)
        np.testing.assert_array_equal(resize(image, (size[0], size[1]), interpolation), np.array(theirs))


# --- whole views ----------------------------------------------------------------------------------------------

RECIPES = {
    "deit": PRESETS["deit"],
    "crop-flip": PRESETS["crop-flip"],
    "none": PRESETS["none"],
    "random filters": Recipe(img_size=48, interpolation="random", aa="rand-m9-mstd0.5-inc1-n3-p0.9", reprob=1.0),
    "bilinear": Recipe(img_size=33, interpolation="bilinear"),
    "beyond 10": Recipe(img_size=40, aa="rand-m14-mstd4-mmax30-n4-p1"),
}


@pytest.mark.parametrize(
    "kind", ["photo", "one pixel", "one row", "wide", "tall", "dark", "saturated", "photo 61 x 120"]
)
@pytest.mark.parametrize("recipe", RECIPES)
def test_views_are_pillows_and_timms(recipe, kind):
    image = KINDS[kind]
    for number in range(2 if RECIPES[recipe].img_size == 224 else 12):
        view = draw_by_definition(RECIPES[recipe], kind, number, *image.shape[:2])
        ours, theirs = (render(image, view) for render in (render_by_definition, render_with_pillow))
        np.testing.assert_array_equal(ours, theirs, err_msg=str(view))


def test_a_view_is_what_timms_own_transform_makes_of_the_same_decisions(monkeypatch):
    """`timm.data.create_transform` itself: crop, resize and flip are torchvision's, and RandAugment is timm's class."""
    view = View(
        crop=(20, 30, 100, 90),
        resize=(64, 64),
        window=(0, 0),
        img_size=64,
        flip=True,
        ops=(DrawnOp("Rotate", 27.0), DrawnOp("ColorIncreasing", 1.81)),
    )
    image = photo(150, 200)
    transform = transforms_factory.transforms_imagenet_train(
        64, auto_augment="rand-m9-inc1-n2", interpolation="bicubic", hflip=1.0, normalize=False, color_jitter=None
    )
    crop, _, randaugment, *_ = transform.transforms
    top, left, height, width = view.crop
    monkeypatch.setattr(crop, "get_params", lambda *_: (top, left, height, width))
    chosen = {op.name: op for op in randaugment.ops}
    monkeypatch.setattr(auto_augment.np.random, "choice", lambda *_, **__: [chosen[op.name] for op in view.ops])
    monkeypatch.setattr(auto_augment.random, "random", lambda: 0.5)  # applied, and not negated
    for op, argument in zip(view.ops, ((9.0,), (9.0,)), strict=True):
        monkeypatch.setattr(chosen[op.name], "magnitude", argument[0])
    theirs = transform(Image.fromarray(image)).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(render_by_definition(image, view), theirs)


def test_erased_boxes_are_the_last_step_and_touch_nothing_else():
    image, box = KINDS["square"], Erase(box=(3, 5, 11, 9), noise=77)
    plain = View(crop=(0, 0, 40, 40), resize=(40, 40), window=(0, 0), img_size=40, ops=(DrawnOp("Invert"),))
    erased = View(**vars(plain) | {"erase": box})
    np.testing.assert_array_equal(render_by_definition(image, erased), erase(render_by_definition(image, plain), box))
    changed = (render_by_definition(image, erased) != render_by_definition(image, plain)).any(-1)
    assert changed[3:14, 5:14].mean() > 0.95
    assert changed.sum() == changed[3:14, 5:14].sum()


def test_the_reference_changes_no_image_that_it_is_given():
    image = KINDS["square"]
    before = image.copy()
    whole = View(
        crop=(0, 0, 40, 40), resize=(40, 40), window=(0, 0), img_size=40, erase=Erase(box=(0, 0, 9, 9), noise=1)
    )
    pixels = render_by_definition(image, whole)
    assert not np.shares_memory(pixels, image)
    np.testing.assert_array_equal(image, before)


# --- many views -----------------------------------------------------------------------------------------------


def photographs() -> Iterator[np.ndarray]:
    """Yield real photographs: all of the sample, where there is one, and 200 of CIFAR-10."""
    with tarfile.open(next(shared_data("imagenet-sample").glob("*.tar"))) as tar:
        for member in tar:
            if member.name.endswith(".jpg"):
                yield decode(tar.extractfile(member).read(), key=member.name)
    import pyarrow.parquet as parquet

    file = next(Path(os.environ["DEIT_CLI_DATA"], "cifar10").rglob("*.parquet"))
    for row in next(parquet.ParquetFile(file).iter_batches(200)).to_pylist():
        yield decode(row["img"]["bytes"], key="cifar10")


MANY = [
    # recipe, views of each photograph
    (Recipe(img_size=32, interpolation="random"), 8),
    (Recipe(img_size=48, interpolation="random", aa="rand-m11-mstd3-mmax20-inc1-n4-p0.9", seed=5), 4),
    (Recipe(img_size=40, aa="rand-m9-mstd101-n3-p0.9", reprob=0.0), 3),
    (PRESETS["deit"], 1),
]


@pytest.mark.slow
def test_5000_views_of_photographs_are_pillows_and_timms():
    count, ops = 0, Counter()
    for number, image in enumerate(photographs()):
        for recipe, views in MANY:
            for view in range(views):
                drawn = draw_by_definition(recipe, str(number), view, *image.shape[:2])
                ours, theirs = (render(image, drawn) for render in (render_by_definition, render_with_pillow))
                np.testing.assert_array_equal(ours, theirs, err_msg=f"{number} {drawn}")
                ops.update((op.name, op.interpolation) for op in drawn.ops)
                count += 1
    assert count >= 5000
    assert {(name, filter_) for name in INCREASING for filter_ in FILTERS} <= set(ops)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="Pillow may fuse products and sums here")
def test_a_fused_product_and_sum_would_be_another_view():
    """The exactness of the comparisons above: the same formula with one rounding less gives another level somewhere."""
    image = levels_beside_levels()
    b, p, m = (x.astype(np.float64) for x in (luma(image)[..., None] + 0 * image, image, np.float32(1.7)))
    fused = np.trunc(np.clip((b + m * (p - b)).astype(np.float32), 0, 255))  # exact in real64, then rounded once
    assert (fused != timms(image, "Color", 1.7)).any()
