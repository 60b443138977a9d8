"""Partners and mixes: independent of the batch, equal to a slow loop, and exact where nothing is mixed."""

import itertools

import numpy as np
import pytest
import torch
from timm.data.mixup import cutmix_bbox_and_lam

from pipeline.views import pairs
from pipeline.views.draws import Draws
from pipeline.views.mixing import MixBatch, apply_mix, lay_out, mix_batch
from pipeline.views.pairs import Mix, Pairs, count_pairs, count_units, draw_mix, draw_pairs, mix_blocks, pairs_of
from pipeline.views.recipe import PRESETS, Recipe

SMALL = Recipe(img_size=32, mix_block=8)


def names(count: int) -> list[str]:
    return [f"n{i:05d}" for i in range(count)]


# --- partners -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 7, 8, 255, 256])
def test_everyone_has_exactly_one_partner_and_an_odd_one_is_left(count):
    pairs = draw_pairs(SMALL, names(count), 0)
    assert (pairs.shape, pairs.dtype) == (((count + 1) // 2, 2), np.int64)
    assert sorted(pairs.ravel().tolist()) == ([-1] if count % 2 else []) + list(range(count))
    assert (pairs[:, 0] >= 0).all(), "the single stands first"


def test_a_single_sample_and_an_empty_block_have_no_pairs():
    np.testing.assert_array_equal(draw_pairs(SMALL, ["only"], 0), [[0, -1]])
    assert draw_pairs(SMALL, [], 0).shape == (0, 2)
    assert pairs_of(SMALL, names(4), np.array([], np.int64), 0).rows.shape == (0, 2)


@pytest.mark.parametrize("share", [1, 2, 3, 5])
def test_partners_stay_for_views_per_pairing_views_and_change_then(share):
    recipe = Recipe(views_per_pairing=share)
    drawn = [draw_pairs(recipe, names(64), view).tolist() for view in range(4 * share)]
    groups = [drawn[start : start + share] for start in range(0, 4 * share, share)]
    assert all(pairs == group[0] for group in groups for pairs in group)
    assert all(one[0] != other[0] for one, other in itertools.combinations(groups, 2))


def test_every_partner_is_as_likely_and_every_sample_as_often_single():
    partners, singles = np.zeros((5, 5), int), np.zeros(5, int)
    for view in range(3000):
        for first, second in draw_pairs(Recipe(views_per_pairing=1), names(5), view).tolist():
            if second < 0:
                singles[first] += 1
            else:
                partners[first, second] += 1
                partners[second, first] += 1
    # 3000 views, each of 4 partners and "none" with probability 1/5: 600, standard deviation 22
    assert np.abs(partners[~np.eye(5, dtype=bool)] - 600).max() < 100
    assert np.abs(singles - 600).max() < 100


@pytest.mark.parametrize(
    "recipe",
    [PRESETS["none"], PRESETS["crop-flip"], Recipe(mixup_prob=0.0), Recipe(mixup=0.0, cutmix=0.0)],
    ids=["none", "crop-flip", "probability 0", "alphas 0"],
)
def test_a_recipe_that_does_not_mix_pairs_nobody(recipe):
    expected = [[i, -1] for i in range(5)]
    assert draw_pairs(recipe, names(5), 0).tolist() == expected
    assert pairs_of(recipe, names(5), np.arange(5), 3).rows.tolist() == expected
    assert draw_mix(recipe, "key", 0) == Mix()


BLOCKS = [
    # usable rows of a shard of 24 with blocks of 8, the blocks
    (range(24), [range(8), range(8, 16), range(16, 24)]),
    (range(20), [range(8), range(8, 16), range(16, 20)]),  # the last is short
    ([0, 1, 3, 7, 8, 9], [[0, 1, 3, 7], [8, 9]]),
    ([5, 17], [[5], [17]]),  # a whole block is bad
    ([8], [[8]]),
    ([], []),
]


@pytest.mark.parametrize(("usable", "blocks"), BLOCKS)
def test_bad_rows_leave_gaps_and_move_no_row_to_another_block(usable, blocks):
    cut = mix_blocks(SMALL, np.array(usable, np.int64))
    assert [block.tolist() for block in cut] == [list(block) for block in blocks]


@pytest.mark.parametrize("mix_block", [2, 3, 4, 5, 256])
@pytest.mark.parametrize("mixes", [True, False])
def test_units_follow_from_the_number_of_samples_where_all_are_usable(mix_block, mixes):
    recipe = SMALL.with_fields(mix_block=mix_block, **({} if mixes else {"mixup": 0.0, "cutmix": 0.0}))
    assert recipe.mixes == mixes
    for size in (*range(40), 255, 256, 257, 511, 512, 513, 1000):
        assert count_units(recipe, size) == count_pairs(recipe, np.arange(size)), size


def test_pairs_of_a_shard_stay_within_their_blocks():
    pairs = pairs_of(SMALL, names(27), np.arange(27), 0).rows
    assert sorted(pairs.ravel().tolist()) == [-1, *range(27)]
    paired = pairs[pairs[:, 1] >= 0]
    np.testing.assert_array_equal(paired[:, 0] // 8, paired[:, 1] // 8)
    np.testing.assert_array_equal(pairs[:, 0] // 8, np.repeat(np.arange(4), [4, 4, 4, 2]))


def test_a_bad_row_does_not_change_the_pairs_of_other_blocks():
    whole = pairs_of(SMALL, names(32), np.arange(32), 0).rows
    holed = pairs_of(SMALL, names(32), np.delete(np.arange(32), [9, 10, 13]), 0).rows
    for block in (0, 2, 3):
        np.testing.assert_array_equal(whole[whole[:, 0] // 8 == block], holed[holed[:, 0] // 8 == block])
    assert sorted(holed[holed[:, 0] // 8 == 1].ravel().tolist()) == [-1, 8, 11, 12, 14, 15]


def test_pairs_of_a_shard_are_those_of_its_blocks_whatever_follows():
    long, short = (pairs_of(SMALL, names(count), np.arange(count), 5).rows for count in (64, 16))
    np.testing.assert_array_equal(long[:8], short)
    np.testing.assert_array_equal(draw_pairs(SMALL, names(64)[8:16], 5) + 8, short[4:])


def test_blocks_of_one_shard_are_paired_differently():
    pairs = pairs_of(Recipe(mix_block=64), names(128), np.arange(128), 0).rows
    assert (pairs[:32] + 64).tolist() != pairs[32:].tolist()


PINNED_PAIRS = [
    (1, [[8, 0], [6, 2], [1, 3], [5, 4], [7, -1]]),
    (2, [[2, 0], [6, 5], [4, 8], [3, 1], [7, -1]]),
]


@pytest.mark.parametrize(("renderer", "pairs"), PINNED_PAIRS)
def test_pairs_are_pinned(renderer, pairs):
    message = "other partners break every label set; raise RENDERER if it must be"
    assert draw_pairs(Recipe(renderer=renderer), names(9), 4).tolist() == pairs, message


# --- drawing a mix --------------------------------------------------------------------------------------------


PINNED_MIXES = [
    # renderer, mixes of three views
    (
        1,
        {
            0: Mix(lam=0.9835179038459195, box=None),
            1: Mix(lam=0.5214445153061225, box=(50, 86, 174, 138)),
            2: Mix(lam=0.011792827625516302, box=None),
        },
    ),
    (
        2,
        {
            0: Mix(lam=0.5733816964285714, box=(85, 0, 139, 154)),
            3: Mix(lam=0.010160087603956041, box=None),
            5: Mix(lam=0.601081119647396, box=None),
        },
    ),
]


@pytest.mark.parametrize(("renderer", "pinned"), PINNED_MIXES)
def test_mixes_are_pinned(renderer, pinned):
    message = "other mixes break every label set; raise RENDERER if it must be"
    assert {view: draw_mix(Recipe(renderer=renderer), "n00000", view) for view in pinned} == pinned, message


def test_a_mix_depends_on_recipe_key_and_view_alone():
    again = [draw_mix(Recipe(), "key", view) for view in (3, 1, 2, 1, 3)]
    assert again[0] == again[4]
    assert again[1] == again[3]
    others = [draw_mix(Recipe(seed=1), "key", 1), draw_mix(Recipe(), "kez", 1), draw_mix(Recipe(), "key", 2)]
    assert again[1] not in others


KINDS = [
    # fields, which kinds of mix appear among many
    ({}, {"mixup", "cutmix"}),
    ({"cutmix": 0.0}, {"mixup"}),
    ({"mixup": 0.0}, {"cutmix"}),
    ({"mixup_switch_prob": 1.0}, {"cutmix"}),
    ({"mixup_switch_prob": 0.0}, {"mixup"}),
    # with one kind only there is nothing to switch
    ({"cutmix": 0.0, "mixup_switch_prob": 1.0}, {"mixup"}),
    ({"mixup": 0.0, "mixup_switch_prob": 0.0}, {"cutmix"}),
    ({"mixup_prob": 0.0}, {"none"}),
    ({"mixup_prob": 0.5}, {"none", "mixup", "cutmix"}),
    ({"mixup": 0.0, "cutmix": 0.0}, {"none"}),
]


def kind(mix: Mix) -> str:
    return "none" if mix == Mix() else "mixup" if mix.box is None else "cutmix"


@pytest.mark.parametrize(("fields", "kinds"), KINDS)
def test_the_recipe_says_which_kinds_of_mix_there_are(fields, kinds):
    recipe = Recipe(img_size=224, **fields)
    drawn = [kind(draw_mix(recipe, f"key{i}", 0)) for i in range(300)]
    # A CutMix box of no pixels is no mix: one in some thousand.
    assert {name for name in drawn if drawn.count(name) > 3} == kinds


def test_mixup_prob_is_the_share_of_pairs_that_are_mixed():
    drawn = [draw_mix(Recipe(mixup_prob=0.3), f"key{i}", 0) != Mix() for i in range(2000)]
    assert np.mean(drawn) == pytest.approx(0.3, abs=0.04)


@pytest.mark.parametrize("size", [1, 2, 5, 32, 224])
def test_lambda_is_the_share_of_the_pixels_that_stay(size):
    recipe = Recipe(img_size=size, mixup=0.0)
    clipped = 0
    for i in range(500):
        mix = draw_mix(recipe, f"key{i}", 0)
        assert 0 <= mix.lam <= 1
        if mix.box is None:
            assert mix == Mix()
            continue
        top, left, tall, wide = mix.box
        assert 0 <= top < top + tall <= size
        assert 0 <= left < left + wide <= size
        own = np.ones((size, size))
        own[top : top + tall, left : left + wide] = 0
        assert mix.lam == pytest.approx(own.mean(), abs=1e-12)
        clipped += tall != wide
    if size > 5:
        assert clipped > 50, "boxes are square until the border clips them, and it must clip some"


class Centre(Draws):
    """Draws that put the middle of a CutMix box at a given place: y, then x."""

    def __init__(self, *place: int) -> None:
        super().__init__(b"")
        self.place = iter(place)

    def integer(self, stop: int) -> int:
        return next(self.place)


@pytest.mark.parametrize("size", [9, 32])
def test_the_box_of_a_centre_and_a_lambda_is_timms(size, monkeypatch):
    for y, x, lam in itertools.product(
        (0, 1, size // 2, size - 1), (0, size // 3, size - 1), (0.0, 0.2, 0.51, 0.9, 1.0)
    ):
        centre = iter((y, x))
        monkeypatch.setattr(np.random, "randint", lambda *_, centre=centre, **__: next(centre))
        (yl, yh, xl, xh), corrected = cutmix_bbox_and_lam((3, size, size), lam)
        mix = pairs._cut(Centre(y, x), lam, size)
        assert mix.lam == pytest.approx(corrected, abs=1e-12)
        assert mix.box == (None if corrected == 1 else (yl, xl, yh - yl, xh - xl))


def test_mixup_lambdas_are_between_zero_and_one():
    lams = [draw_mix(Recipe(cutmix=0.0), f"key{i}", 0).lam for i in range(1000)]
    assert min(lams) >= 0
    assert max(lams) <= 1
    assert np.mean(lams) == pytest.approx(0.5, abs=0.04)


# --- batches --------------------------------------------------------------------------------------------------

PAIRS = [(4, 1), (0, -1), (2, 6), (3, 5)]
MIXES = [Mix(lam=0.75), Mix(lam=0.3), Mix(lam=1 - 12 / 80, box=(5, 2, 3, 4)), Mix()]


def slow_mix(images: np.ndarray, pairs: list[tuple[int, int]], mixes: list[Mix]) -> np.ndarray:
    """Mix images [B, H, W, 3] pixel by pixel in float64, to [B, 3, H, W]."""
    images = images.transpose(0, 3, 1, 2)
    out = images.astype(np.float64)
    for (first, second), mix in zip(pairs, mixes, strict=True):
        if second < 0:
            continue
        for own, other in ((first, second), (second, first)):
            for channel, y, x in np.ndindex(images.shape[1:]):
                if mix.box is None:
                    share = mix.lam
                else:
                    top, left, height, width = mix.box
                    share = 0.0 if top <= y < top + height and left <= x < left + width else 1.0
                a, b = float(images[own, channel, y, x]), float(images[other, channel, y, x])
                out[own, channel, y, x] = share * a + (1 - share) * b
    return out


def random_images(count: int, height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8))


def planes(images: torch.Tensor) -> torch.Tensor:
    """The same values as float32 [B, 3, H, W]."""
    return images.movedim(-1, -3).float()


def test_both_partners_see_each_other_and_share_one_mix():
    batch = mix_batch(PAIRS, MIXES, 7)
    assert batch.partner.tolist() == [0, 4, 6, 3, 1, 5, 2]  # 3 and 5 are a pair that is not mixed
    torch.testing.assert_close(batch.lam, torch.tensor([1, 0.75, 0.85, 1, 0.75, 1, 0.85]))
    assert batch.box.tolist() == [[0] * 4, [0] * 4, [5, 2, 3, 4], [0] * 4, [0] * 4, [0] * 4, [5, 2, 3, 4]]
    assert (batch.partner.dtype, batch.lam.dtype, batch.box.dtype) == (torch.int64, torch.float32, torch.int64)
    assert torch.equal(batch.partner[batch.partner], torch.arange(7))


@pytest.mark.parametrize(
    ("pairs", "positions"),
    [
        ([(4, 1), (0, 3)], [(0, 1), (2, 3)]),  # pair after pair, whatever the samples
        ([(4, 1), (2, -1)], [(0, 1), (2, -1)]),  # an odd block: its last sample is alone
        ([(0, -1), (1, -1), (2, -1)], [(0, -1), (1, -1), (2, -1)]),  # nothing is mixed
        ([(2, -1), (4, 1), (0, 3)], [(0, -1), (1, 2), (3, 4)]),  # one alone moves those behind it by one
        ([], []),  # an empty block
    ],
)
def test_the_two_of_a_pair_stand_together(pairs, positions):
    drawn = Pairs(Recipe(), names(5), np.array(pairs, np.int64).reshape(-1, 2))
    layout = lay_out(drawn, range(4, 5))
    assert layout.places.tolist() == [[list(each)] for each in positions]
    assert layout.rows.tolist() == [row for pair in pairs for row in pair if row >= 0]


def test_views_of_a_pair_follow_each_other_with_the_mix_of_each():
    recipe, keys = Recipe(), names(5)
    drawn = Pairs(recipe, keys, np.array([[4, 1], [2, -1]]))
    layout = lay_out(drawn, range(3, 6))
    assert layout.rows.tolist() == [4, 1, 4, 1, 4, 1, 2, 2, 2]
    assert layout.places.tolist() == [[[0, 1], [2, 3], [4, 5]], [[6, -1], [7, -1], [8, -1]]]
    positions, mixes = [(0, 1), (2, 3), (4, 5)], [draw_mix(recipe, keys[4], view) for view in range(3, 6)]
    expected = mix_batch(positions, mixes, 9)
    for name in ("partner", "lam", "box"):
        assert torch.equal(getattr(layout.mix, name), getattr(expected, name))


def test_some_pairs_of_a_shard_keep_their_samples_and_mixes():
    whole = pairs_of(SMALL, names(27), np.arange(27), 0)
    some = whole.take(np.array([9, 2]))
    assert some.rows.tolist() == [whole.rows[9].tolist(), whole.rows[2].tolist()]
    assert some.mixes(1) == [whole.mixes(1)[9], whole.mixes(1)[2]]


def test_the_first_of_a_pair_names_its_mix_and_a_single_sample_is_not_mixed():
    pairs = pairs_of(Recipe(mix_block=9), names(9), np.arange(9), 0)
    *pairs_rows, (single, nobody) = pairs.rows.tolist()
    assert nobody == -1
    assert draw_mix(pairs.recipe, names(9)[single], 0) != Mix()  # if it had a partner
    assert pairs.mixes(0) == [draw_mix(pairs.recipe, names(9)[first], 0) for first, _ in pairs_rows] + [Mix()]


def test_an_empty_batch_has_empty_arrays():
    batch = mix_batch([], [], 0)
    assert (batch.partner.shape, batch.lam.shape, batch.box.shape) == ((0,), (0,), (0, 4))


def test_as_many_mixes_as_pairs():
    with pytest.raises(ValueError, match="zip"):
        mix_batch(PAIRS, MIXES[:-1], 7)


def test_mixed_images_are_those_of_a_slow_loop():
    images = random_images(7, 8, 10)
    mixed = apply_mix(images, mix_batch(PAIRS, MIXES, 7))
    assert (mixed.dtype, mixed.shape) == (torch.float32, (7, 3, 8, 10))
    np.testing.assert_allclose(mixed.numpy(), slow_mix(images.numpy(), PAIRS, MIXES), atol=1e-4)


def test_drawn_mixes_of_a_drawn_block_are_those_of_a_slow_loop():
    recipe, keys, images = Recipe(img_size=12), names(15), random_images(15, 12, 12)
    for view in range(4):
        pairs = [(first, second) for first, second in draw_pairs(recipe, keys, view).tolist()]
        mixes = [draw_mix(recipe, keys[first], view) for first, _ in pairs]
        mixed = apply_mix(images, mix_batch(pairs, mixes, 15))
        np.testing.assert_allclose(mixed.numpy(), slow_mix(images.numpy(), pairs, mixes), atol=1e-4)


def test_unmixed_images_are_exact():
    """Where lambda is 1, outside of a CutMix box and inside of it, every value is a byte's, unrounded."""
    images = random_images(7, 8, 10)
    mixed = apply_mix(images, mix_batch(PAIRS, MIXES, 7))
    for position in (0, 3, 5):
        assert torch.equal(mixed[position], planes(images[position]))
    inside = torch.zeros(8, 10, dtype=torch.bool)
    inside[5:8, 2:6] = True
    for own, other in ((2, 6), (6, 2)):
        assert torch.equal(mixed[own], torch.where(inside, planes(images[other]), planes(images[own])))


def test_a_cutmix_box_of_the_whole_image_swaps_the_partners():
    images = random_images(2, 6, 6)
    mixed = apply_mix(images, mix_batch([(0, 1)], [Mix(lam=0.0, box=(0, 0, 6, 6))], 2))
    assert torch.equal(mixed, planes(images.flip(0)))


def test_mixing_is_linear():
    """Mixing half the pixels and half the others, and adding: the same as mixing the sum."""
    batch = mix_batch(PAIRS, MIXES, 7)
    one, other = random_images(7, 8, 10) // 2, random_images(7, 8, 10).flip(2) // 2
    torch.testing.assert_close(apply_mix(one, batch) + apply_mix(other, batch), apply_mix(one + other, batch))


def test_a_pair_keeps_its_mean_under_mixup():
    images = random_images(2, 8, 8)
    mixed = apply_mix(images, mix_batch([(0, 1)], [Mix(lam=0.3)], 2))
    torch.testing.assert_close(mixed.sum(0), planes(images).sum(0))


def test_mixing_does_not_depend_on_where_the_pair_stands_in_the_batch():
    images = random_images(7, 8, 10)
    order = torch.tensor([6, 2, 0, 4, 1, 5, 3])
    place = order.argsort().tolist()
    moved = [(place[first], place[second] if second >= 0 else -1) for first, second in PAIRS]
    mixed = apply_mix(images, mix_batch(PAIRS, MIXES, 7))
    assert torch.equal(apply_mix(images[order], mix_batch(moved, MIXES, 7)), mixed[order])
    alone = apply_mix(images[[2, 6]], mix_batch([(0, 1)], [MIXES[2]], 2))
    assert torch.equal(alone, mixed[[2, 6]])


def test_a_batch_is_channels_last_in_memory_as_its_images_lie():
    mixed = apply_mix(random_images(7, 8, 10), mix_batch(PAIRS, MIXES, 7))
    assert mixed.stride() == (8 * 10 * 3, 1, 10 * 3, 3)
    assert mixed.is_contiguous(memory_format=torch.channels_last)


def test_the_memory_format_of_the_images_is_kept_and_does_not_change_the_values():
    images, batch = random_images(7, 8, 10), mix_batch(PAIRS, MIXES, 7)
    apart = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)  # the same values, channel after channel
    mixed = apply_mix(apart, batch)
    assert mixed.is_contiguous()
    assert torch.equal(mixed, apply_mix(images, batch))


def test_mixing_writes_to_nothing():
    images, batch = random_images(7, 8, 10), mix_batch(PAIRS, MIXES, 7)
    before = images.clone(), batch.partner.clone(), batch.lam.clone(), batch.box.clone()
    apply_mix(images, batch)
    assert all(torch.equal(a, b) for a, b in zip((images, batch.partner, batch.lam, batch.box), before, strict=True))


def test_a_batch_moves_to_a_device_as_a_whole():
    batch = mix_batch(PAIRS, MIXES, 7)
    moved = batch.to("cpu")
    assert isinstance(moved, MixBatch)
    assert torch.equal(moved.box, batch.box)
    meta = batch.to("meta")
    assert {tensor.device.type for tensor in (meta.partner, meta.lam, meta.box)} == {"meta"}
