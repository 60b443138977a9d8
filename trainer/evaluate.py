"""Accuracy of the class head, the distillation head and their fusions; agreement with the teacher's stored answers."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UsageError
from pipeline.images.source import Source, open_source
from pipeline.labels.labelset import LabelSet
from pipeline.labels.replay import check_replay
from pipeline.machine.loaders import plan_workers
from pipeline.machine.ranks import forward_dtype, resolve_device
from pipeline.views.pairs import count_pairs
from pipeline.views.recipe import PRESETS, Recipe
from pipeline.weights import weights_here
from trainer.config import EvaluateConfig
from trainer.order import Order
from trainer.parallel import Running, World
from trainer.stream import BatchRenderer, Catalogue, CentreRenderer, mixed_images, stream_batches
from trainer.student import Heads, Student, normalise, open_student

log = logging.getLogger("deit_cli.evaluate")

Scores = dict[str, dict[str, float]]
ANSWERS = ("class_head", "distillation_head", "mean_logits", "sum_softmax")


def evaluate_checkpoint(config: EvaluateConfig) -> dict[str, Any]:
    """Open a student, measure its accuracy and agreement as requested, and return plain JSON values.

    Raises:
        UsageError: the options do not name exactly one student, or it does not fit the images or the labels.
    """
    label_set = None if config.labels is None else LabelSet.open(config.labels, expect_manifest=config.expect_manifest)
    source = None if config.data is None else open_source(config.data)
    student = _open(config, [each.num_classes for each in (source, label_set) if each])
    where = resolve_device(config.device)
    world = World(0, 1, where, plan_workers(config.workers, where))
    running = Running(world=world, dtype=forward_dtype(config.amp_dtype, where), batch_size=config.batch_size)
    student.to(where)
    result: dict[str, Any] = {"checkpoint": config.checkpoint or str(config.model)}
    if source:
        result["scores"], result["images"] = evaluate(student, source, running, crop_pct=config.crop_pct)
    if label_set:
        images = label_set.open_source(config.labels_data)
        check_replay(label_set, images)
        result["agreement"], result["agreement_views"] = measure_agreement(
            student, label_set, images, running, limit=config.agreement_samples
        )
    return result


def _open(config: EvaluateConfig, num_classes: Sequence[int | None]) -> Student:
    """Return the student; `num_classes` are the class counts of images and labels, None if unknown."""
    here = weights_here(config.checkpoint) if config.checkpoint else None
    if config.num_classes and (here is None or here.is_dir()):
        raise UsageError(
            "--num-classes is only for a file of weights: omit it, folders and published weights state their own number"
        )
    classes = next(filter(None, (config.num_classes, *num_classes)), None)
    return open_student(here, model=config.model, num_classes=classes, pretrained=config.pretrained)


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
    labelled = labelled_places(source, student)
    world, names = running.world, ANSWERS if student.has_distillation_head else ANSWERS[:1]
    mine = labelled[world.rank :: world.size]
    renderer = CentreRenderer(source, mine, centre_recipe(student, crop_pct), running.batch_size)
    right = torch.zeros(len(names), 2, dtype=torch.int64)
    for batch in renderer.stream(workers=world.workers):
        pixels = batch.images.to(running.device).permute(0, 3, 1, 2).float()
        for counts, logits in zip(right, answers_to(student, pixels, running).values(), strict=True):
            ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices.cpu() == batch.class_label[:, None]
            counts += torch.stack([ranked[:, 0].sum(), ranked.any(dim=1).sum()])
    percent = (100 * world.total(right) / len(labelled)).tolist()
    return {name: {"top1": a, "top5": b} for name, (a, b) in zip(names, percent, strict=True)}, len(labelled)


def labelled_places(source: Source, student: Student) -> list[tuple[int, int]]:
    """Return shard and row of every sample that has a class label.

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
        raise UsageError(f"{source.location} has no class labels to evaluate on")
    highest = max(label for shard in source.shards for label in shard.class_labels if label is not None)
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
    student: Student, label_set: LabelSet, source: Source, running: Running, *, limit: int
) -> tuple[dict[str, float], int]:
    """Measure how often each head's argmax equals the teacher's stored argmax, on replayed views of the label set.

    Args:
        student: model to measure; it is in evaluation mode during the measurement.
        label_set: label set whose first view is used.
        source: images of the label set.
        running: settings for running the student.
        limit: maximum number of views to use, in whole batches.

    Returns:
        percent by the name of the answer, and the number of views.
    """
    renderer, steps = first_views(student, label_set, source, running, limit=limit)
    same: dict[str, int] = {}
    seen = 0
    for batch in stream_batches(renderer, range(steps), workers=running.world.workers):
        assert batch.teacher is not None
        for name, logits in answers_to(student, mixed_images(batch, running.device), running).items():
            same[name] = same.get(name, 0) + int((logits.argmax(1).cpu() == batch.teacher.hard).sum())
        seen += len(batch.keys)
    return {name: 100 * count / seen for name, count in same.items()}, seen


def first_views(
    student: Student, label_set: LabelSet, source: Source, running: Running, *, limit: int
) -> tuple[BatchRenderer, int]:
    """Return the renderer of the first view of every sample of a label set, and how many of its batches `limit` views are.

    Args:
        student: model that is to see the views.
        label_set: label set whose first view is used.
        source: images of the label set.
        running: settings for running the student.
        limit: maximum number of views to use, in whole batches.

    Raises:
        UsageError: the student has other classes or another image size.
    """
    recipe = label_set.recipe
    for what, mine, theirs in (
        ("classes", student.num_classes, label_set.num_classes),
        ("pixels", student.img_size, recipe.img_size),
    ):
        if mine != theirs:
            raise UsageError(f"the student has {mine} {what}, {label_set.place} has {theirs}")
    units = tuple(count_pairs(recipe, label_set.samples(name).usable) for name in label_set.shards)
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
    return BatchRenderer(Catalogue(source, label_set), recipe, order), steps


def centre_recipe(student: Student, crop_pct: float | None) -> Recipe:
    """Return the evaluation recipe: resize and centre crop as in the student's configuration."""
    pct = crop_pct or float(student.model.pretrained_cfg.get("crop_pct") or 0.875)
    return PRESETS["none"].with_fields(img_size=student.img_size, crop_pct=pct)


def answers_to(student: Student, images: Tensor, running: Running) -> dict[str, Tensor]:
    """Return the answers of the student in evaluation mode for float32 images in 0..255."""
    was_training = student.training
    student.eval()
    try:
        enabled = running.dtype != torch.float32
        with torch.inference_mode(), torch.autocast(running.device.type, dtype=running.dtype, enabled=enabled):
            return fused_logits(student(normalise(images, student)))
    finally:
        student.train(was_training)


def score_table(result: dict[str, Any]) -> str:
    """Return the result of `evaluate_checkpoint` as a readable table."""
    lines = [f"{'':20}{'top-1':>8}{'top-5':>8}{'agrees':>8}"]
    for name in [*(result.get("scores") or result["agreement"])]:
        scores = (result.get("scores") or {}).get(name, {})
        cells = [scores.get("top1"), scores.get("top5"), (result.get("agreement") or {}).get(name)]
        lines.append(f"{name:20}" + "".join(f"{'-' if cell is None else f'{cell:.2f}':>8}" for cell in cells))
    if "images" in result:
        lines.append(f"accuracy in % of {result['images']:,} images")
    if "agreement_views" in result:
        lines.append(f"agreement with the teacher in % of {result['agreement_views']:,} replayed views")
    return "\n".join(lines)
