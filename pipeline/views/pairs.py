"""Partners and their mixes: neither depends on batch, rank or machine.

The samples of a source shard are divided, in order, into blocks of `recipe.mix_block`. A random permutation pairs the
samples of a block. The two samples of a pair are partners and share one mix, as in timm's pair mode. Both stages process
a pair together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipeline.images.samples import Box
from pipeline.views.draws import Draws, draws_for
from pipeline.views.recipe import Recipe


@dataclass(frozen=True)
class Mix:
    """The mix of the two views of a pair.

    Attributes:
        lam: weight of a sample's own view (and class label) against its partner's, 0..1.
        box: box of CutMix that is taken from the partner; None for mixup or no mix.
    """

    lam: float = 1.0
    box: Box | None = None


def draw_pairs(recipe: Recipe, keys: Sequence[str], view: int) -> NDArray[np.int64]:
    """Return the pairs of the samples of one mix block for one view.

    Each run of `views_per_pairing` views shares its pairs, so that a trainer that needs several views of an image decodes
    the image and its partner once.

    Args:
        recipe: the augmentation; it says whether views are mixed, and how many views share their pairs.
        keys: sample keys of the block's usable samples, in order.
        view: view number.

    Returns:
        int64 [P, 2], positions in `keys`; the second is -1 for a sample without a partner (the last one of a block with an
        odd number of samples, and every sample if the recipe does not mix).
    """
    if not recipe.mixes:
        return np.stack([np.arange(len(keys)), np.full(len(keys), -1)], axis=1)
    group = view // recipe.views_per_pairing
    order = draws_for(recipe.id, keys[0] if keys else "", group, "pairs").permutation(len(keys))
    if len(order) % 2:
        order = np.append(order, -1)
    return order.reshape(-1, 2)


def mix_blocks(recipe: Recipe, usable: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Return the mix blocks of the usable rows of a source shard; leaving out a bad row moves no other row."""
    blocks = usable // recipe.mix_block
    return np.split(usable, np.flatnonzero(np.diff(blocks)) + 1) if len(usable) else []


def count_pairs(recipe: Recipe, usable: NDArray[np.int64]) -> int:
    """Return the number of pairs of the usable rows of a source shard, including samples without a partner."""
    if not recipe.mixes:
        return len(usable)
    return sum((len(block) + 1) // 2 for block in mix_blocks(recipe, usable))


def count_units(recipe: Recipe, num_samples: int) -> int:
    """Return what `count_pairs` returns for a source shard of which every sample is usable."""
    if not recipe.mixes:
        return num_samples
    blocks, rest = divmod(num_samples, recipe.mix_block)
    return blocks * ((recipe.mix_block + 1) // 2) + (rest + 1) // 2


@dataclass(frozen=True)
class Pairs:
    """Pairs of samples of one source shard, for the views that share a pairing.

    Attributes:
        recipe: the augmentation.
        keys: sample keys, by row.
        rows: int64 [P, 2], rows of the two samples; the second is -1 for a sample without a partner.
    """

    recipe: Recipe
    keys: Sequence[str]
    rows: NDArray[np.int64]

    def take(self, which: NDArray[np.int64]) -> "Pairs":
        """Return some of the pairs, by position."""
        return replace(self, rows=self.rows[which])

    def mixes(self, view: int) -> list[Mix]:
        """Draw the mix of each pair in one view; a sample without a partner is not mixed."""
        rows: list[tuple[int, int]] = self.rows.tolist()
        return [draw_mix(self.recipe, self.keys[a], view) if b >= 0 else Mix() for a, b in rows]


def pairs_of(recipe: Recipe, keys: Sequence[str], usable: NDArray[np.int64], view: int) -> Pairs:
    """Return the pairs of all usable samples of a source shard for one view, block after block.

    Args:
        recipe: the augmentation.
        keys: keys of all samples of the shard, by row.
        usable: rows of the usable samples, in ascending order.
        view: view number.
    """
    rows, names = [np.empty((0, 2), np.int64)], list(keys)
    for block in mix_blocks(recipe, usable):
        positions = draw_pairs(recipe, [names[row] for row in block.tolist()], view)
        rows.append(np.where(positions < 0, -1, block[positions]))
    return Pairs(recipe, keys, np.concatenate(rows))


def draw_mix(recipe: Recipe, key: str, view: int) -> Mix:
    """Draw the mix of the pair whose first sample has this key, like timm's Mixup in pair mode."""
    draws = draws_for(recipe.id, key, view, "mix")
    if not recipe.mixes or not draws.chance(recipe.mixup_prob):
        return Mix()
    switch = draws.uniform()
    use_cutmix = recipe.cutmix > 0 and (recipe.mixup == 0 or switch < recipe.mixup_switch_prob)
    alpha = recipe.cutmix if use_cutmix else recipe.mixup
    lam = draws.beta(alpha) if recipe.renderer == 1 else draws.exact_beta(alpha)
    return _cut(draws, lam, recipe.img_size) if use_cutmix else Mix(lam=lam)


def _cut(draws: Draws, lam: float, size: int) -> Mix:
    """Draw the box of CutMix, and correct lam to the clipped box (timm's rand_bbox, correct_lam)."""
    side = int(size * math.sqrt(1 - lam))
    centre_y, centre_x = draws.integer(size), draws.integer(size)
    top, bottom = max(0, centre_y - side // 2), min(size, centre_y + (side + 1) // 2)
    left, right = max(0, centre_x - side // 2), min(size, centre_x + (side + 1) // 2)
    area = (bottom - top) * (right - left)
    if area == 0:
        return Mix()
    return Mix(lam=1 - area / size**2, box=(top, left, bottom - top, right - left))
