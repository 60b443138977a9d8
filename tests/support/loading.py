"""Work for loader processes, in a module of its own: a process that needs it imports nothing else of the tests."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import factorial

import torch
from torch import Tensor

from pipeline.errors import BadImageError

Note = Callable[[str], None]


def faculty(number: int, note: Note) -> int:
    """The product up to a number; an error of ours for a negative one, Python's own for what is no number."""
    note(f"image {number}")
    if number < 0:
        raise BadImageError("img", f"of {number}")
    return factorial(number)


def faulty(kind: type[Exception], number: int, note: Note) -> int:
    """The number, or for 3 a defect of that class."""
    if number == 3:
        raise kind("a defect")
    return number


def sleepy(seconds: float, note: Note) -> None:
    time.sleep(seconds)


def process(_: int, note: Note) -> int:
    return os.getpid()


@dataclass(frozen=True)
class Filled:
    """A batch whose pixels all have its number, and one small tensor twice."""

    number: int
    images: Tensor
    one: Tensor
    same: Tensor


class Fill:
    """Fills one image or more with a number; a negative one cannot be rendered."""

    def __call__(self, number: int, out: Tensor, note: Note) -> Filled:
        if number < 0:
            raise BadImageError("img", f"of {number}")
        size = 1 + number % len(out)
        small = torch.tensor([number, number + 1])
        return Filled(number, out[:size].fill_(number), small, small)
