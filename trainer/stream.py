"""Batches from a label set and a source: replayed views with the teacher's labels.

A loader process renders whole batches. Batch i of a rank is a pure function of i, so a resumed run asks only for the
remaining batches.
"""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import BadImageError, LabelSetCorrupt, SourceError
from pipeline.images.decode import decode
from pipeline.images.source import Source
from pipeline.labels.combined import CombinedLabels, Labels
from pipeline.labels.comparing import check_shard, labelled_part
from pipeline.labels.encoding import Answers, LabelRows
from pipeline.labels.format import DAMAGED_MANIFEST
from pipeline.labels.replay import check_image
from pipeline.labels.tables import SampleRows
from pipeline.machine.loaders import Note, SlotStream
from pipeline.pixels.handover import RenderedViews, UnrenderedViews, begin_batch, rendered, slot_shape
from pipeline.pixels.render import Take, draw_decoded, draw_encoded, render_view
from pipeline.storage.place import RemoteFile
from pipeline.storage.prefetch import Prefetch
from pipeline.views.draws import stream_of
from pipeline.views.mixing import Layout, MixBatch, apply_mix, lay_out
from pipeline.views.pairs import Pairs, count_pairs, count_units, pairs_of
from pipeline.views.recipe import Recipe
from trainer.losses import ClassTarget, TeacherTarget
from trainer.order import Order, Share

Record = TypeVar("Record")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Batch:
    """The views of one forward pass before mixing, with their labels.

    Attributes:
        index: number of the forward pass among those of this rank in the run; the stream can continue from any index.
        views: view numbers in the batch.
        keys: sample keys, B strings.
        images: uint8 [B, H, W, 3], or [N] before a device has rendered them.
        mix: partners and mixes.
        classes: class labels, 0 if unlabelled; partners and weights are those of `mix`.
        teacher: the teacher's stored answers; None without a label set.
    """

    index: int
    views: range
    keys: tuple[str, ...]
    images: Tensor
    mix: MixBatch
    classes: ClassTarget
    teacher: TeacherTarget | None

    def to(self, device: torch.device) -> "Batch":
        """Return the same batch on a device, rendered; copies from page-locked memory to CUDA run on the current stream."""
        images = rendered(self.images, len(self.keys), device)
        if device.type == "cpu":
            return self if images is self.images else replace(self, images=images)
        later = device.type == "cuda"  # `on_device` waits for its stream before the source is written again
        return _with_tensors(replace(self, images=images), lambda tensor: tensor.to(device, non_blocking=later))

    def record_stream(self, stream: "torch.cuda.Stream") -> None:
        """Tell the allocator that this stream will use the batch, which another stream has made."""

        def record(tensor: Tensor) -> Tensor:
            tensor.record_stream(stream)
            return tensor

        _with_tensors(self, record)


def _with_tensors(record: Record, change: Callable[[Tensor], Tensor]) -> Record:
    """Return a copy of a record and its nested records, with `change` applied once to each tensor."""
    changed: dict[int, Tensor] = {}

    def visit(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in changed:
                changed[id(value)] = change(value)
            return changed[id(value)]
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{field.name: visit(getattr(value, field.name)) for field in fields(value)})
        return value

    return visit(record)


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield batches on a device; on CUDA the next batch is copied while the current one is in use.

    Each copy is finished before the next batch is requested, so its source memory may be used again: this function
    holds one batch.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    copies, computing = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    waiting: Batch | None = None
    for batch in batches:
        with torch.cuda.stream(copies):
            moved = batch.to(device)
        if waiting is not None:
            yield waiting
        copies.synchronize()
        moved.record_stream(computing)
        waiting = moved
    if waiting is not None:
        yield waiting


@dataclass(frozen=True)
class ShardTable:
    """The samples of a source shard, by row."""

    keys: Sequence[str]
    class_label: NDArray[np.int64]
    labelled: NDArray[np.bool_]
    usable: NDArray[np.int64]
    samples: SampleRows | None


class Catalogue:
    """The samples of every source shard: from the label set if there is one, else from the source."""

    def __init__(self, source: Source, label_set: Labels | None, labelled_fraction: float = 1.0) -> None:
        """Open the samples.

        Args:
            source: original images.
            label_set: label set with the teacher's answers, or None.
            labelled_fraction: share of the class labels that is used. The other samples count as unlabelled; without a
                label set they are not used at all.
        """
        self.source = source if label_set is None else labelled_part(label_set, source)
        self.label_set, self._fraction = label_set, labelled_fraction
        self.names = tuple(shard.name for shard in self.source.shards)

    @property
    def is_remote(self) -> bool:
        """Return True if images or labels are read from other machines."""
        return any(self.remote_files(0, range(0)))

    def remote_files(self, shard: int, views: range) -> Iterator[RemoteFile]:
        """Yield the remote files of one source shard: images, samples, and labels of these views."""
        name, label_set = self.names[shard], self.label_set
        yield from self.source.remote_files(name)
        if label_set is not None:
            yield from label_set.remote_files(name)
            for view in views:
                yield from label_set.remote_files(name, view)

    def table(self, shard: int) -> ShardTable:
        """Return the samples of one source shard, after its source was compared with its samples in the label set.

        Raises:
            LabelSetMismatch: the source has other keys or class labels.
        """
        table = self._stored_table(shard)
        if self.label_set is not None and table.samples is not None:
            check_shard(self.label_set, self.source, self.names[shard], table.samples)
        return table

    def units(self, recipe: Recipe) -> tuple[int, ...]:
        """Return the number of units (pairs, or single samples) of each source shard.

        With a label set, the manifest says it, except where images are bad: which ones they are is in the samples file. So neither
        the source nor (where no image is bad) a file of the label set is read. `BatchRenderer` compares the number with the samples.
        """
        if self.label_set is None:
            if self._fraction == 1:
                return tuple(count_units(recipe, len(shard)) for shard in self.source.shards)
            return tuple(count_pairs(recipe, self._stored_table(shard).usable) for shard in range(len(self.names)))
        label_set, partly = self.label_set, self.label_set.partly_usable
        with Prefetch(file for name in self.names if name in partly for file in label_set.remote_files(name)):
            return tuple(
                count_pairs(recipe, label_set.samples(record.name).usable)
                if record.name in partly
                else count_units(recipe, record.num_samples)
                for record in label_set.records
            )

    def any_labelled(self) -> bool:
        """Return whether a sample has a class label that is used; the search ends at the first one."""
        return any(self._stored_table(shard).labelled.any() for shard in range(len(self.names)))

    def _stored_table(self, shard: int) -> ShardTable:
        """Return the samples of one source shard, with a label set without looking at the source."""
        if self.label_set is None:
            keys, labels = self.source.shards[shard].keys, self.source.shards[shard].class_labels
            table = _table(keys, labels, np.arange(len(keys)), None, self._fraction)
            return table if self._fraction == 1 else replace(table, usable=np.flatnonzero(table.labelled))
        samples = self.label_set.samples(self.names[shard])
        return _table(samples.key, samples.class_label, samples.usable, samples, self._fraction)


class BatchRenderer:
    """Renderer called in loader processes: `renderer(i, out, note)` returns the batch of this rank's i-th forward pass."""

    def __init__(self, catalogue: Catalogue, recipe: Recipe, order: Order, share: Share = Share()) -> None:
        self._catalogue, self._recipe, self._order, self._share = catalogue, recipe, order, share
        self.img_size = recipe.img_size
        # Enough for the shards of a window and its neighbours; a rank reads only its share of these.
        self.shards_kept = 4 * -(-order.window // share.size)
        self._tables = _Recent[ShardTable](self.shards_kept)
        self._pairs = _Recent[Pairs](self.shards_kept)
        self._labels = _Recent[LabelRows](self.shards_kept * order.repeated_aug)

    @property
    def most(self) -> int:
        """Return the maximum number of views in a batch."""
        units = -(-self._order.units_per_step // self._share.parts)
        return units * self._order.unit_size * self._order.repeated_aug

    def remote_files(self, indices: range) -> Iterator[RemoteFile]:
        """Yield the remote files that batches need, in the order of their first use in an epoch."""
        catalogue = self._catalogue
        if not catalogue.is_remote:
            return
        fetched: set[int] = set()
        of_epoch = -1
        for index in indices:
            epoch, step = self._order.position(index // self._share.passes)
            if epoch != of_epoch:
                of_epoch, fetched = epoch, set()
            units = self._share.cut(self._order.step_units(epoch, step), index % self._share.passes)
            for shard in [int(each) for each in np.unique(units[:, 0]) if int(each) not in fetched]:
                fetched.add(shard)
                yield from catalogue.remote_files(shard, self._order.views_of_epoch(epoch))

    def render_here(self, index: int) -> Batch:
        """Return a batch rendered in this process, in newly allocated memory."""
        out = torch.empty(slot_shape(self.most, self.img_size, unrendered=False), dtype=torch.uint8)
        return self(index, out, lambda _: None)

    def __call__(self, index: int, out: Tensor, note: Note) -> Batch:
        """Render a batch into `out`, uint8 [at least B, H, W, 3], or hand it over there, uint8 [N].

        Raises:
            DeitCliError: an image or a label is missing, damaged or not the expected one.
        """
        update, number = divmod(index, self._share.passes)
        epoch, step = self._order.position(update)
        views = self._order.views_of_epoch(epoch)
        units = self._share.cut(self._order.step_units(epoch, step), number)
        return self.render_units(units, views, out, note, index=index)

    def render_units(
        self, units: NDArray[np.int64], views: range, out: Tensor, note: Note = lambda _: None, *, index: int = 0
    ) -> Batch:
        """Render views of units into `out`, as `__call__` does.

        Args:
            units: int64 [U, 2], source shard and unit in it, grouped by shard.
            views: view numbers, which share their pairs.
            out: uint8 [at least B, H, W, 3] or [N].
            note: called with the name of each image before it is read.
            index: index of the batch.
        """
        of_shards = np.split(units, np.flatnonzero(np.diff(units[:, 0])) + 1)  # a step has its units grouped by shard
        parts = [self._part(int(chosen[0, 0]), chosen[:, 1], views) for chosen in of_shards]
        start, batch = 0, begin_batch(out, sum(len(part.layout.rows) for part in parts), self.img_size)
        for part in parts:
            self._draw_images(part, views, batch, start, note)
            start += len(part.layout.rows)
        return _joined(index, views, batch.images, parts, self._target_of(parts))

    def _part(self, shard: int, units: NDArray[np.int64], views: range) -> "_Part":
        """Return rows, mixes and labels of the units of one source shard, without decoding images."""
        table = self._tables.get(shard, lambda: self._catalogue.table(shard))
        group = views.start // self._recipe.views_per_pairing
        pairs = self._pairs.get((shard, group), lambda: self._pairs_of(shard, table, views.start)).take(units)
        layout = lay_out(pairs, views)
        return _Part(shard, table, pairs.rows, layout, self._labels_of(shard, table, pairs.rows, layout, views))

    def _pairs_of(self, shard: int, table: ShardTable, view: int) -> Pairs:
        """Return all pairs of a source shard; their number must be the one that the order of the run was made with."""
        pairs = pairs_of(self._recipe, table.keys, table.usable, view)
        expected, name = self._order.shard_units[shard], self._catalogue.names[shard]
        if len(pairs.rows) == expected:
            return pairs
        if table.samples is None:
            raise SourceError(f"source shard {name} has {len(pairs.rows)} units, it had {expected} at the start")
        raise LabelSetCorrupt(
            f"{self._catalogue.label_set and self._catalogue.label_set.place}: the manifest promises rows for {expected} units of"
            f" {name}, its samples file has {len(pairs.rows)}",
            fix=DAMAGED_MANIFEST,
        )

    def _labels_of(
        self, shard: int, table: ShardTable, pairs: NDArray[np.int64], layout: Layout, views: range
    ) -> Answers | None:
        """Return the stored answers for the views in a layout, in their order."""
        label_set = self._catalogue.label_set
        if label_set is None:
            return None
        name = self._catalogue.names[shard]
        found = [self._labels.get((shard, view), partial(label_set.read, name, view)).answers for view in views]
        at, there = np.searchsorted(table.usable, np.where(pairs >= 0, pairs, table.usable[0])), layout.places >= 0
        columns = zip(*found, strict=True)
        return Answers(*(np.stack([values[at] for values in of_views], axis=1)[there] for of_views in columns))

    def _target_of(self, parts: list["_Part"]) -> TeacherTarget | None:
        """Return the target of distillation for a batch; several label sets are combined here, once for all of its views."""
        label_set, stored = self._catalogue.label_set, [part.answers for part in parts if part.answers is not None]
        if not stored:
            return None
        answers = Answers(*map(np.concatenate, zip(*stored, strict=True)))
        if isinstance(label_set, CombinedLabels):
            answers = label_set.combination.combine(answers)
        return TeacherTarget(
            hard=torch.from_numpy(answers.hard.astype(np.int64)),
            topk_index=torch.from_numpy(answers.topk_index.astype(np.int64)),
            topk_prob=torch.from_numpy(answers.topk_prob.astype(np.float32)),
            tail_mass=torch.from_numpy(answers.tail_mass.astype(np.float32)),
        )

    def _draw_images(
        self, part: "_Part", views: range, batch: RenderedViews | UnrenderedViews, start: int, note: Note
    ) -> None:
        """Decode each image once, and add its views to the batch, where the part begins at `start`."""
        for pair, places in zip(
            part.pairs.tolist(), (part.layout.places + start).transpose(0, 2, 1).tolist(), strict=True
        ):
            for row, at in zip(pair, places, strict=True):
                if row >= 0:
                    self._draw(part.shard, row, part.table, views, partial(batch.add, at), note)

    def _draw(self, shard: int, row: int, table: ShardTable, views: range, take: Take, note: Note) -> None:
        note(f"image {table.keys[row]!r} of {self._catalogue.names[shard]}")
        source_shard = self._catalogue.source.shards[shard]
        sample = source_shard[row]
        if table.samples is None:  # this image has not been decoded before: decode all of it to check it
            try:
                pixels = decode(sample.image, key=sample.key)
            except BadImageError as error:
                raise source_shard.unreadable(row, error) from error.__cause__
            draw_decoded(pixels, self._recipe, sample.key, views, take)
            return
        check_image(sample, table.samples, row, shard=self._catalogue.names[shard])
        draw_encoded(sample.image, self._recipe, sample.key, views, take)


def stream_batches(
    renderer: BatchRenderer,
    indices: range,
    *,
    workers: int,
    held: int = 1,
    device: torch.device | None = None,
    unrendered: bool = False,
) -> Iterator[Batch]:
    """Render batches in loader processes and yield them in order.

    Images are in shared memory that is reused (see `SlotStream`): the images of a batch are overwritten once more than
    `held` further batches have been requested.

    Args:
        renderer: renderer of the batches.
        indices: indices of the batches.
        workers: number of loader processes; 0: render in this process.
        held: number of batches that the caller may hold while it requests another one.
        device: device to which the caller copies batches; None: no copies.
        unrendered: True: `on_device` renders the views on that device.

    Raises:
        DeitCliError: a batch failed; raised after all earlier batches have been yielded.
    """
    shape = slot_shape(renderer.most, renderer.img_size, unrendered=unrendered)
    with Prefetch(renderer.remote_files(indices)):
        yield from SlotStream(renderer, indices, shape, workers=workers, held=held, device=device)


@dataclass(frozen=True)
class CentreBatch:
    """Centre crops, uint8 [B, H, W, 3], and their class labels, int64 [B], -1 for a sample without one."""

    images: Tensor
    class_label: Tensor


class CentreRenderer:
    """Renderer called in loader processes: `renderer(i, out, note)` returns the i-th batch of centre crops and class labels."""

    def __init__(
        self,
        source: Source,
        labelled: list[tuple[int, int]],
        recipe: Recipe,
        batch_size: int,
        *,
        need_labels: bool = True,
    ) -> None:
        self._source, self._labelled, self._recipe, self._size = source, labelled, recipe, batch_size
        self._need_labels = need_labels

    def stream(self, *, workers: int) -> SlotStream[CentreBatch]:
        """Return all batches, rendered in loader processes."""
        size = max(1, min(self._size, len(self._labelled)))
        shape = (size, self._recipe.img_size, self._recipe.img_size, 3)
        batches = range(-(-len(self._labelled) // self._size))
        return SlotStream(self, batches, shape, workers=workers, held=1)

    def __call__(self, index: int, out: Tensor, note: Note) -> CentreBatch:
        """Render a batch into the first rows of `out`.

        Raises:
            SourceError: an image cannot be decoded, or has lost the class label that is needed.
        """
        chosen = self._labelled[index * self._size : (index + 1) * self._size]
        pixels, labels = out.numpy(), []
        for at, (number, row) in enumerate(chosen):
            shard = self._source.shards[number]
            note(f"image {shard.keys[row]!r} of {shard.name}")
            sample = shard[row]
            if sample.class_label is None and self._need_labels:
                raise SourceError(f"{sample.key!r} has lost its class label since the source was opened")
            try:
                pixels[at] = render_view(sample.image, self._recipe, sample.key, 0)
            except BadImageError as error:
                raise shard.unreadable(row, error) from error.__cause__
            labels.append(-1 if sample.class_label is None else sample.class_label)
        return CentreBatch(out[: len(chosen)], torch.tensor(labels))


@dataclass(frozen=True)
class _Part:
    """The part of a batch that comes from one source shard: U units, V views of each.

    Attributes:
        shard: number of the source shard.
        table: samples of the source shard.
        pairs: int64 [U, 2], rows of the two partners; the second is -1 for a sample without a partner.
        layout: position of each view in this part.
        answers: stored answers for these views; None without a label set.
    """

    shard: int
    table: ShardTable
    pairs: NDArray[np.int64]
    layout: Layout
    answers: Answers | None


def _joined(index: int, views: range, images: Tensor, parts: list[_Part], teacher: TeacherTarget | None) -> Batch:
    """Return a batch that joins these parts in order."""
    rows = [(part.table, part.layout.rows) for part in parts]
    mixes = [part.layout.mix for part in parts]
    starts = itertools.accumulate((len(mix.lam) for mix in mixes), initial=0)
    mix = MixBatch(
        torch.cat([mix.partner + start for mix, start in zip(mixes, starts, strict=False)]),
        torch.cat([mix.lam for mix in mixes]),
        torch.cat([mix.box for mix in mixes]),
    )
    class_label = torch.from_numpy(np.concatenate([table.class_label[at] for table, at in rows]))
    labelled = torch.from_numpy(np.concatenate([table.labelled[at] for table, at in rows]))
    return Batch(
        index=index,
        views=views,
        keys=tuple(table.keys[int(row)] for table, at in rows for row in at),
        images=images,
        mix=mix,
        classes=ClassTarget(class_label, labelled, mix.partner, mix.lam),
        teacher=teacher,
    )


def keeps_label(key: str, fraction: float) -> bool:
    """Return whether the class label of a sample belongs to this share of all labels: a pure function of its arguments.

    A label that belongs to a share belongs to every larger one.
    """
    return fraction == 1 or stream_of("labelled", key).uniform() < fraction


def _table(
    keys: Sequence[str],
    labels: Sequence[int | None],
    usable: NDArray[np.int64],
    samples: SampleRows | None,
    fraction: float,
) -> ShardTable:
    known = [label is not None and keeps_label(key, fraction) for key, label in zip(keys, labels, strict=True)]
    labelled = np.array(known, bool)
    class_label = np.array([label or 0 for label in labels], np.int64)
    return ShardTable(keys, class_label, labelled, usable, samples)


class _Recent(Generic[Value]):
    """A cache of the `size` most recently used values."""

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


def mixed_images(batch: Batch, device: torch.device) -> Tensor:
    """Return the views of a batch as the teacher saw them, float32 [B, 3, H, W] of 0..255."""
    return apply_mix(batch.images.to(device, non_blocking=device.type == "cuda"), batch.mix.to(device))
