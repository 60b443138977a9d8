"""Label sets in other training loops: a dataset for PyTorch's `DataLoader`, what collates its items, and the order of `train`."""

import operator
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, Literal, TypedDict, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from pipeline.errors import BadImageError, SourceError, UsageError
from pipeline.images.source import Source
from pipeline.labels.combined import Labels
from pipeline.labels.replay import check_start
from pipeline.pixels.handover import slot_shape
from pipeline.views.mixing import MixBatch, apply_mix
from trainer.config import TrainConfig
from trainer.losses import ClassTarget, TeacherTarget
from trainer.order import Order, Share, check_parts, order_of
from trainer.stream import Batch, BatchRenderer, Catalogue

Policy = Literal["cycle", "random"]
Index = int | tuple[int, int]  # unit, or epoch and unit


class Targets(TypedDict):
    """What the losses compare the student's answers with; `targets_of` makes their records of it.

    Keys:
        class_label: int64 [B], 0 if the sample is not labelled.
        labelled: bool [B].
        partner: int64 [B], the partner's position in this batch; its own position if a view is not mixed.
        lam: float32 [B], weight of the sample's own view and class label.
        hard: int64 [B], the teacher's most probable class.
        topk_index: int64 [B, K], the teacher's K most probable classes; K is 0 if only hard labels are stored.
        topk_prob: float32 [B, K], their probabilities.
        tail_mass: float32 [B], the probability of all other classes together.
    """

    class_label: Tensor
    labelled: Tensor
    partner: Tensor
    lam: Tensor
    hard: Tensor
    topk_index: Tensor
    topk_prob: Tensor
    tail_mass: Tensor


class Views(Targets):
    """Views before mixing, with their targets.

    Keys:
        images: uint8 [B, H, W, 3].
        box: int64 [B, 4], top, left, height and width of the box that CutMix takes from the partner; zeros without one.
    """

    images: Tensor
    box: Tensor


class MixedViews(Targets):
    """Views as the teacher saw them, with their targets.

    Keys:
        images: float32 [B, 3, H, W], values 0..255.
    """

    images: Tensor


class _IndexError(UsageError, IndexError):
    """An index outside of the dataset: `for item in dataset` ends with an IndexError."""


class DistillationDataset(Dataset[Views]):
    """The views of a label set, rendered again, with the teacher's stored answers.

    An item is a *unit*: the samples that are mixed with each other (two, or one without a partner), and R views of each.
    So partners are always in one batch, whatever the sampler does, and every image is decoded once. `collate` makes a batch of
    items; `DataLoader(batch_size=64)` then gives batches of 64 units, which are 128 R views.

    An index is the number of a unit, whose views are those of the epoch that `set_epoch` has set; or a tuple (epoch, number
    of a unit), as `DistillationBatchSampler` yields it. A dataset can be sent to worker processes, however they start.

    Attributes:
        labels: the label set.
        source: original images.
        order: the views of each epoch, and the units.
    """

    def __init__(
        self,
        labels: Labels,
        source: Source | str | os.PathLike[str] | None = None,
        *,
        views: range | None = None,
        repeated_aug: int | None = None,
        view_policy: Policy = "cycle",
        seed: int = TrainConfig.seed,
    ) -> None:
        """Open the images, and check that this machine renders the pixels that the teacher saw, as `deit-cli train` does.

        Args:
            labels: the label set, or several as one.
            source: images, or their path or URL; None: the images in the label set, else those at the path that it names.
            views: view numbers to use; None: all labelled views.
            repeated_aug: R, views of an image in one item; an epoch has 1/R of the units. None: as `deit-cli train` chooses it.
            view_policy: `cycle` uses the views in turn, epoch after epoch; `random` in a new order in each round.
            seed: seed of `random`, and of the order of `DistillationBatchSampler`.

        Raises:
            LabelSetError: images, pixels or mixes are not those that were labelled.
            SourceError: the source has no image, or cannot be read.
            UsageError: the views or R do not fit the label set.
        """
        if isinstance(labels, str | os.PathLike):
            raise UsageError(f"labels must be an open label set, got {labels!r}", fix="Pass LabelSet.open of it")
        self.labels, recipe = labels, labels.recipe
        self.source = (
            source if isinstance(source, Source) else labels.open_source(None if source is None else os.fspath(source))
        )
        chosen = _labelled_views(labels, views)
        if view_policy not in get_args(Policy):
            raise UsageError(f"view_policy must be one of {', '.join(get_args(Policy))}, got {view_policy!r}")
        if repeated_aug is not None:
            _check_whole(1, repeated_aug=repeated_aug)
        check_start(labels, self.source)
        self._catalogue = Catalogue(self.source, labels)
        units = self._catalogue.units(recipe)
        order = order_of(
            recipe,
            units,
            chosen,
            batch_size=2 * len(chosen),  # enough for a unit
            repeated_aug=repeated_aug,
            window=TrainConfig.shuffle_window,
            seed=seed,
            view_policy=view_policy,
        )
        self.order: Order = replace(order, batch_size=order.unit_size * order.repeated_aug)
        self._starts = np.cumsum([0, *units])  # of each source shard, the number of its first unit
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # worker processes that stay see it change
        self._renderer = self._new_renderer()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_renderer": None}  # what it keeps in memory stays here

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._epoch.share_memory_()
        self._renderer = self._new_renderer()

    @property
    def epoch(self) -> int:
        """Return the epoch whose views an item has if its index is only the number of a unit."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, in worker processes too; call it before a loader begins an epoch."""
        self._epoch.fill_(_checked_epoch(epoch))

    def __len__(self) -> int:
        """Return the number of units."""
        return int(self._starts[-1])

    def __getitem__(self, index: Index) -> Views:
        """Render the views of a unit.

        Args:
            index: number of the unit, or (epoch, number of the unit).

        Returns:
            V views of one sample, or of two partners; V is R.

        Raises:
            UsageError: there is no such unit; it is an IndexError as well.
            LabelSetError: an image is not the one that was labelled, or a file of the label set is damaged.
            SourceError: an image cannot be read or decoded.
        """
        batch = self._batch(index)
        assert batch.teacher is not None
        return {
            "images": batch.images,
            "box": batch.mix.box,
            **_tensors_of(batch.classes),
            **_tensors_of(batch.teacher),
        }  # pyright: ignore[reportReturnType]

    def keys_of(self, index: Index) -> tuple[str, ...]:
        """Return the sample keys of the views of an item, in their order."""
        return self._batch(index).keys

    def number_of(self, shard: int, unit: int) -> int:
        """Return the number of a unit among all, from the number of its source shard and its number in that."""
        return int(self._starts[shard]) + unit

    def _batch(self, index: Index) -> Batch:
        epoch, number = index if isinstance(index, tuple) else (self.epoch, index)
        shard, unit = self._place_of(number)
        views = self.order.views_of_epoch(_checked_epoch(epoch))
        size = self.order.unit_size * self.order.repeated_aug
        out = torch.empty(slot_shape(size, self.labels.recipe.img_size, unrendered=False), dtype=torch.uint8)
        try:
            return self._renderer.render_units(np.array([[shard, unit]]), views, out)
        except BadImageError as error:
            if get_worker_info() is None:
                raise
            raise SourceError(str(error)) from error  # DataLoader makes an error again from one text

    def _place_of(self, number: int) -> tuple[int, int]:
        """Return the source shard of a unit, and the number of the unit in it."""
        number, count = operator.index(number), len(self)
        if not -count <= number < count:
            raise _IndexError(f"an item must be one of the {count} units, 0 to {count - 1}, got {number}")
        number %= count
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        return shard, number - int(self._starts[shard])

    def _new_renderer(self) -> BatchRenderer:
        return BatchRenderer(self._catalogue, self.labels.recipe, self.order)


class DistillationBatchSampler(Sampler[list[tuple[int, int]]]):
    """The batches of `deit-cli train`, in its order: pass it to `DataLoader` as `batch_sampler`.

    A batch is a pure function of seed, epoch and step. Its indices name the epoch, so the dataset's own epoch does not matter.
    Call `set_epoch` before each epoch; Lightning and Accelerate do.

    Attributes:
        order: the order of all updates.
        epoch: the epoch whose batches the next iteration yields.
    """

    def __init__(
        self,
        dataset: DistillationDataset,
        batch_size: int = TrainConfig.batch_size,
        *,
        grad_accum_steps: int = TrainConfig.grad_accum_steps,
        window: int = TrainConfig.shuffle_window,
        rank: int = 0,
        num_replicas: int = 1,
    ) -> None:
        """Choose the batches; the arguments mean what they mean for `deit-cli train`.

        Args:
            dataset: the dataset; its seed is the seed of the order.
            batch_size: maximum number of views in a batch.
            grad_accum_steps: number of batches for one update of the weights.
            window: number of source shards whose images are shuffled together.
            rank: number of this process, 0 <= rank < num_replicas.
            num_replicas: number of processes, which have different batches of the same updates.

        Raises:
            UsageError: a value is out of range, or a batch would have no unit.
        """
        super().__init__()
        _check_whole(1, batch_size=batch_size, grad_accum_steps=grad_accum_steps, window=window)
        if not 0 <= rank < num_replicas:
            raise UsageError(f"rank must be in 0..num_replicas - 1, got rank {rank} of {num_replicas}")
        self._dataset, self._share = dataset, Share(rank, num_replicas, grad_accum_steps)
        self.order: Order = replace(dataset.order, batch_size=batch_size * self._share.parts, window=window)
        check_parts(self.order, self._share)
        self.epoch = 0

    @property
    def sampler(self) -> "DistillationBatchSampler":
        """Return this sampler: Lightning calls `set_epoch` of what a batch sampler has here."""
        return self

    @property
    def batch_size(self) -> int:
        """Return the maximum number of items in a batch, as PyTorch's `BatchSampler` does."""
        return -(-self.order.units_per_step // self._share.parts)

    @property
    def drop_last(self) -> bool:
        """Return True: an incomplete last update is left out."""
        return True

    @property
    def views_per_update(self) -> int:
        """Return the number of views of an update, over all its batches, if every sample has a partner.

        `deit-cli train` adds up the losses of views and divides by this number. To do the same, multiply the mean loss of a
        batch of B views by B * num_replicas / views_per_update.
        """
        return self.order.views_per_step

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose batches the next iteration yields."""
        self.epoch = _checked_epoch(epoch)

    def __len__(self) -> int:
        """Return the number of batches of this process in an epoch."""
        return self.order.steps_per_epoch * self._share.passes

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield the batches of one epoch, as lists of indices of the dataset."""
        epoch = self.epoch
        for step in range(self.order.steps_per_epoch):
            units = self.order.step_units(epoch, step)
            for number in range(self._share.passes):
                of_batch = self._share.cut(units, number).tolist()
                yield [(epoch, self._dataset.number_of(shard, unit)) for shard, unit in of_batch]


def collate(items: Sequence[Views]) -> MixedViews:
    """Return a batch of items, mixed by mixup and CutMix as the teacher saw it: the `collate_fn` of a `DataLoader`."""
    return mix_views(collate_views(items))


def collate_views(items: Sequence[Views]) -> Views:
    """Return a batch of items before mixing, a quarter of the bytes; `mix_views` mixes it, for example on a GPU."""
    columns: dict[str, list[Tensor]] = {name: [item[name] for item in items] for name in Views.__annotations__}
    starts = accumulate((len(lam) for lam in columns["lam"]), initial=0)
    columns["partner"] = [partner + start for partner, start in zip(columns["partner"], starts, strict=False)]
    return {name: torch.cat(tensors) for name, tensors in columns.items()}  # pyright: ignore[reportReturnType]


def mix_views(views: Views) -> MixedViews:
    """Mix a batch by mixup and CutMix, on the device on which it is; the same arithmetic as `deit-cli train`'s."""
    mix = MixBatch(views["partner"], views["lam"], views["box"])
    targets = {name: tensor for name, tensor in views.items() if name in Targets.__annotations__}
    return {"images": apply_mix(views["images"], mix), **targets}  # pyright: ignore[reportReturnType]


def targets_of(batch: Targets) -> tuple[ClassTarget, TeacherTarget]:
    """Return the class labels and the teacher's answers of a batch, as the losses take them."""
    return (
        ClassTarget(batch["class_label"], batch["labelled"], batch["partner"], batch["lam"]),
        TeacherTarget(batch["hard"], batch["topk_index"], batch["topk_prob"], batch["tail_mass"]),
    )


def _tensors_of(target: ClassTarget | TeacherTarget) -> dict[str, Tensor]:
    return dict(vars(target))


def _labelled_views(labels: Labels, views: range | None) -> range:
    """Return the chosen view numbers; raise UsageError unless they are labelled, and follow one another."""
    labelled = labels.views
    chosen = labelled if views is None else views
    if not isinstance(chosen, range):
        raise UsageError(f"views must be a range, such as range(0, 30), got {chosen!r}")
    if len(chosen) == 0 or chosen.step != 1 or chosen.start not in labelled or chosen[-1] not in labelled:
        raise UsageError(
            f"views must be a range within the labelled views, {labelled.start}:{labelled.stop}, got {chosen!r}",
            fix="Label more views with deit-cli labels extend, or leave out views",
        )
    return chosen


def _checked_epoch(epoch: int) -> int:
    _check_whole(0, epoch=epoch)
    return int(epoch)


def _check_whole(least: int, **values: Any) -> None:
    for name, value in values.items():
        if not hasattr(value, "__index__"):  # a number of NumPy has it, a float not
            raise UsageError(f"{name} must be a whole number, got {value!r}")
        if value < least:
            raise UsageError(f"{name} must be at least {least}, got {value}")
