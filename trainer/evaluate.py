"""Accuracy of the class head, the distillation head and their fusions; agreement with the teacher's stored answers."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from pipeline.errors import CheckpointError, UsageError
from pipeline.images.source import Source
from pipeline.labels.labelset import LabelSet
from pipeline.views.recipe import PRESETS, Recipe
from trainer.order import Order
from trainer.parallel import Running, World
from trainer.stream import Batch, BatchRenderer, Catalogue, CentreRenderer, mixed_images, stream_batches
from trainer.student import Heads, Student, normalise

log = logging.getLogger("deit_cli.evaluate")

Scores = dict[str, dict[str, float]]
ANSWERS = ("class_head", "distillation_head", "mean_logits", "sum_softmax")
Answering = Callable[[Student, Tensor], Mapping[str, Tensor]]  # student, normalised images -> answers [B, C] by name


def fused_logits(heads: Heads) -> dict[str, Tensor]:
    """Return the answers computed from the two heads, [B, C] each; a model with one head has only the first.

    `mean_logits` is the released code's fusion, `sum_softmax` the paper's (Touvron et al. 2021, section 5.2).
    """
    answers = {"class_head": heads.class_logits.float()}
    if heads.distill_logits is not None:
        distill = heads.distill_logits.float()
        answers["distillation_head"] = distill
        answers["mean_logits"] = (answers["class_head"] + distill) / 2
        answers["sum_softmax"] = answers["class_head"].softmax(1) + distill.softmax(1)
    return answers


def answer_with_heads(student: Student, images: Tensor) -> dict[str, Tensor]:
    """Return the answers that need nothing but the student's heads, for normalised images."""
    return fused_logits(student(images))


def primary_head(scores: Mapping[str, object]) -> str:
    """Return the name of the answer that selects the best checkpoint: the mean of both heads, or the only head."""
    return "mean_logits" if "mean_logits" in scores else "class_head"


class Tally:
    """Number of right answers to images, for each of several answers; it adds up over batches and ranks.

    Attributes:
        names: names of the answers.
        images: number of images that were counted.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.images = 0
        self._right = torch.zeros(len(self.names), 2, dtype=torch.int64)  # top-1, top-5

    def add(self, answers: Mapping[str, Tensor], class_label: Tensor) -> None:
        """Count a batch.

        Args:
            answers: float [B, C] by name: a larger number is a more probable class, of equal ones the first.
            class_label: int64 [B], on the CPU.
        """
        for counts, name in zip(self._right, self.names, strict=True):
            rank = _ranks(answers[name], class_label)
            counts += torch.stack([(rank < 1).sum(), (rank < 5).sum()])
        self.images += len(class_label)

    def share(self, world: World) -> None:
        """Add up the counts of all ranks; every rank must call this method."""
        self._right = world.total(self._right)
        self.images = int(world.total(torch.tensor(self.images)))

    def scores(self) -> Scores:
        """Return top-1 and top-5 in percent by the name of the answer."""
        percent = (100 * self._right.double() / self.images).tolist()
        return {name: {"top1": a, "top5": b} for name, (a, b) in zip(self.names, percent, strict=True)}


def _ranks(answer: Tensor, class_label: Tensor) -> Tensor:
    """Return how many classes of each row come before its class label, int64 [B] on the CPU; all of them if it is NaN.

    `topk` orders equal numbers in no certain way. In bfloat16 many are equal, and `argmax` takes the first.
    """
    label = class_label.to(answer.device)[:, None]
    own, numbers = answer.gather(1, label), torch.arange(answer.shape[1], device=answer.device)
    return (~(answer <= own) | ((answer == own) & (numbers < label))).sum(dim=1).cpu()


def chosen_class(answer: Tensor) -> Tensor:
    """Return the most probable class of each row, of equal ones the first, int64 [B] on the CPU.

    Raises:
        CheckpointError: an answer is NaN or infinite.
    """
    largest, chosen = answer.max(dim=1)
    check_finite(largest)
    return chosen.cpu()


def check_finite(values: Tensor) -> None:
    """Raise CheckpointError if a value that a student's answers lead to is NaN or infinite."""
    if not torch.isfinite(values).all():
        raise CheckpointError(
            "the student's answers are NaN or infinite for some images",
            fix="Try --amp-dtype float32, or another checkpoint",
        )


def evaluate(
    student: Student, source: Source, running: Running, *, crop_pct: float | None = None
) -> tuple[Scores, int]:
    """Measure top-1 and top-5 in percent on centre crops of all labelled samples, divided among the ranks.

    Args:
        student: model to measure; it is in evaluation mode during the measurement.
        source: labelled images.
        running: settings for running the student; every rank must call this function.
        crop_pct: centre crop, as a share of the resized shorter side; None: as in the model's configuration.

    Returns:
        scores by the name of the answer, and the number of images.
    """
    tally = Tally(ANSWERS if student.has_distillation_head else ANSWERS[:1])
    count_answers(tally, student, source, running, crop_pct=crop_pct)
    return tally.scores(), tally.images


def count_answers(
    tally: Tally,
    student: Student,
    source: Source,
    running: Running,
    *,
    crop_pct: float | None,
    answering: Answering = answer_with_heads,
) -> None:
    """Count the answers to all labelled samples of a source in one pass, divided among the ranks; see `evaluate`."""
    places = labelled_places(source, student)
    for images, class_label in centre_crops(student, source, places, running, crop_pct=crop_pct):
        tally.add(answers_of(student, images, running, answering), class_label)
    tally.share(running.world)


def centre_crops(
    student: Student, source: Source, places: Sequence[tuple[int, int]], running: Running, *, crop_pct: float | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's share of the centre crops of some samples, in order.

    Args:
        student: student whose image size and crop are used.
        source: labelled images.
        places: shard and row of each sample.
        running: device and size of the batches.
        crop_pct: as in `evaluate`.

    Yields:
        float32 [B, 3, H, W] in 0..255 on the device, and class labels, int64 [B] on the CPU.
    """
    world = running.world
    mine = list(places[world.rank :: world.size])
    renderer = CentreRenderer(source, mine, centre_recipe(student, crop_pct), running.batch_size)
    for batch in renderer.stream(workers=world.workers):
        yield batch.images.to(running.device).permute(0, 3, 1, 2).float(), batch.class_label


def labelled_places(source: Source, student: Student, *, why: str = "evaluate on") -> list[tuple[int, int]]:
    """Return shard and row of every sample that has a class label; `why` ends the error if there is none.

    Raises:
        UsageError: no sample has a class label, or the labels are not the student's classes.
    """
    labelled = [
        (s, row)
        for s, shard in enumerate(source.shards)
        for row, label in enumerate(shard.class_labels)
        if label is not None
    ]
    if not labelled:
        raise UsageError(f"{source.location} has no class labels to {why}")
    highest = source.max_label or 0
    if highest >= student.num_classes or source.num_classes not in (None, student.num_classes):
        raise UsageError(
            f"the student has {student.num_classes} classes, {source.location} has {source.num_classes or f'labels up to {highest}'}"
        )
    _compare_names(source, student)
    return labelled


def _compare_names(source: Source, student: Student) -> None:
    """Raise if the class names are in another order, because wrong answers would count as right; warn of other differences."""
    mine, theirs = student.class_names, source.class_names
    if mine is None or theirs is None or mine == theirs:
        return
    at = next(number for number, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
    text = f"class {at} is {mine[at]!r} for the student and {theirs[at]!r} in {source.location}"
    if sorted(mine) == sorted(theirs):
        raise UsageError(
            f"{text}: the same names in another order", fix="Use the student's order of classes for the images"
        )
    log.warning("%s: their numbers are compared anyway", text)


def measure_agreement(
    student: Student,
    label_set: LabelSet,
    source: Source,
    running: Running,
    *,
    limit: int,
    answering: Answering = answer_with_heads,
) -> tuple[dict[str, float], int]:
    """Measure how often the argmax of each answer equals the teacher's stored argmax, on replayed views of the label set.

    Args:
        student: model to measure; it is in evaluation mode during the measurement.
        label_set: label set whose first view is used.
        source: images of the label set.
        running: settings for running the student.
        limit: maximum number of views to use, in whole batches.
        answering: function that makes the answers.

    Returns:
        percent by the name of the answer, and the number of views.

    Raises:
        CheckpointError: an answer is NaN or infinite.
    """
    same: dict[str, int] = {}
    seen = 0
    for batch in replayed_batches(student, label_set, source, running, limit=limit):
        assert batch.teacher is not None
        for name, logits in answers_of(student, mixed_images(batch, running.device), running, answering).items():
            same[name] = same.get(name, 0) + int((chosen_class(logits) == batch.teacher.hard).sum())
        seen += len(batch.keys)
    return {name: 100 * count / seen for name, count in same.items()}, seen


def replayed_batches(
    student: Student, label_set: LabelSet, source: Source, running: Running, *, limit: int
) -> Iterator[Batch]:
    """Yield batches of the first view of a label set, with the teacher's answers; the same for every student.

    Args:
        student: student that will see them.
        label_set: label set whose first view is used.
        source: images of the label set.
        running: number of views in a batch, and loader processes.
        limit: maximum number of views, in whole batches.

    Raises:
        UsageError: the student has other classes than the label set, or another image size.
    """
    recipe = label_set.recipe
    for what, mine, theirs in (
        ("classes", student.num_classes, label_set.num_classes),
        ("pixels", student.img_size, recipe.img_size),
    ):
        if mine != theirs:
            raise UsageError(f"the student has {mine} {what}, {label_set.place} has {theirs}")
    catalogue = Catalogue(source, label_set)
    units = catalogue.units(recipe)
    order = Order(
        shard_units=units,
        unit_size=2 if recipe.mixes else 1,
        batch_size=max(2, min(running.batch_size, limit)),
        repeated_aug=1,
        views=label_set.views,
        window=len(units),
        seed=0,
    )
    steps = max(1, min(order.steps_per_epoch, limit // order.batch_size))
    renderer = BatchRenderer(catalogue, recipe, order)
    yield from stream_batches(renderer, range(steps), workers=running.world.workers)


def centre_recipe(student: Student, crop_pct: float | None) -> Recipe:
    """Return the evaluation recipe: resize and centre crop as in the student's configuration."""
    pct = crop_pct or float(student.model.pretrained_cfg.get("crop_pct") or 0.875)
    return PRESETS["none"].with_fields(img_size=student.img_size, crop_pct=pct)


def answers_of(
    student: Student, images: Tensor, running: Running, answering: Answering = answer_with_heads
) -> Mapping[str, Tensor]:
    """Return the answers of the student in evaluation mode for float32 images in 0..255."""
    was_training = student.training
    student.eval()
    try:
        enabled = running.dtype != torch.float32
        with torch.inference_mode(), torch.autocast(running.device.type, dtype=running.dtype, enabled=enabled):
            return answering(student, normalise(images, student))
    finally:
        student.train(was_training)
