"""The compiled renderer of views: `_kernel.c`, called through ctypes. It uses no other library, and does not hold the interpreter's lock."""

import ctypes
import importlib.util
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.images.samples import Box
from pipeline.pixels.packed import RECORD, packed
from pipeline.views.noise import noise_levels
from pipeline.views.recipe import MAX_LAYERS
from pipeline.views.view import View

# VERSION in _kernel.c is the same number. Add 1 to both when the record, the functions that are called here, or any pixel changes: a
# library that was compiled before is then not used.
VERSION = 1
INSTRUCTION_SETS = ("basic instructions", "AVX2", "AVX-512")  # by level
_ALIGNMENT = 64
_memory = threading.local()


class Trouble(NamedTuple):
    """Why the kernel cannot be used, and how to get it."""

    what: str
    way_out: str


def is_compiled() -> bool:
    """Return whether the kernel was compiled when this package was installed, from the sources that are here now."""
    return trouble() is None


def trouble() -> Trouble | None:
    """Return why the kernel cannot be used; None if it can."""
    return _opened()[1]


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
        views: V views of renderer 2; their crops are inside the image.
        out: for each view, uint8 [img_size, img_size, 3], contiguous; its pixels are written here.
        level: instruction set, 0..best_level(); None: the best one. All of them give the same pixels.

    Raises:
        ValueError: the image, a view or a place is not as described: the kernel would read or write other memory.
    """
    _check_image(image)
    height, width = image.shape[:2]
    for view, pixels in zip(views, out, strict=True):
        _check(view, height, width)
        _check_out(pixels, view.img_size)
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


def _check_image(image: NDArray[np.uint8]) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.flags.c_contiguous:
        raise ValueError(f"an image must be contiguous uint8 [H, W, 3], got {_described(image)}")


def _check(view: View, height: int, width: int) -> None:
    size = view.img_size
    if not _is_inside(view.crop, height, width, least=1):
        raise ValueError(f"the crop {view.crop} must lie inside the image of {height} x {width}")
    if not _is_inside((*view.window, size, size), *view.resize, least=1):
        raise ValueError(
            f"the window of {size} pixels at {view.window} must lie inside the crop resized to {view.resize}"
        )
    if view.erase and not _is_inside(view.erase.box, size, size, least=0):
        raise ValueError(f"the erased box {view.erase.box} must lie inside the view of {size} pixels")
    if len(view.ops) > MAX_LAYERS:
        raise ValueError(f"a view has at most {MAX_LAYERS} operations, got {len(view.ops)}")


def _check_out(pixels: NDArray[np.uint8], size: int) -> None:
    flags = pixels.flags
    if pixels.dtype != np.uint8 or pixels.shape != (size, size, 3) or not (flags.c_contiguous and flags.writeable):
        raise ValueError(
            f"a view of {size} pixels needs contiguous writable uint8 [{size}, {size}, 3], got {_described(pixels)}"
        )


def _is_inside(box: Box, height: int, width: int, *, least: int) -> bool:
    top, left, tall, wide = box
    return min(top, left) >= 0 and min(tall, wide) >= least and top + tall <= height and left + wide <= width


def _described(array: NDArray) -> str:
    kind = "contiguous" if array.flags.c_contiguous else "not contiguous"
    return f"{array.dtype} {list(array.shape)}, {kind}{'' if array.flags.writeable else ', read-only'}"


def _address(array: NDArray[np.uint8]) -> int:
    return array.__array_interface__["data"][0]


def _scratch(size: int) -> int:
    """Return the address of scratch memory of this thread, which is kept: new pages would cost as much as the rendering."""
    if getattr(_memory, "size", 0) < size:
        _memory.held = np.empty(size + _ALIGNMENT, np.uint8)
        _memory.size = size
    start = _address(_memory.held)
    return start + -start % _ALIGNMENT


def _library() -> Any:
    return _opened()[0]


@cache
def _opened() -> tuple[Any, Trouble | None]:
    """Return the compiled kernel, or None and why it cannot be used."""
    found = importlib.util.find_spec("pipeline.pixels._kernel")
    if found is None or found.origin is None:
        return None, Trouble(
            "the kernel for views was not compiled when deit-cli was installed",
            "Install a C compiler (gcc or clang), then run pip install again, with -v to see its messages",
        )
    again = "Run pip install again, with -v to see the messages of the C compiler"
    try:
        library = ctypes.CDLL(found.origin)
    except OSError as error:  # it was compiled for another processor or system
        return None, Trouble(f"the kernel for views cannot be loaded: {error}", again)
    if _version_of(library) != VERSION:
        return None, Trouble(f"{found.origin} was compiled from other sources than those beside it", again)
    library.best_level.restype, library.best_level.argtypes = ctypes.c_int32, []
    library.scratch_bytes.restype, library.scratch_bytes.argtypes = ctypes.c_int64, [ctypes.c_char_p, ctypes.c_int32]
    address = ctypes.c_void_p
    library.render.restype = None
    library.render.argtypes = [
        *(ctypes.c_int32, address, address, ctypes.c_char_p, ctypes.c_int32, address, address, address)
    ]
    return library, None


def _version_of(library: ctypes.CDLL) -> int:
    return library.kernel_version() if hasattr(library, "kernel_version") else 0


assert RECORD.itemsize == 1056  # struct record
