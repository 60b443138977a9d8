"""RandAugment's operations against timm's: the same list, and the same arguments."""

import numpy as np
import pytest
from timm.data import auto_augment

from pipeline.views.randaugment import FILL, INCREASING, OPERATIONS, PLAIN, op_argument
from pipeline.views.recipe import MAX_LAYERS

NAMES = sorted({*INCREASING, *PLAIN})


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
            assert op_argument(name, level, negate=negate) == theirs, (level, negate)


def test_timms_coin_has_two_sides():
    """What the test above replaces: a sign, and nothing else."""
    assert {auto_augment._randomly_negate(3.0) for _ in range(100)} == {-3.0, 3.0}


def test_whole_numbered_arguments_are_whole():
    for name in ("Posterize", "PosterizeIncreasing", "Solarize", "SolarizeIncreasing", "SolarizeAdd"):
        assert all(isinstance(op_argument(name, level, negate=False), int) for level in LEVELS)
