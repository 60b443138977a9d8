"""Batches of views between a loader process and a device.

A loader process renders the views itself, or it only decodes, and hands over pixels and the records of the views for a GPU.
"""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import UsageError
from pipeline.pixels.batched import missing_for_triton, render_batch
from pipeline.pixels.packed import RECORD, packed
from pipeline.pixels.render import Pixels, render, render_into
from pipeline.views.recipe import PRESETS, Recipe
from pipeline.views.view import View, draw_view

log = logging.getLogger("deit_cli.render")

# Memory for each view of a batch, in sizes of a rendered view. A crop of a photograph of ImageNet has twice the pixels of a view on
# average, and views of one image share them. What does not fit is rendered before it is handed over.
VIEWS_OF_MEMORY = 2.25
_CHECKED = 32  # views that are compared before a GPU renders


def bytes_for(num_views: int, img_size: int) -> int:
    """Return how much memory a batch of unrendered views may take, a multiple of 64 bytes."""
    size = num_views * (RECORD.itemsize + int(VIEWS_OF_MEMORY * 3 * img_size**2))
    return -(-size // 64) * 64


class RenderedViews:
    """Views of a batch that are rendered into their places."""

    def __init__(self, out: Tensor) -> None:
        """Begin a batch in `out`, uint8 [B, img_size, img_size, 3]."""
        self._out, self._places = out, out.numpy()

    @property
    def images(self) -> Tensor:
        """The views, uint8 [B, img_size, img_size, 3]."""
        return self._out

    def add(self, at: Sequence[int], image: Pixels, views: Sequence[View]) -> None:
        """Render views of an image, uint8 [H, W, 3]; the position of each in the batch is in `at`."""
        render_into([self._places[position] for position in at], image, views)

    def add_rendered(self, at: int, pixels: Pixels) -> None:
        """Add a view that is already rendered."""
        self._places[at] = pixels


class UnrenderedViews:
    """Views of a batch that a device will render: their records, then pixels, in one piece of memory."""

    def __init__(self, memory: Tensor, num_views: int, img_size: int) -> None:
        """Begin a batch in `memory`, uint8 [bytes_for(num_views, img_size) or more]."""
        self._out, self._memory, self._size = memory, memory.numpy(), img_size
        self._used, self._left = num_views * RECORD.itemsize, num_views
        self._records = self._memory[: self._used].reshape(num_views, RECORD.itemsize)

    @property
    def images(self) -> Tensor:
        """The used memory, uint8 [N]."""
        return self._out[: self._used]

    def add(self, at: Sequence[int], image: Pixels, views: Sequence[View]) -> None:
        """Add the views of an image, uint8 [H, W, 3]; the position of each in the batch is in `at`."""
        top, left = (min(view.crop[axis] for view in views) for axis in (0, 1))
        bottom, right = (max(view.crop[axis] + view.crop[axis + 2] for view in views) for axis in (0, 1))
        height, width, others = bottom - top, right - left, self._left - len(views)
        if self._used + 3 * (height * width + others * self._size**2) > len(self._memory):  # others need at most this
            for position, view in zip(at, views, strict=True):
                self.add_rendered(position, render(image, view))
            return
        start = self._take(image[top:bottom, left:right])
        for position, view in zip(at, views, strict=True):
            self._note(position, packed(view, height=height, width=width, offset=start, origin=(top, left)))

    def add_rendered(self, at: int, pixels: Pixels) -> None:
        """Add a view that is already rendered: what remains to be done with it changes nothing."""
        size = self._size
        view = View(crop=(0, 0, size, size), resize=(size, size), window=(0, 0), img_size=size)
        self._note(at, packed(view, height=size, width=size, offset=self._take(pixels)))

    def _note(self, at: int, record: bytes) -> None:
        self._records[at] = np.frombuffer(record, np.uint8)
        self._left -= 1

    def _take(self, pixels: Pixels) -> int:
        """Copy pixels into the memory, and return where they begin, counted from the end of the records."""
        start, self._used = self._used, self._used + pixels.size
        self._memory[start : self._used].reshape(pixels.shape)[:] = pixels
        return start - self._records.size


def begin_batch(out: Tensor, num_views: int, img_size: int) -> RenderedViews | UnrenderedViews:
    """Begin a batch of views in the memory of its slot: uint8 [at least B, H, W, 3] to render them here, or [N] for a device."""
    return RenderedViews(out[:num_views]) if out.ndim == 4 else UnrenderedViews(out, num_views, img_size)


def slot_shape(num_views: int, img_size: int, *, unrendered: bool) -> tuple[int, ...]:
    """Return the shape of the memory for a batch of at most `num_views` views."""
    return (bytes_for(num_views, img_size),) if unrendered else (num_views, img_size, img_size, 3)


def rendered(images: Tensor, num_views: int, device: torch.device) -> Tensor:
    """Return the rendered views of a batch on a device, uint8 [B, H, W, 3].

    Args:
        images: rendered views, uint8 [B, H, W, 3], or those of `UnrenderedViews`, uint8 [N], on the host.
        num_views: B.
        device: a copy from page-locked memory runs on the current stream, and so does the rendering.
    """
    if images.ndim == 4:
        return images.to(device, non_blocking=device.type == "cuda")  # elsewhere nobody waits before the source changes
    start = num_views * RECORD.itemsize
    records = images[:start].numpy().view(RECORD)
    return render_batch(images[start:].to(device, non_blocking=True), records)


def renders_on_gpu(asked: str, recipe: Recipe, device: torch.device) -> bool:
    """Return whether a GPU will render the views.

    Args:
        asked: `cpu`, `gpu`, or `auto` (the GPU, if it is fast there, and this version renders the same pixels).
        recipe: the augmentation.
        device: device of the network.

    Raises:
        UsageError: `gpu` was asked for and is not possible.
    """
    if asked == "cpu":
        return False
    problem = _obstacle(recipe, device) or _fault(device)
    if asked == "gpu":
        if problem:
            raise _refusal(problem)
        if slow := missing_for_triton():
            log.warning("views are rendered on %s in plain torch, which is slow: %s", device, slow)
        return True
    problem = problem or missing_for_triton()
    if problem:
        log.info("views are rendered on the CPU: %s", problem)
    return problem is None


def refuse_impossible(asked: str, recipe: Recipe, device: torch.device) -> None:
    """Raise UsageError if `gpu` was asked for where it cannot be; takes no time, and compares no views."""
    if asked == "gpu" and (problem := _obstacle(recipe, device)):
        raise _refusal(problem)


def _refusal(problem: str) -> UsageError:
    return UsageError(f"--render gpu: {problem}", fix="Pass --render cpu")


def _obstacle(recipe: Recipe, device: torch.device) -> str | None:
    """Return why no device of this kind can render views of this recipe, or None."""
    if device.type != "cuda":
        return f"it needs a CUDA device, this run uses {device.type}"
    if recipe.renderer == 1:
        return "views of renderer 1 are defined by libraries of the CPU; label again with renderer 2"
    return None


def _fault(device: torch.device) -> str | None:
    """Return what is wrong with the views that a device renders, or None."""
    try:
        differing = _differing_views(device)
    except Exception as error:  # a compiler or a driver may fail in any way
        return (
            f"rendering on {device} failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
    return f"{differing} of {_CHECKED} views had other pixels on {device} than on the CPU" if differing else None


def _differing_views(device: torch.device) -> int:
    """Render views with all kinds of operations on the CPU and on a device, and return how many differ."""
    recipe, size = PRESETS["deit"].with_fields(img_size=64, aa="rand-m9-mstd0.5-inc1-n4"), 64
    y, x, channel = np.ogrid[:90, :120, :3]
    image = np.ascontiguousarray((x * (channel + 2) + y * 3 + x * y // 16 + 40 * channel) % 256, np.uint8)
    drawn = [draw_view(recipe, "check", view, height=90, width=120) for view in range(_CHECKED)]
    here = np.empty((_CHECKED, size, size, 3), np.uint8)
    render_into(list(here), image, drawn)
    batch = UnrenderedViews(torch.empty(bytes_for(_CHECKED, size), dtype=torch.uint8), _CHECKED, size)
    batch.add(range(_CHECKED), image, drawn)
    there = rendered(batch.images, _CHECKED, device).cpu().numpy()
    return int((there != here).any((1, 2, 3)).sum())
