"""What `init` knows before it writes: the images, the machine, and the answers of the user."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.images.source import Source
from pipeline.machine.threads import usable_cores
from pipeline.text import byte_size, count, first_few

MANY = 100_000  # images: from here on DeiT's own schedule, made for 1.3 million, is the starting point
SMALL = {"embed_dim": 64, "depth": 4, "num_heads": 2}  # student `ti` of configs/scales/cifar10.yaml, made for two cores
TEACHER_EPOCHS = 30
NONE = "none"


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
        return classes != self.teacher_classes or (not self.pretrained and is_published(self.teacher))


def is_published(teacher: str) -> bool:
    """Return whether a teacher is a network of timm, which can be trained here: no exported folder, function or Hub repository."""
    return ":" not in teacher and not Path(teacher).is_dir()
