"""Decoding a region of a JPEG with libjpeg-turbo, if a TurboJPEG library of version 3 is installed.

The decoders in Python packages contain libjpeg-turbo but do not offer this function, so it is called through the C
interface. The pixels are bit for bit the same as when the whole image is decoded. Without the library, or for an image
that is not suited, the whole image is decoded. https://libjpeg-turbo.org documents the functions and numbers used here.
"""

import contextlib
import ctypes
import importlib.metadata
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.images.samples import Box

_NAMES = ("libturbojpeg.so.0", "libturbojpeg.dylib", "turbojpeg.dll")
_DECOMPRESS, _RGB = 1, 0  # TJINIT_DECOMPRESS, TJPF_RGB
_ASKED = (4, 5, 6, 7, 8, 12, 14, 15)  # TJPARAM_, in the order of the parameters of _around
_BLOCK_WIDTH = {0: 8, 1: 16, 2: 16, 3: 8}  # pixels of an MCU in a row: 4:4:4, 4:2:2, 4:2:0, grey
_YCBCR_OR_GREY = (1, 2)
# Chroma is interpolated from neighbouring pixels, and a region that is decoded alone lacks these at its edges.
_MARGIN_ROWS = 2
# Limits within which it saves time (benchmarks/decode.py). The entropy decoder goes through all rows down to the region's last one
# and takes 0.73 of the time of the whole image; the rest is spent on the pixels of the region. Calling the library costs some time, too.
_LEAST_PIXELS, _ENTROPY, _MOST_TIME = 128 * 128, 0.73, 0.95


class _Region(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("x", "y", "w", "h")]


def is_installed() -> bool:
    """Return whether regions can be decoded on this machine."""
    return _library() is not None


def decode_region(image: bytes, box: Box) -> tuple[NDArray[np.uint8], int, int] | None:
    """Decode the part of an undamaged JPEG that a box needs.

    Damage outside the box is not noticed: the caller must know that the whole image decodes.

    Args:
        image: the encoded file.
        box: top, left, height, width; inside the image.

    Returns:
        the part of the image that contains the box, uint8 [H, W, 3], contiguous; its top and its left in the image. None if
        the whole image must be decoded.
    """
    library = _library()
    if library is None:
        return None
    with _decompressor(library) as handle:
        if library.tj3DecompressHeader(handle, image, len(image)):
            return None
        region = _around(box, *(library.tj3Get(handle, name) for name in _ASKED))
        if region is None or library.tj3SetCroppingRegion(handle, region):
            return None
        pixels = np.empty((region.h, region.w, 3), np.uint8)
        failed = library.tj3Decompress8(handle, image, len(image), pixels.ctypes.data, 0, _RGB)
        return None if failed else (pixels, region.y, region.x)


def _around(box: Box, subsampling: int, width: int, height: int, bits: int, colours: int, *rare: int) -> _Region | None:
    """Return the region to decode for a box, with margins; None if it saves no time, or if the JPEG is of a rare kind.

    Args:
        box: top, left, height, width.
        subsampling: chroma subsampling, as TurboJPEG numbers it.
        width: width of the image, pixels.
        height: height of the image, pixels.
        bits: bits of a sample.
        colours: colour space.
        rare: values above 0 where the file is progressive, arithmetically coded or lossless.
    """
    top, left, tall, wide = box
    block = _BLOCK_WIDTH.get(subsampling)
    if block is None or bits != 8 or colours not in _YCBCR_OR_GREY or max(rare) > 0:
        return None
    time = _ENTROPY * (top + tall) / height + (1 - _ENTROPY) * tall * wide / (height * width)
    if width * height < _LEAST_PIXELS or time > _MOST_TIME:
        return None
    x, y = max(0, left // block - 1) * block, max(0, top - _MARGIN_ROWS)
    return _Region(x, y, min(width, left + wide + block) - x, min(height, top + tall + _MARGIN_ROWS) - y)


@contextlib.contextmanager
def _decompressor(library: Any) -> Iterator[int]:
    handle = library.tj3Init(_DECOMPRESS)
    if not handle:
        raise MemoryError("libjpeg-turbo has no memory for a decompressor")
    try:
        yield handle
    finally:
        library.tj3Destroy(handle)


@cache
def _library() -> Any:
    """Return the first TurboJPEG library of version 3: from the system, or from the package `turbojpeg`."""
    for name in (*_NAMES, *_packaged()):
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(name)
            if hasattr(library, "tj3SetCroppingRegion"):
                return _declared(library)
    return None


def _packaged() -> list[str]:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        files = importlib.metadata.files("turbojpeg") or []
        return [str(file.locate()) for file in files if file.name.startswith("libturbojpeg")]
    return []


def _declared(library: Any) -> Any:
    library.tj3Init.restype, library.tj3Init.argtypes = ctypes.c_void_p, [ctypes.c_int]
    library.tj3DecompressHeader.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]
    library.tj3Get.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.tj3SetCroppingRegion.argtypes = [ctypes.c_void_p, _Region]
    library.tj3Decompress8.argtypes = [
        *(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
    ]
    library.tj3Destroy.restype, library.tj3Destroy.argtypes = None, [ctypes.c_void_p]
    return library
