"""`deit-cli evaluate`: every answer of a student to the images in one pass: accuracy, calibration, classes and confusions.

Calibration: the answers are sorted into 15 bins of equal width by their confidence, the probability of the chosen class. The expected
calibration error is the mean of |accuracy - confidence| over the bins, weighted by their images (Guo et al. 2017, equation 3). The
probabilities of an answer are the softmax of its logits; `sum_softmax` is a sum of two probabilities and is divided by 2.

With `--flip` an answer is the mean of the answers to an image and to its mirror image. Logits are averaged where the answer is
logits; `sum_softmax` is probabilities, so these are averaged.
"""

import copy
import csv
import io
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline.errors import CheckpointError, StorageError, UsageError
from pipeline.images.source import Source, open_source
from pipeline.labels.comparing import check_source, labelled_part
from pipeline.labels.labelset import LabelSet
from pipeline.labels.replay import check_start
from pipeline.machine.loaders import plan_workers
from pipeline.machine.ranks import forward_dtype, resolve_device
from pipeline.pixels.render import warn_without_kernel
from pipeline.storage.atomic import replace_file
from pipeline.storage.json import pretty_json
from pipeline.storage.place import File, LocalFile, open_file, open_place
from pipeline.text import aligned
from pipeline.weights import weights_here
from trainer.config import EvaluateConfig
from trainer.evaluate import (
    ANSWERS,
    Tally,
    centre_recipe,
    check_finite,
    chosen_class,
    count_answers,
    fused_logits,
    labelled_places,
    measure_agreement,
    primary_head,
)
from trainer.evidence.linear import (
    FILE_NAME,
    Linear,
    OtherStudent,
    check_two_tokens,
    concatenated,
    fit_linear,
    load_linear,
    save_linear,
)
from trainer.evidence.networks import weights_in
from trainer.parallel import Running, World
from trainer.student import Student, open_student

log = logging.getLogger("deit_cli.evaluate")

LINEAR = "concat_linear"
BINS = 15  # Guo et al. 2017
EDGES = torch.arange(BINS + 1, dtype=torch.float64) / BINS
MOST_CONFUSIONS = 100  # pairs of an answer in the result
SHOWN = 5  # classes and confusions in the table


def evaluate_checkpoint(config: EvaluateConfig) -> dict[str, Any]:
    """Open a student, measure its accuracy and agreement as requested, write the files, and return plain JSON values.

    Raises:
        UsageError: the options do not name exactly one student, or it does not fit the images or the labels.
        CheckpointError: the student or its linear classifier is damaged, or its answers are not numbers.
        StorageError: a file cannot be written.
    """
    for path in filter(None, (config.out, config.csv, config.predictions)):
        LocalFile(path).refuse_unwritable()
    label_set = None if config.labels is None else LabelSet.open(config.labels, expect_manifest=config.expect_manifest)
    source = None if config.data is None else open_source(config.data, options=config.options)
    fitting = _fit_images(config)
    if config.checkpoint and (chosen := weights_in(config.checkpoint)) != config.checkpoint:
        config = replace(config, checkpoint=chosen)
        log.info("weights: %s", chosen)
    here = weights_here(config.checkpoint) if config.checkpoint else None
    student = _open(config, here, [each.num_classes for each in (source, label_set, fitting and fitting[0]) if each])
    where = resolve_device(config.device)
    world = World(0, 1, where, plan_workers(config.workers, where))
    running = Running(world=world, dtype=forward_dtype(config.amp_dtype, where), batch_size=config.batch_size)
    student.to(where)
    warn_without_kernel()
    linear = _linear(config, here, student, running, fitting)
    linear = None if linear is None else linear.to(where)
    result: dict[str, Any] = {
        "kind": "scores",
        "version": 1,
        "checkpoint": config.checkpoint or str(config.model),
        "model": student.model.pretrained_cfg.get("architecture"),
        "parameters": sum(parameter.numel() for parameter in student.model.parameters()),
        "num_classes": student.num_classes,
    } | ({} if linear is None else {LINEAR: linear.facts})
    if source:
        result |= _measure(config, student, source, running, linear)
    if label_set:
        images = label_set.open_source(config.labels_data, options=config.other_options)
        check_start(label_set, images)
        result["agreement"], result["agreement_views"] = measure_agreement(
            student,
            label_set,
            images,
            running,
            limit=config.agreement_samples,
            answering=EveryAnswer(linear),
        )
    if config.out is not None:
        replace_file(config.out, pretty_json(result))
    return result


def _open(config: EvaluateConfig, here: Path | None, num_classes: Sequence[int | None]) -> Student:
    """Return the student; `here` is its checkpoint, `num_classes` are the class counts of images and labels, None if unknown."""
    if config.num_classes and (here is None or here.is_dir()):
        raise UsageError(
            "--num-classes is only for a file of weights: omit it, folders and published weights state their own number"
        )
    classes = next(filter(None, (config.num_classes, *num_classes)), None)
    return open_student(here, model=config.model, num_classes=classes, pretrained=config.pretrained)


# --- the linear classifier --------------------------------------------------------------------------------------------


def _fit_images(config: EvaluateConfig) -> tuple[Source, LabelSet | None] | None:
    """Return the images on which the linear classifier is fitted, and the label set that has them; None: no fit.

    Of a label set, the images are used, in centre crops as in the evaluation. Its views are other pixels, and a mixed view has two
    classes, for which the tokens of no single class stand.
    """
    if config.fit_data is not None:
        return open_source(config.fit_data, options=config.other_options), None
    if config.fit_labels is None:
        return None
    label_set = LabelSet.open(config.fit_labels)
    source = label_set.open_source()
    check_source(label_set, source)
    return labelled_part(label_set, source), label_set


def _linear(
    config: EvaluateConfig,
    here: Path | None,
    student: Student,
    running: Running,
    fitting: tuple[Source, LabelSet | None] | None,
) -> Linear | None:
    """Return the student's linear classifier: fitted now and saved, or read from its file; None if there is none."""
    file = _linear_file(config, here)
    if fitting is None:
        return _read_linear(file, student, asked=config.concat_linear is not None)
    check_two_tokens(student)
    if file is None:
        raise UsageError(
            f"published weights have no folder for {FILE_NAME}", fix="Pass --concat-linear FILE, which is written"
        )
    try:
        file.refuse_unwritable()
    except StorageError as error:
        raise error.with_fix("Pass --concat-linear FILE, which is written instead") from error
    source, label_set = fitting
    places = labelled_places(source, student, why=f"fit {LINEAR} on")
    if label_set is not None:
        usable = [set(label_set.samples(shard.name).usable.tolist()) for shard in source.shards]
        places = [(shard, row) for shard, row in places if row in usable[shard]]
    linear = fit_linear(student, source, running, crop_pct=config.crop_pct, places=places)
    save_linear(linear, file)
    log.info("%s is written", file)
    return linear


def _linear_file(config: EvaluateConfig, here: Path | None) -> File | None:
    """Return the file of the classifier: as requested, or beside the weights; None for published weights."""
    if config.concat_linear is not None:
        return open_file(config.concat_linear)
    if config.checkpoint is None or here is None:
        return None
    return (
        open_place(config.checkpoint) / FILE_NAME if here.is_dir() else open_file(config.checkpoint).beside(FILE_NAME)
    )


def _read_linear(file: File | None, student: Student, *, asked: bool) -> Linear | None:
    """Return the classifier in a file; None if nobody asked for it and it does not exist or belongs to other weights."""
    if asked:
        check_two_tokens(student)
    elif file is None or not student.has_two_tokens:
        return None
    assert file is not None
    try:
        found = load_linear(file, student)
    except OtherStudent as error:
        if asked:
            raise
        log.warning("%s", error)
        return None
    if asked and found is None:
        raise CheckpointError(
            f"{file}: no such file", fix="Pass --fit-data too: the classifier is then fitted and written"
        )
    return found


@dataclass(frozen=True)
class EveryAnswer:
    """Function that gives every answer of a student to normalised images [B, 3, H, W], float32 [B, C] by name.

    Attributes:
        linear: linear classifier of the student; None: no `concat_linear`.
        flip: whether to average with the answers to the mirror images.
    """

    linear: Linear | None = None
    flip: bool = False

    def names(self, student: Student) -> tuple[str, ...]:
        """Return the names of the answers."""
        heads = ANSWERS if student.has_distillation_head else ANSWERS[:1]
        return heads if self.linear is None else (*heads, LINEAR)

    def __call__(self, student: Student, images: Tensor) -> Mapping[str, Tensor]:
        """Return the answers."""
        answers = self._once(student, images)
        if not self.flip:
            return answers
        mirrored = self._once(student, images.flip(3))
        return {name: (answer + mirrored[name]) / 2 for name, answer in answers.items()}

    def _once(self, student: Student, images: Tensor) -> dict[str, Tensor]:
        if self.linear is None:
            return fused_logits(student(images))
        tokens = student.tokens(images)
        return fused_logits(student.read(*tokens)) | {LINEAR: self.linear(concatenated(*tokens))}


def probabilities(name: str, answer: Tensor) -> Tensor:
    """Return the probabilities of an answer, float32 [B, C]."""
    return answer / 2 if name == "sum_softmax" else answer.softmax(dim=1)


# --- counting ---------------------------------------------------------------------------------------------------------


class FullTally(Tally):
    """A tally with calibration bins, classes and confusions as well. Its size depends on the wrong pairs that occur, not on C x C.

    Attributes:
        kept: for each batch of this rank, class int64 [A, B] and confidence float32 [A, B] of the A answers; [] without `keeps`.
    """

    def __init__(self, names: Sequence[str], num_classes: int, *, keeps: bool = False) -> None:
        super().__init__(names)
        answers = len(self.names)
        self._keeps = keeps
        self._in_bins = torch.zeros(2, answers, BINS, dtype=torch.int64)  # images, right answers
        self._confidence = torch.zeros(answers, BINS, dtype=torch.float64)  # sums
        self._of_class = torch.zeros(
            1 + answers, num_classes, dtype=torch.int64
        )  # images, right answers of each answer
        self._wrong: list[Counter[tuple[int, int]]] = [Counter() for _ in self.names]  # (class, answer) -> images
        self.kept: list[tuple[Tensor, Tensor]] = []

    def add(self, answers: Mapping[str, Tensor], class_label: Tensor) -> None:
        """Count a batch, as `Tally.add` does.

        Raises:
            CheckpointError: an answer is NaN or infinite.
        """
        super().add(answers, class_label)
        chosen = torch.stack([chosen_class(answers[name]) for name in self.names])
        most = [probabilities(name, answers[name].float()).amax(dim=1) for name in self.names]
        confidence = torch.stack(most).cpu()
        check_finite(confidence)
        which = torch.bucketize(confidence.double(), EDGES[1:-1])  # (low, high]
        right = chosen == class_label
        self._of_class[0] += torch.bincount(class_label, minlength=self._of_class.shape[1])
        for at in range(len(self.names)):
            self._in_bins[0, at] += torch.bincount(which[at], minlength=BINS)
            self._in_bins[1, at] += torch.bincount(which[at][right[at]], minlength=BINS)
            self._confidence[at].index_add_(0, which[at], confidence[at].double())
            self._of_class[1 + at] += torch.bincount(class_label[right[at]], minlength=self._of_class.shape[1])
            wrong = ~right[at]
            self._wrong[at].update(zip(class_label[wrong].tolist(), chosen[at][wrong].tolist(), strict=True))
        if self._keeps:
            self.kept.append((chosen, confidence))

    def share(self, world: World) -> None:
        """Add up the counts of all ranks."""
        super().share(world)
        self._in_bins = world.total(self._in_bins)
        self._confidence = world.total(self._confidence)
        self._of_class = world.total(self._of_class)
        ranks = world.gather(self._wrong)
        self._wrong = [sum(counters, Counter()) for counters in zip(*ranks, strict=True)]

    def scores(self) -> dict[str, dict[str, float]]:
        """Return top-1, top-5 and expected calibration error in percent by the name of the answer."""
        gaps = (self._in_bins[1] - self._confidence).abs().sum(dim=1) / self.images
        found = zip(super().scores().items(), gaps.tolist(), strict=True)
        return {name: scores | {"ece": 100 * gap} for (name, scores), gap in found}

    def calibration(self) -> dict[str, list[dict[str, Any]]]:
        """Return the bins of each answer; confidence and accuracy are means in 0..1, None in an empty bin."""
        (images, right), edges = self._in_bins.tolist(), EDGES.tolist()
        return {
            name: [
                {
                    "low": edges[at],
                    "high": edges[at + 1],
                    "images": n,
                    "confidence": confidence / n if n else None,
                    "accuracy": hits / n if n else None,
                }
                for at, (n, hits, confidence) in enumerate(zip(*columns, strict=True))
            ]
            for name, *columns in zip(self.names, images, right, self._confidence.tolist(), strict=True)
        }

    def per_class(self, class_names: Sequence[str] | None) -> list[dict[str, Any]]:
        """Return images and top-1 in percent of every class that has images."""
        images, *right = self._of_class.tolist()
        return [
            {
                "class": number,
                "name": None if class_names is None else class_names[number],
                "images": n,
                "top1": {name: 100 * hits[number] / n for name, hits in zip(self.names, right, strict=True)},
            }
            for number, n in enumerate(images)
            if n
        ]

    def confusion(self) -> dict[str, list[dict[str, int]]]:
        """Return the wrong pairs of each answer with the most images, at most `MOST_CONFUSIONS`; ties by number."""
        return {
            name: [
                {"class": label, "answer": chosen, "images": n}
                for (label, chosen), n in sorted(wrong.items(), key=lambda item: (-item[1], item[0]))[:MOST_CONFUSIONS]
            ]
            for name, wrong in zip(self.names, self._wrong, strict=True)
        }


def at_size(student: Student, size: int) -> Student:
    """Return the student for images of another size: a copy whose position embeddings timm has interpolated.

    Raises:
        UsageError: the model cannot take images of this size.
    """
    if size == student.img_size:
        return student
    name = student.model.pretrained_cfg.get("architecture")
    resized = copy.deepcopy(student)
    resized.img_size, model = size, resized.model
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is not None and any(size % side for side in patch):
        raise UsageError(f"--img-size must be a multiple of the patch size {patch[0]}, got {size}")
    if hasattr(model, "set_input_size"):
        try:
            model.set_input_size(img_size=(size, size))
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UsageError(f"timm cannot set {name} to images of {size} pixels: {reason}") from error
    elif model.pretrained_cfg.get("fixed_input_size"):
        raise UsageError(f"{name} takes images of {student.img_size} pixels only, got --img-size {size}")
    return resized


def _measure(
    config: EvaluateConfig, student: Student, source: Source, running: Running, linear: Linear | None
) -> dict[str, Any]:
    """Return the part of the result about accuracy, and write the files about images and classes."""
    answering = EveryAnswer(linear, config.flip)
    names = answering.names(student)
    sizes = config.img_size or (student.img_size,)
    students = [at_size(student, size) for size in sizes]  # all, so that a size is refused before the first pass
    tallies = [FullTally(names, student.num_classes, keeps=config.predictions is not None) for _ in sizes[:1]]
    tallies += [FullTally(names, student.num_classes) for _ in sizes[1:]]
    for resized, tally in zip(students, tallies, strict=True):
        count_answers(tally, resized, source, running, crop_pct=config.crop_pct, answering=answering)
    first = tallies[0]
    per_class = first.per_class(student.class_names or source.class_names)
    if config.csv is not None:
        replace_file(config.csv, _csv(names, per_class))
    if config.predictions is not None:
        replace_file(config.predictions, _predictions(first, source, student))
    return {
        "data": source.location,
        "scores": first.scores(),
        "images": first.images,
        "img_size": sizes[0],
        "crop_pct": centre_recipe(student, config.crop_pct).crop_pct,
        "flip": config.flip,
        "calibration": first.calibration(),
        "per_class": per_class,
        "confusion": first.confusion(),
        "sizes": [{"img_size": size, "scores": tally.scores()} for size, tally in zip(sizes, tallies, strict=True)],
    }


# --- files ------------------------------------------------------------------------------------------------------------


def _csv(names: Sequence[str], per_class: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the table of classes as CSV: class, name, images, and top-1 of each answer in percent."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["class", "name", "images", *(f"{name}_top1" for name in names)])
    for row in per_class:
        table.writerow([row["class"], row["name"] or "", row["images"], *(row["top1"][name] for name in names)])
    return text.getvalue().encode()


def _predictions(tally: FullTally, source: Source, student: Student) -> Callable[[Any], None]:
    """Return a function that writes key, class label, and class and confidence of each answer to an open Parquet file."""
    places = labelled_places(source, student)
    shards = source.shards
    columns: dict[str, Any] = {
        "key": pa.array([shards[shard].keys[row] for shard, row in places], pa.string()),
        "class_label": pa.array([shards[shard].class_labels[row] for shard, row in places], pa.int32()),
    }
    chosen, confidence = (torch.cat(parts, dim=1) for parts in zip(*tally.kept, strict=True))
    for at, name in enumerate(tally.names):
        columns[name] = pa.array(chosen[at].numpy(), pa.int32())
        columns[f"{name}_confidence"] = pa.array(confidence[at].numpy(), pa.float32())
    return lambda file: pq.write_table(pa.table(columns), file, compression="zstd")


# --- the table --------------------------------------------------------------------------------------------------------


def score_table(result: Mapping[str, Any]) -> str:
    """Return the result of `evaluate_checkpoint` as readable tables."""
    scores, agreement = result.get("scores", {}), result.get("agreement", {})
    rows = [["", "top-1, %", "top-5, %", "calibration error, %", "agrees, %"]]
    for name in scores or agreement:
        of_answer = scores.get(name, {})
        cells = (of_answer.get("top1"), of_answer.get("top5"), of_answer.get("ece"), agreement.get(name))
        rows.append([name, *("-" if cell is None else f"{cell:.2f}" for cell in cells)])
    lines = [aligned(rows)]
    if scores:
        mirrored = ", each with its mirror image" if result["flip"] else ""
        lines.append(
            f"accuracy on {result['images']:,} images{mirrored}: {result['data']}, {result['img_size']} pixels,"
            f" centre crop {result['crop_pct']:g}"
        )
    if agreement:
        lines.append(f"agreement with the teacher on {result['agreement_views']:,} replayed views")
    if len(result.get("sizes", ())) > 1:
        rows = [["top-1, % at", *scores]]
        rows += [
            [f"{size['img_size']} pixels", *(f"{each['top1']:.2f}" for each in size["scores"].values())]
            for size in result["sizes"]
        ]
        lines += ["", aligned(rows)]
    if scores and result["num_classes"] > 2:
        lines += _weak_points(result, primary_head(scores))
    return "\n".join(lines)


def _weak_points(result: Mapping[str, Any], answer: str) -> list[str]:
    """Return the lines about the weakest classes and the largest confusions of an answer."""
    names = {row["class"]: row["name"] for row in result["per_class"]}

    def named(number: int) -> str:
        return f"{number} {names[number]}" if names.get(number) not in (None, str(number)) else f"class {number}"

    weakest = sorted(result["per_class"], key=lambda row: (row["top1"][answer], row["class"]))[:SHOWN]
    rows = [["top-1, %", "images", f"weakest classes of {answer}"]]
    rows += [[f"{row['top1'][answer]:.2f}", f"{row['images']:,}", named(row["class"])] for row in weakest]
    lines = ["", aligned(rows, left=(2,))]
    if pairs := result["confusion"][answer][:SHOWN]:
        rows = [["images", f"largest confusions of {answer}"]]
        rows += [[f"{pair['images']:,}", f"{named(pair['class'])} taken for {named(pair['answer'])}"] for pair in pairs]
        lines += ["", aligned(rows, left=(1,))]
    return lines
