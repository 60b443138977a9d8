"""The class token and the distillation token of a student, on their way from the first block to the heads."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.machine.ranks import double_on
from trainer.parallel import Running
from trainer.student import Heads, Student, normalise

PROBED_IMAGES = 64  # of a batch; the probe of a training run is to cost less than an update


def why_no_tokens(student: Student) -> str | None:
    """Return why a student has no pair of tokens to compare, or None if it has one."""
    if not student.has_distillation_head:
        return "one head: there is no second token"
    if student.model.global_pool != "token":  # LeViT, EfficientFormer, SwiftFormer
        return "two heads that read the same pooled features: there is no second token"
    return None


def blocks_of(student: Student) -> list[Any]:
    """Return the transformer blocks of a student with two tokens, in order: those of DeiT, or of all stages of PiT."""
    stages = getattr(student.model, "transformers", [student.model])
    return [block for stage in stages for block in stage.blocks]


def learned_tokens(student: Student) -> Tensor:
    """Return the parameters of class token and distillation token, without position embeddings, [2, D]."""
    model = student.model
    both = torch.cat([model.cls_token, model.dist_token], dim=1) if hasattr(model, "dist_token") else model.cls_token
    return both[0].detach()


def run_with_tokens(student: Student, images: Tensor, running: Running) -> tuple[Heads, list[Tensor]]:
    """Run a student in evaluation mode, so without stochastic depth, and return its answers and both of its tokens.

    Args:
        student: student on the device of `running`; its mode and its random numbers are the same afterwards.
        images: float32 [B, 3, H, W] of 0..255, on the same device.
        running: dtype of the forward pass.

    Returns:
        logits of both heads; the tokens [B, 2, D] as they enter the first block, after each block, and after the final
        norm, as the heads read them. The list is empty for a student without a pair of tokens.
    """
    was_training = student.training
    student.eval()
    try:
        enabled = running.dtype != torch.float32
        with (
            torch.inference_mode(),
            torch.autocast(running.device.type, dtype=running.dtype, enabled=enabled),
            contextlib.nullcontext([]) if why_no_tokens(student) else _tokens_kept(student) as tokens,
        ):
            return student(normalise(images, student)), tokens
    finally:
        student.train(was_training)


@contextlib.contextmanager
def _tokens_kept(student: Student) -> Iterator[list[Tensor]]:
    """Yield a list to which a forward pass inside the block adds both tokens of each place, in order."""
    found: list[Tensor] = []

    def enters(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0][:, :2])

    def leaves(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        found.append(output[:, :2])

    blocks = blocks_of(student)
    handles = [blocks[0].register_forward_pre_hook(enters)]
    handles += [module.register_forward_hook(leaves) for module in (*blocks, student.model.norm)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def token_cosines(tokens: Sequence[Tensor]) -> Tensor:
    """Return the cosine of class token and distillation token at each place, float64 [B, places], on the CPU.

    Args:
        tokens: [B, 2, D] for each place, as `run_with_tokens` returns them.
    """
    doubles = [t.to(double_on(t.device)).double() for t in tokens]
    return torch.stack([F.cosine_similarity(t[:, 0], t[:, 1], dim=-1) for t in doubles], dim=1).cpu()


def probe_tokens(student: Student, images: Tensor, running: Running) -> dict[str, Any]:
    """Return the cosine of both tokens at the input, after each block and at the output, means over images.

    Args:
        student: student with two tokens; its weights, buffers and random numbers do not change.
        images: float32 [B, 3, H, W] of 0..255.
        running: device and dtype of the forward pass.
    """
    _, tokens = run_with_tokens(student, images, running)
    first, *blocks, last = token_cosines(tokens).mean(dim=0).tolist()
    return {"images": len(images), "input": first, "blocks": blocks, "output": last}
