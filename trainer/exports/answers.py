"""The graph that is exported: images in, the chosen answers of a student out."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import CheckpointError, UsageError
from trainer.evaluate import ANSWERS, fused_logits
from trainer.evidence.linear import Linear, check_two_tokens, concatenated
from trainer.evidence.scores import LINEAR
from trainer.exports.config import Preprocess
from trainer.student import Student, normalise

INPUT = "images"  # name of the input of every graph
BATCH = "batch"  # name of its first dimension


def chosen_answers(asked: Sequence[str], student: Student) -> tuple[str, ...]:
    """Return the names of the answers to export: those asked for, or else the one that stands for the student.

    Raises:
        UsageError: the student has no such answer.
    """
    if not asked:
        return ("mean_logits",) if student.has_distillation_head else ANSWERS[:1]
    known = (*ANSWERS, LINEAR)
    if unknown := next((name for name in asked if name not in known), None):
        raise UsageError(f"--answer must be one of {', '.join(known)}, got {unknown!r}")
    if LINEAR in asked:
        _check_linear(student)
    if not student.has_distillation_head and (lacking := next((name for name in asked if name != ANSWERS[0]), None)):
        name = student.model.pretrained_cfg.get("architecture")
        raise UsageError(f"--answer {lacking} needs two heads, and {name} has one", fix=f"Pass --answer {ANSWERS[0]}")
    return tuple(asked)


def _check_linear(student: Student) -> None:
    try:
        check_two_tokens(student)
    except UsageError as error:
        raise UsageError(error.what, fix=f"Leave out --answer {LINEAR}") from error


class Answers(nn.Module):
    """A student in evaluation mode as a function from images to a tuple of answers.

    Attributes:
        names: names of the answers, in the order of the tuple.
        preprocess: `none`: the images are normalised, float32 [B, 3, H, W]; `nhwc` and `nchw`: pixels, uint8 [B, H, W, 3] and
            [B, 3, H, W], which are normalised here.
        linear: linear classifier of both tokens, or None.
    """

    mean: Tensor
    std: Tensor
    linear_weight: Tensor
    linear_bias: Tensor

    def __init__(
        self, student: Student, names: Sequence[str], *, preprocess: Preprocess = "none", linear: Linear | None = None
    ) -> None:
        super().__init__()
        self.student = student.eval().requires_grad_(False)
        self.names, self.preprocess = tuple(names), preprocess
        for name, values in (("mean", student.mean), ("std", student.std)):
            self.register_buffer(name, torch.tensor(values)[None, :, None, None] * 255)
        self.linear = linear
        if linear is not None:
            self.register_buffer("linear_weight", linear.weight)
            self.register_buffer("linear_bias", linear.bias)
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the answers, float32 [B, C] each."""
        if self.preprocess == "nhwc":
            images = images.permute(0, 3, 1, 2)
        if self.preprocess != "none":
            images = (images.float() - self.mean) / self.std
        answers = self._all(images)
        return tuple(answers[name] for name in self.names)

    def _all(self, images: Tensor) -> dict[str, Tensor]:
        if LINEAR not in self.names:
            return fused_logits(self.student(images))
        tokens = self.student.tokens(images)
        fitted = nn.functional.linear(concatenated(*tokens), self.linear_weight, self.linear_bias)
        return fused_logits(self.student.read(*tokens)) | {LINEAR: fitted}

    def input_of(self, pixels: Tensor) -> Tensor:
        """Return the input of the graph for pixels, float32 [B, 3, H, W] with whole numbers in 0..255."""
        if self.preprocess == "none":
            return normalise(pixels, self.student)
        whole = pixels.to(torch.uint8)
        return whole.permute(0, 2, 3, 1).contiguous() if self.preprocess == "nhwc" else whole

    @property
    def example(self) -> Tensor:
        """Return two images as the graph takes them: with one, the exporters would fix the size of the batch."""
        return self.input_of(torch.zeros(2, 3, self.student.img_size, self.student.img_size))

    def described(self) -> dict[str, Any]:
        """Return names, dtypes and shapes of input and outputs as JSON values; `batch` is any number of images."""
        example, classes = self.example, self.student.num_classes
        shape = [BATCH, *example.shape[1:]]
        return {
            "input": {"name": INPUT, "dtype": str(example.dtype).removeprefix("torch."), "shape": shape},
            "outputs": [{"name": name, "dtype": "float32", "shape": [BATCH, classes]} for name in self.names],
        }


def check_weights(student: Student, shown: str) -> None:
    """Raise CheckpointError if a weight is NaN or infinite.

    Args:
        student: student to look at.
        shown: location of its weights, for the error.
    """
    for name, tensor in student.model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{shown}: {name} holds NaN or infinity: its training diverged", fix="Export another checkpoint"
            )
