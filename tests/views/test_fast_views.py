"""The fast renderer makes the pixels of the plain one, bit for bit."""

import itertools
import tarfile

import numpy as np
import pytest
from support.builders import photo, shared_data
from support.plain_views import grey, operate, render_plainly, warped

from pipeline.images.decode import decode
from pipeline.pixels.render import render
from pipeline.settings.files import load_recipe
from pipeline.views.randaugment import INCREASING, PLAIN, _grey, apply_op, mirror, op_argument
from pipeline.views.view import View, draw_view

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
    recipe = load_recipe(name, changes)
    image = (
        photo(height * 1000 + width, 50, 60)[:height, :width] if width < 50 else photo(7, max(height, 4), max(width, 5))
    )
    image = np.ascontiguousarray(np.resize(image, (height, width, 3)))
    for view in range(views):
        drawn = draw_view(recipe, f"{height}x{width}", view, height=height, width=width)
        np.testing.assert_array_equal(render(image, drawn), render_plainly(image, drawn), err_msg=str(drawn))


def test_views_of_photographs_equal_the_plain_ones():
    recipe = load_recipe("deit")
    seen: set[str] = set()
    with tarfile.open(next(shared_data("imagenet-sample").glob("*.tar"))) as tar:
        photographs = [tar.extractfile(member) for member in tar if member.name.endswith(".jpg")][:40]
        for number, file in enumerate(photographs):
            assert file is not None
            image = decode(file.read(), key="photo")
            for view in range(4):
                drawn = draw_view(recipe, str(number), view, height=image.shape[0], width=image.shape[1])
                np.testing.assert_array_equal(render(image, drawn), render_plainly(image, drawn), err_msg=str(drawn))
                seen |= {op for op, _ in drawn.ops}
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
    np.testing.assert_array_equal(mirror(pixels), pixels[:, ::-1])
    assert mirror(pixels).flags.c_contiguous


def test_the_comparison_notices_one_changed_level():
    view = View(crop=(0, 0, 24, 32), resize=(16, 16), window=(0, 0), img_size=16)
    image = photo(1)
    changed = image.copy()
    changed[12, 16] ^= 64
    assert (render(image, view) != render_plainly(changed, view)).any()
