"""The settings files that `init` writes: each line with its reason.

Every number is DeiT's, that of a study of configs/, or follows from the images; its comment says which. None is the result of a search.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.storage.yaml import to_flow
from pipeline.text import count
from trainer.advice.answers import MANY, NONE, SMALL, TEACHER_EPOCHS, Answers, Images, Machine
from trainer.advice.commands import command_line

EMA_UPDATES = 25_000  # over which DeiT's average of the weights runs: 1 / (1 - 0.99996)
LEAST_UPDATES = 20  # in an epoch of few images

Line = tuple[str, Any, str]  # setting, value, reason


def settings_files(answers: Answers, folder: Path, machine: Machine) -> dict[str, str | None]:
    """Return the text of each settings file, by its name; None for `teacher.yaml` if the teacher need not learn the classes."""
    head = [
        f"images: {answers.images.line}",
        f"machine: {machine.line}",
        "paths are relative to the folder in which the command runs",
    ]
    labelling = [
        command_line("deit-cli", "precompute", "-c", folder / "precompute.yaml"),
        "stores the teacher's answers for numbered views of every image",
        *head,
    ]
    training = [
        command_line("deit-cli", "train", "-c", folder / "train.yaml"),
        "trains the student from the stored answers",
        *head,
    ]
    teaching = [
        command_line("deit-cli", "train", "-c", folder / "teacher.yaml"),
        f"teaches {answers.teacher} the {answers.images.classes} classes of the images, before it labels them",
        *head,
    ]
    return {
        "teacher.yaml": _yaml(teaching, list(_teacher_lines(answers, folder))) if answers.trains_teacher else None,
        "precompute.yaml": _yaml(labelling, list(_precompute_lines(answers, folder))),
        "train.yaml": _yaml(training, list(_train_lines(answers, folder, machine))),
    }


def _yaml(head: Sequence[str], lines: Sequence[Line]) -> str:
    """Return commented YAML: a value that is a mapping becomes lines of its own, whose values are pairs of value and reason."""
    text = [_comment(line) for line in head] + [""]
    for name, value, why in lines:
        if isinstance(value, dict):
            text.append(f"{name}: {_comment(why)}")
            text += [f"  {field}: {to_flow(inner)} {_comment(reason)}" for field, (inner, reason) in value.items()]
        else:
            text.append(f"{name}: {to_flow(value)} {_comment(why)}")
    return "\n".join(text) + "\n"


def _comment(text: str) -> str:
    """Return a comment that ends where its line ends: a path in it may have characters that YAML refuses or breaks lines at."""
    return "# " + "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)


def _precompute_lines(answers: Answers, folder: Path) -> Iterator[Line]:
    images, (size, _) = answers.images, answers.sizes
    yield "data", images.location, f"{count(images.samples, 'image')}"
    yield from _reading(answers)
    yield "out", str(folder / "labels"), "the label set; the same command continues an interrupted one"
    if answers.trains_teacher:
        which = "last" if answers.evaluation is None else "best"
        why = "the last state, as nothing is evaluated" if which == "last" else "the state with the best accuracy"
        path = str(folder / "teacher" / which)
        yield "teacher", path, f"{answers.teacher}, after it has learned these classes (teacher.yaml): {why}"
    else:
        known = (
            "checked when it is loaded"
            if answers.teacher_classes is None
            else f"{answers.teacher_classes:,} classes, as the images"
        )
        yield "teacher", answers.teacher, known if images.classes else "the images have no class labels to compare with"
    yield (
        "views",
        f"0:{answers.views}",
        f"{answers.views * images.samples:,} answers; `deit-cli estimate` says how long they take here",
    )
    yield "recipe", "deit", "DeiT's augmentation (arXiv 2012.12877, table 9); `deit-cli recipes deit` explains it"
    if size < 224:
        yield (
            "set",
            _small_recipe(size, images.side),
            "changes to it for small images, as in configs/scales/cifar10.yaml",
        )


def _small_recipe(size: int, side: int) -> dict[str, tuple[Any, str]]:
    return {
        "img_size": (
            size,
            f"pixels; the shorter side of the images is {side}, and a larger view would hold nothing more",
        ),
        "scale": ([0.4, 1.0], "a smaller part of a small image cannot be recognised"),
        "aa": ("rand-m5-mstd0.5-inc1", "RandAugment at magnitude 5 instead of 9"),
        "mixup_prob": (0.5, "every second pair of images is mixed"),
    }


def _train_lines(answers: Answers, folder: Path, machine: Machine) -> Iterator[Line]:
    images = answers.images
    few, starts = images.samples < MANY, _starts_from_published(answers)
    yield "labels", str(folder / "labels"), "the label set; recipe and class names come from it"
    yield "output", str(folder / "student"), "checkpoints, metrics, and the trained student in last/ and best/"
    yield "resume", "auto", "the same command continues an interrupted run"
    yield "model", answers.model, "`deit-cli models` lists others with their sizes"
    yield from _size_lines(answers)
    if starts:
        yield (
            "pretrained",
            True,
            f"{images.samples:,} images are few for a transformer: it starts from ImageNet weights, which timm downloads",
        )
    yield from _update_lines(answers, machine)
    yield "epochs", answers.epochs, _views_reason(answers)
    if starts:
        yield "lr", 5e-5, "small, because the weights are trained already; a starting point (docs/recipes.md)"
    elif few and answers.small:
        yield "lr", 2e-3, "that of configs/scales/cifar10.yaml for such a student; a starting point"
    elif few:
        yield (
            "lr",
            1e-3,
            "DeiT's for 1,024 images; configs/scales/cifar10.yaml has 2e-3 for smaller students; a starting point",
        )
    else:
        yield "lr_base", 5e-4, "DeiT's: for 512 images in an update, scaled in proportion"
    if few and not starts:
        yield "drop_path", 0.0, "no stochastic depth in a short training, as in configs/scales/cifar10.yaml"
    if few:
        yield "repeated_aug", 1, "DeiT's 3 views of an image would leave few different images in such an update"
    if answers.epochs * images.samples // _update_size(images) < EMA_UPDATES:
        yield (
            "model_ema",
            False,
            f"DeiT's average of the weights runs over {EMA_UPDATES:,} updates, more than there are here",
        )
    yield from _evaluation_lines(answers)


def _size_lines(answers: Answers) -> Iterator[Line]:
    (size, patch), sizes = answers.sizes, answers.student_sizes
    if patch is not None and "patch_size" in sizes:
        larger = f"; with a GPU {patch // 2}, for {(2 * size // patch) ** 2} patches" if answers.small else ""
        yield "patch_size", patch, f"pixels: {(size // patch) ** 2} patches of a view of {size} pixels{larger}"
    if answers.small:
        smaller = "small, because there is no GPU: without this line"
        more = "these three lines make about a twentieth of the work"
        yield "embed_dim", SMALL["embed_dim"], f"{smaller} 192, as DeiT-Ti has; {more}"
        yield "depth", SMALL["depth"], f"blocks; {smaller} 12"
        yield "num_heads", SMALL["num_heads"], f"attention heads; {smaller} 3"


def _update_lines(answers: Answers, machine: Machine) -> Iterator[Line]:
    """Yield how an update is divided: over the GPUs, and into passes that fit in their memory."""
    update, gpus = _update_size(answers.images), max(1, len(machine.gpus))
    most = 128 if answers.model.startswith(("deit-b", "deit_base")) else 256
    batch = max(2, min(most, update // gpus))
    passes = max(1, update // (batch * gpus))
    total = batch * gpus * passes
    reason = "as in DeiT" if total == 1024 else f"about {answers.images.samples // total:,} updates in an epoch"
    yield "batch_size", batch, f"{total:,} images in an update{f', on {gpus} GPUs' if gpus > 1 else ''}: {reason}"
    if passes > 1:
        yield "grad_accum_steps", passes, "passes for one update; if memory runs out, halve batch_size and double this"


def _evaluation_lines(answers: Answers) -> Iterator[Line]:
    if answers.evaluation is None:
        yield (
            "eval_data",
            None,
            "no evaluation: give images with class labels to see the accuracy and to keep the best student",
        )
        return
    yield from _reading(answers, leave=("labels_file",))
    yield "eval_data", answers.evaluation.location, f"{count(answers.evaluation.samples, 'image')}, after every epoch"
    if answers.sizes[0] < 224:
        yield "crop_pct", 1.0, "the whole image: small images have no border to cut off"
    else:
        yield "crop_pct", 0.875, "resize to 256 pixels and crop 224, as DeiT does"


def _teacher_lines(answers: Answers, folder: Path) -> Iterator[Line]:
    images, (size, _) = answers.images, answers.sizes
    yield "data", images.location, f"{images.labelled:,} images with class labels"
    yield from _reading(answers)
    which = "last" if answers.evaluation is None else "best"
    yield "output", str(folder / "teacher"), f"precompute.yaml takes the teacher from {which}/ in it"
    yield "resume", "auto", "the same command continues an interrupted run"
    yield "distillation_type", NONE, "it learns from the class labels"
    known = f"its {answers.teacher_classes:,} classes are not those of the images, so its head is new"
    yield "model", answers.teacher, known if images.classes != answers.teacher_classes else "a network of timm"
    if answers.pretrained:
        yield "pretrained", True, "start from the published weights, which timm downloads"
    else:
        yield "pretrained", False, "start from random weights: nothing is downloaded, as you passed --no-pretrained"
    yield (
        "recipe",
        "crop-flip",
        "a CNN learns without mixup and RandAugment, as the teachers of configs/scales/cifar10.yaml do",
    )
    if size < 224:
        yield "set", _small_teaching(size), "changes to it for small images, as in configs/scales/cifar10.yaml"
    if answers.pretrained:
        yield "epochs", TEACHER_EPOCHS, "fine-tuning is short (docs/recipes.md); a starting point"
    else:
        yield "epochs", TEACHER_EPOCHS, "configs/scales/cifar10.yaml has 18 for a smaller network; a starting point"
        yield "lr_base", 0.012, "for 512 images: 3e-3 for 128, as the CNN of configs/scales/cifar10.yaml"
    yield "batch_size", min(128, _update_size(images)), "images in an update"
    yield "drop_path", 0.0, "no stochastic depth, as for the teachers of configs/scales/cifar10.yaml"
    yield "repeated_aug", 1, "every image once in an epoch"
    yield "model_ema", False, f"an average over {EMA_UPDATES:,} updates is too slow for a short training"
    if answers.evaluation is not None:
        yield "eval_data", answers.evaluation.location, "is the teacher better than the student is to become?"
        if size < 224:
            yield "crop_pct", 1.0, "the whole image: small images have no border to cut off"


def _small_teaching(size: int) -> dict[str, tuple[Any, str]]:
    less = (224 / size) ** 2
    return {
        "img_size": (size, f"pixels, as the views that it labels; 224 would be about {less:.0f} times the work"),
        "scale": ([0.4, 1.0], "a smaller part of a small image cannot be recognised"),
    }


def _reading(answers: Answers, leave: Sequence[str] = ()) -> Iterator[Line]:
    kept = {name: value for name, value in answers.reading.items() if name not in leave}
    yield from ((name, value, "how the images are read, as you passed it") for name, value in kept.items())


def _update_size(images: Images) -> int:
    """Return the images of an update: DeiT's 1,024, or for few images a power of two that leaves `LEAST_UPDATES` in an epoch."""
    if images.samples >= MANY:
        return 1024
    return 2 ** min(8, max(4, int(math.log2(max(1, images.samples / LEAST_UPDATES)))))


def _starts_from_published(answers: Answers) -> bool:
    """Return whether the student starts from published weights: there are few images, and its patches are those of the weights."""
    return answers.pretrained and answers.images.samples < MANY and answers.sizes[1] == 16 and not answers.small


def _views_reason(answers: Answers) -> str:
    if answers.epochs <= answers.views:
        return "no view is used twice"
    return f"{count(answers.views, 'view')} of each image: from epoch {answers.views} on they repeat"
