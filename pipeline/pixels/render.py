"""The pixels of views, as docs/views-v2.md defines them: decode, draw, render.

The compiled kernel renders them; where it was not compiled, torch does, slower. Both give the same pixels. Views of renderer 1 are
those of old label sets.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UsageError
from pipeline.images.decode import decode, decode_for, image_size
from pipeline.pixels import kernel
from pipeline.views.recipe import Recipe
from pipeline.views.view import View, draw_view

log = logging.getLogger("deit_cli.render")

Pixels = NDArray[np.uint8]  # uint8 [H, W, 3], RGB
# More crops of an image need nearly all of it: those of three views three quarters, those of four four fifths.
MOST_IN_A_PART = 3
Take = Callable[
    [Pixels, Sequence[View]], None
]  # what becomes of a decoded image (or a part of it) and the views drawn for it


def render(image: Pixels, view: View) -> Pixels:
    """Return the pixels of a view.

    Args:
        image: uint8 [H, W, 3], the decoded image that the view was drawn for.
        view: parameters of the view.

    Returns:
        uint8 [img_size, img_size, 3], contiguous (channels last, so a batch is a channels-last tensor without a copy).
    """
    out = np.empty((view.img_size, view.img_size, 3), np.uint8)
    render_into([out], image, [view])
    return out


def render_view(image: bytes | Pixels, recipe: Recipe, key: str, view: int) -> Pixels:
    """Draw and render one view.

    Args:
        image: the encoded file, which is decoded completely, or the decoded image, uint8 [H, W, 3].
        recipe: the augmentation.
        key: sample key.
        view: view number, 0 or more.

    Returns:
        uint8 [img_size, img_size, 3].

    Raises:
        BadImageError: it cannot be decoded.
    """
    pixels = decode(image, key=key) if isinstance(image, bytes) else image
    (rendered,) = render_views(pixels, recipe, key, range(view, view + 1))
    return rendered


def render_views(image: Pixels, recipe: Recipe, key: str, views: range) -> NDArray[np.uint8]:
    """Draw and render several views of one decoded image, uint8 [V, img_size, img_size, 3]."""
    out = np.empty((len(views), recipe.img_size, recipe.img_size, 3), np.uint8)
    draw_decoded(image, recipe, key, views, partial(render_into, list(out)))
    return out


def draw_decoded(image: Pixels, recipe: Recipe, key: str, views: range, take: Take) -> None:
    """Draw views of a decoded image, uint8 [H, W, 3], and let `take` make something of them."""
    height, width = image.shape[:2]
    take(image, [draw_view(recipe, key, view, height=height, width=width) for view in views])


def draw_encoded(image: bytes, recipe: Recipe, key: str, views: range, take: Take) -> None:
    """Draw views of an image that is known to decode, and let `take` make something of them.

    Args:
        image: the encoded file; only the part that the crops need may be decoded.
        recipe: the augmentation.
        key: sample key.
        views: view numbers.
        take: called once with the decoded part, uint8 [H, W, 3], and the views, whose crops are relative to it.

    Raises:
        BadImageError: it cannot be decoded.
    """
    if len(views) > MOST_IN_A_PART:
        draw_decoded(decode(image, key=key), recipe, key, views, take)
        return
    height, width = image_size(image, key=key)
    drawn = [draw_view(recipe, key, view, height=height, width=width) for view in views]
    pixels, top, left = decode_for(image, [view.crop for view in drawn], key=key)
    if top or left:
        drawn = [replace(view, crop=(view.crop[0] - top, view.crop[1] - left, *view.crop[2:])) for view in drawn]
    take(pixels, drawn)


def render_into(out: Sequence[Pixels], image: Pixels, views: Sequence[View]) -> None:
    """Render views that were drawn for an image.

    Args:
        out: for each view, uint8 [img_size, img_size, 3], contiguous; its pixels are written here.
        image: uint8 [H, W, 3].
        views: parameters of the views, of one renderer.
    """
    if views[0].renderer == 1:
        renderer1 = _renderer_1()
        for view, pixels in zip(views, out, strict=True):
            pixels[:] = renderer1.render(image, view)
    elif kernel.is_compiled():
        kernel.render_views(np.ascontiguousarray(image), views, out)
    else:
        from pipeline.pixels import batched  # it needs torch

        for pixels, rendered in zip(out, batched.render_views(image, views), strict=True):
            pixels[:] = rendered


def check_renderer(recipe: Recipe) -> None:
    """Raise UsageError if a package that the recipe's renderer needs is not installed."""
    if recipe.renderer == 1:
        _renderer_1()


def _renderer_1() -> ModuleType:
    try:
        from pipeline.pixels import renderer1  # only old label sets need it, and OpenCV
    except ImportError as error:
        what = f"views of renderer 1 need a package that is not installed ({error})"
        raise UsageError(what, fix='Run pip install "deit-cli[renderer1]"') from error
    return renderer1


def warn_without_kernel() -> None:
    """Warn if the compiled kernel cannot be used. The main process of a run calls this once, because each of its loaders would."""
    if trouble := kernel.trouble():
        log.warning(
            "%s: torch renders the views on the CPU, about thirty times slower; the pixels are the same. %s", *trouble
        )
