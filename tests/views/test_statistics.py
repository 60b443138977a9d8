"""Our draws have timm's distributions: two-sample tests over many views, with fixed seeds.

Every comparison passes above SURE, and a deliberately shifted distribution fails below it: the tests have power.
"""

import math
import random
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy import stats
from timm.data import Mixup, auto_augment
from timm.data.mixup import cutmix_bbox_and_lam
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation

from pipeline.views import view as views
from pipeline.views.pairs import Mix, draw_mix
from pipeline.views.randaugment import INCREASING
from pipeline.views.recipe import PRESETS, Recipe
from pipeline.views.view import View, draw_view

pytestmark = pytest.mark.slow

SURE = 1e-4  # smallest p-value that passes; the seeds are fixed, so what passes once passes always
COUNT = 20_000
DEIT = PRESETS["deit"]
# The strength of these is |argument| / strength at full level, so that the magnitude can be read back.
FULL = {"Rotate": 30, "ShearX": 0.3, "ShearY": 0.3, "TranslateXRel": 0.45, "TranslateYRel": 0.45}


@pytest.fixture(autouse=True)
def _timms_generators() -> Iterator[None]:
    """Seed the three global generators that timm draws from, and put them back."""
    before = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    yield
    random.setstate(before[0]), np.random.set_state(before[1]), torch.random.set_rng_state(before[2])


@cache
def drawn(recipe: Recipe, height: int = 375, width: int = 500, count: int = COUNT) -> list[View]:
    """Draw ten views each of many samples."""
    return [draw_view(recipe, f"sample{i // 10}", i % 10, height=height, width=width) for i in range(count)]


def same_shape(ours, theirs) -> float:
    """Return the p-value of Kolmogorov and Smirnov's two-sample test."""
    return stats.ks_2samp(ours, theirs, method="asymp").pvalue


def same_shares(ours, theirs) -> float:
    """Return the p-value of the chi-square test that two lists have the same shares of each value."""
    values = sorted({*ours, *theirs})
    counts = [[sample.count(value) for value in values] for sample in (list(ours), list(theirs))]
    return 1.0 if len(values) == 1 else stats.chi2_contingency(counts).pvalue


# --- RandAugment ----------------------------------------------------------------------------------------------


def timms_randaugment(notation: str, count: int) -> list[list[tuple[str, float]]]:
    """Return the operations and arguments that timm's RandAugment chooses, without any pixels."""
    transform = auto_augment.rand_augment_transform(notation, {"translate_const": 100, "img_mean": (124, 116, 104)})
    chosen: list[list[tuple[str, float]]] = []

    def recorder(name: str) -> Callable:
        return lambda image, *arguments, **_: chosen[-1].append((name, float(arguments[0]) if arguments else 0.0))

    for operation in transform.ops:
        operation.aug_fn = recorder(operation.name)
    for _ in range(count):
        chosen.append([])
        transform(None)
    return chosen


def names_of(views_ops) -> list[str]:
    return [name for ops in views_ops for name, *_ in ops]


def test_operations_are_as_many_and_as_frequent_as_timms():
    ours, theirs = [view.ops for view in drawn(DEIT)], timms_randaugment(DEIT.aa, COUNT)
    number = np.bincount([len(ops) for ops in ours], minlength=3)
    assert stats.chisquare(number, np.array([0.25, 0.5, 0.25]) * COUNT).pvalue > SURE
    assert same_shares([len(ops) for ops in ours], [len(ops) for ops in theirs]) > SURE
    frequency = [names_of(ours).count(name) for name in INCREASING]
    assert sum(frequency) == number @ [0, 1, 2], "no other operation is drawn"
    assert stats.chisquare(frequency).pvalue > SURE
    assert same_shares(names_of(ours), names_of(theirs)) > SURE


def test_the_two_operations_of_a_view_are_independent():
    pairs = np.zeros((15, 15))
    for view in drawn(Recipe(aa="rand-m9-mstd0.5-inc1-p1")):
        first, second = (INCREASING.index(op.name) for op in view.ops)
        pairs[first, second] += 1
    assert stats.chi2_contingency(pairs).pvalue > SURE
    assert np.trace(pairs) == pytest.approx(COUNT / 15, rel=0.1), "the same one twice is allowed, as timm allows it"


def test_a_missing_operation_or_another_probability_would_be_seen():
    ours = names_of(view.ops for view in drawn(DEIT))
    without = [name for name in ours if name != "Equalize" or random.random() < 0.5]
    assert same_shares(ours, without) < SURE
    fewer = [len(view.ops) for view in drawn(Recipe(aa="rand-m9-mstd0.5-inc1-p0.47"))]
    assert same_shares([len(view.ops) for view in drawn(DEIT)], fewer) < SURE


@pytest.mark.parametrize("notation", ["rand-m9-mstd0.5-inc1", "rand-m7-n3-mstd1", "rand-m9-mstd101-inc1-p0.8"])
def test_arguments_of_every_operation_have_timms_distribution(notation):
    """Level, direction and rounding together, operation by operation."""
    ours = [view.ops for view in drawn(Recipe(aa=notation))]
    theirs = timms_randaugment(notation, COUNT)
    assert {*names_of(ours)} == {*names_of(theirs)}
    for name in sorted({*names_of(ours)}):
        one, other = ([value for ops in sample for op, value, *_ in ops if op == name] for sample in (ours, theirs))
        assert len(one) > 1000
        assert same_shape(one, other) > SURE, name
        if name.startswith("Posterize"):
            assert same_shares(one, other) > SURE, name


def test_both_directions_are_as_likely():
    enhanced = {"ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing"}

    def directions(views_ops) -> list[bool]:
        return [
            value > (name in enhanced)
            for ops in views_ops
            for name, value, *_ in ops
            if name in enhanced or name in FULL
        ]

    ours, theirs = directions(view.ops for view in drawn(DEIT)), directions(timms_randaugment(DEIT.aa, COUNT))
    assert len(ours) > 11_000
    assert stats.binomtest(sum(ours), len(ours), 0.5).pvalue > SURE
    assert stats.binomtest(sum(ours), len(ours), 0.53).pvalue < SURE, "the test has no power"
    assert same_shares(ours, theirs) > SURE


def levels(notation: str) -> list[float]:
    """Return the magnitudes of our geometric operations, read back from their arguments."""
    ops = [op for view in drawn(Recipe(aa=notation)) for op in view.ops if op.name in FULL]
    return [10 * abs(op.argument) / FULL[op.name] for op in ops]


def timms_levels(magnitude: float, std: float, maximum: float | None = None, count: int = COUNT) -> list[float]:
    """Return the magnitudes that timm's AugmentOp samples."""
    hparams = {"magnitude_std": std, "magnitude_max": maximum}
    operation = auto_augment.AugmentOp("Rotate", prob=1.0, magnitude=magnitude, hparams=hparams)
    sampled: list[float] = []
    operation.level_fn = lambda level, _: (sampled.append(level), (0,))[1]
    operation.aug_fn = lambda image, *_, **__: image
    for _ in range(count):
        operation(None)
    return sampled


MAGNITUDES = [
    # notation, timm's magnitude, its standard deviation and maximum
    ("rand-m9-mstd0.5-inc1", (9, 0.5)),
    ("rand-m9-mstd101-inc1", (9, math.inf)),
    ("rand-m1-mstd2", (1, 2.0)),  # cut at 0
    ("rand-m12-mstd2-mmax15", (12, 2.0, 15)),
]


@pytest.mark.parametrize(("notation", "timm"), MAGNITUDES, ids=[notation for notation, _ in MAGNITUDES])
def test_magnitudes_have_timms_distribution(notation, timm):
    ours = levels(notation)
    assert len(ours) > 6000
    assert same_shape(ours, timms_levels(*timm)) > SURE


def test_magnitudes_are_cut_at_ten_as_often_as_timms():
    ours, theirs = levels("rand-m9-mstd0.5-inc1"), timms_levels(9, 0.5)
    assert same_shares([level >= 10 - 1e-9 for level in ours], [level >= 10 for level in theirs]) > SURE
    assert 0.01 < np.mean([level >= 10 - 1e-9 for level in ours]) < 0.04  # two standard deviations: 0.023


@pytest.mark.parametrize(("magnitude", "std"), [(8, 0.5), (8.96, 0.5), (9, 0.57)])
def test_another_magnitude_would_be_seen(magnitude, std):
    assert same_shape(levels("rand-m9-mstd0.5-inc1"), timms_levels(magnitude, std)) < SURE


# --- crops and flips ------------------------------------------------------------------------------------------

SIZES = [
    # height, width
    (375, 500),
    (500, 333),
    (224, 224),
    (32, 32),
    (100, 420),  # attempts often fail: the middle is taken
    (900, 60),
]


def crop_features(crops, height: int, width: int) -> dict[str, np.ndarray]:
    """Return what a crop is, as numbers without unit."""
    top, left, tall, wide = np.array(crops, float).T
    return {
        "area": tall * wide / (height * width),
        "log ratio": np.log(wide / tall),
        "top": (top + 0.5) / (height - tall + 1),
        "left": (left + 0.5) / (width - wide + 1),
    }


def timms_crops(recipe: Recipe, height: int, width: int, count: int = COUNT // 2) -> list[tuple[int, ...]]:
    image = Image.new("L", (width, height))
    get_params = RandomResizedCropAndInterpolation.get_params
    return [get_params(image, recipe.scale, recipe.ratio) for _ in range(count)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_crops_have_timms_area_ratio_and_place(height, width):
    ours = crop_features([view.crop for view in drawn(DEIT, height, width)], height, width)
    theirs = crop_features(timms_crops(DEIT, height, width), height, width)
    for name in ours:
        assert same_shape(ours[name], theirs[name]) > SURE, name


def test_crops_fall_back_to_the_middle_as_often_as_timms():
    height, width = 900, 60
    middle = ((900 - 80) // 2, 0, 80, 60)
    ours = [view.crop == middle for view in drawn(DEIT, height, width)]
    theirs = [tuple(crop) == middle for crop in timms_crops(DEIT, height, width)]
    assert 0.1 < np.mean(ours) < 0.9999
    assert same_shares(ours, theirs) > SURE


SHIFTED_CROPS = [
    # fields of a recipe that is not DeiT's, the feature that shows it
    ({"ratio": (0.72, 4 / 3)}, "log ratio"),
    ({"scale": (0.1, 1.0)}, "area"),
    ({"scale": (0.08, 0.85)}, "area"),
]


@pytest.mark.parametrize(("fields", "name"), SHIFTED_CROPS)
def test_another_range_of_crops_would_be_seen(fields, name):
    ours = crop_features([view.crop for view in drawn(Recipe(**fields))], 375, 500)
    theirs = crop_features(timms_crops(DEIT, 375, 500), 375, 500)
    assert same_shape(ours[name], theirs[name]) < SURE


def test_half_of_the_views_are_flipped():
    ours = [view.flip for view in drawn(DEIT)]
    assert stats.binomtest(sum(ours), COUNT, 0.5).pvalue > SURE
    flip, dots = torchvision.transforms.RandomHorizontalFlip(0.5), torch.tensor([[[0, 1]]])
    assert same_shares(ours, [bool(flip(dots)[0, 0, 0]) for _ in range(COUNT)]) > SURE
    assert stats.binomtest(sum(view.flip for view in drawn(Recipe(hflip=0.53))), COUNT, 0.5).pvalue < SURE


def test_decisions_of_a_view_are_independent_of_each_other_and_of_the_next_view():
    numbers = np.array(
        [
            (view.flip, len(view.ops), view.erase is not None, view.crop[2] * view.crop[3], view.crop[0])
            for view in drawn(DEIT)
        ],
        float,
    )
    limit = stats.norm.isf(SURE / 50) / math.sqrt(COUNT)
    correlation = np.corrcoef(numbers, rowvar=False)
    related = (3, 4), (4, 3)  # a large crop has little room
    assert correlation[related[0]] < -10 * limit
    for i, j in np.ndindex(5, 5):
        if i != j and (i, j) not in related:
            assert abs(correlation[i, j]) < limit, (i, j)
        assert abs(np.corrcoef(numbers[:-1, i], numbers[1:, j])[0, 1]) < limit, (i, j)


# --- erasing --------------------------------------------------------------------------------------------------


@cache
def timms_boxes() -> list[tuple[int, ...] | None]:
    """Return top, left, height, width of what timm's RandomErasing fills, read off zero images."""
    erase = RandomErasing(probability=0.25, mode="pixel", device="cpu")
    boxes: list[tuple[int, ...] | None] = []
    image = torch.zeros(1, 224, 224)
    for _ in range(COUNT):
        filled = erase(image)[0] != 0
        if not filled.any():
            boxes.append(None)
            continue
        rows, columns = filled.any(1).nonzero().ravel().tolist(), filled.any(0).nonzero().ravel().tolist()
        boxes.append((rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1))
        image.zero_()
    return boxes


def our_boxes(recipe: Recipe) -> list[tuple[int, ...] | None]:
    return [view.erase and view.erase.box for view in drawn(recipe)]


def test_a_quarter_of_the_views_is_erased():
    ours, theirs = ([box is not None for box in boxes] for boxes in (our_boxes(DEIT), timms_boxes()))
    assert same_shares(ours, theirs) > SURE
    assert stats.binomtest(sum(ours), COUNT, 0.25).pvalue > SURE
    assert same_shares([box is not None for box in our_boxes(Recipe(reprob=0.28))], theirs) < SURE


def test_erased_boxes_have_timms_area_ratio_and_place():
    ours, theirs = (
        crop_features([box for box in boxes if box], 224, 224) for boxes in (our_boxes(DEIT), timms_boxes())
    )
    for name in ours:
        assert len(ours[name]) > 4500
        assert same_shape(ours[name], theirs[name]) > SURE, name


@pytest.mark.parametrize(
    ("constant", "value", "name"),
    [("ERASE_AREA", (0.02, 0.36), "area"), ("ERASE_ASPECT", (0.35, 1 / 0.35), "log ratio")],
)
def test_other_boxes_would_be_seen(constant, value, name, monkeypatch):
    monkeypatch.setattr(views, constant, value)
    shifted = [draw_view(DEIT, "shifted", i, height=9, width=9).erase for i in range(COUNT)]
    ours = crop_features([erase.box for erase in shifted if erase], 224, 224)
    theirs = crop_features([box for box in timms_boxes() if box], 224, 224)
    assert same_shape(ours[name], theirs[name]) < SURE


# --- mixing ---------------------------------------------------------------------------------------------------


@cache
def mixes(recipe: Recipe) -> list[Mix]:
    return [draw_mix(recipe, f"sample{i // 10}", i % 10) for i in range(COUNT)]


def is_cutmix(mix: Mix) -> bool:
    """Where every pair is mixed, an exact 1 is a CutMix box that has no pixels."""
    return mix.box is not None or mix.lam == 1


def timms_mixes(count: int = COUNT, **options) -> tuple[list[float], list[tuple[tuple[int, ...], float]]]:
    """Return the lambdas of timm's mixups, and the boxes and corrected lambdas of its CutMixes."""
    mixup = Mixup(
        **{"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "prob": 1.0, "switch_prob": 0.5, "mode": "pair"} | options
    )
    lams, use_cutmix = mixup._params_per_elem(count)
    cut = [cutmix_bbox_and_lam((3, 224, 224), lam) for lam in lams[use_cutmix].tolist()]
    return lams[~use_cutmix].tolist(), [((yl, xl, yh - yl, xh - xl), lam) for (yl, yh, xl, xh), lam in cut]


def test_half_of_the_mixes_are_cutmix():
    cut = sum(is_cutmix(mix) for mix in mixes(DEIT))
    assert stats.binomtest(cut, COUNT, 0.5).pvalue > SURE
    theirs = len(timms_mixes()[1])
    assert stats.chi2_contingency([[cut, COUNT - cut], [theirs, COUNT - theirs]]).pvalue > SURE
    seldom = sum(is_cutmix(mix) for mix in mixes(Recipe(mixup_switch_prob=0.47)))
    assert stats.binomtest(seldom, COUNT, 0.5).pvalue < SURE


def test_mixup_lambdas_have_timms_distribution():
    recipe = Recipe(cutmix=0.0)
    ours = [mix.lam for mix in mixes(recipe)]
    theirs, _ = timms_mixes(10 * COUNT, cutmix_alpha=0.0)
    assert same_shape(ours, theirs) > SURE
    assert stats.kstest(ours, stats.beta(0.8, 0.8).cdf).pvalue > SURE
    both = [mix.lam for mix in mixes(DEIT) if not is_cutmix(mix)]
    assert same_shape(both, theirs) > SURE


def test_another_alpha_would_be_seen():
    theirs, _ = timms_mixes(10 * COUNT, cutmix_alpha=0.0)
    for alpha in (1.0, 0.65):
        assert same_shape([mix.lam for mix in mixes(Recipe(mixup=alpha, cutmix=0.0))], theirs) < SURE


def test_cutmix_boxes_and_corrected_lambdas_have_timms_distribution():
    ours = [mix for mix in mixes(Recipe(mixup=0.0))]
    _, theirs = timms_mixes(mixup_alpha=0.0)
    assert same_shape([mix.lam for mix in ours], [lam for _, lam in theirs]) > SURE
    our_boxes = np.array([mix.box for mix in ours if mix.box])
    their_boxes = np.array([box for box, lam in theirs if lam < 1])
    for side in range(4):
        assert same_shape(our_boxes[:, side], their_boxes[:, side]) > SURE, side
    assert same_shares([mix.box is None for mix in ours], [lam == 1 for _, lam in theirs]) > SURE


def test_an_uncorrected_lambda_or_another_cutmix_alpha_would_be_seen():
    _, theirs = timms_mixes(mixup_alpha=0.0)
    corrected = [lam for _, lam in theirs]
    assert same_shape(corrected, np.random.beta(1.0, 1.0, COUNT)) < SURE
    assert same_shape([mix.lam for mix in mixes(Recipe(mixup=0.0, cutmix=0.8))], corrected) < SURE


def test_mixup_prob_is_timms():
    ours = [mix.lam == 1 for mix in mixes(Recipe(cutmix=0.0, mixup_prob=0.7))]
    theirs, _ = timms_mixes(cutmix_alpha=0.0, prob=0.7)
    assert same_shares(ours, [lam == 1 for lam in theirs]) > SURE
    assert stats.binomtest(sum(ours), COUNT, 0.3).pvalue > SURE
