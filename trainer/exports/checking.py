"""The check of an export: its answers against those of the student, on real images or on generated ones."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.images.source import open_source
from trainer.evaluate import Tally, check_finite
from trainer.evidence.analyse import UNKNOWN, Crops
from trainer.evidence.scores import EveryAnswer
from trainer.exports.answers import Answers
from trainer.exports.config import StudentExportConfig
from trainer.parallel import Running, World
from trainer.student import Student, normalise

Answering = Callable[[Tensor], Mapping[str, Tensor]]  # input of the graph -> answers [B, C] by name
Seen = tuple[Tensor, Tensor]  # pixels float32 [B, 3, H, W], whole numbers in 0..255; class labels int64 [B] or UNKNOWN

LIMIT = (
    1e-4  # largest difference of a float32 export, as a share of the student's largest answer, or of 1 if that is less
)
BATCH_SIZE = 32
GENERATED = 16  # images


def checking_images(config: StudentExportConfig, student: Student) -> tuple[str, Iterable[Seen]]:
    """Return the name and the batches of the images of --data, or of generated ones."""
    if config.data is None:
        return f"{GENERATED} generated images", [(generated(student.img_size), torch.full((GENERATED,), UNKNOWN))]
    crops = Crops.spread(open_source(config.data, options=config.options), config.samples, config.crop_pct)
    name = config.data.rstrip("/").rpartition("/")[
        2
    ]  # an export is published: a path of this machine is nobody's business
    return f"images of {name}", crop_batches(crops, student, config.workers)


def crop_batches(crops: Crops, student: Student, workers: int) -> Iterator[Seen]:
    """Yield batches of centre crops and their class labels."""
    world = World(0, 1, torch.device("cpu"), workers)
    running = Running(world=world, dtype=torch.float32, batch_size=BATCH_SIZE)
    for seen in crops.batches(student, running):
        yield seen.pixels, seen.known


def generated(size: int) -> Tensor:
    """Return `GENERATED` images of coloured waves, float32 [N, 3, size, size] with whole numbers in 0..255."""
    number = torch.arange(GENERATED)[:, None, None, None]
    colour = torch.arange(3)[:, None, None]
    y, x = torch.arange(size)[:, None] / size, torch.arange(size) / size
    phase = 2 * math.pi * ((1 + number % 5) * x + (1 + number // 5) * y) + (1 + number % 3) * colour
    return (127.5 * (1 + torch.sin(phase))).round()


@dataclass
class Comparison:
    """What the answers of an export and of its student have in common.

    Attributes:
        where: name of the images.
        images: their number.
        difference: largest difference of a number, by the name of the answer.
        largest: largest absolute number that the student answered, likewise.
        same: number of images for which both choose the same class, likewise.
        student, export: right answers to images with a class label.
    """

    where: str
    student: Tally
    export: Tally
    images: int = 0
    difference: dict[str, float] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    same: dict[str, int] = field(default_factory=dict)

    def add(self, wanted: Mapping[str, Tensor], got: Mapping[str, Tensor], label: Tensor) -> None:
        """Compare the answers to a batch."""
        for name, answer in wanted.items():
            check_finite(answer)
            check_finite(got[name])
            gap, top = float((got[name] - answer).abs().max()), float(answer.abs().max())
            self.difference[name] = max(gap, self.difference.get(name, 0.0))
            self.largest[name] = max(top, self.largest.get(name, 0.0))
            equal = int((got[name].argmax(1) == answer.argmax(1)).sum())
            self.same[name] = self.same.get(name, 0) + equal
        self.images += len(label)
        if (known := label != UNKNOWN).any():
            for tally, answers in ((self.student, wanted), (self.export, got)):
                tally.add({name: answer[known] for name, answer in answers.items()}, label[known])

    def check_equal(self) -> None:
        """Raise CheckpointError if an answer differs by more than float32 explains."""
        for name, gap in self.difference.items():
            allowed = LIMIT * max(1.0, self.largest[name])
            if not gap <= allowed:
                raise CheckpointError(
                    f"the export's {name} differs from the student's by {gap:.2g} on {self.where}, allowed is {allowed:.2g}",
                    fix="Nothing is written; this is a fault of an exporter: try another form, or other versions of torch",
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON values; accuracy in percent, None without class labels."""
        named: dict[str, Any] = {
            name: {
                "max_difference": gap,
                "largest_answer": self.largest[name],
                "same_class_pct": 100 * self.same[name] / self.images,
            }
            for name, gap in self.difference.items()
        }
        found: dict[str, Any] = {"images_from": self.where, "images": self.images, "answers": named, "accuracy": None}
        if self.student.images:
            scores = {"student": self.student.scores(), "export": self.export.scores()}
            found["accuracy"] = {"images": self.student.images, **scores}
        return found


def compare(graph: Answers, exported: Answering, where: str, batches: Iterable[Seen]) -> Comparison:
    """Compare the answers of an export with those of its student, in batches and for one image alone."""
    found = Comparison(where, Tally(graph.names), Tally(graph.names))
    for number, (pixels, label) in enumerate(batches):
        images = graph.input_of(pixels)
        if number == 0:  # another size of batch
            found.add(_student(graph, pixels[:1]), exported(images[:1]), torch.full((1,), UNKNOWN))
            found.images, found.same = 0, {}
        found.add(_student(graph, pixels), exported(images), label)
    return found


def _student(graph: Answers, pixels: Tensor) -> dict[str, Tensor]:
    """Return the answers as `evaluate` computes them, without the graph: the check covers what the graph does itself."""
    with torch.inference_mode():
        answers = EveryAnswer(graph.linear)(graph.student, normalise(pixels, graph.student))
    return {name: answers[name] for name in graph.names}
