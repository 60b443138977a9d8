"""Views: a pure function of (recipe, key, view), and the pixels that timm and Pillow would make of it."""

import hashlib
import io
import itertools
import math
import os
import random
import resource
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from scipy import stats
from support.builders import with_checkout
from support.defined_views import draw_by_definition
from support.photographs import difference, needs_photographs, photo
from support.pillow_views import render_with_pillow, resize_rows_first

import pipeline
from pipeline.errors import BadImageError
from pipeline.images.decode import encode
from pipeline.pixels.render import render, render_view, render_views
from pipeline.views import exact
from pipeline.views import view as views
from pipeline.views.draws import Draws, draws_for
from pipeline.views.noise import IMAGENET_MEAN, IMAGENET_STD
from pipeline.views.randaugment import FILL
from pipeline.views.recipe import PRESETS, RENDERER, Recipe
from pipeline.views.view import DrawnOp, Erase, View, draw_view

SMALL = Recipe(img_size=64)


def photographs(count: int) -> list[np.ndarray]:
    """Return real photographs, spread over the sample."""
    with tarfile.open(Path(os.environ["DEIT_CLI_DATA"], "imagenet-sample", "train-000000.tar")) as tar:
        names = sorted(name for name in tar.getnames() if name.endswith(".jpg"))
        files = [tar.extractfile(name).read() for name in names[:: len(names) // count][:count]]
    return [np.array(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]


# --- purity ---------------------------------------------------------------------------------------------------

KEYS = ["n01440764/n01440764_10026", "a", "b/é", "0"]
SUMMARY = """
import hashlib, random, sys
import cv2, numpy as np, torch
from pipeline.views.pairs import draw_mix, draw_pairs
from pipeline.views.recipe import PRESETS, RENDERER, Recipe
from pipeline.pixels.render import render
from pipeline.views.view import draw_view

order, threads = sys.argv[1], int(sys.argv[2])
random.seed(threads); np.random.seed(threads); torch.manual_seed(threads)
torch.set_num_threads(threads); cv2.setNumThreads(threads)
keys = ["n01440764/n01440764_10026", "a", "b/\\u00e9", "0"]
image = (np.indices((90, 120, 3)).sum(0) * 7 % 256).astype(np.uint8)
wanted = [(name, key, view) for name in sorted(PRESETS) for key in keys for view in (0, 3)]
wanted = wanted if order == "forward" else random.sample(wanted, len(wanted))
lines = []
for name, key, view in wanted:
    drawn = draw_view(PRESETS[name], key, view, height=90, width=120)
    pixels = hashlib.sha256(render(image, drawn).tobytes()).hexdigest()
    pairs = draw_pairs(PRESETS[name], keys, view).tolist()
    lines.append(f"{name} {key.encode()} {view} {drawn} {draw_mix(PRESETS[name], key, view)} {pairs} {pixels}")
print("\\n".join(sorted(lines)))
"""


def in_another_process(order: str, *, hash_seed: str, threads: int) -> subprocess.Popen:
    """Start a fresh interpreter that draws and renders, and prints one line per view."""
    command = [sys.executable, "-c", SUMMARY, order, str(threads)]
    return subprocess.Popen(command, env=with_checkout(PYTHONHASHSEED=hash_seed), stdout=subprocess.PIPE, text=True)


def test_views_are_the_same_in_other_processes_with_other_hash_seeds_global_seeds_orders_and_thread_counts():
    with (
        in_another_process("forward", hash_seed="0", threads=1) as first,
        in_another_process("shuffled", hash_seed="4711", threads=2) as second,
    ):
        one, other = first.communicate()[0], second.communicate()[0]
    assert (first.returncode, second.returncode) == (0, 0)
    assert one == other
    assert len(set(one.splitlines())) == 2 * len(PRESETS) * len(KEYS)


def test_a_view_does_not_depend_on_order_or_on_other_draws():
    names = [(recipe, key, view) for recipe in (SMALL, Recipe()) for key in KEYS for view in range(4)]

    def drawn(recipe: Recipe, key: str, view: int) -> View:
        return draw_view(recipe, key, view, height=375, width=500)

    forward = [drawn(*name) for name in names]
    backward = [drawn(*name) for name in reversed(names)][::-1]
    interleaved = []
    for name in names:
        draws_for(name[0].id, name[1], name[2], "crop").raw(3)  # somebody else reads a stream of the same name
        interleaved.append(drawn(*name))
    assert forward == backward == interleaved
    assert len(set(forward)) == len(names)


def test_global_seeds_do_not_move_a_view_and_a_view_does_not_move_them():
    image = photo(80, 100)

    def everything() -> bytes:
        return render_views(image, SMALL, "key", range(12)).tobytes()

    def states() -> tuple:
        name, words, *rest = np.random.get_state()
        return random.getstate(), (name, words.tobytes(), *rest), torch.random.get_rng_state().numpy().tobytes()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before, first = states(), everything()
    assert states() == before
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    assert states() != before
    assert everything() == first


def test_one_view_is_rendered_of_a_file_as_of_its_pixels():
    image = photo(60, 90)
    expected = render(image, draw_view(SMALL, "key", 7, height=60, width=90))
    np.testing.assert_array_equal(render_view(image, SMALL, "key", 7), expected)
    np.testing.assert_array_equal(render_view(encode(image, "PNG"), SMALL, "key", 7), expected)
    with pytest.raises(BadImageError, match="image 'key'"):
        render_view(encode(image, "PNG")[:-500], SMALL, "key", 7)


def test_the_public_names_read_labels_and_render_their_views():
    assert {"LabelSet", "Recipe", "open_source", "render_view"} <= set(pipeline.__all__)
    assert pipeline.render_view is render_view
    assert [getattr(pipeline, name).__name__ for name in pipeline.__all__] == pipeline.__all__
    with pytest.raises(AttributeError, match="module 'pipeline' has no attribute 'render_views'"):
        pipeline.__getattr__("render_views")


def test_views_of_a_range_are_those_drawn_one_by_one():
    image = photo(60, 90)
    together = render_views(image, SMALL, "key", range(5, 9))
    assert (together.shape, together.dtype) == ((4, 64, 64, 3), np.uint8)
    for position, view in enumerate(range(5, 9)):
        alone = render(image, draw_view(SMALL, "key", view, height=60, width=90))
        np.testing.assert_array_equal(together[position], alone)


GOLDEN = [
    # recipe, key, view number, view of a 375 x 500 image
    (
        PRESETS["deit"],
        "n01440764/n01440764_10026",
        85,
        View(
            crop=(13, 15, 349, 449),
            resize=(224, 224),
            window=(0, 0),
            img_size=224,
            flip=True,
            ops=(DrawnOp("Rotate", -26.600877003162168), DrawnOp("ShearX", -0.2545730992499739)),
            erase=Erase(box=(15, 8, 115, 98), noise=18071160497188101349),
        ),
    ),
    (
        Recipe(img_size=64, interpolation="random", seed=7),
        "b/é",
        9,
        View(
            crop=(71, 241, 235, 243),
            resize=(64, 64),
            window=(0, 0),
            img_size=64,
            flip=True,
            ops=(
                DrawnOp("SharpnessIncreasing", 0.33044655035017056, "bicubic"),
                DrawnOp("ColorIncreasing", 0.2465952078648842, "bilinear"),
            ),
            interpolation="bilinear",
        ),
    ),
    (
        PRESETS["crop-flip"],
        "a",
        3,
        View(crop=(44, 58, 288, 378), resize=(224, 224), window=(0, 0), img_size=224, flip=True),
    ),
    (PRESETS["none"], "a", 7, View(crop=(0, 0, 375, 500), resize=(256, 341), window=(16, 58), img_size=224)),
]


@pytest.mark.parametrize(
    ("recipe", "key", "view", "pinned"), GOLDEN, ids=["deit", "random filters", "crop-flip", "none"]
)
def test_views_are_pinned(recipe, key, view, pinned):
    drawn = draw_view(recipe, key, view, height=375, width=500)
    assert drawn == pinned, "views of stored labels move: raise RENDERER if it must be"
    assert drawn.renderer == RENDERER == 2


def shift_stream(purpose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make one decision read its stream from the second word on."""

    def shifted(recipe_id: str, key: str, view: int, name: str) -> Draws:
        stream = draws_for(recipe_id, key, view, name)
        if name == purpose:
            stream.bits()
        return stream

    monkeypatch.setattr(views, "draws_for", shifted)


PURPOSES = [
    # purpose, the only field of a view that its stream moves
    ("crop", "crop"),
    ("flip", "flip"),
    ("randaug", "ops"),
    ("erase", "erase"),
    # only `interpolation: random` reads it
    ("interpolation", None),
    # one that does not exist today
    ("blur", None),
]


@pytest.mark.parametrize(("purpose", "field"), PURPOSES)
def test_a_decision_moves_no_other_decision(purpose, field, monkeypatch):
    def fields() -> list[dict]:
        return [vars(draw_view(SMALL, str(i), 0, height=90, width=120)) for i in range(60)]

    before = fields()
    shift_stream(purpose, monkeypatch)
    after = fields()
    moved = {name for one, other in zip(before, after, strict=True) for name in one if one[name] != other[name]}
    assert moved == ({field} if field else set())


# --- filters --------------------------------------------------------------------------------------------------

RANDOM = Recipe(img_size=64, interpolation="random", aa="rand-m9-n3-p1")


def without_filters(view: View) -> View:
    ops = tuple(op._replace(interpolation="bicubic") for op in view.ops)
    return replace(view, interpolation="bicubic", ops=ops)


def drawn_views(recipe: Recipe, count: int) -> list[View]:
    return [draw_view(recipe, str(i), 0, height=90, width=120) for i in range(count)]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_filter_that_is_named_is_the_filter_of_everything(interpolation):
    for view in drawn_views(RANDOM.with_fields(interpolation=interpolation), 50):
        assert {view.interpolation, *(op.interpolation for op in view.ops)} == {interpolation}


def test_random_filters_are_one_or_the_other_for_the_resize_and_for_each_layer():
    """Each is bilinear with probability 1/2, whatever the others are: all 16 combinations are as frequent."""
    combinations = [(view.interpolation, *(op.interpolation for op in view.ops)) for view in drawn_views(RANDOM, 4000)]
    counts = [combinations.count(each) for each in itertools.product(("bicubic", "bilinear"), repeat=4)]
    assert sum(counts) == 4000
    assert stats.chisquare(counts).pvalue > 1e-4


def test_random_filters_move_no_other_decision(monkeypatch):
    before = drawn_views(RANDOM, 60)
    shift_stream("interpolation", monkeypatch)
    after = drawn_views(RANDOM, 60)
    assert before != after
    assert [without_filters(view) for view in before] == [without_filters(view) for view in after]


def test_layers_that_are_not_applied_draw_a_filter_all_the_same():
    """The filter of the last layer is the fourth draw, however many operations are applied before it."""
    recipe = RANDOM.with_fields(aa="rand-m9-n3-p0.5")
    seen = set()
    for i, view in enumerate(drawn_views(recipe, 200)):
        draws = draws_for(recipe.id, str(i), 0, "interpolation")
        filters = ["bilinear" if draws.chance(0.5) else "bicubic" for _ in range(4)]
        layers = draws_for(recipe.id, str(i), 0, "randaug")
        applied = [(layers.bits(), layers.chance(0.5), layers.bits(), layers.bits())[1] for _ in range(3)]
        assert view.interpolation == filters[0]
        assert [op.interpolation for op in view.ops] == list(itertools.compress(filters[1:], applied))
        seen.add(tuple(applied))
    assert len(seen) == 8


# --- against the definition -----------------------------------------------------------------------------------

DEFINED = {
    **PRESETS,
    "random filters": RANDOM,
    "beyond 10": Recipe(img_size=40, aa="rand-m12-mstd4-mmax20-inc1-n4-p0.9", seed=3, interpolation="random"),
    "uniform levels": Recipe(img_size=33, aa="rand-m9-mstd101-n3", interpolation="bilinear", reprob=1.0),
    "extreme ratios": Recipe(img_size=16, ratio=(0.011, 99.0), scale=(0.0001, 1.0)),
    "narrow": Recipe(img_size=16, ratio=(3.0, 3.5), reprob=1.0, hflip=0.01),
    "middle": Recipe(crop="center", img_size=37, crop_pct=0.31),
}


@pytest.mark.parametrize("name", DEFINED)
def test_views_are_drawn_as_they_are_defined(name):
    sizes = [(375, 500), (90, 61), (1, 1), (1, 700), (900, 3), (224, 224)]
    sizes.append((2**46, 2**45))  # its crops show every bit of the functions that are exact
    for i, (height, width) in enumerate(sizes):
        for view in range(25):
            drawn = draw_view(DEFINED[name], f"key{i}", view, height=height, width=width)
            assert drawn == draw_by_definition(DEFINED[name], f"key{i}", view, height, width)


def test_the_logarithm_of_a_ratio_is_rounded_before_it_is_used():
    """This ratio is one of those where the logarithm of a library gives another crop."""
    ratios = (1 + k / 5000 for k in range(5000))
    ratio = next(r for r in ratios if exact.exp(math.log(r)) != exact.exp(exact.log(r)))
    recipe, side = Recipe(img_size=16, ratio=(ratio, ratio)), 2**46
    for view in range(5):
        drawn = draw_view(recipe, "a", view, height=side, width=side)
        assert drawn == draw_by_definition(recipe, "a", view, side, side)


# --- one step at a time ---------------------------------------------------------------------------------------


def whole(image: np.ndarray, size: int, **parts) -> View:
    """Return a view that resizes the whole image to size x size."""
    return View(crop=(0, 0, *image.shape[:2]), resize=(size, size), window=(0, 0), img_size=size, **parts)


SIZES = [
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


def pillow_resize(image: np.ndarray, size: tuple[int, int], interpolation: str = "bicubic") -> np.ndarray:
    return np.array(resize_rows_first(Image.fromarray(image), size, interpolation))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("size", "crop", "img_size"), SIZES)
def test_resize_is_pillows(size, crop, img_size, interpolation):
    image = photo(*size)
    top, left = (size[0] - crop[0]) // 2, (size[1] - crop[1]) // 3
    view = View(
        crop=(top, left, *crop),
        resize=(img_size, img_size),
        window=(0, 0),
        img_size=img_size,
        interpolation=interpolation,
    )
    region = image[top : top + crop[0], left : left + crop[1]]
    np.testing.assert_array_equal(render(image, view), pillow_resize(region, (img_size, img_size), interpolation))


@needs_photographs
def test_resize_is_pillows_on_photographs():
    for number, image in enumerate(photographs(25)):
        drawn = draw_view(PRESETS["crop-flip"], str(number), 0, height=image.shape[0], width=image.shape[1])
        top, left, tall, wide = drawn.crop
        pixels = render(image, drawn)[:, ::-1] if drawn.flip else render(image, drawn)
        expected = pillow_resize(image[top : top + tall, left : left + wide], (224, 224))
        np.testing.assert_array_equal(pixels, expected)


def test_the_comparison_with_pillow_would_see_another_filter_or_half_a_pixel():
    image = photo(375, 500)
    ours = render(image, whole(image, 224))
    for other in (Image.Resampling.BILINEAR, Image.Resampling.LANCZOS):
        assert difference(ours, np.array(Image.fromarray(image).resize((224, 224), other))).mean() > 0.2
    box = (0.5, 0, 500, 375)
    shifted = np.array(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC, box=box))
    assert difference(ours, shifted).mean() > 0.2


def test_flip_mirrors_left_and_right():
    image = photo(70, 50)
    np.testing.assert_array_equal(render(image, whole(image, 32, flip=True)), render(image, whole(image, 32))[:, ::-1])


def test_operations_apply_in_order_after_the_flip():
    image = photo(64, 64)
    solarized_then_brighter = render(
        image, whole(image, 64, ops=(DrawnOp("Solarize", 100), DrawnOp("Brightness", 1.5)))
    )
    brighter_then_solarized = render(
        image, whole(image, 64, ops=(DrawnOp("Brightness", 1.5), DrawnOp("Solarize", 100)))
    )
    table = np.arange(256)
    solarized = np.where(table < 100, table, 255 - table)
    brighter = np.minimum(255, np.floor(table * 1.5)).astype(int)
    np.testing.assert_array_equal(solarized_then_brighter, brighter[solarized][image])
    np.testing.assert_array_equal(brighter_then_solarized, solarized[brighter][image])
    moved = render(image, whole(image, 64, flip=True, ops=(DrawnOp("TranslateXRel", 0.25),)))
    np.testing.assert_array_equal(moved[:, :40], image[:, ::-1][:, 16:56])
    assert (moved[:, -14:] == FILL).all()


def test_the_view_is_the_window_of_the_resized_crop():
    image = photo(60, 80)
    view = View(crop=(10, 20, 30, 40), resize=(48, 64), window=(5, 17), img_size=32)
    expected = pillow_resize(image[10:40, 20:60], (48, 64))[5:37, 17:49]
    np.testing.assert_array_equal(render(image, view), expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_pixels_are_contiguous_bytes_of_the_asked_size(preset):
    recipe = PRESETS[preset]
    image = photo(90, 70)
    for view in range(4):
        pixels = render(image, draw_view(recipe, "key", view, height=90, width=70))
        assert (pixels.shape, pixels.dtype) == ((recipe.img_size, recipe.img_size, 3), np.uint8)
        assert pixels.flags.c_contiguous
        assert not np.shares_memory(pixels, image)


def test_rendering_does_not_write_to_the_image():
    """The hard case is the whole image at its own size, where nothing need be copied."""
    image = photo(64, 64)
    before = image.copy()
    noise = Erase(box=(0, 0, 60, 60), noise=1)
    for parts in (
        {"erase": noise},
        {"flip": True, "erase": noise},
        {"ops": (DrawnOp("Posterize", 8),), "erase": noise},
    ):
        assert not np.array_equal(render(image, whole(image, 64, **parts)), before)
        np.testing.assert_array_equal(image, before)


def test_an_image_that_may_not_be_written_to_renders_without_a_warning():
    image = photo(64, 64)
    expected = render(image, whole(image, 32))
    image.setflags(write=False)
    np.testing.assert_array_equal(render(image, whole(image, 32)), expected)


def test_images_that_are_not_contiguous_render_the_same():
    image = photo(80, 64)
    for other in (image[:, ::-1], image[::2], image.transpose(1, 0, 2)):
        view = whole(other, 48, ops=(DrawnOp("Equalize"),))
        np.testing.assert_array_equal(render(other, view), render(np.ascontiguousarray(other), view))


# --- erasing --------------------------------------------------------------------------------------------------


def test_the_erased_box_is_noise_of_the_right_mean_and_deviation_per_channel_and_nothing_else_changes():
    image = photo(224, 224)
    box = (20, 30, 130, 160)
    erased, plain = (
        render(image, whole(image, 224, **parts)) for parts in ({"erase": Erase(box=box, noise=12345)}, {})
    )
    inside = np.zeros((224, 224), bool)
    inside[20:150, 30:190] = True
    np.testing.assert_array_equal(erased[~inside], plain[~inside])
    noise = erased[inside].astype(float)
    normal = np.random.default_rng(0).standard_normal(2_000_000)
    for channel in range(3):
        expected = np.clip(np.rint(255 * (IMAGENET_MEAN[channel] + IMAGENET_STD[channel] * normal)), 0, 255)
        assert noise[:, channel].mean() == pytest.approx(expected.mean(), abs=1.5)  # 4 standard errors
        assert noise[:, channel].std() == pytest.approx(expected.std(), abs=1.2)
    between = np.corrcoef(noise, rowvar=False) - np.eye(3)
    assert np.abs(between).max() < 0.03, "channels are independent"
    field = erased[20:150, 30:190].astype(float) - noise.mean(0)
    for axis in (0, 1):
        rolled = (field * np.roll(field, 1, axis)).mean() / field.var()
        assert abs(rolled) < 0.03, "neighbours are independent"


def test_erasing_noise_is_pinned_and_another_for_every_stream():
    grey = np.full((32, 32, 3), 100, np.uint8)

    def erased(noise: int) -> bytes:
        return render(grey, whole(grey, 32, erase=Erase(box=(1, 2, 30, 29), noise=noise))).tobytes()

    assert erased(1) == erased(1) != erased(2)
    assert (
        hashlib.sha256(erased(2**64 - 1)).hexdigest()
        == "4db3667dbfce73a53129ed25175274cd89f233ec74bcb658f9bbb97ad77fae42"
    )


def test_two_views_are_erased_with_different_noise():
    recipe = Recipe(img_size=32, reprob=1.0, aa=None)
    noises = [draw_view(recipe, "key", view, height=50, width=50).erase.noise for view in range(100)]
    assert len(set(noises)) == 100


# --- against Pillow and timm ----------------------------------------------------------------------------------

RECIPES = {
    "deit": PRESETS["deit"],
    "four ops": Recipe(img_size=96, aa="rand-m9-n4-p1-inc1", reprob=1.0),
    "random filters": Recipe(img_size=64, aa="rand-m9-n4-p1", interpolation="random"),
    "bilinear": Recipe(img_size=64, interpolation="bilinear"),
    "crop-flip": PRESETS["crop-flip"],
    "none": PRESETS["none"],
}


def assert_pillows(image: np.ndarray, recipe: Recipe, count: int) -> None:
    for view in range(count):
        drawn = draw_view(recipe, "reference", view, height=image.shape[0], width=image.shape[1])
        np.testing.assert_array_equal(render(image, drawn), render_with_pillow(image, drawn), err_msg=str(drawn))


@pytest.mark.parametrize("name", RECIPES)
def test_pixels_are_pillows_and_timms(name):
    assert_pillows(photo(181, 240), RECIPES[name], 25)


@needs_photographs
def test_pixels_are_pillows_and_timms_on_photographs():
    for image in photographs(8):
        assert_pillows(image, PRESETS["deit"], 5)


# --- the centre view ------------------------------------------------------------------------------------------

CENTRES = [
    # height, width, img_size, crop_pct
    (375, 500, 224, 0.875),
    (500, 333, 224, 0.875),
    (256, 256, 224, 0.875),
    (257, 341, 224, 0.9),  # odd: the middle is between pixels
    (341, 255, 96, 1.0),
    (32, 32, 32, 1.0),
    (33, 47, 32, 0.875),
    (60, 45, 224, 0.875),  # up
    (101, 700, 64, 0.95),
]


def timms_centre(image: np.ndarray, img_size: int, crop_pct: float) -> np.ndarray:
    transform = timm.data.create_transform(
        img_size, is_training=False, crop_pct=crop_pct, interpolation="bicubic", normalize=False
    )
    return transform(Image.fromarray(image)).permute(1, 2, 0).numpy()


@pytest.mark.parametrize(("height", "width", "img_size", "crop_pct"), CENTRES)
def test_the_centre_view_is_timms_evaluation(height, width, img_size, crop_pct):
    recipe = Recipe(crop="center", img_size=img_size, crop_pct=crop_pct, hflip=0.0, aa=None, reprob=0.0)
    image = photo(height, width)
    ours = render(image, draw_view(recipe, "key", 3, height=height, width=width))
    np.testing.assert_array_equal(ours, timms_centre(image, img_size, crop_pct))


def test_the_centre_view_is_the_same_for_every_key_and_view():
    drawn = {draw_view(PRESETS["none"], key, view, height=90, width=120) for key in KEYS for view in range(3)}
    assert len(drawn) == 1


ROUNDED = [
    # height, width, img_size, crop_pct: resized to one pixel less than timm's
    (55, 55, 224, 1.0),  # 224 x 223: the view is not square, and cannot be stacked
    (107, 107, 224, 0.875),
    (33, 110, 32, 0.875),
    (35, 105, 32, 0.875),
]


@pytest.mark.parametrize(("height", "width", "img_size", "crop_pct"), ROUNDED)
def test_the_resized_size_is_timms_whatever_the_rounding(height, width, img_size, crop_pct):
    recipe = Recipe(crop="center", img_size=img_size, crop_pct=crop_pct, hflip=0.0, aa=None, reprob=0.0)
    drawn = draw_view(recipe, "key", 0, height=height, width=width)
    short = math.floor(img_size / crop_pct)
    assert drawn.resize == (short * height // min(height, width), short * width // min(height, width))


# --- strange sizes --------------------------------------------------------------------------------------------

STRANGE = [(1, 5000), (5000, 1), (1, 1), (2, 1), (1, 3), (7, 4000)]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", STRANGE, ids=str)
def test_strips_and_dots_render_in_little_memory(size, preset):
    image = photo(*size)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    recipe = PRESETS[preset]
    for view in range(2):
        drawn = draw_view(recipe, "key", view, height=size[0], width=size[1])
        top, left, tall, wide = drawn.crop
        assert 0 <= top < top + tall <= size[0]
        assert 0 <= left < left + wide <= size[1]
        assert max(drawn.resize) <= 8 * recipe.img_size / recipe.crop_pct
        assert render(image, drawn).shape == (recipe.img_size, recipe.img_size, 3)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown < 100 * 1024, f"{grown / 1024:.0f} MiB more: a strip of 5000 pixels was resized as a whole"


def test_a_constant_image_stays_constant_where_nothing_is_erased():
    image = np.full((40, 70, 3), (10, 200, 90), np.uint8)
    for view in range(10):
        pixels = render(image, draw_view(PRESETS["crop-flip"], "key", view, height=40, width=70))
        assert (pixels == (10, 200, 90)).all()


def test_crops_lie_inside_of_the_image_and_have_the_asked_area_and_ratio():
    recipe = Recipe(scale=(0.2, 0.5), ratio=(0.9, 1.2), aa=None)
    for view in range(500):
        top, left, tall, wide = draw_view(recipe, "key", view, height=200, width=300).crop
        assert 0 <= top <= 200 - tall
        assert 0 <= left <= 300 - wide
        assert 0.19 < tall * wide / 60_000 < 0.51
        assert 0.88 < wide / tall < 1.22


def test_probabilities_of_zero_and_one_are_never_and_always():
    never, always = Recipe(hflip=0.0, reprob=0.0, aa="rand-p0"), Recipe(hflip=1.0, reprob=1.0, aa="rand-p1-n3")
    for view in range(200):
        off, on = (draw_view(recipe, "key", view, height=100, width=100) for recipe in (never, always))
        assert (off.flip, off.ops, off.erase) == (False, (), None)
        assert (on.flip, len(on.ops)) == (True, 3)
        assert on.erase is not None
