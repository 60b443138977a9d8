"""The questions of `init`, with the defaults and checks of their answers."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from pipeline.errors import BadImageError, SourceError, UsageError
from pipeline.images.decode import image_size
from pipeline.images.source import Source, SourceOptions, open_source
from pipeline.settings.configs import SourceConfig
from pipeline.settings.fields import settings_of
from pipeline.settings.questions import Questions
from pipeline.storage.urls import local_path
from pipeline.text import count
from trainer.advice.answers import MANY, NONE, Answers, Images, Machine, is_published
from trainer.config import InitConfig
from trainer.student import create_student

LOOKED_AT = 32  # images whose size is read
# Views of small images: size of the view that is at least the image -> size of a patch, for 64 to 196 tokens.
PATCHES = {32: 4, 64: 8, 96: 8, 128: 16, 160: 16, 192: 16, 224: 16}

ClassesOf = Callable[[str], tuple[str, int | None]]  # resolved name and number of classes of a teacher


def ask(
    config: InitConfig, questions: Questions, classes_of: ClassesOf, machine: Machine, say: Callable[[str], None]
) -> Answers:
    """Return the answers to the six questions: those that the user has passed, and those that `questions` asks for.

    Args:
        config: what the user has passed.
        questions: asks the user.
        classes_of: resolves the name of a teacher.
        machine: decides some defaults.
        say: called with what was found at a location.

    Raises:
        UsageError: an answer is missing, or does not fit the others.
        SourceError: the images cannot be read.
    """

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


def _teacher(name: str, found: tuple[str, int | None], images: Images, *, pretrained: bool) -> tuple[str, int | None]:
    """Return the teacher's name as it is written into the file, and its number of classes."""
    resolved, classes = found
    if not pretrained and images.classes is None and is_published(name):
        raise UsageError(
            f"--no-pretrained: {name} cannot learn from {images.location}, which has no class labels",
            fix="Choose an exported folder or module:function",
        )
    if None not in (images.classes, classes) and classes != images.classes and not is_published(name):
        raise UsageError(
            f"{name} has {classes:,} classes, {images.location} has {images.classes:,}",
            fix="Choose a teacher with these classes, or a published network, which learns them first",
        )
    return resolved, classes


def _whole(answer: str, flag: str, high: int) -> int:
    if not (answer.isdecimal() and 1 <= int(answer) <= high):
        raise UsageError(f"{flag} must be a whole number in 1..{high}, got {answer}")
    return int(answer)
