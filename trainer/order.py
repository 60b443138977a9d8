"""Epoch order: the views of each step, a pure function of (seed, epoch, step). A step is one update of the weights.

The unit of shuffling is the pair, because partners must meet in one batch. With repeated augmentation R, a unit has R
views of its two images, and each image is decoded once for R views. R epochs then share one shuffle: each uses its own
part of the units, and all use the same R views, so that in these epochs every one of these views of every image is used
exactly once. (DeiT's sampler draws again for each epoch: it would use some labelled views twice and others never.)

The number of ranks only determines how the units of a step are divided. Within a step the units are sorted by source
shard, so that the share of a rank comes from few shards: of a window of 64, each of eight ranks reads nine.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UsageError
from pipeline.views.draws import stream_of
from pipeline.views.recipe import Recipe
from trainer.config import ViewPolicy


@dataclass(frozen=True)
class Order:
    """The order of all epochs, defined by a few values.

    Attributes:
        shard_units: number of units (pairs, or single samples) of each source shard.
        unit_size: number of samples in a unit; 2 if views are mixed.
        batch_size: maximum number of views in one step, over all ranks and forward passes.
        repeated_aug: R, number of views of an image in one step.
        views: view numbers to use; None: unlimited view numbers.
        window: number of source shards that are shuffled together.
        seed: seed of the shuffles.
        view_policy: `cycle` uses the views in order, then again from the first; `random` draws a new order for each pass
            over the views; `once` is `cycle`, for a caller that has checked that there are enough views.
    """

    shard_units: tuple[int, ...]
    unit_size: int
    batch_size: int
    repeated_aug: int
    views: range | None
    window: int
    seed: int
    view_policy: ViewPolicy = "cycle"

    def __post_init__(self) -> None:
        if self.views is not None and len(self.views) % self.repeated_aug:
            raise UsageError(
                f"--repeated-aug {self.repeated_aug} uses views in groups of {self.repeated_aug},"
                f" the label set has {len(self.views)}: label a multiple, or pass another --repeated-aug"
            )
        if self.units_per_step < 1:
            least = self.unit_size * self.repeated_aug
            raise UsageError(
                f"--batch-size must be at least {least} ({self.unit_size} partners, {self.repeated_aug} views), got {self.batch_size}"
            )
        if not sum(self.shard_units):
            raise UsageError("the source has no usable image")

    @property
    def units_per_step(self) -> int:
        """Return the number of units in one step."""
        return self.batch_size // (self.unit_size * self.repeated_aug)

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of steps in an epoch, at least one. An incomplete last step is left out, as in timm."""
        return max(1, sum(self.shard_units) // self.repeated_aug // self.units_per_step)

    @property
    def views_per_step(self) -> int:
        """Return the number of views in a full step if every unit has all its samples: the divisor of the loss of a step."""
        units = min(self.units_per_step, -(-sum(self.shard_units) // self.repeated_aug))
        return units * self.unit_size * self.repeated_aug

    @property
    def least_units_per_step(self) -> int:
        """Return the minimum number of units in a step: epochs of a group differ by one unit if the division is uneven."""
        return min(self.units_per_step, sum(self.shard_units) // self.repeated_aug)

    def position(self, index: int) -> tuple[int, int]:
        """Return (epoch, step) of the index-th step of the run."""
        return divmod(index, self.steps_per_epoch)

    def views_of_epoch(self, epoch: int) -> range:
        """Return the R views that an epoch uses; they repeat after all have been used."""
        r = self.repeated_aug
        group = epoch // r
        if self.views is None:
            return range(group * r, group * r + r)
        turn, group = divmod(group, len(self.views) // r)
        if self.view_policy == "random":
            group = int(_view_groups(self.seed, turn, len(self.views) // r)[group])
        start = self.views.start + group * r
        return range(start, start + r)

    def step_units(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Return the units of one step, int64 [U, 2]: source shard and unit in it, grouped by shard."""
        group, part = divmod(epoch, self.repeated_aug)
        places, starts = _shuffle(self, group)
        # The epochs of a group take turns: epoch `part` has every R-th unit of the shuffle.
        at = part + self.repeated_aug * np.arange(step * self.units_per_step, (step + 1) * self.units_per_step)
        at = at[at < starts[-1]]
        window = np.searchsorted(starts, at, side="right") - 1
        units = np.concatenate(
            [np.empty((0, 2), np.int64)]
            + [_window_units(self, group, int(each))[at[window == each] - starts[each]] for each in np.unique(window)]
        )
        return units[np.argsort(places[units[:, 0]], kind="stable")]


@dataclass(frozen=True)
class Share:
    """The part of every step for one of `size` ranks, which each make `passes` forward passes for one update.

    Attributes:
        rank: number of this rank, 0 <= rank < size.
        size: number of ranks.
        passes: number of forward passes of a rank for one update, one after the other.
    """

    rank: int = 0
    size: int = 1
    passes: int = 1

    @property
    def parts(self) -> int:
        """Return the number of forward passes for one update, over all ranks."""
        return self.size * self.passes

    def cut(self, units: NDArray[np.int64], number: int) -> NDArray[np.int64]:
        """Return the units of this rank's `number`-th forward pass. The parts of a step differ by at most one unit."""
        part = self.rank * self.passes + number
        return units[len(units) * part // self.parts : len(units) * (part + 1) // self.parts]


def order_of(
    recipe: Recipe,
    shard_units: tuple[int, ...],
    views: range | None,
    *,
    batch_size: int,
    share: Share = Share(),
    repeated_aug: int | None = None,
    window: int,
    seed: int,
    view_policy: ViewPolicy = "cycle",
) -> Order:
    """Return the order of all updates, which is the same on every rank.

    Args:
        recipe: recipe of the views.
        shard_units: number of units of each source shard.
        views: view numbers to use; None: unlimited view numbers.
        batch_size: maximum number of views of one rank in one forward pass.
        share: this process's part of every update.
        repeated_aug: R; None: `default_repeats`, or 1 if an epoch would then have fewer units than an update has parts.
        window, seed, view_policy: as in `Order`.

    Raises:
        UsageError: views, repeated augmentation or batch size do not fit the images or the ranks.
    """
    repeats = repeated_aug or default_repeats(recipe, views)
    if repeated_aug is None and sum(shard_units) < repeats * share.parts:
        repeats = 1  # with repeats, an epoch would have fewer units than an update has forward passes
    check_repeats(recipe, repeats, views)
    order = Order(
        shard_units=shard_units,
        unit_size=2 if recipe.mixes else 1,
        batch_size=batch_size * share.parts,
        repeated_aug=repeats,
        views=views,
        window=window,
        seed=seed,
        view_policy=view_policy,
    )
    check_parts(order, share)
    return order


def check_parts(order: Order, share: Share) -> None:
    """Raise UsageError unless every forward pass of an update has at least one unit."""
    unit = order.unit_size * order.repeated_aug
    if order.least_units_per_step < share.parts:
        raise UsageError(
            f"an update of {order.least_units_per_step * unit} views cannot be split into {share.parts} forward passes"
            f" ({share.size} ranks, --grad-accum-steps {share.passes}) of at least {unit} views",
            fix="Use fewer ranks or a smaller --grad-accum-steps",
        )


def default_repeats(recipe: Recipe, views: range | None) -> int:
    """Return DeiT's three views of an image per batch if pairs and view numbers allow it, else one."""
    fits = recipe.views_per_pairing % 3 == 0 and (views is None or (len(views) % 3 == 0 and views.start % 3 == 0))
    return 3 if fits else 1


def check_repeats(recipe: Recipe, repeats: int, views: range | None) -> None:
    """Raise UsageError unless the R views of an image have the same partner."""
    start = 0 if views is None else views.start
    if recipe.mixes and (recipe.views_per_pairing % repeats or start % repeats):
        raise UsageError(
            f"--repeated-aug {repeats} needs partners that stay the same for {repeats} views; this recipe keeps them for"
            f" {recipe.views_per_pairing} (views_per_pairing), starting at view {start}"
        )


@lru_cache(maxsize=2)
def _shuffle(order: Order, group: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the shuffle of the source shards for a group of epochs.

    Returns:
        the position of each source shard in the shuffle; the number of units before each window, and of all units.
    """
    shards = _shuffled_shards(order, group)
    places = np.empty(len(shards), np.int64)
    places[shards] = np.arange(len(shards))
    units = np.array(order.shard_units, np.int64)[shards]
    of_windows = np.add.reduceat(units, np.arange(0, len(units), order.window))
    return places, np.concatenate([[0], np.cumsum(of_windows)])


@lru_cache(maxsize=4)  # a step has units of few windows, and the next steps have units of the same
def _window_units(order: Order, group: int, number: int) -> NDArray[np.int64]:
    """Return the shuffled units of one window, int64 [U, 2]. No process holds the units of a whole epoch."""
    members = _shuffled_shards(order, group)[number * order.window : (number + 1) * order.window].tolist()
    units = np.concatenate([_units_of(shard, order.shard_units[shard]) for shard in members])
    return units[stream_of("order", str(order.seed), str(group), f"window {number}").permutation(len(units))]


@lru_cache(maxsize=2)
def _shuffled_shards(order: Order, group: int) -> NDArray[np.int64]:
    return stream_of("order", str(order.seed), str(group), "shards").permutation(len(order.shard_units))


@lru_cache(maxsize=2)
def _view_groups(seed: int, turn: int, groups: int) -> NDArray[np.int64]:
    return stream_of("order", str(seed), str(turn), "views").permutation(groups)


def _units_of(shard: int, count: int) -> NDArray[np.int64]:
    return np.stack([np.full(count, shard), np.arange(count)], axis=1)
