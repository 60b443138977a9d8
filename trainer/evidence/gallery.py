"""The views on which a student and the teacher of its labels are furthest apart, with what both answer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pipeline.images.decode import encode
from pipeline.labels.labelset import LabelSet
from pipeline.machine.loaders import plan_workers
from pipeline.machine.ranks import forward_dtype, resolve_device
from trainer.config import ReportConfig
from trainer.evaluate import answers_of, replayed_batches
from trainer.evidence.networks import find_networks
from trainer.losses import TeacherTarget
from trainer.parallel import Running, World
from trainer.stream import Batch, mixed_images

SHOWN = 5  # classes of the teacher's answer


@dataclass(frozen=True)
class Picture:
    """A view of the gallery.

    Attributes:
        entry: its values in report-data.json.
        png: its pixels, as PNG.
    """

    entry: dict[str, Any]
    png: bytes


def most_apart(run: Path, label_set: LabelSet, config: ReportConfig, *, class_head: bool = False) -> list[Picture]:
    """Return the views of a label set on which a student's answer differs most from the teacher's, the most different first.

    The difference is the total variation distance: half the sum of |p - q| over all classes. The tail of the stored labels is spread
    evenly. With hard labels only (K = 0), the teacher's class counts as certain.

    Args:
        run: folder of the student's run; its best weights are used if it has some, else its last.
        label_set: label set whose first views are looked at.
        config: number of pictures and of views, location of the images, device.
        class_head: whether the class head answers, because the student's second head is not trained; else the mean of both.

    Raises:
        UsageError: the student does not fit the label set.
        LabelSetError: the images are not those of the label set.
    """
    device = resolve_device(config.device)
    student = find_networks([str(run)])[0].open(device)
    world = World(0, 1, device, plan_workers(config.workers, device))
    running = Running(world=world, dtype=forward_dtype(config.amp_dtype, device), batch_size=config.batch_size)
    source = label_set.open_source(config.data, options=config.options)
    found: list[tuple[float, str, int, dict[str, Any], Tensor]] = []
    for batch in replayed_batches(student, label_set, source, running, limit=config.gallery_views):
        images = mixed_images(batch, device)
        answers = answers_of(student, images, running)
        logits = answers["class_head" if class_head or "mean_logits" not in answers else "mean_logits"].cpu()
        found += _compared(batch, logits, images.cpu(), label_set)
        found = sorted(found, key=lambda each: (-each[0], each[1], each[2]))[: config.gallery]
    return [_picture(place, entry, pixels) for place, (*_, entry, pixels) in enumerate(found)]


def _compared(
    batch: Batch, logits: Tensor, images: Tensor, label_set: LabelSet
) -> list[tuple[float, str, int, dict[str, Any], Tensor]]:
    """Return distance, key, view, values and pixels of every view of a batch."""
    assert batch.teacher is not None
    teacher, student = dense(batch.teacher, logits.shape[1]), logits.softmax(1)
    apart = 0.5 * (teacher - student).abs().sum(1)
    kept, classes = teacher.topk(min(SHOWN, teacher.shape[1]), dim=1), batch.classes
    result: list[tuple[float, str, int, dict[str, Any], Tensor]] = []
    for at, key in enumerate(batch.keys):
        view = batch.views.start
        partner, lam = int(classes.partner[at]), float(classes.lam[at])
        parts = [(at, lam)] if partner == at or lam == 1 else [(at, lam), (partner, 1 - lam)]
        best = int(student[at].argmax())
        entry = {
            "key": key,
            "view": view,
            "apart": float(apart[at]),
            "shows": [
                {"share": share, "name": _name(label_set, int(classes.class_label[i]) if classes.labelled[i] else None)}
                for i, share in parts
            ],
            "teacher": [
                {"prob": float(prob), "name": _name(label_set, int(index))}
                for prob, index in zip(kept.values[at], kept.indices[at], strict=True)
            ],
            "student": {"prob": float(student[at, best]), "name": _name(label_set, best)},
        }
        result.append((entry["apart"], key, view, entry, images[at]))
    return result


def dense(target: TeacherTarget, num_classes: int) -> Tensor:
    """Return the teacher's probabilities of all classes, float32 [B, C]: the tail in equal parts, a hard label as certain."""
    kept = target.topk_index.shape[1]
    if kept == 0:
        return F.one_hot(target.hard, num_classes).float()
    rest = target.tail_mass.clamp(min=0)[:, None] / max(1, num_classes - kept)
    prob = rest.expand(-1, num_classes).clone().scatter_(1, target.topk_index, target.topk_prob.float())
    return prob / prob.sum(1, keepdim=True)


def _name(label_set: LabelSet, index: int | None) -> str:
    if index is None:
        return "unlabelled"
    return f"class {index}" if label_set.class_names is None else label_set.class_names[index]


def _picture(place: int, entry: dict[str, Any], pixels: Tensor) -> Picture:
    png = encode(pixels.permute(1, 2, 0).round().clamp(0, 255).byte().numpy(), "PNG")
    return Picture({"picture": f"view-{place}"} | entry, png)
