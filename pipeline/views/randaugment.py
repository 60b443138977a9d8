"""RandAugment's operations: the argument of each magnitude, and the effect of each operation on uint8 pixels.

The list, its order, the magnitudes and their directions are those of timm (`timm.data.auto_augment`). The code is our own,
because the pixels of a stored label must stay the same if timm changes its tables; a test compares the two. OPERATIONS, at
the end, has a row for each operation.

The operations work on uint8 [H, W, 3] through OpenCV and 256-entry tables. Operations that only look up
each level in a table give exactly the same pixels as Pillow. Color and Sharpness are one level above Pillow in 42 and 36 % of
the values of photographs (at magnitude 9), and equal in the others: OpenCV rounds when it blends, Pillow truncates. Geometric
operations use cubic interpolation with a = -0.75; Pillow's `transform` uses a = -1.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2 as _opencv
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Pixels = NDArray[np.uint8]  # uint8 [H, W, 3], RGB
cv2: Any = _opencv  # its type stubs lose the dtype of every array

FILL = (124, 116, 104)  # ImageNet mean, with which timm fills uncovered corners
MAX_LEVEL = 10.0

_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # Pillow's ImageFilter.SMOOTH
_LUMA = np.array([19595, 38470, 7471], np.float32)
_A = -0.75  # the value of OpenCV, whose warp interpolates rotations with the same curve


@dataclass(frozen=True)
class Op:
    """An operation of RandAugment.

    Attributes:
        name: name of the operation in timm.
        apply: function that turns uint8 [H, W, 3] and an argument into a new array of the same shape.
        argument: function that turns share (magnitude / 10) and sign (1 or -1) into degrees, shear, share of the image,
            bits to keep, threshold or blend factor; it returns 0 for an operation that takes no argument.
        increasing: function that replaces `argument` under timm's `inc`, with which operations grow stronger with the
            magnitude; such an operation is called NAMEIncreasing. None if `inc` changes nothing.
    """

    name: str
    apply: Callable[[Pixels, float], Pixels]
    argument: Callable[[float, float], float] = lambda share, sign: 0.0
    increasing: Callable[[float, float], float] | None = None


def op_argument(name: str, level: float, *, negate: bool) -> float:
    """Return the argument that timm gives operation `name` at a magnitude.

    Args:
        name: name in INCREASING or PLAIN.
        level: magnitude, 0..10 (more where `mmax` allows it).
        negate: random choice of the direction, for operations that have two.

    Returns:
        the argument, as described at `Op.argument`.
    """
    op = _BY_NAME[name]
    argument = op.argument if op.increasing is None or name == op.name else op.increasing
    return argument(level / MAX_LEVEL, -1.0 if negate else 1.0)


def apply_op(image: Pixels, name: str, argument: float) -> Pixels:
    """Return the image after one operation, a new array of the same shape."""
    return _BY_NAME[name].apply(image, argument)


def mirror(image: Pixels) -> Pixels:
    """Return the image mirrored left to right, a new contiguous array."""
    return cv2.flip(image, 1)


def _autocontrast(image: Pixels, _: float) -> Pixels:
    planes = cv2.split(image)
    return _look_up(planes, [_stretch(*map(int, cv2.minMaxLoc(plane)[:2])) for plane in planes])


def _look_up(planes: Sequence[NDArray[np.uint8]], tables: Sequence[NDArray[np.uint8]]) -> Pixels:
    """Return the image with each channel looked up in its own table, uint8 [256]."""
    return cv2.merge([cv2.LUT(plane, table) for plane, table in zip(planes, tables, strict=True)])


def _stretch(low: int, high: int) -> Pixels:
    if high <= low:
        return np.arange(256, dtype=np.uint8)
    scale = 255.0 / (high - low)
    return np.clip(np.trunc(np.arange(256) * scale - low * scale), 0, 255).astype(np.uint8)


def _equalize(image: Pixels, _: float) -> Pixels:
    planes = cv2.split(image)
    histograms = (cv2.calcHist([plane], [0], None, [256], [0, 256]).ravel().astype(np.int64) for plane in planes)
    return _look_up(planes, [_flatten(histogram) for histogram in histograms])


def _flatten(histogram: NDArray[np.int64]) -> Pixels:
    """Return the table of Pillow's ImageOps.equalize for a histogram, computed in integers."""
    used = histogram[histogram > 0]
    step = (int(used.sum()) - int(used[-1])) // 255
    if len(used) <= 1 or step == 0:
        return np.arange(256, dtype=np.uint8)
    below = np.concatenate(([0], np.cumsum(histogram)[:-1]))
    return np.clip((step // 2 + below) // step, 0, 255).astype(np.uint8)


def _posterize(image: Pixels, bits: float) -> Pixels:
    if bits >= 8:
        return image.copy()
    return image & np.uint8(256 - 2 ** (8 - max(0, int(bits))))  # magnitudes above 10 give negative bits


def _solarize(image: Pixels, threshold: float) -> Pixels:
    levels = np.arange(256)
    return cv2.LUT(image, np.where(levels < threshold, levels, 255 - levels).astype(np.uint8))


def _solarize_add(image: Pixels, add: float) -> Pixels:
    levels = np.arange(256)
    return cv2.LUT(image, np.where(levels < 128, np.minimum(255, levels + int(add)), levels).astype(np.uint8))


def _brightness(image: Pixels, factor: float) -> Pixels:
    return cv2.LUT(image, _blend_table(0, factor))


def _contrast(image: Pixels, factor: float) -> Pixels:
    mean = int(_grey(image).mean() + 0.5)
    return cv2.LUT(image, _blend_table(mean, factor))


def _blend(share: float, _: float) -> float:
    return share * 1.8 + 0.1


def _blend_increasing(share: float, sign: float) -> float:
    return max(0.1, 1.0 + sign * share * 0.9)


def _blend_table(base: int, factor: float) -> Pixels:
    """Return the table of Pillow's blend of a constant with every level, in float32, truncated and clipped."""
    levels = np.float32(base) + np.float32(factor) * (np.arange(256, dtype=np.float32) - base)
    return np.clip(levels, 0, 255).astype(np.uint8)


def _color(image: Pixels, factor: float) -> Pixels:
    return cv2.addWeighted(image, factor, cv2.cvtColor(_grey(image), cv2.COLOR_GRAY2RGB), 1 - factor, 0)


def _sharpness(image: Pixels, factor: float) -> Pixels:
    smooth = image.copy()
    if min(image.shape[:2]) > 2:  # Pillow's kernel filter does not change the outermost pixels
        smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, _SMOOTH)[1:-1, 1:-1]
    return cv2.addWeighted(image, factor, smooth, 1 - factor, 0)


def _grey(image: Pixels) -> NDArray[np.uint8]:
    """Return the ITU-R 601 luma in 16-bit fixed point, like Pillow's convert("L").

    float32 is exact here: the weights add up to 2**16, so no sum reaches 2**24, and float32 holds all integers up to 2**24.
    """
    luma = image.reshape(-1, 3).astype(np.float32) @ _LUMA
    luma += 0x8000
    luma *= 2.0**-16
    return luma.astype(np.uint8).reshape(image.shape[:2])


def _rotate(image: Pixels, degrees: float) -> Pixels:
    height, width = image.shape[:2]
    cos, sin = math.cos(math.radians(-degrees)), math.sin(math.radians(-degrees))
    x, y = width / 2, height / 2
    return _affine(image, (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y))


def _shear_x(image: Pixels, factor: float) -> Pixels:
    return _slide(image, factor * (np.arange(image.shape[0]) + 0.5))


def _shear_y(image: Pixels, factor: float) -> Pixels:
    return cv2.transpose(_shear_x(cv2.transpose(image), factor))


def _translate_x(image: Pixels, share: float) -> Pixels:
    return _slide(image, np.full(image.shape[0], share * image.shape[1]))


def _translate_y(image: Pixels, share: float) -> Pixels:
    return cv2.transpose(_translate_x(cv2.transpose(image), share))


def _slide(image: Pixels, shift: NDArray[np.float64]) -> Pixels:
    """Sample row y at x + shift[y]: a cubic warp with four taps instead of sixteen, because pixels move only within their row.

    Products and sums are separate float32 operations, so rounding is the same on every machine.
    """
    height, width = image.shape[:2]
    whole = np.floor(shift)
    first = np.clip(whole.astype(np.int64) - 1, -width - 3, width)  # first tap of the leftmost pixel
    left, right = max(0, -int(first.min())), max(0, int(first.max()) + 3)
    wide = cv2.copyMakeBorder(image, 0, 0, left, right, cv2.BORDER_CONSTANT, value=FILL).reshape(height, -1)
    windows = np.lib.stride_tricks.sliding_window_view(wide, 3 * (width + 3), axis=1)
    rows = torch.from_numpy(windows[np.arange(height), 3 * (left + first)]).float()
    taps = [rows[:, 3 * tap : 3 * (tap + width)] for tap in range(4)]
    products = (weight * tap for weight, tap in zip(_cubic(shift - whole), taps, strict=True))
    total = next(products).add_(next(products)).add_(next(products))
    return cv2.add(total.numpy(), next(products).numpy(), dtype=cv2.CV_8U).reshape(image.shape)  # rounds and clips


def _cubic(x: NDArray[np.float64]) -> Tensor:
    """Return the weights of the pixels at -1, 0, 1 and 2 for 0 <= x < 1, float32 [4, H, 1]; cubic convolution (Keys 1981)."""
    distance = np.abs(x - np.array([[-1], [0], [1], [2]]))
    near = ((_A + 2) * distance - (_A + 3)) * distance**2 + 1
    far = _A * (((distance - 5) * distance + 8) * distance - 4)
    return torch.from_numpy(np.where(distance <= 1, near, far).astype(np.float32)[..., None])


def _affine(image: Pixels, matrix: tuple[float, ...]) -> Pixels:
    """Sample the image at matrix * (output position); pixel centres are at one half, as in Pillow."""
    a, b, c, d, e, f = matrix
    centred = np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]])
    size = (image.shape[1], image.shape[0])
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, centred, size, flags=flags, borderMode=cv2.BORDER_CONSTANT, borderValue=FILL)


# A draw is a position in this table, so its order is part of the format: a new order needs a new RENDERER.
OPERATIONS = (
    Op("AutoContrast", _autocontrast),
    Op("Equalize", _equalize),
    Op("Invert", lambda image, _: cv2.bitwise_not(image)),
    Op("Rotate", _rotate, lambda share, sign: sign * share * 30),
    Op("Posterize", _posterize, lambda share, _: int(share * 4), lambda share, _: 4 - int(share * 4)),
    Op("Solarize", _solarize, lambda share, _: min(256, int(share * 256)), lambda share, _: 256 - min(256, int(share * 256))),
    Op("SolarizeAdd", _solarize_add, lambda share, _: min(128, int(share * 110))),
    Op("Color", _color, _blend, _blend_increasing),
    Op("Contrast", _contrast, _blend, _blend_increasing),
    Op("Brightness", _brightness, _blend, _blend_increasing),
    Op("Sharpness", _sharpness, _blend, _blend_increasing),
    Op("ShearX", _shear_x, lambda share, sign: sign * share * 0.3),
    Op("ShearY", _shear_y, lambda share, sign: sign * share * 0.3),
    Op("TranslateXRel", _translate_x, lambda share, sign: sign * share * 0.45),
    Op("TranslateYRel", _translate_y, lambda share, sign: sign * share * 0.45),
)  # fmt: skip
PLAIN = tuple(op.name for op in OPERATIONS)
INCREASING = tuple(f"{op.name}Increasing" if op.increasing else op.name for op in OPERATIONS)
_BY_NAME = dict(zip(PLAIN + INCREASING, OPERATIONS + OPERATIONS, strict=True))
