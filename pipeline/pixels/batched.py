"""Views of renderer 2 in batches on a device: one call renders many views of many decoded images, with Triton or in plain torch."""

import os
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.pixels import torch_kernels
from pipeline.pixels.packed import SHARPNESS, TURN, packed
from pipeline.pixels.packed import records as unpacked
from pipeline.views.recipe import MAX_LAYERS
from pipeline.views.view import View

_KINDS = (*range(SHARPNESS + 1), TURN)
Kernels = Literal["triton", "torch"]


def render_batch(
    pixels: Tensor, records: NDArray, out: Tensor | None = None, *, kernels: Kernels | None = None
) -> Tensor:
    """Return the pixels of views; the same on every device, as docs/views-v2.md defines them.

    Args:
        pixels: uint8 [N], decoded images or regions of them, one after the other; each is RGB in rows, 3 bytes a pixel.
        records: RECORD [B] (see `pipeline.pixels.packed`), of one `size` S. Image i begins at `offset`, and its crop is relative to it.
        out: uint8 [B, S, S, 3], contiguous, on the device of `pixels`; a new tensor if it is None.
        kernels: what renders. The default is Triton on a CUDA device where it is installed and finds a C compiler, otherwise plain torch.

    Returns:
        uint8 [B, S, S, 3] on the device of `pixels`; this is `out` if it was given. An empty batch has no size: [0, 0, 0, 3].

    Raises:
        ValueError: a record does not fit the pixels, or `out` does not fit the records.
    """
    _check(records, pixels)
    if not len(records):
        return pixels.new_empty(0, 0, 0, 3) if out is None else out
    size = int(records["size"][0])
    shape = (len(records), size, size, 3)
    if out is None:
        out = pixels.new_empty(shape)
    _check_out(out, shape, pixels.device)
    _module(kernels or _fastest(pixels.device)).render_batch(pixels, records, out)
    return out


def render_views(image: NDArray[np.uint8], views: Sequence[View]) -> NDArray[np.uint8]:
    """Render views of one decoded image, uint8 [H, W, 3], on the CPU; return uint8 [V, S, S, 3]."""
    height, width = image.shape[:2]
    pixels = torch.from_numpy(np.require(image, requirements=["C", "W"]).reshape(-1))
    return render_batch(pixels, unpacked(packed(view, height=height, width=width) for view in views)).numpy()


def missing_for_triton() -> str | None:
    """Return what Triton lacks on this machine, or None: it builds its launcher with a C compiler, which not every machine has."""
    if not find_spec("triton"):
        return "Triton is not installed"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return None if compiler else "Triton needs a C compiler (gcc, clang, or the one that CC names)"


def _fastest(device: torch.device) -> Kernels:
    """Return what renders on a device."""
    return "triton" if device.type == "cuda" and missing_for_triton() is None else "torch"


def _module(kernels: Kernels) -> ModuleType:
    if kernels == "torch":
        return torch_kernels
    from pipeline.pixels import triton_kernels  # it is not installed everywhere

    return triton_kernels


def _check(records: NDArray, pixels: Tensor) -> None:
    """Raise ValueError unless every record stays inside the pixels and its view: a GPU would read other memory."""
    if pixels.dtype != torch.uint8 or pixels.ndim != 1 or not pixels.is_contiguous():
        raise ValueError(f"pixels must be contiguous uint8 [N], got {pixels.dtype} {list(pixels.shape)}")
    image, size = records["image"].astype(np.int64), records["size"][:, None]
    rules = {
        "all views must have the same size": records["size"] == records["size"][:1],
        "the image must lie inside the pixels": (records["offset"] >= 0)
        & (image[:, 0] * image[:, 1] <= (len(pixels) - records["offset"]) // 3),
        "the crop must lie inside the image": _inside(records["crop"][:, :2], records["crop"][:, 2:], image),
        "the window must lie inside the resized crop": _inside(records["window"], size, records["resize"]),
        "the erased box must lie inside the view": _inside(
            records["erase"][:, :2], records["erase"][:, 2:], size, least=0
        ),
        f"num_ops must be in 0..{MAX_LAYERS}": (records["num_ops"] >= 0) & (records["num_ops"] <= MAX_LAYERS),
        f"operations must be of the kinds {_KINDS}": np.isin(records["ops"]["kind"], _KINDS).all(1),
    }
    for rule, holds in rules.items():
        if not holds.all():
            first = int(np.argmin(holds))
            names = ("offset", "image", "crop", "resize", "window", "size", "erase", "num_ops")
            fields = {name: records[first][name].tolist() for name in names}
            raise ValueError(f"{rule}; record {first} has {fields}, and the pixels are {len(pixels)} bytes")


def _check_out(out: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if out.dtype != torch.uint8 or out.shape != shape or out.device != device or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous uint8 {list(shape)} on {device}, got {out.dtype} {list(out.shape)} on {out.device}"
        )


def _inside(start: NDArray, length: NDArray, whole: NDArray, *, least: int = 1) -> NDArray[np.bool_]:
    """Return which boxes lie inside their wholes, bool [B]; all are int [B, 2] (vertical, horizontal) or [B, 1]."""
    return np.all((start >= 0) & (length >= least) & (start.astype(np.int64) + length <= whole), axis=1)
