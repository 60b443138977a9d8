import itertools
import tracemalloc

import numpy as np
import pytest

from pipeline.errors import UsageError
from pipeline.settings.files import load_recipe
from pipeline.views.draws import stream_of
from pipeline.views.pairs import count_pairs
from trainer.order import Order, Share, check_repeats, default_repeats


def order(**changes) -> Order:
    return Order(
        **{
            "shard_units": (50, 30, 41),
            "unit_size": 2,
            "batch_size": 8,
            "repeated_aug": 1,
            "views": range(6),
            "window": 2,
            "seed": 0,
        }
        | changes
    )


def units_of_epoch(o: Order, epoch: int) -> list[tuple[int, int]]:
    return [tuple(unit) for step in range(o.steps_per_epoch) for unit in o.step_units(epoch, step).tolist()]


def test_an_epoch_takes_no_unit_twice_and_leaves_out_less_than_a_batch():
    o = order()
    units = units_of_epoch(o, 0)
    assert len(set(units)) == len(units) == 120  # 30 batches of 4 pairs; one pair of 121 is left out
    assert set(units) <= {(s, u) for s, size in enumerate(o.shard_units) for u in range(size)}


def whole_epoch(o: Order, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Slow reference: all units of an epoch in order, and the place of each source shard in the shuffle."""
    group, part = divmod(epoch, o.repeated_aug)
    shards = stream_of("order", str(o.seed), str(group), "shards").permutation(len(o.shard_units))
    windows = []
    for number, start in enumerate(range(0, len(shards), o.window)):
        units = [(shard, unit) for shard in shards[start : start + o.window] for unit in range(o.shard_units[shard])]
        shuffle = stream_of("order", str(o.seed), str(group), f"window {number}").permutation(len(units))
        windows.append(np.array(units, np.int64).reshape(-1, 2)[shuffle])
    return np.concatenate(windows)[part :: o.repeated_aug], np.argsort(shards)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"repeated_aug": 3, "batch_size": 12},
        {"window": 1},
        {"window": 64, "seed": 5},
        {"shard_units": (3,) * 40, "window": 3, "batch_size": 64},  # a step has units of several windows
        {"shard_units": (3,) * 40, "window": 3, "batch_size": 120, "repeated_aug": 3},
        {"shard_units": (0, 5, 0, 0, 7, 0), "window": 2},  # a source shard, and a window, without a usable image
        {"shard_units": (2, 1), "batch_size": 64},  # too few for a full step
    ],
    ids=str,
)
def test_steps_are_parts_of_one_shuffle_of_the_whole_epoch(changes):
    o = order(**changes)
    for epoch in range(7):
        units, places = whole_epoch(o, epoch)
        for step in range(o.steps_per_epoch + 2):
            part = units[step * o.units_per_step : (step + 1) * o.units_per_step]
            expected = part[np.argsort(places[part[:, 0]], kind="stable")]
            found = o.step_units(epoch, step)
            assert (found.dtype, found.tolist()) == (np.int64, expected.tolist())


def test_a_step_takes_the_memory_of_a_window_and_not_of_an_epoch():
    """A loader process of an ImageNet-22k run would hold 220 MB of units otherwise."""
    o = order(shard_units=(500,) * 4000, window=8)
    tracemalloc.start()
    o.step_units(0, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6  # the units of the epoch are 32 MB


def test_a_step_is_a_function_of_seed_epoch_and_step_alone():
    forward = [order().step_units(epoch, step).tolist() for epoch in range(3) for step in range(5)]
    backward = [order().step_units(epoch, step).tolist() for epoch in (2, 1, 0) for step in (4, 3, 2, 1, 0)]
    assert forward == backward[::-1]
    assert order().step_units(0, 0).tolist() != order(seed=1).step_units(0, 0).tolist()
    assert order().step_units(0, 0).tolist() != order().step_units(1, 0).tolist()


def test_repeated_augmentation_uses_every_view_of_every_pair_once_in_r_epochs():
    o = order(repeated_aug=3, batch_size=12)
    used = [(unit, view) for e in range(6) for unit in _all_units(o, e) for view in o.views_of_epoch(e)]
    assert len(set(used)) == len(used) == 121 * 6
    assert [list(o.views_of_epoch(e)) for e in range(7)] == [[0, 1, 2]] * 3 + [[3, 4, 5]] * 3 + [[0, 1, 2]]


def _all_units(o: Order, epoch: int) -> list[tuple[int, int]]:
    """All units of an epoch, those of the last partial batch too."""
    return [tuple(u) for step in range(o.steps_per_epoch + 1) for u in o.step_units(epoch, step).tolist()]


def test_views_come_in_turn_and_then_again():
    o = order(views=range(4, 7))
    assert [o.views_of_epoch(e)[0] for e in range(5)] == [4, 5, 6, 4, 5]
    endless = order(views=None)
    assert [endless.views_of_epoch(e)[0] for e in range(5)] == [0, 1, 2, 3, 4]


def test_a_window_keeps_its_shards_together():
    o = order(shard_units=(40,) * 6, window=2)
    shards = [shard for shard, _ in units_of_epoch(o, 0)]
    spans = [set(shards[i : i + 80]) for i in range(0, 240, 80)]
    assert [len(span) for span in spans] == [2, 2, 2]
    assert set().union(*spans) == set(range(6))


def test_a_step_mixes_the_shards_of_its_window_as_a_full_shuffle_does():
    o = order(shard_units=(500,) * 4, window=4, batch_size=64)
    steps = [o.step_units(0, step)[:, 0] for step in range(o.steps_per_epoch)]
    counts = np.array([np.bincount(shards, minlength=4) for shards in steps])
    # 32 drawn from four times 500: each shard's count has variance 32 * 1/4 * 3/4, less 2 % for drawing without return
    assert counts.var(axis=0) == pytest.approx(5.9, rel=0.35)
    assert abs(np.corrcoef(counts[:-1, 0], counts[1:, 0])[0, 1]) < 0.3


@pytest.mark.parametrize("window", [2, 8])
def test_a_rank_reads_few_shards_of_a_window(window):
    o = order(shard_units=(100,) * 8, window=window, batch_size=160)
    for step in range(o.steps_per_epoch):
        units = o.step_units(0, step)
        shares = [set(Share(rank, 4).cut(units, 0)[:, 0].tolist()) for rank in range(4)]
        assert max(map(len, shares)) <= window // 4 + 2


@pytest.mark.parametrize(("batch_size", "sizes"), [(32, {4}), (26, {3, 4})])
def test_ranks_and_passes_cut_a_step_into_parts_of_nearly_one_size(batch_size, sizes):
    units = order(batch_size=batch_size).step_units(0, 3)
    whole = units.tolist()
    for size, passes in ((1, 4), (2, 2), (4, 1)):
        shares = [Share(rank, size, passes) for rank in range(size)]
        parts = [share.cut(units, number).tolist() for share in shares for number in range(passes)]
        assert [unit for part in parts for unit in part] == whole
        assert set(map(len, parts)) == sizes


def test_views_in_a_drawn_order_are_each_used_once_and_then_in_another_order():
    o = order(views=range(3, 33), view_policy="random", repeated_aug=3, batch_size=12)
    turns = [[o.views_of_epoch(turn * 30 + epoch) for epoch in range(30)] for turn in range(2)]
    for turn in turns:
        assert turn[::3] == turn[1::3] == turn[2::3]  # three epochs share three views
        assert sorted(views.start for views in turn[::3]) == list(range(3, 33, 3))
    assert turns[0] != turns[1] != sorted(turns[1], key=lambda views: views.start)
    assert order(views=None, view_policy="random").views_of_epoch(7) == range(7, 8)


def test_an_epoch_smaller_than_a_step_is_one_step_of_what_there_is():
    o = order(batch_size=1000)
    assert (len(o.step_units(0, 0)), o.views_per_step) == (121, 242)
    assert (order().views_per_step, order(repeated_aug=3, batch_size=20).views_per_step) == (8, 18)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, 30),  # 121 pairs, 4 a batch
        ({"unit_size": 1}, 15),  # 121 single samples, 8 a batch
        ({"batch_size": 1000}, 1),  # less than one batch makes one
        ({"repeated_aug": 3, "batch_size": 12}, 20),  # a third of the pairs, 2 a batch
    ],
)
def test_steps_of_an_epoch(changes, steps):
    assert order(**changes).steps_per_epoch == steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 1}, "--batch-size must be at least 2"),
        ({"repeated_aug": 4, "batch_size": 64}, "--repeated-aug 4 uses views in groups of 4, the label set has 6"),
        ({"repeated_aug": 3}, None),
        ({"shard_units": (0, 0)}, "no usable image"),
    ],
)
def test_orders_that_cannot_be(changes, message):
    if message is None:
        assert order(**changes).units_per_step == 1
        return
    with pytest.raises(UsageError, match=message):
        order(**changes)


def test_positions_run_through_the_epochs():
    o = order()
    assert [o.position(i) for i in (0, 29, 30, 61)] == [(0, 0), (0, 29), (1, 0), (2, 1)]


def test_units_are_the_pairs_of_the_blocks():
    recipe = load_recipe("deit", {"mix_block": 4})
    assert count_pairs(recipe, np.arange(9)) == 5  # 2 + 2 + a single
    assert count_pairs(recipe, np.array([0, 2, 3, 4, 8])) == 4  # blocks of 3, 1 and 1 usable rows
    assert count_pairs(load_recipe("crop-flip"), np.arange(9)) == 9


@pytest.mark.parametrize(
    ("per_pairing", "views", "default"),
    [
        (3, range(6), 3),
        (3, range(4), 1),  # not a multiple
        (3, range(1, 7), 1),  # groups would straddle two pairings
        (1, range(6), 1),  # partners change with every view
        (3, None, 3),
    ],
)
def test_three_repeats_where_the_views_allow_it(per_pairing, views, default):
    assert default_repeats(load_recipe("deit", {"views_per_pairing": per_pairing}), views) == default


def test_repeats_across_a_change_of_partners_are_refused():
    recipe = load_recipe("deit")
    for repeats, views in itertools.product((1, 3), (range(6), None)):
        check_repeats(recipe, repeats, views)
    with pytest.raises(UsageError, match="--repeated-aug 2 needs partners that stay the same for 2 views"):
        check_repeats(recipe, 2, range(6))
    check_repeats(load_recipe("crop-flip"), 2, range(6))  # nothing is mixed
