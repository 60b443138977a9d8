"""Several label sets as one: the answers of different teachers to the same views, averaged or drawn at random.

A view is a function of recipe, key and view number. So label sets of one recipe and one source, made by different teachers, hold
answers to the same pixels. Readers use `LabelSet` and `CombinedLabels` through the same names, except that the answers of
several sets are stored side by side until `Combination.combine` computes those of a batch.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import LabelSetMismatch, UsageError
from pipeline.images.source import NO_OPTIONS, Source, SourceOptions
from pipeline.labels.encoding import Answers, LabelRows
from pipeline.labels.labelset import LabelSet
from pipeline.labels.manifest import ShardRecord, SourceRecord, first_difference
from pipeline.labels.tables import SampleRows
from pipeline.storage.cache import Cache
from pipeline.storage.place import RemoteFile
from pipeline.text import listed
from pipeline.views.draws import stream_of
from pipeline.views.recipe import Recipe

log = logging.getLogger("deit_cli.labels")

Mode = Literal["mean", "random"]
OTHER_SET = "Pass label sets that were made from the same images with the same recipe"
SAME_WEIGHT = 9  # digits: votes that differ by less are equal, because sums of weights are rounded


@dataclass(frozen=True)
class Combination:
    """How the answers of several label sets to the same views become one.

    Attributes:
        weights: weights of the sets; they add up to 1.
        kept: K of each set; 0 for all if one set has only hard labels, because only these can then be combined.
        num_classes: C.
        mode: `mean`: a weighted mean of the probabilities, and a weighted vote for the hard label; `random`: for each view,
            the answers of one set, drawn with its weight as probability.
        seed: seed of the draws of `random`.
        spread: what the student's loss does with the tail: spread it over all other classes, or (False) drop it, so that
            the top-k of each set count with a sum of 1.
    """

    weights: tuple[float, ...]
    kept: tuple[int, ...]
    num_classes: int
    mode: Mode = "mean"
    seed: int = 0
    spread: bool = True

    def store(self, found: Sequence[Answers], shard: str, view: int, row: NDArray[np.uint32]) -> Answers:
        """Return the answers of all sets to one view of a source shard: side by side, or with `random` those drawn.

        Args:
            found: answers of each set, N rows.
            shard: source shard.
            view: view number.
            row: uint32 [N], rows of the samples.
        """
        if not any(self.kept):
            found = [
                each._replace(topk_index=each.topk_index[:, :0], topk_prob=each.topk_prob[:, :0]) for each in found
            ]
        if self.mode == "random":
            return self._drawn(found, shard, view, row)
        return Answers(
            np.stack([each.hard for each in found], axis=1),
            np.concatenate([each.topk_index for each in found], axis=1),
            np.concatenate([each.topk_prob for each in found], axis=1),
            np.stack([each.tail_mass for each in found], axis=1),
        )

    def combine(self, stored: Answers) -> Answers:
        """Return the answers from which a student learns, from those that `store` returned for any number of views.

        The probabilities of `mean` are exact for every class: those outside of all top-k have equal parts of the tail. There
        are K' = min(C, sum of the sets' K) classes; if the sets agree on some, the row is filled up with other classes and
        their probabilities. So the loss sees the mean of the targets that it would make of each set, for any temperature.
        """
        if self.mode == "random":
            return stored
        hard = self._vote(stored.hard)
        if not any(self.kept):
            return Answers(hard, stored.topk_index, stored.topk_prob, np.zeros(len(hard)))
        return Answers(hard, *self._mean(stored))

    def _vote(self, hard: NDArray[np.integer]) -> NDArray[np.integer]:
        """Return the hard labels [N] for which sets with the largest weight together vote, from those of the sets, [N, S].

        Of classes with equal votes, the one that the set with the largest weight names; of equal sets, the first.
        """
        order = sorted(range(len(self.weights)), key=lambda at: -self.weights[at])
        hard = hard[:, order]
        votes = (hard[:, :, None] == hard[:, None, :]) @ np.array(self.weights)[order]
        return hard[np.arange(len(hard)), votes.round(SAME_WEIGHT).argmax(axis=1)]

    def _mean(self, stored: Answers) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        """Return classes [N, K'], their mean probabilities, and the mean probability of all other classes together, [N]."""
        index, prob = stored.topk_index.astype(np.int64), stored.topk_prob.astype(np.float64)
        place, classes = _union(index, self.num_classes)
        rows, start = np.arange(len(index))[:, None], 0
        mean, mean_rest = np.zeros(classes.shape), np.zeros(len(index))
        for number, (weight, topk) in enumerate(zip(self.weights, self.kept, strict=True)):
            columns, others = slice(start, start + topk), self.num_classes - topk
            kept, rest = prob[:, columns], self._rest(stored.tail_mass[:, number], topk)
            scale = weight / (kept.sum(axis=1) + others * rest)
            part = np.repeat((scale * rest)[:, None], classes.shape[1], axis=1)
            part[rows, place[:, columns]] = scale[:, None] * kept
            mean, mean_rest, start = mean + part, mean_rest + scale * rest, start + topk
        return classes, mean, mean_rest * (self.num_classes - classes.shape[1])

    def _drawn(self, found: Sequence[Answers], shard: str, view: int, row: NDArray[np.uint32]) -> Answers:
        """Return for each row the answers of one set, drawn from (seed, source shard, row, view)."""
        draws = stream_of("label set", str(self.seed), shard, str(view))
        bits = draws.raw(int(row.max(initial=0)) + 1)[row]
        chosen = np.searchsorted(np.cumsum(self.weights)[:-1], (bits >> 11) * 2.0**-53, side="right")
        wide = [self._widened(each, max(self.kept)) for each in found]
        return Answers(*(np.stack(columns)[chosen, np.arange(len(row))] for columns in zip(*wide, strict=True)))

    def _widened(self, answers: Answers, topk: int) -> Answers:
        """Return the same answers with more classes in top-k: others with their parts of the tail."""
        had = answers.topk_index.shape[1]
        if had == topk:
            return answers
        index = np.pad(answers.topk_index.astype(np.int64), ((0, 0), (0, topk - had)))
        rest = self._rest(answers.tail_mass, had)
        added = np.repeat(rest[:, None], topk - had, axis=1)
        return Answers(
            answers.hard,
            _filled(index, np.broadcast_to(np.arange(topk) >= had, index.shape)),
            np.concatenate([answers.topk_prob, added], axis=1),
            rest * (self.num_classes - topk),
        )

    def _rest(self, tail_mass: NDArray[np.floating], topk: int) -> NDArray[np.float64]:
        """Return the probability that the loss gives to each class outside of top-k, [N], before the temperature."""
        others = self.num_classes - topk
        return tail_mass.astype(np.float64) / others if self.spread and others else np.zeros(len(tail_mass))


class CombinedLabels:
    """At least two label sets from which a student learns together. It is small, and can be sent to worker processes.

    Attributes:
        sets: the label sets, in the order of the user.
        combination: how their answers become one.
        place: locations of all sets, as text.
        records: source shards that all sets have, in the order of the source.
        views: view numbers that all sets have.
    """

    def __init__(
        self,
        sets: Sequence[LabelSet],
        *,
        weights: Sequence[float] = (),
        mode: Mode = "mean",
        seed: int = 0,
        spread: bool = True,
    ) -> None:
        """Combine label sets.

        Args:
            sets: at least two label sets.
            weights: weights above 0 and finite, one for each set; none: equal weights.
            mode: see `Combination`, as the following.
            seed: seed of the draws.
            spread: what the student's loss does with the tail.

        Raises:
            UsageError: the weights are not such numbers.
            LabelSetMismatch: the sets do not belong to the same views, or have no view or no source shard in common.
        """
        weights = weights or [1.0] * len(sets)
        if len(weights) != len(sets) or not all(0 < weight < math.inf for weight in (*weights, sum(weights))):
            raise UsageError(
                f"weights must be {len(sets)} finite numbers above 0, one for each set, got {list(weights)}"
            )
        self.sets = tuple(sets)
        self.place = " + ".join(str(each.place) for each in sets)
        _check_same(self.sets)
        self.records, self.views = _common_records(self.sets), _common_views(self.sets)
        shares = tuple(weight / math.fsum(weights) for weight in weights)
        kept = tuple(each.plan.topk for each in sets)
        kept = kept if all(kept) else (0,) * len(kept)
        self.combination = Combination(shares, kept, self.num_classes, mode, seed, spread)

    @property
    def recipe(self) -> Recipe:
        """The augmentation that made the views."""
        return self.sets[0].recipe

    @property
    def source_record(self) -> SourceRecord:
        """The source that was labelled."""
        return self.sets[0].source_record

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return self.sets[0].num_classes

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes in label order, if any of the sets knows them."""
        return next((each.class_names for each in self.sets if each.class_names), None)

    @property
    def shards(self) -> tuple[str, ...]:
        """Names of the source shards that all sets have, in order."""
        return tuple(record.name for record in self.records)

    @property
    def is_part(self) -> bool:
        """Whether the sets have only some source shards of the source in common."""
        return len(self.records) < len(self.source_record.shards)

    @property
    def partly_usable(self) -> frozenset[str]:
        """Names of the source shards that have bad images by the manifest of any set."""
        return frozenset[str]().union(*(each.partly_usable for each in self.sets))

    def samples(self, shard: str) -> SampleRows:
        """Read the samples of a source shard.

        Raises:
            LabelSetMismatch: a set was made from another image under the same key.
        """
        first, *others = (each.samples(shard) for each in self.sets)
        for other, label_set in zip(others, self.sets[1:], strict=True):
            mine, theirs = (
                zip(each.image_xxh3, (why is None for why in each.bad), strict=True) for each in (first, other)
            )
            key = next((key for key, one, two in zip(first.key, mine, theirs, strict=True) if one != two), None)
            if key is not None:
                raise LabelSetMismatch(
                    f"image {key!r} of {shard} had other bytes for {label_set.place} than for {self.sets[0].place}, or was bad"
                    " for only one of them: they have no answers for the same pixels",
                    fix="Pass label sets that were made from the same image files",
                )
        return first

    def read(self, shard: str, view: int) -> LabelRows:
        """Read the labels of one view of a source shard, as `Combination.store` returns them."""
        found = [each.read(shard, view) for each in self.sets]
        row = found[0].row
        return LabelRows(row, *self.combination.store([rows.answers for rows in found], shard, view, row))

    def remote_files(self, shard: str, view: int | None = None) -> tuple[RemoteFile, ...]:
        """Return the remote files of all sets that hold the samples (and, with a view, the labels) of a source shard."""
        return tuple(file for each in self.sets for file in each.remote_files(shard, view))

    def open_source(
        self, data: str | None = None, *, options: SourceOptions = NO_OPTIONS, cache: Cache | None = None
    ) -> Source:
        """Open the images: those at `data`, else those in the first set that has images, else those of the first set."""
        owner = next((each for each in self.sets if each.has_images), self.sets[0])
        return owner.open_source(data, options=options, cache=cache)


Labels = LabelSet | CombinedLabels


def open_labels(
    locations: Sequence[str],
    *,
    pins: Sequence[str] = (),
    cache: Cache | None = None,
    weights: Sequence[float] = (),
    mode: Mode = "mean",
    seed: int = 0,
    spread: bool = True,
) -> Labels:
    """Open one label set, or several as one.

    Args:
        locations: folders or URLs.
        pins: expected manifests, one for each set; none: any.
        cache: cache for the files of URLs; None: the default cache.
        weights: see `CombinedLabels`, as the following.
        mode: how the answers become one.
        seed: seed of the draws.
        spread: what the loss does with the tail.
    """
    known = pins or [None] * len(locations)
    sets = [
        LabelSet.open(location, cache=cache, expect_manifest=pin)
        for location, pin in zip(locations, known, strict=True)
    ]
    return sets[0] if len(sets) == 1 else CombinedLabels(sets, weights=weights, mode=mode, seed=seed, spread=spread)


def sets_of(labels: Labels) -> tuple[LabelSet, ...]:
    """Return the label sets behind labels: one or several."""
    return labels.sets if isinstance(labels, CombinedLabels) else (labels,)


def in_words(names: Sequence[str], weights: Sequence[Any], mode: str) -> str:
    """Return which parts are combined and how: `a (0.7) and b (0.3), averaged`; it fails for no values of a damaged file."""
    how = {"mean": "averaged", "random": "one drawn for each view"}.get(mode, mode)
    shares = [f"{weight:.3g}" if isinstance(weight, int | float) else str(weight) for weight in weights]
    return f"{listed([f'{name} ({share})' for name, share in zip(names, shares, strict=True)])}, {how}"


def _check_same(sets: tuple[LabelSet, ...]) -> None:
    """Raise LabelSetMismatch unless all sets have answers for the same views and classes, and each is there once."""
    first = sets[0]
    for number, other in enumerate(sets[1:], 1):
        mine, theirs = _definition(other), _definition(first)
        if None in (mine["classes"]["names"], theirs["classes"]["names"]):  # a teacher may not know its classes
            mine["classes"]["names"] = theirs["classes"]["names"] = None
        if mine != theirs:
            raise LabelSetMismatch(
                f"{other.place} has no answers for the views of {first.place}{first_difference(mine, theirs)}",
                fix=OTHER_SET,
            )
        if same := next((each for each in sets[:number] if each.plan.labelset_id == other.plan.labelset_id), None):
            raise LabelSetMismatch(
                f"{same.place} and {other.place} are the same label set, or parts of it",
                fix="Pass each label set once; deit-cli labels merge joins parts",
            )


def _definition(label_set: LabelSet) -> dict[str, Any]:
    """Return what must be equal for labels of the same views; the location of the images may differ."""
    names = label_set.class_names
    return {
        "recipe": label_set.recipe.model_dump(mode="json"),
        "source": label_set.source_record.model_dump(mode="json", include={"class_names", "shards"}),
        "classes": {"number": label_set.num_classes, "names": None if names is None else list(names)},
    }


def _common_views(sets: tuple[LabelSet, ...]) -> range:
    views = range(max(each.views.start for each in sets), min(each.views.stop for each in sets))
    texts = [f"{each.views.start}:{each.views.stop} ({each.place})" for each in sets]
    if not views:
        raise LabelSetMismatch(
            f"no view is in all label sets, which have {listed(texts)}",
            fix="Label more views with deit-cli labels extend",
        )
    if len({each.views for each in sets}) > 1:
        message = "the label sets have views %s: the student trains on those that all have, %d:%d"
        log.warning(message, listed(texts), views.start, views.stop)
    return views


def _common_records(sets: tuple[LabelSet, ...]) -> tuple[ShardRecord, ...]:
    common = set.intersection(*(set(each.shards) for each in sets))
    texts = [f"{len(each.shards)} ({each.place})" for each in sets]
    if not common:
        raise LabelSetMismatch(
            f"no source shard is in all label sets, which have {listed(texts)} source shards",
            fix="Fetch the same source shards of each with deit-cli labels pull --shards",
        )
    if len({each.shards for each in sets}) > 1:
        message = "the label sets have %s source shards: the student trains on those that all have, %d"
        log.warning(message, listed(texts), len(common))
    return tuple(record for record in sets[0].records if record.name in common)


def _union(index: NDArray[np.int64], num_classes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the distinct classes of each row, and where they are.

    Args:
        index: [N, M], classes; some occur several times in a row.
        num_classes: C.

    Returns:
        place [N, M]: column of each class of `index` in the classes; classes [N, min(C, M)]: all classes of the row in
        ascending order, then some others.
    """
    size, width = index.shape
    if width >= num_classes:
        return index, np.broadcast_to(np.arange(num_classes), (size, num_classes))
    # One sort of whole numbers that hold class and column: several times as fast as argsort.
    found, column = np.divmod(np.sort(index * width + np.arange(width), axis=1), width)
    at = np.cumsum(np.diff(found, axis=1, prepend=-1) > 0, axis=1) - 1
    rows = np.arange(size)[:, None]
    place, classes = np.empty_like(index), np.zeros_like(index)
    place[rows, column] = at
    classes[rows, at] = found
    return place, _filled(classes, np.arange(width) > at[:, -1:])


def _filled(classes: NDArray[np.int64], missing: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Replace the entries of [N, M] that are missing by classes that the row does not have; M is at most C."""
    width = classes.shape[1]
    taken = np.zeros(classes.shape, bool)
    row, column = np.nonzero(~missing & (classes < width))
    taken[row, classes[row, column]] = True
    free = ~taken  # of the first M classes, at least as many as are missing
    free &= np.cumsum(free, axis=1) <= missing.sum(axis=1, keepdims=True)
    classes = classes.copy()
    classes[missing] = np.nonzero(free)[1]
    return classes
