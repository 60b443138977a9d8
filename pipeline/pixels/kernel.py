"""The compiled renderer of views: `_kernel.c`, called through ctypes. It uses no other library, and does not hold the interpreter's lock."""

import ctypes
import importlib.util
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.pixels.packed import RECORD, packed
from pipeline.views.noise import noise_levels
from pipeline.views.view import View

_ALIGNMENT = 64
_memory = threading.local()


def is_compiled() -> bool:
    """Return whether the kernel was compiled when this package was installed."""
    return _library() is not None


@cache
def best_level() -> int:
    """Return the number of the best instruction set of this processor: 0 the plain one, 1 AVX2, 2 AVX-512."""
    return _library().best_level()


def render_views(
    image: NDArray[np.uint8], views: Sequence[View], out: Sequence[NDArray[np.uint8]], *, level: int | None = None
) -> None:
    """Render views of one image.

    Args:
        image: uint8 [H, W, 3], contiguous: the decoded image, or the part of it that `View.crop` refers to.
        views: V views of renderer 2; their crops are inside of the image.
        out: for each view, uint8 [img_size, img_size, 3], contiguous; its pixels are written here.
        level: instruction set, 0..best_level(); None: the best one. All of them give the same pixels.
    """
    height, width = image.shape[:2]
    for view, pixels in zip(views, out, strict=True):
        top, left, tall, wide = view.crop
        if min(top, left) < 0 or min(tall, wide) < 1 or top + tall > height or left + wide > width:
            raise ValueError(f"the crop {view.crop} is not inside of an image of {height} x {width}")
        if (
            pixels.shape != (view.img_size, view.img_size, 3)
            or pixels.dtype != np.uint8
            or not pixels.flags.c_contiguous
        ):
            raise ValueError(f"a view of {view.img_size} pixels does not fit into {pixels.dtype} {list(pixels.shape)}")
    library, count = _library(), len(views)
    records = b"".join([packed(view, height=height, width=width) for view in views])
    start = _address(image)
    library.render(
        best_level() if level is None else level,
        start,
        start + image.nbytes,
        records,
        count,
        _address(noise_levels()),
        _scratch(library.scratch_bytes(records, count)),
        (ctypes.c_void_p * count)(*map(_address, out)),
    )


def _address(array: NDArray[np.uint8]) -> int:
    return array.__array_interface__["data"][0]


def _scratch(size: int) -> int:
    """Return the address of scratch memory of this thread, which is kept: new pages would cost as much as the rendering."""
    if getattr(_memory, "size", 0) < size:
        _memory.held = np.empty(size + _ALIGNMENT, np.uint8)
        _memory.size = size
    start = _address(_memory.held)
    return start + -start % _ALIGNMENT


@cache
def _library() -> Any:
    """Return the compiled kernel, or None where it was not compiled."""
    found = importlib.util.find_spec("pipeline.pixels._kernel")
    if found is None or found.origin is None:
        return None
    library = ctypes.CDLL(found.origin)
    library.best_level.restype, library.best_level.argtypes = ctypes.c_int32, []
    library.scratch_bytes.restype, library.scratch_bytes.argtypes = ctypes.c_int64, [ctypes.c_char_p, ctypes.c_int32]
    address = ctypes.c_void_p
    library.render.restype = None
    library.render.argtypes = [
        *(ctypes.c_int32, address, address, ctypes.c_char_p, ctypes.c_int32, address, address, address)
    ]
    return library


assert RECORD.itemsize == 1056  # struct record
