"""Epoch order: which views make up a step, as a pure function of (seed, epoch, step).

The unit of shuffling is the pair, because partners must meet in one batch. With repeated augmentation R, a unit brings
R views of its two images: one decode, R views. R epochs then share one shuffle, each taking its own part of the units
and all taking the same R views, so that over these epochs every view of every image is used exactly once. (DeiT's
sampler draws anew each epoch: some views would be used twice and some never, and each of them was paid for.)
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline.draws import stream_of
from pipeline.errors import UsageError
from pipeline.recipe import Recipe


@dataclass(frozen=True)
class Order:
    """What the order of all epochs follows from.

    Attributes:
        shard_units: units (pairs, or single samples) of each source shard.
        unit_size: samples of a unit, 2 where views are mixed.
        batch_size: views in a batch, at most.
        repeated_aug: R, views of an image in one batch.
        views: view numbers to use, in turn; None numbers them without end.
        window: source shards that are shuffled together.
        seed: of the shuffles.
        grad_accum_steps: batches of one update; an epoch holds whole updates.
    """

    shard_units: tuple[int, ...]
    unit_size: int
    batch_size: int
    repeated_aug: int
    views: range | None
    window: int
    seed: int
    grad_accum_steps: int = 1

    def __post_init__(self) -> None:
        if self.views is not None and len(self.views) % self.repeated_aug:
            raise UsageError(
                f"--repeated-aug {self.repeated_aug} takes the views in groups of {self.repeated_aug},"
                f" the label set has {len(self.views)}: label a multiple, or pass another --repeated-aug"
            )
        if self.units_per_step < 1:
            least = self.unit_size * self.repeated_aug
            raise UsageError(
                f"--batch-size must be at least {least} ({self.unit_size} partners, {self.repeated_aug} views), got {self.batch_size}"
            )
        if not sum(self.shard_units):
            raise UsageError("the source has no usable image")
        if self.steps_per_epoch < 1:
            raise UsageError(
                f"--grad-accum-steps {self.grad_accum_steps} is more than the batches of an epoch: pass fewer"
            )

    @property
    def units_per_step(self) -> int:
        """Units in one batch."""
        return self.batch_size // (self.unit_size * self.repeated_aug)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch. What is left of a batch or update is left out, as timm does; too few make one batch."""
        steps = max(1, sum(self.shard_units) // self.repeated_aug // self.units_per_step)
        return steps - steps % self.grad_accum_steps

    def position(self, index: int) -> tuple[int, int]:
        """Return (epoch, step) of the index-th batch of the run."""
        return divmod(index, self.steps_per_epoch)

    def views_of_epoch(self, epoch: int) -> range:
        """Return the R views that an epoch uses; they repeat when all were used."""
        r = self.repeated_aug
        group = epoch // r
        if self.views is None:
            return range(group * r, group * r + r)
        start = self.views.start + group % (len(self.views) // r) * r
        return range(start, start + r)

    def step_units(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Return the units of one batch, int64 [U, 2]: source shard, unit in it."""
        units = _epoch_units(self, epoch)
        return units[step * self.units_per_step : (step + 1) * self.units_per_step]

    def repeats_after(self) -> int | None:
        """Return the first epoch that uses views for a second time; None where they have no end."""
        return None if self.views is None else len(self.views)


def default_repeats(recipe: Recipe, views: range | None) -> int:
    """Return DeiT's three views of an image per batch where pairs and view numbers allow it, else one."""
    fits = recipe.views_per_pairing % 3 == 0 and (views is None or (len(views) % 3 == 0 and views.start % 3 == 0))
    return 3 if fits else 1


def check_repeats(recipe: Recipe, repeats: int, views: range | None) -> None:
    """Raise UsageError unless the R views of an image have the same partner."""
    start = 0 if views is None else views.start
    if recipe.mixes and (recipe.views_per_pairing % repeats or start % repeats):
        raise UsageError(
            f"--repeated-aug {repeats} needs views whose partners stay for {repeats} views; this recipe keeps them for"
            f" {recipe.views_per_pairing} (views_per_pairing), from view {start}"
        )


def count_units(recipe: Recipe, usable: NDArray[np.int64]) -> int:
    """Return how many units the usable rows of a source shard make: pairs of its mix blocks, or single samples."""
    if not recipe.mixes:
        return len(usable)
    _, sizes = np.unique(usable // recipe.mix_block, return_counts=True)
    return int(((sizes + 1) // 2).sum())


@lru_cache(maxsize=2)
def _epoch_units(order: Order, epoch: int) -> NDArray[np.int64]:
    """Shuffle the shards, then the units within each window of shards, and take this epoch's part."""
    group, part = divmod(epoch, order.repeated_aug)
    shards = stream_of("order", str(order.seed), str(group), "shards").permutation(len(order.shard_units))
    windows = []
    for number, start in enumerate(range(0, len(shards), order.window)):
        members = shards[start : start + order.window].tolist()
        units = np.concatenate([_units_of(shard, order.shard_units[shard]) for shard in members])
        shuffle = stream_of("order", str(order.seed), str(group), f"window {number}").permutation(len(units))
        windows.append(units[shuffle])
    return np.concatenate(windows)[part :: order.repeated_aug]


def _units_of(shard: int, count: int) -> NDArray[np.int64]:
    return np.stack([np.full(count, shard), np.arange(count)], axis=1)
