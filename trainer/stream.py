"""Label set and source to batches: replayed views with the labels that the teacher gave them.

A loader process renders whole batches. Batch i of a rank is a pure function of i, so a resumed run asks for the batches
that are left and repeats nothing.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import DeitCliError, SourceError
from pipeline.images.decode import decode
from pipeline.images.source import Source, SourceShard
from pipeline.labels.comparing import labelled_part
from pipeline.labels.encoding import LabelRows
from pipeline.labels.labelset import LabelSet
from pipeline.labels.replay import check_image
from pipeline.labels.tables import SampleRows
from pipeline.machine.loaders import Mapped, Slots, Whereabouts, checked, start_loader
from pipeline.storage.place import RemoteFile
from pipeline.storage.prefetch import Prefetch
from pipeline.views.mixing import MixBatch, apply_mix, mix_batch
from pipeline.views.pairs import Mix, draw_mix, shard_pairs
from pipeline.views.recipe import Recipe
from pipeline.views.view import draw_view, render, render_encoded, render_views
from trainer.order import Order, Share

Value = TypeVar("Value")


@dataclass(frozen=True)
class Batch:
    """Views of one forward pass, before mixing, with everything known of them.

    Attributes:
        index: of the forward pass among those of this rank in the run; with it the stream can go on from anywhere.
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

    def to(self, device: torch.device) -> "Batch":
        """Return the same batch on a device; copies from page-locked memory run on the current stream."""
        if device.type == "cpu":
            return self
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in _TENSORS}
        return replace(self, mix=self.mix.to(device), **moved)

    def record_stream(self, stream: "torch.cuda.Stream") -> None:
        """Tell the allocator that this stream will use the batch, which another one has made."""
        for tensor in (*(getattr(self, name) for name in _TENSORS), self.mix.partner, self.mix.lam, self.mix.box):
            tensor.record_stream(stream)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle tensors as arrays: torch would open a file of shared memory for each of them."""
        plain = {name: getattr(self, name).numpy() for name in _TENSORS}
        mix = (self.mix.partner.numpy(), self.mix.lam.numpy(), self.mix.box.numpy())
        return _restored, (self.index, self.views, self.keys, mix, plain)


_TENSORS = ("images", "class_label", "labelled", "hard", "topk_index", "topk_prob", "tail_mass")


def _restored(index: int, views: range, keys: tuple[str, ...], mix: tuple[Any, ...], plain: dict[str, Any]) -> Batch:
    tensors = {name: torch.from_numpy(array) for name, array in plain.items()}
    return Batch(index=index, views=views, keys=keys, mix=MixBatch(*map(torch.from_numpy, mix)), **tensors)


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield batches on a device; on CUDA the next one is copied while the one before is computed with.

    The copies are done before the next batch is asked for, so that what they were copied from may be used again: one
    batch is held.
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
    """What a source shard's samples are, by row."""

    keys: tuple[str, ...]
    class_label: NDArray[np.int64]
    labelled: NDArray[np.bool_]
    usable: NDArray[np.int64]
    samples: SampleRows | None


class Catalogue:
    """The samples of every source shard: from the label set where there is one, else from the source itself."""

    def __init__(self, source: Source, label_set: LabelSet | None) -> None:
        self.source = source if label_set is None else labelled_part(label_set, source)
        self.label_set = label_set
        self.names = tuple(shard.name for shard in self.source.shards)

    @property
    def is_remote(self) -> bool:
        """Whether images or labels come from other machines."""
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
        """Read the samples of one source shard."""
        name = self.names[shard]
        if self.label_set is None:
            keys, labels = self.source.shards[shard].keys, self.source.shards[shard].class_labels
            return _table(keys, labels, np.arange(len(keys)), None)
        samples = self.label_set.samples(name)
        return _table(samples.key, samples.class_label, samples.usable, samples)


class BatchRenderer:
    """`renderer(i)` is this rank's i-th forward pass of the run, or the error that stops it: called in loader processes."""

    def __init__(self, catalogue: Catalogue, recipe: Recipe, order: Order, share: Share = Share()) -> None:
        self._catalogue, self._recipe, self._order, self._share = catalogue, recipe, order, share
        self.img_size = recipe.img_size
        self.whereabouts: Whereabouts | None = None
        # Shards of a window and its neighbours, with room; a rank meets its share of them.
        self.shards_kept = 4 * -(-order.window // share.size)
        self._tables = _Recent[ShardTable](self.shards_kept)
        self._pairs = _Recent[NDArray[np.int64]](self.shards_kept)
        self._labels = _Recent[LabelRows](self.shards_kept * order.repeated_aug)

    @property
    def most(self) -> int:
        """Views of a batch, at most."""
        units = -(-self._order.units_per_step // self._share.parts)
        return units * self._order.unit_size * self._order.repeated_aug

    def remote_files(self, indices: range) -> Iterator[RemoteFile]:
        """Yield what batches need from other machines, in the order of its first use in an epoch."""
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

    def __call__(self, index: int, out: Tensor | None = None) -> Batch | Exception:
        """Render a batch, into `out` (uint8 [at least B, H, W, 3]) if it is given.

        Errors are returned, so that they cross processes whole.
        """
        try:
            return self._render(index, out)
        except DeitCliError as error:
            return error

    def _render(self, index: int, out: Tensor | None) -> Batch:
        update, number = divmod(index, self._share.passes)
        epoch, step = self._order.position(update)
        views = self._order.views_of_epoch(epoch)
        units = self._share.cut(self._order.step_units(epoch, step), number)
        parts = [self._part(shard, chosen, views) for shard, chosen in _by_shard(units)]
        count = sum(len(part.keys) for part in parts)
        size = self._recipe.img_size
        images = torch.empty(count, size, size, 3, dtype=torch.uint8) if out is None else out[:count]
        pixels, start = images.numpy(), 0
        for part in parts:
            self._render_images(part, views, pixels[start : start + len(part.keys)])
            start += len(part.keys)
        return _joined(index, views, images, parts)

    def _part(self, shard: int, units: NDArray[np.int64], views: range) -> "_Part":
        """Find rows, mixes and labels of the units that come from one source shard; nothing is decoded yet."""
        table = self._tables.get(shard, lambda: self._catalogue.table(shard))
        group = views.start // self._recipe.views_per_pairing
        pairs = self._pairs.get(
            (shard, group), lambda: shard_pairs(self._recipe, table.keys, table.usable, views.start)
        )[units]
        # A batch holds unit after unit, each view after view, in each the two partners: [U, V, 2], singles taken out.
        rows = np.broadcast_to(pairs[:, None], (len(pairs), len(views), 2))
        there = rows >= 0
        places = np.where(there, np.cumsum(there).reshape(there.shape) - 1, -1)
        flat = rows[there]
        mixes = [
            draw_mix(self._recipe, table.keys[first], view) if second >= 0 else Mix()
            for first, second in pairs.tolist()
            for view in views
        ]
        return _Part(
            shard=shard,
            table=table,
            pairs=pairs,
            places=places,
            keys=tuple(map(table.keys.__getitem__, flat.tolist())),
            class_label=table.class_label[flat],
            labelled=table.labelled[flat],
            mix=mix_batch([(first, second) for first, second in places.reshape(-1, 2).tolist()], mixes, len(flat)),
            labels=self._labels_of(shard, table, rows, there, views),
        )

    def _labels_of(
        self, shard: int, table: ShardTable, rows: NDArray[np.int64], there: NDArray[np.bool_], views: range
    ) -> tuple[NDArray[Any], ...]:
        """Return hard, topk_index, topk_prob and tail_mass of the views that are there, in their order."""
        label_set = self._catalogue.label_set
        if label_set is None:
            return ()
        name = self._catalogue.names[shard]

        def read(view: int, label_set: LabelSet = label_set) -> LabelRows:
            return self._labels.get((shard, view), lambda: label_set.read(name, view))

        found = [read(view) for view in views]
        at = np.searchsorted(table.usable, np.where(there, rows, table.usable[0]))

        def column(of: Callable[[LabelRows], NDArray[Any]]) -> NDArray[Any]:
            return np.stack([of(rows)[at[:, number]] for number, rows in enumerate(found)], axis=1)[there]

        hard, index, prob = (column(of) for of in (lambda x: x.hard, lambda x: x.topk_index, lambda x: x.topk_prob))
        tail = column(lambda x: x.tail_mass) if len(found[0].tail_mass) else np.zeros(len(hard))
        return hard.astype(np.int64), index.astype(np.int64), prob.astype(np.float32), tail.astype(np.float32)

    def _render_images(self, part: "_Part", views: range, pixels: NDArray[np.uint8]) -> None:
        """Decode each image once, and put its views where they belong."""
        for pair, places in zip(part.pairs.tolist(), part.places, strict=True):
            for row, at in zip(pair, places.T, strict=True):
                if row >= 0:
                    pixels[at] = self._rendered(part.shard, row, part.table, views)

    def _rendered(self, shard: int, row: int, table: ShardTable, views: range) -> NDArray[np.uint8]:
        if self.whereabouts:
            self.whereabouts.note(f"image {table.keys[row]!r} of {self._catalogue.names[shard]}")
        sample = self._catalogue.source.shards[shard][row]
        if table.samples is None:  # nobody has decoded this image before: all of it must be sound
            return render_views(decode(sample.image, key=sample.key), self._recipe, sample.key, views)
        check_image(sample, table.samples, row, shard=self._catalogue.names[shard])
        return render_encoded(sample.image, self._recipe, sample.key, views)


def stream_batches(
    renderer: BatchRenderer, indices: range, *, workers: int, held: int = 1, pin_memory: bool = False
) -> Iterator[Batch]:
    """Render batches in loader processes and yield them in order.

    Their images lie in shared memory that is used over and over (see `pipeline.machine.loaders.Slots`): those of a batch are
    another one's when, after it, more than `held` further batches have been asked for.

    Args:
        renderer: of the batches.
        indices: which of them.
        workers: loader processes; 0: in this one.
        held: batches that the caller may hold while it asks for another one.
        pin_memory: whether the shared memory is to be page-locked, so that copies to a GPU run beside its work.

    Raises:
        DeitCliError: what stopped a batch, after the batches before it.
    """
    slots = Slots((renderer.most, renderer.img_size, renderer.img_size, 3), workers=workers, held=held)
    if pin_memory:
        slots.pin()
    renderer.whereabouts = Whereabouts(workers)
    loader = start_loader(Mapped(_IntoSlots(renderer, slots)), workers=workers, sampler=slots.number(indices))
    with Prefetch(renderer.remote_files(indices)):
        for slot, batch in checked(loader, renderer.whereabouts):
            yield replace(batch, images=slots.pixels[slot, : len(batch.keys)])


class _IntoSlots:
    """Renders into the slot that comes with an index; the images stay there, and only the rest crosses processes."""

    def __init__(self, renderer: BatchRenderer, slots: Slots) -> None:
        self._renderer, self._slots = renderer, slots

    def __call__(self, numbered: tuple[int, int]) -> tuple[int, Batch] | Exception:
        slot, index = numbered
        batch = self._renderer(index, self._slots.pixels[slot])
        return batch if isinstance(batch, Exception) else (slot, replace(batch, images=torch.empty(0)))


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


@dataclass(frozen=True)
class _Part:
    """What one source shard gives to a batch of B views: U units, V views of each.

    Attributes:
        pairs: int64 [U, 2], rows of the partners; second -1 for a sample without one.
        places: int64 [U, V, 2], where each view stands in this part; -1 where there is none.
        labels: hard, topk_index, topk_prob and tail_mass of the B views; empty without a label set.
    """

    shard: int
    table: ShardTable
    pairs: NDArray[np.int64]
    places: NDArray[np.int64]
    keys: tuple[str, ...]
    class_label: NDArray[np.int64]
    labelled: NDArray[np.bool_]
    mix: MixBatch
    labels: tuple[NDArray[Any], ...]


_NO_LABELS = (np.empty(0, np.int64), np.empty((0, 0), np.int64), np.empty((0, 0), np.float32), np.empty(0, np.float32))


def _joined(index: int, views: range, images: Tensor, parts: list[_Part]) -> Batch:
    """Lay the parts of a batch one behind the other."""

    def joined(columns: Iterable[NDArray[Any]]) -> Tensor:
        return torch.from_numpy(np.concatenate(list(columns)))

    starts = np.cumsum([0, *(len(part.keys) for part in parts)]).tolist()
    labels = zip(*(part.labels or _NO_LABELS for part in parts), strict=True)
    hard, topk_index, topk_prob, tail_mass = (joined(column) for column in labels)
    return Batch(
        index=index,
        views=views,
        keys=tuple(key for part in parts for key in part.keys),
        images=images,
        mix=MixBatch(
            torch.cat([part.mix.partner + start for part, start in zip(parts, starts, strict=False)]),
            torch.cat([part.mix.lam for part in parts]),
            torch.cat([part.mix.box for part in parts]),
        ),
        class_label=joined(part.class_label for part in parts),
        labelled=joined(part.labelled for part in parts),
        hard=hard,
        topk_index=topk_index,
        topk_prob=topk_prob,
        tail_mass=tail_mass,
    )


def _by_shard(units: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield each source shard with its units; those of a shard stand together."""
    for group in np.split(units, np.flatnonzero(np.diff(units[:, 0])) + 1):
        yield int(group[0, 0]), group[:, 1]


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


def mixed_images(batch: Batch, device: torch.device) -> Tensor:
    """Return the views of a batch as the teacher saw them, float32 [B, 3, H, W] of 0..255."""
    pixels = batch.images.to(device, non_blocking=True).permute(0, 3, 1, 2)
    mix: MixBatch = batch.mix.to(device)
    return apply_mix(pixels, mix)
