"""Erasing noise: its table, and the numbers that look it up, pinned bit by bit."""

import hashlib

import numpy as np
import pytest
from scipy import stats
from support import defined_views
from support.pillow_views import noise_with_numpy

from pipeline.views.noise import IMAGENET_MEAN, IMAGENET_STD, fill_with_noise, noise_key, noise_levels
from pipeline.views.view import Erase


def test_noise_table_is_pinned():
    table = noise_levels()
    assert (table.shape, table.dtype) == ((3, 65536), np.uint8)
    assert hashlib.sha256(table.tobytes()).hexdigest() == (
        "6c3c2e5f2e41f2a018055d436ade7816a0d69c18f4d0d3fbf49fdf1ad6c3059e"
    ), "another table gives other erasing noise, and breaks every label set"


def test_noise_table_rises_and_has_the_quantiles_of_a_clipped_normal():
    table = noise_levels().astype(int)
    assert (np.diff(table, axis=1) >= 0).all()
    for channel in range(3):
        edges = (np.arange(257) - 0.5) / 255
        edges[[0, -1]] = -np.inf, np.inf  # the two ends take what is clipped
        exact = np.diff(stats.norm(IMAGENET_MEAN[channel], IMAGENET_STD[channel]).cdf(edges))
        share = np.bincount(table[channel], minlength=256) / 65536
        assert np.abs(share - exact).max() <= 1.01 / 65536
        assert table[channel, 32768] == round(255 * IMAGENET_MEAN[channel])


def test_noise_table_has_the_mean_and_deviation_of_clipped_rounded_noise():
    table = noise_levels().astype(float)
    normal = np.random.default_rng(0).standard_normal(1_000_000)
    for channel in range(3):
        noise = np.clip(np.round(255 * (IMAGENET_MEAN[channel] + IMAGENET_STD[channel] * normal)), 0, 255)
        assert table[channel].mean() == pytest.approx(noise.mean(), abs=0.2)
        assert table[channel].std() == pytest.approx(noise.std(), abs=0.2)


def test_noise_table_is_that_of_the_definition():
    np.testing.assert_array_equal(noise_levels(), defined_views.noise_levels())


def test_noise_table_is_far_from_every_rounding_boundary():
    """Each machine computes it with its own logarithm, whose error is below 1e-13 here."""
    shares = (np.arange(65536) + 0.5) / 65536
    levels = 255 * (np.array(IMAGENET_MEAN)[:, None] + np.array(IMAGENET_STD)[:, None] * stats.norm.ppf(shares))
    inside = levels[(levels > 0) & (levels < 255)]
    assert np.abs(inside - np.floor(inside) - 0.5).min() > 4e-7


def test_nobody_can_change_the_table_that_all_share():
    with pytest.raises(ValueError, match="read-only"):
        noise_levels()[0, 0] = 1


BOXES = [
    # top, left, height, width in 40 x 50
    (0, 0, 40, 50),
    (3, 5, 1, 1),  # fewer numbers than one word has
    (7, 1, 5, 11),  # no multiple of four
    (2, 2, 0, 0),  # a box may be empty where views are tiny
    (39, 49, 1, 1),
]


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("noise", [0, 1, 123456789, 2**64 - 1])
def test_a_box_is_filled_as_it_is_defined_and_nothing_else(box, noise):
    pixels = np.full((40, 50, 3), 9, np.uint8)
    filled = pixels.copy()
    fill_with_noise(filled, box, noise)
    np.testing.assert_array_equal(filled, defined_views.erase(pixels, Erase(box=box, noise=noise)))
    top, left, height, width = box
    np.testing.assert_array_equal(
        filled[top : top + height, left : left + width], noise_with_numpy(Erase(box=box, noise=noise))
    )
    filled[top : top + height, left : left + width] = 9
    np.testing.assert_array_equal(filled, pixels)


def test_the_reference_has_its_own_philox():
    """Philox4x64-10 as NumPy has it: the first counter is 1, not 0."""
    for key in ((0, 0), (1, 2**64 - 1), noise_key(7)):
        words = np.random.Philox(key=np.array(key, np.uint64)).random_raw(100)
        numbers = words.astype("<u8").view("<u2")
        np.testing.assert_array_equal(defined_views.philox(key, 400), numbers)


def test_the_key_is_the_first_two_words_of_the_stream_of_the_noise():
    seed = hashlib.blake2b((123456789).to_bytes(8, "little"), digest_size=32).digest()
    first = hashlib.blake2b(seed + bytes(8)).digest()
    assert noise_key(123456789) == (int.from_bytes(first[:8], "little"), int.from_bytes(first[8:16], "little"))
