"""The two tokens of a student over many images: how similar they are, and what they look at.

The figures to compare with are those of Touvron et al. 2021, section 4: docs/analysis.md.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UsageError
from pipeline.machine.ranks import double_on
from pipeline.storage.atomic import replace_file
from trainer.parallel import Running
from trainer.student import Student
from trainer.tokens import blocks_of, run_with_tokens, token_cosines

_VANISHED = 1e-12  # a variance that is only rounding, as a share of the mean square


class TokenStatistics:
    """Cosine and linear CKA of both tokens, from the batches of one pass."""

    def __init__(self) -> None:
        self._cosines: list[Tensor] = []
        self._cka = LinearCKA()

    def add(self, tokens: Sequence[Tensor]) -> None:
        """Add the tokens of a batch, [B, 2, D] for each place, as `run_with_tokens` returns them."""
        self._cosines.append(token_cosines(tokens))
        self._cka.add(tokens[-1][:, 0], tokens[-1][:, 1])

    def summary(self) -> dict[str, Any]:
        """Return the number of images, mean and standard deviation of the cosine at each place, and the CKA of the outputs."""
        cosines = torch.cat(self._cosines)
        means, spread = cosines.mean(dim=0).tolist(), cosines.std(dim=0, correction=0).tolist()
        return {
            "images": len(cosines),
            "cosine": {"input": means[0], "blocks": means[1:-1], "output": means[-1]},
            "std": {"blocks": spread[1:-1], "output": spread[-1]},
            "cka": self._cka.value(),
        }


class LinearCKA:
    """Linear CKA of two sets of features (Kornblith et al. 2019, section 3), from sums over images in float64.

    With centred features X and Y, [N, D] each, it is |Y'X|² / (|X'X| |Y'Y|) in Frobenius norms: 1 if one is the other,
    rotated and scaled. The sums take the memory of one matrix [2D, 2D], whatever the number of images.
    """

    def __init__(self) -> None:
        self._count = 0
        self._total: Tensor | float = 0.0  # [2D]
        self._products: Tensor | float = 0.0  # [2D, 2D]

    def add(self, first: Tensor, second: Tensor) -> None:
        """Add the features of a batch of images, float [B, D] each."""
        both = torch.cat([first, second], dim=1).to(double_on(first.device)).double()
        self._count += len(both)
        self._total = self._total + both.sum(dim=0)
        self._products = self._products + both.T @ both

    def value(self) -> float | None:
        """Return the CKA, or None if one of the features is the same for all images."""
        products, total = torch.as_tensor(self._products), torch.as_tensor(self._total)
        centred, width = products - torch.outer(total, total) / self._count, len(products) // 2
        first, second = slice(0, width), slice(width, None)

        def norm(matrix: Tensor) -> float:
            return torch.linalg.norm(matrix).item()

        if not all(norm(centred[of, of]) > _VANISHED * norm(products[of, of]) for of in (first, second)):
            return None
        return norm(centred[first, second]) ** 2 / (norm(centred[first, first]) * norm(centred[second, second]))


def token_attention(student: Student, images: Tensor, running: Running, block: int) -> Tensor:
    """Return how much class token and distillation token look at each token, float32 [B, 2, N]; each row sums to 1.

    Args:
        student: student with two tokens.
        images: float32 [B, 3, H, W] of 0..255.
        running: device and dtype of the forward pass.
        block: number of the block, from 0.

    Returns:
        the attention of the block, as the mean over its heads, to all N tokens: both tokens first, then the patches by row.
    """
    attention = blocks_of(student)[block].attn
    kept: list[Tensor] = []
    handle = attention.attn_drop.register_forward_hook(
        lambda _, __, rows: kept.append(rows[:, :, :2].float().mean(dim=1).cpu())
    )
    fused, attention.fused_attn = attention.fused_attn, False  # the fused operation does not show its rows
    try:
        run_with_tokens(student, images, running)
    finally:
        handle.remove()
        attention.fused_attn = fused
    return torch.cat(kept)


def patch_maps(rows: Tensor) -> Tensor:
    """Return attention rows [B, 2, N] as maps over the patches, [B, 2, S, S]; without the part that goes to both tokens.

    Raises:
        UsageError: the patches are not a square, so their places are unknown.
    """
    patches = rows[:, :, 2:]
    side = math.isqrt(patches.shape[2])
    if side**2 != patches.shape[2]:
        raise UsageError(f"attention is drawn for square grids of patches, this block has {patches.shape[2]} patches")
    return patches.reshape(*patches.shape[:2], side, side)


def draw_attention(path: Path, keys: Sequence[str], images: Tensor, maps: Tensor, title: str) -> None:
    """Draw a line for each image: the image, and where class token and distillation token look.

    Args:
        path: PNG file to write.
        keys: key of each image.
        images: float32 [B, 3, H, W] of 0..255.
        maps: float32 [B, 2, S, S], attention to each patch.
        title: text above the picture.
    """
    import warnings

    from matplotlib.figure import Figure

    pixels = images.round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    figure = Figure(figsize=(6.6, 2.3 * len(keys) + 0.5), layout="constrained")
    for line, key, picture, pair in zip(figure.subplots(len(keys), 3, squeeze=False), keys, pixels, maps, strict=True):
        line[0].imshow(picture, interpolation="nearest")
        line[0].set_title(key[-24:], fontsize=7, parse_math=False)
        for axis, name, each in zip(line[1:], ("class token", "distillation token"), pair, strict=True):
            axis.imshow(each.numpy(), vmin=0, vmax=pair.max().item(), interpolation="nearest")  # same scale for both
            axis.set_title(f"{name}, {each.sum().item():.0%} on patches", fontsize=7)
        for axis in line:
            axis.axis("off")
    figure.suptitle(title, fontsize=8, x=0.01, ha="left", parse_math=False)
    with warnings.catch_warnings():  # keys in a script that the font lacks are shown as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        replace_file(path, lambda file: figure.savefig(file, format="png", dpi=110))
