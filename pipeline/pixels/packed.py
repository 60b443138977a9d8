"""Views of renderer 2 as numbers: one record of a fixed layout for each view, which the kernels on the CPU and on the GPU read.

Everything that docs/views-v2.md computes from the parameters of a view alone is computed here, once for all kernels.
"""

import math
import struct
from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from pipeline.views.exact import rotation
from pipeline.views.noise import noise_key
from pipeline.views.randaugment import PLAIN
from pipeline.views.recipe import MAX_LAYERS
from pipeline.views.view import DrawnOp, View

# The operations of a record are numbered as in RandAugment's table, with two exceptions: every warp is an AFFINE, and a rotation by a
# multiple of 90 degrees that only moves pixels is a TURN.
AUTOCONTRAST, EQUALIZE, INVERT, AFFINE, POSTERIZE, SOLARIZE, SOLARIZE_ADD, COLOR, CONTRAST, BRIGHTNESS, SHARPNESS = (
    range(11)
)
TURN = 15
BILINEAR, BICUBIC = 0, 1

OP = np.dtype(
    [
        ("kind", "<i4"),
        ("filter", "<i4"),  # BILINEAR or BICUBIC, of an AFFINE
        (
            "number",
            "<i4",
        ),  # POSTERIZE: mask; SOLARIZE: threshold; SOLARIZE_ADD: what is added; TURN: quarter turns, anticlockwise
        ("factor", "<f4"),  # of a blend
        ("matrix", "<f8", 6),  # of an AFFINE: a, b, c, d, e, f
    ]
)
RECORD = np.dtype(
    [
        ("offset", "<i8"),  # first byte of the image in a buffer
        ("image", "<i4", 2),  # height and width of the image in the buffer; its rows follow each other, 3 bytes a pixel
        ("crop", "<i4", 4),  # top, left, height, width
        ("resize", "<i4", 2),  # height, width
        ("window", "<i4", 2),  # top, left
        ("size", "<i4"),  # height and width of the view
        ("flip", "<i4"),
        ("filter", "<i4"),
        ("num_ops", "<i4"),
        ("erase", "<i4", 4),  # top, left, height, width; zeros: none
        ("noise", "<u8", 2),  # Philox key
        ("ops", OP, MAX_LAYERS),
    ]
)
_HEADER, _OP = struct.Struct("<q18i2Q"), struct.Struct("<3if6d")
_NO_OPS = bytes(OP.itemsize * MAX_LAYERS)
_FILTERS = {"bilinear": BILINEAR, "bicubic": BICUBIC}
_NO_MATRIX = (0.0,) * 6


def packed(view: View, *, height: int, width: int, offset: int = 0, origin: tuple[int, int] = (0, 0)) -> bytes:
    """Return the record of a view, RECORD.itemsize bytes.

    Args:
        view: a view of renderer 2.
        height: height of the image in the buffer, pixels.
        width: width of the image in the buffer, pixels.
        offset: position of the image in the buffer, bytes.
        origin: top and left of what is in the buffer, in the image that the view was drawn for.
    """
    top, left, tall, wide = view.crop
    erase, key = (view.erase.box, noise_key(view.erase.noise)) if view.erase else ((0, 0, 0, 0), (0, 0))
    ops = b"".join(_packed_op(op, view.img_size) for op in view.ops)
    header = _HEADER.pack(
        offset, height, width, top - origin[0], left - origin[1], tall, wide, *view.resize, *view.window, view.img_size, view.flip,
        _FILTERS[view.interpolation], len(view.ops), *erase, *key,
    )  # fmt: skip
    return header + ops + _NO_OPS[len(ops) :]


def records(packed_views: Iterable[bytes]) -> np.ndarray:
    """Return packed views as an array of RECORD."""
    return np.frombuffer(b"".join(packed_views), RECORD)


def _packed_op(op: DrawnOp, size: int) -> bytes:
    name = op.name.removesuffix("Increasing")
    kind, number, factor, matrix = _KINDS[name], 0, 0.0, _NO_MATRIX
    match name:
        case "Rotate" | "ShearX" | "ShearY" | "TranslateXRel" | "TranslateYRel":
            number, matrix = _warp(name, op.argument, size)
            kind = TURN if number else AFFINE
        case "Posterize":
            number = _kept_bits(int(op.argument))
        case "Solarize" | "SolarizeAdd":
            number = int(op.argument)
        case "Color" | "Contrast" | "Brightness" | "Sharpness":
            factor = op.argument
    return _OP.pack(kind, _FILTERS[op.interpolation], number, factor, *matrix)


def _kept_bits(bits: int) -> int:
    """Return the mask that keeps the highest bits of a level; magnitudes above 10 ask for a negative number of them."""
    return 256 - 2 ** (8 - min(max(bits, 0), 8))


@lru_cache(16)
def _warp(name: str, argument: float, size: int) -> tuple[int, tuple[float, ...]]:
    """Return the quarter turns (0: the matrix is to be used; 4: none, a copy) and the matrix of a geometric operation on a square."""
    match name:
        case "ShearX":
            return 0, (1.0, argument, 0.0, 0.0, 1.0, 0.0)
        case "ShearY":
            return 0, (1.0, 0.0, 0.0, argument, 1.0, 0.0)
        case "TranslateXRel":
            return 0, (1.0, 0.0, argument * size, 0.0, 1.0, 0.0)
        case "TranslateYRel":
            return 0, (1.0, 0.0, 0.0, 0.0, 1.0, argument * size)
    degrees = math.fmod(argument, 360.0)
    degrees += 360.0 if degrees < 0 else 0.0
    if degrees % 90 == 0:
        return int(degrees) // 90 or 4, _NO_MATRIX
    cos, sin = rotation(degrees)
    half = size / 2
    return 0, (cos, sin, cos * -half + sin * -half + half, -sin, cos, -sin * -half + cos * -half + half)


_KINDS = {name: kind for kind, name in enumerate(PLAIN)}
