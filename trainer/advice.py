"""`deit-cli init`: looks at the images and the machine, and writes commented settings files for `precompute` and `train`.

Every number is DeiT's, that of a study of configs/, or follows from the images; its comment says which. None is the result of a search.
"""

import math
import os
import shlex
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import BadImageError, SourceError, UsageError
from pipeline.images.decode import image_size
from pipeline.images.source import Source, SourceOptions, open_source
from pipeline.machine.threads import usable_cores
from pipeline.settings.configs import SourceConfig
from pipeline.settings.fields import settings_of
from pipeline.settings.questions import Questions
from pipeline.storage.atomic import publish_file, replace_file
from pipeline.storage.urls import local_path
from pipeline.storage.yaml import to_flow
from pipeline.text import byte_size, count, first_few
from trainer.config import InitConfig
from trainer.student import create_student

LOOKED_AT = 32  # images whose size is read
MANY = 100_000  # images: from here on DeiT's own schedule, made for 1.3 million, is the starting point
EMA_UPDATES = 25_000  # over which DeiT's average of the weights runs: 1 / (1 - 0.99996)
LEAST_UPDATES = 20  # in an epoch of few images
# Views of small images: size of the view that is at least the image -> size of a patch, for 64 to 196 tokens.
PATCHES = {32: 4, 64: 8, 96: 8, 128: 16, 160: 16, 192: 16, 224: 16}
SMALL = {"embed_dim": 64, "depth": 4, "num_heads": 2}  # student `ti` of configs/scales/cifar10.yaml, made for two cores
TEACHER_EPOCHS = 30
NONE = "none"

ClassesOf = Callable[[str], tuple[str, int | None]]  # resolved name and number of classes of a teacher
Line = tuple[str, Any, str]  # setting, value, reason


@dataclass(frozen=True, kw_only=True)
class Images:
    """What was found at a location.

    Attributes:
        location: as the user typed it.
        source: the opened source.
        samples: number of images.
        labelled: number of images with a class label.
        classes: number of classes; None without class labels.
        side: median of the shorter sides of the images that were looked at, in pixels.
        looked_at: number of these.
        bad: keys of those that cannot be decoded.
    """

    location: str
    source: Source
    samples: int
    labelled: int
    classes: int | None
    side: int
    looked_at: int
    bad: tuple[str, ...]

    @property
    def line(self) -> str:
        """Return what was found in one line."""
        classes = (
            "without class labels"
            if self.classes is None
            else f"{count(self.classes, 'class', 'es')}, {self.labelled:,} labelled"
        )
        bad = f"; cannot be decoded: {first_few(self.bad, 3)}" if self.bad else ""
        side = f"shorter side {self.side} pixels (median of {count(self.looked_at, 'image')})"
        return f"{self.location}: {count(self.samples, 'image')}, {classes}, {side}{bad}"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What this machine has.

    Attributes:
        gpus: names of the GPUs.
        gpu_bytes: memory of the smallest.
        cores: CPU cores that this process may use.
        memory_bytes: main memory.
    """

    gpus: tuple[str, ...]
    gpu_bytes: int
    cores: int
    memory_bytes: int

    @classmethod
    def here(cls) -> "Machine":
        """Return what this machine has."""
        cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        return cls(
            gpus=tuple(card.name for card in cards),
            gpu_bytes=min((card.total_memory for card in cards), default=0),
            cores=usable_cores(),
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        )

    @property
    def line(self) -> str:
        """Return it in one line."""
        gpus = f"{len(self.gpus)} x {self.gpus[0]} with {byte_size(self.gpu_bytes)}" if self.gpus else "no GPU"
        return f"{gpus}, {count(self.cores, 'core')}, {byte_size(self.memory_bytes)} of memory"


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The answers to the questions of `init`.

    Attributes:
        images: the images to learn from.
        evaluation: the images for evaluation, or None.
        model: name of the student.
        sizes: size of the views and of a patch, in pixels; no patch for a student that has none, or its own.
        teacher: the teacher as `--teacher` takes it.
        teacher_classes: its number of classes; None: not known.
        epochs: number of epochs.
        views: number of views of each image.
        reading: options for reading the images.
        pretrained: whether published weights may be downloaded; False: every network learns from random weights.
        small: whether the student has the sizes of `SMALL`, for a machine without a GPU.
    """

    images: Images
    evaluation: Images | None
    model: str
    sizes: tuple[int, int | None]
    teacher: str
    teacher_classes: int | None
    epochs: int
    views: int
    reading: Mapping[str, Any]
    pretrained: bool = True
    small: bool = False

    @property
    def student(self) -> str:
        """Return the folder in the run's output with the student to use: the best, or without evaluation the last."""
        return "last" if self.evaluation is None else "best"

    @property
    def student_sizes(self) -> dict[str, int]:
        """Return the sizes of the student that are not those of its model, as `train` and `estimate` take them."""
        _, patch = self.sizes
        patches = {} if patch is None or (patch == 16 and not self.small) else {"patch_size": patch}
        return patches | (SMALL if self.small else {})

    @property
    def trains_teacher(self) -> bool:
        """Return whether the teacher must learn the classes of the images first."""
        classes = self.images.classes
        if classes is None or self.teacher_classes is None:
            return False
        return classes != self.teacher_classes or (not self.pretrained and _is_published(self.teacher))


def set_up(
    config: InitConfig,
    folder: Path,
    *,
    questions: Questions,
    classes_of: ClassesOf,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Ask for what is missing, and write the settings files; return them and the next commands, as plain JSON values.

    Args:
        config: what the user has passed.
        folder: folder of the files; created if missing.
        questions: asks the user.
        classes_of: resolves the name of a teacher.
        overwrite: whether files that exist are replaced.
        say: called with what was found.

    Raises:
        UsageError: a file exists, or an answer is missing.
        SourceError: the images cannot be read.
    """
    names = ("precompute.yaml", "train.yaml", "teacher.yaml")
    if os.path.lexists(folder) and not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", fix="Choose another FOLDER")
    if not overwrite and (kept := [name for name in names if os.path.lexists(folder / name)]):
        raise UsageError(f"{folder / kept[0]} exists", fix="Choose another FOLDER, or pass --overwrite to replace it")
    asked = {"--data": config.data, "--eval-data": config.eval_data, "--model": config.model}
    questions.check_askable(asked | {"--teacher": config.teacher, "--epochs": config.epochs, "--views": config.views})
    machine = Machine.here()
    say(f"this machine: {machine.line}")
    answers = _ask(config, questions, classes_of, machine, say)
    files = {name: text for name, text in _files(answers, folder, machine).items() if text}
    for name, text in files.items():
        (replace_file if overwrite else publish_file)(folder / name, text.encode())
    return {
        "files": [str(folder / name) for name in files],
        "images": answers.images.samples,
        "classes": answers.images.classes,
        "machine": machine.line,
        "next": list(_commands(answers, folder, machine)),
        "after": list(_later_commands(answers, folder)),
        "slow": [] if machine.gpus else list(_work(answers)),
    }


def set_up_text(made: Mapping[str, Any]) -> str:
    """Return the result of `set_up` as text for people."""
    text = [f"wrote {', '.join(made['files'])}; read them, then run", *(f"    {line}" for line in made["next"])]
    text += ["then look at the results, and take the student with you:", *(f"    {line}" for line in made["after"])]
    if made["slow"]:
        text.append("this machine has no GPU, so this work is slow; half the epochs or views take half the time:")
        text += [f"    {line}" for line in made["slow"]]
    return "\n".join(text)


# --- questions ------------------------------------------------------------------------------------------------------


def _ask(
    config: InitConfig, questions: Questions, classes_of: ClassesOf, machine: Machine, say: Callable[[str], None]
) -> Answers:
    def seen(answer: str, options: SourceOptions = config.options) -> Images:
        found = look_at(answer, options)
        say(found.line)
        return found

    of_evaluation = replace(config.options, labels_file=None)  # that of --data
    images = questions.ask("Where are the images (path or URL)", config.data, flag="--data", check=seen)
    evaluation = questions.ask(
        "Where are the images for evaluation (path, URL or none)",
        config.eval_data,
        flag="--eval-data",
        default=_beside(images.location),
        check=lambda answer: None if answer == NONE else _evaluation(seen(answer, of_evaluation), images),
    )
    model, sizes = questions.ask(
        "Which student (deit-ti, deit-s, deit-b or a model of timm)",
        config.model,
        flag="--model",
        default="deit-s" if machine.gpus and images.samples >= MANY else "deit-ti",
        check=lambda answer: (answer, _sizes(answer, images)),
    )
    teacher, classes = questions.ask(
        "Which teacher (a published network, an exported folder or module:function)",
        config.teacher,
        flag="--teacher",
        default="regnety_160" if machine.gpus else "resnet18",
        check=lambda answer: _teacher(answer, classes_of(answer), images, pretrained=config.pretrained),
    )
    epochs = questions.ask(
        "How many epochs",
        config.epochs,
        flag="--epochs",
        default=300 if images.samples >= MANY else 100 if machine.gpus else 30,
        check=lambda answer: _whole(answer, "--epochs", 10**6),
    )
    views = questions.ask(
        "How many views of each image (more epochs than views use them again)",
        config.views,
        flag="--views",
        default=min(epochs, 300) if machine.gpus else min(epochs, 10),
        check=lambda answer: _whole(answer, "--views", 2**20),
    )
    reading = {each.name: getattr(config, each.name) for each in settings_of(SourceConfig)}
    size, patch = sizes
    small = config.model is None and model == "deit-ti" and not machine.gpus and patch not in (None, 16)
    return Answers(
        images=images,
        evaluation=evaluation,
        model=model,
        sizes=(size, 2 * patch) if small and patch else sizes,
        teacher=teacher,
        teacher_classes=classes,
        epochs=epochs,
        views=views,
        reading={name: value for name, value in reading.items() if value is not None},
        pretrained=config.pretrained,
        small=small,
    )


def look_at(location: str, options: SourceOptions) -> Images:
    """Open the images at a location, count them, and read the sizes of some of them.

    Raises:
        SourceError: there are no images, or none of those that were looked at can be decoded.
    """
    source = open_source(location, options=options)
    samples, highest = source.num_samples, source.max_label
    sides: list[int] = []
    bad: list[str] = []
    for shard, position in islice(_spread(source), LOOKED_AT):
        key = shard.keys[position]
        try:
            sides.append(min(image_size(shard.read_image(position), key=key)))
        except BadImageError:
            bad.append(key)
    if not sides:
        raise SourceError(f"{location}: none of {count(len(bad), 'image')} that were looked at can be decoded")
    classes = None if highest is None else source.num_classes or highest + 1
    return Images(
        location=location,
        source=source,
        samples=samples,
        labelled=source.num_labelled,
        classes=classes,
        side=round(statistics.median(sides)),
        looked_at=len(sides),
        bad=tuple(bad),
    )


def _spread(source: Source) -> Iterator[tuple[Any, int]]:
    """Yield shards and positions of images, spread evenly; of a remote source those of its first shard."""
    shards = source.shards[:1] if source.is_remote else source.shards
    step = max(1, sum(map(len, shards)) // LOOKED_AT)
    start = 0
    for shard in shards:
        yield from ((shard, position) for position in range(-start % step, len(shard), step))
        start += len(shard)


def _beside(location: str) -> str:
    """Return the folder with the evaluation images beside `train`, if there is one; else `none`."""
    path = local_path(location)
    if path is not None and path.name in ("train", "training"):
        for name in ("val", "validation", "valid", "test"):
            if (path.parent / name).is_dir():
                return str(path.parent / name)
    return NONE


def _evaluation(found: Images, images: Images) -> Images:
    if found.classes is None:
        raise UsageError(f"{found.location} has no class labels", fix="Images for evaluation need them; or answer none")
    if images.classes is not None and found.source.class_names != images.source.class_names:
        raise UsageError(
            f"{found.location} has {count(found.classes, 'class', 'es')}, {images.location} has {images.classes:,}, and their names must be equal",
            fix="Choose images with the same class folders; or answer none",
        )
    if found.source.source_id == images.source.source_id:
        raise UsageError(
            f"{found.location} has the images to learn from: an accuracy on them says nothing about others"
        )
    return found


def _sizes(model: str, images: Images) -> tuple[int, int | None]:
    """Return the size of the views and of a patch for a student; raise UsageError if timm cannot build it."""
    size = next((size for size in PATCHES if size >= images.side), 224)
    patch = PATCHES[size]
    with torch.device("meta"):
        try:
            create_student(model, num_classes=2, img_size=size, patch_size=patch)
            return size, patch
        except UsageError:  # no transformer, or a name that does not exist
            create_student(model, num_classes=2)
    return size, None


def _is_published(teacher: str) -> bool:
    """Return whether a teacher is a network of timm, which can be trained here: no exported folder, function or Hub repository."""
    return ":" not in teacher and not Path(teacher).is_dir()


def _teacher(name: str, found: tuple[str, int | None], images: Images, *, pretrained: bool) -> tuple[str, int | None]:
    """Return the teacher's name as it is written into the file, and its number of classes."""
    resolved, classes = found
    if not pretrained and images.classes is None and _is_published(name):
        raise UsageError(
            f"--no-pretrained: {name} cannot learn from {images.location}, which has no class labels",
            fix="Choose an exported folder or module:function",
        )
    if None not in (images.classes, classes) and classes != images.classes and not _is_published(name):
        raise UsageError(
            f"{name} has {classes:,} classes, {images.location} has {images.classes:,}",
            fix="Choose a teacher with these classes, or a published network, which learns them first",
        )
    return resolved, classes


def _whole(answer: str, flag: str, high: int) -> int:
    if not (answer.isdecimal() and 1 <= int(answer) <= high):
        raise UsageError(f"{flag} must be a whole number in 1..{high}, got {answer}")
    return int(answer)


# --- files ----------------------------------------------------------------------------------------------------------


def _files(answers: Answers, folder: Path, machine: Machine) -> dict[str, str | None]:
    head = [
        f"images: {answers.images.line}",
        f"machine: {machine.line}",
        "paths are relative to the folder in which the command runs",
    ]
    labelling = [
        _command("deit-cli", "precompute", "-c", folder / "precompute.yaml"),
        "stores the teacher's answers for numbered views of every image",
        *head,
    ]
    training = [
        _command("deit-cli", "train", "-c", folder / "train.yaml"),
        "trains the student from the stored answers",
        *head,
    ]
    teaching = [
        _command("deit-cli", "train", "-c", folder / "teacher.yaml"),
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


def _commands(answers: Answers, folder: Path, machine: Machine) -> Iterator[str]:
    """Yield the next commands to type: as far as the trained student."""
    gpus = len(machine.gpus)
    launcher = ("torchrun", "--nproc-per-node", gpus, "--no-python") if gpus > 1 else ()
    if answers.trains_teacher:
        yield _command(*launcher, "deit-cli", "train", "-c", folder / "teacher.yaml")
    student = {"epochs": answers.epochs, "model": answers.model} | answers.student_sizes
    yield _command("deit-cli", "estimate", "-c", folder / "precompute.yaml", *_flags(student))
    yield _command("deit-cli", "precompute", "-c", folder / "precompute.yaml")
    yield _command(*launcher, "deit-cli", "train", "-c", folder / "train.yaml")


def _later_commands(answers: Answers, folder: Path) -> Iterator[str]:
    """Yield the commands for what has been made: views, accuracy, a page, an export, and the list of runs."""
    labels, student = folder / "labels", folder / "student"
    remote, reading = answers.images.source.is_remote, _flags(answers.reading)
    elsewhere = ("--data", answers.images.location, *reading) if remote else ()
    yield _command("deit-cli", "labels", "show", labels, "--out", folder / "labels.png", *elsewhere)
    evaluate = ["deit-cli", "evaluate", "--checkpoint", student / answers.student, "--labels", labels]
    if remote:
        evaluate += ["--labels-data", answers.images.location]
    if answers.evaluation is not None:
        kept = {name: value for name, value in answers.reading.items() if name != "labels_file"}
        evaluate += ["--data", answers.evaluation.location, *_flags(kept)]
    yield _command(*evaluate)
    yield _command("deit-cli", "report", student, labels, "--out", folder / "report.html", *elsewhere)
    yield _command("deit-cli", "export", student, "--to", "timm", "--out", folder / "student-timm")
    yield _command("deit-cli", "runs", folder)


def _command(*words: Any) -> str:
    return shlex.join(map(str, words))


def _flags(options: Mapping[str, Any]) -> list[str]:
    return [str(part) for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]


def _work(answers: Answers) -> Iterator[str]:
    """Yield the work of each file: how often a network sees an image, and how large the image is."""
    samples, pixels = answers.images.samples, f"of {answers.sizes[0]} pixels"
    if answers.trains_teacher:
        yield f"teacher.yaml: {answers.teacher} trains on {TEACHER_EPOCHS * answers.images.labelled:,} views {pixels}"
    yield f"precompute.yaml: {answers.teacher} answers for {answers.views * samples:,} views {pixels}"
    yield f"train.yaml: {answers.model} trains on {answers.epochs * samples:,} views {pixels}"
