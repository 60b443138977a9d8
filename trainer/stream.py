"""Label set and source to batches: replayed views with the labels that the teacher gave them.

A worker renders whole batches. Batch i of a run is a pure function of i, so a resumed run asks for the batches that
are left and repeats nothing.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.decode import decode
from pipeline.errors import DeitCliError, LabelSetCorrupt, SourceError
from pipeline.labels import LabelRows, SampleRows
from pipeline.labelset import LabelSet
from pipeline.mixing import Mix, MixBatch, draw_mix, mix_batch, shard_pairs
from pipeline.recipe import Recipe
from pipeline.replay import check_image
from pipeline.sources import Source, SourceShard
from pipeline.views import draw_view, render, render_encoded, render_views
from trainer.order import Order

Value = TypeVar("Value")


@dataclass(frozen=True)
class Batch:
    """Views of one step, before mixing, with everything known of them.

    Attributes:
        index: of the batch in the run.
        views: view numbers in it.
        keys: sample keys, B of them.
        images: uint8 [B, H, W, 3].
        mix: partners and mixes.
        class_label: int64 [B], 0 where not labelled.
        labelled: bool [B].
        hard: int64 [B], the teacher's argmax; empty without a label set.
        topk_index: int64 [B, K].
        topk_prob: float32 [B, K].
        tail_mass: float32 [B], zeros where K = 0.
    """

    index: int
    views: range
    keys: tuple[str, ...]
    images: Tensor
    mix: MixBatch
    class_label: Tensor
    labelled: Tensor
    hard: Tensor
    topk_index: Tensor
    topk_prob: Tensor
    tail_mass: Tensor


@dataclass(frozen=True)
class ShardTable:
    """What a source shard's samples are, by row."""

    keys: tuple[str, ...]
    class_label: NDArray[np.int64]
    labelled: NDArray[np.bool_]
    usable: NDArray[np.int64]
    samples: SampleRows | None


class Catalogue:
    """The samples of every source shard: from the label set where there is one, else from the source itself."""

    def __init__(self, source: Source, label_set: LabelSet | None) -> None:
        self.source, self.label_set = source, label_set
        self.names = tuple(shard.name for shard in source.shards)

    def table(self, shard: int) -> ShardTable:
        """Read the samples of one source shard."""
        name = self.names[shard]
        if self.label_set is None:
            keys, labels = self.source.shards[shard].keys, self.source.shards[shard].class_labels
            return _table(keys, labels, np.arange(len(keys)), None)
        samples = self.label_set.samples(name)
        return _table(samples.key, samples.class_label, samples.usable, samples)


class BatchRenderer:
    """`renderer(i)` is batch i of the run, or the error that stopped it: it is called in worker processes."""

    def __init__(self, catalogue: Catalogue, recipe: Recipe, order: Order) -> None:
        self._catalogue, self._recipe, self._order = catalogue, recipe, order
        shards = 4 * order.window  # a window and its neighbours, with room
        self._tables = _Recent[ShardTable](shards)
        self._pairs = _Recent[NDArray[np.int64]](shards)
        self._labels = _Recent[LabelRows](shards * order.repeated_aug)

    def __call__(self, index: int) -> Batch | Exception:
        """Render a batch. Errors are returned, so that they cross processes whole."""
        try:
            return self._render(index)
        except DeitCliError as error:
            return error

    def _render(self, index: int) -> Batch:
        epoch, step = self._order.position(index)
        views = self._order.views_of_epoch(epoch)
        parts = _Parts()
        for shard, unit in self._order.step_units(epoch, step).tolist():
            self._add_unit(parts, shard, unit, views)
        return parts.to_batch(index, views)

    def _add_unit(self, parts: "_Parts", shard: int, unit: int, views: range) -> None:
        """Add the views of one pair (or single sample): each image is decoded once."""
        table = self._tables.get(shard, lambda: self._catalogue.table(shard))
        group = views.start // self._recipe.views_per_pairing
        pairs = self._pairs.get(
            (shard, group), lambda: shard_pairs(self._recipe, table.keys, table.usable, views.start)
        )
        rows = [row for row in pairs[unit].tolist() if row >= 0]
        rendered = [self._rendered(shard, row, table, views) for row in rows]
        for number, view in enumerate(views):
            mix = draw_mix(self._recipe, table.keys[rows[0]], view) if len(rows) == 2 else Mix()
            parts.pairs.append((len(parts.keys), len(parts.keys) + 1 if len(rows) == 2 else -1))
            parts.mixes.append(mix)
            for row, pixels in zip(rows, rendered, strict=True):
                parts.add(table, row, pixels[number], self._label(shard, view, row, table))

    def _rendered(self, shard: int, row: int, table: ShardTable, views: range) -> NDArray[np.uint8]:
        sample = self._catalogue.source.shards[shard][row]
        if table.samples is None:  # nobody has decoded this image before: all of it must be sound
            return render_views(decode(sample.image, key=sample.key), self._recipe, sample.key, views)
        check_image(sample, table.samples, row, shard=self._catalogue.names[shard])
        return render_encoded(sample.image, self._recipe, sample.key, views)

    def _label(self, shard: int, view: int, row: int, table: ShardTable) -> tuple[LabelRows, int] | None:
        label_set = self._catalogue.label_set
        if label_set is None:
            return None
        name = self._catalogue.names[shard]
        labels = self._labels.get((shard, view), lambda: _read_labels(label_set, name, view, table.usable))
        return labels, int(np.searchsorted(table.usable, row))


class CentreBatches:
    """`batches(i)` is the i-th batch of centre crops and class labels; it is called in worker processes."""

    def __init__(self, source: Source, labelled: list[tuple[int, int]], recipe: Recipe, batch_size: int) -> None:
        self._source, self._labelled, self._recipe, self._size = source, labelled, recipe, batch_size

    def __len__(self) -> int:
        return -(-len(self._labelled) // self._size)

    def __call__(self, index: int) -> tuple[Tensor, Tensor] | Exception:
        """Return uint8 [B, H, W, 3] and int64 [B], or the error."""
        try:
            chosen = self._labelled[index * self._size : (index + 1) * self._size]
            views = [self._view(self._source.shards[shard], row) for shard, row in chosen]
        except DeitCliError as error:
            return error
        return torch.from_numpy(np.stack([pixels for pixels, _ in views])), torch.tensor([label for _, label in views])

    def _view(self, shard: SourceShard[Any], row: int) -> tuple[NDArray[np.uint8], int]:
        sample = shard[row]
        if sample.class_label is None:
            raise SourceError(f"{sample.key!r} has lost its class label since the source was opened")
        image = decode(sample.image, key=sample.key)
        drawn = draw_view(self._recipe, sample.key, 0, height=image.shape[0], width=image.shape[1])
        return render(image, drawn), sample.class_label


def _read_labels(label_set: LabelSet, name: str, view: int, usable: NDArray[np.int64]) -> LabelRows:
    labels = label_set.read(name, view)
    if not np.array_equal(labels.row, usable):
        raise LabelSetCorrupt(
            f"{label_set.folder}: view {view} of {name} does not have the usable rows of its samples file"
        )
    return labels


class _Parts:
    """A batch on its way."""

    def __init__(self) -> None:
        self.pairs: list[tuple[int, int]] = []
        self.mixes: list[Mix] = []
        self.keys: list[str] = []
        self._images: list[NDArray[np.uint8]] = []
        self._class_label: list[int] = []
        self._labelled: list[bool] = []
        self._labels: list[tuple[LabelRows, int]] = []

    def add(self, table: ShardTable, row: int, pixels: NDArray[np.uint8], label: tuple[LabelRows, int] | None) -> None:
        self.keys.append(table.keys[row])
        self._images.append(pixels)
        self._class_label.append(int(table.class_label[row]))
        self._labelled.append(bool(table.labelled[row]))
        if label is not None:
            self._labels.append(label)

    def to_batch(self, index: int, views: range) -> Batch:
        hard = np.array([rows.hard[at] for rows, at in self._labels], np.int64)
        topk_index = [rows.topk_index[at] for rows, at in self._labels]
        topk_prob = [rows.topk_prob[at] for rows, at in self._labels]
        tail = [rows.tail_mass[at] if len(rows.tail_mass) else 0.0 for rows, at in self._labels]
        return Batch(
            index=index,
            views=views,
            keys=tuple(self.keys),
            images=torch.from_numpy(np.stack(self._images)),
            mix=mix_batch(self.pairs, self.mixes, len(self.keys)),
            class_label=torch.tensor(self._class_label),
            labelled=torch.tensor(self._labelled),
            hard=torch.from_numpy(hard),
            topk_index=torch.from_numpy(np.array(topk_index, np.int64).reshape(len(hard), -1))
            if len(hard)
            else torch.empty(0, 0, dtype=torch.int64),
            topk_prob=torch.from_numpy(np.array(topk_prob, np.float32).reshape(len(hard), -1))
            if len(hard)
            else torch.empty(0, 0),
            tail_mass=torch.from_numpy(np.array(tail, np.float32)),
        )


def _table(
    keys: tuple[str, ...], labels: tuple[int | None, ...], usable: NDArray[np.int64], samples: SampleRows | None
) -> ShardTable:
    labelled = np.array([label is not None for label in labels], bool)
    class_label = np.array([label or 0 for label in labels], np.int64)
    return ShardTable(keys, class_label, labelled, usable, samples)


class _Recent(Generic[Value]):
    """The values that were asked for last, at most `size` of them."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[Hashable, Value] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        if key not in self._values:
            self._values[key] = make()
            if len(self._values) > self._size:
                self._values.popitem(last=False)
        self._values.move_to_end(key)
        return self._values[key]
