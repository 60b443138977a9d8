"""Renderer 1: how views were drawn and rendered before docs/views-v2.md. Label sets that have it train as before.

Its pixels are what torch's antialiased resize and OpenCV's warp compute in the installed versions, so they may move with these; the replay
probes measure it. Nothing new is labelled with it.

The operations work on uint8 [H, W, 3] through OpenCV and 256-entry tables. Operations that only look up each level in a table give exactly
the same pixels as Pillow. Color and Sharpness are one level above Pillow in 42 and 36 % of the values of photographs (at magnitude 9), and
equal in the others: OpenCV rounds when it blends, Pillow truncates. Geometric operations use cubic interpolation with a = -0.75; Pillow's
`transform` uses a = -1.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import cv2 as _opencv
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.views.noise import fill_with_noise
from pipeline.views.randaugment import FILL
from pipeline.views.view import View

Pixels = NDArray[np.uint8]  # uint8 [H, W, 3], RGB
cv2: Any = _opencv  # its type stubs lose the dtype of every array
cv2.setNumThreads(0)  # each loader process has one core

_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # Pillow's ImageFilter.SMOOTH
_LUMA = np.array([19595, 38470, 7471], np.float32)
_A = -0.75  # the value of OpenCV, whose warp interpolates rotations with the same curve


def render(image: Pixels, view: View) -> Pixels:
    """Return the pixels of a view of renderer 1: uint8 [img_size, img_size, 3], contiguous."""
    pixels = _crop_and_resize(image, view)
    if view.flip:
        pixels = _mirror(pixels)
    for op in view.ops:
        pixels = apply_op(pixels, op.name, op.argument)
    if view.erase:
        fill_with_noise(pixels, view.erase.box, view.erase.noise)
    return np.ascontiguousarray(pixels)


def apply_op(image: Pixels, name: str, argument: float) -> Pixels:
    """Return the image after one operation, a new array of the same shape."""
    return _OPERATIONS[name.removesuffix("Increasing")](image, argument)


def _crop_and_resize(image: Pixels, view: View) -> Pixels:
    """Return the crop, resized with torch's antialiased bicubic filter, rows first; on average 0.03 of 255 from Pillow."""
    top, left, height, width = view.crop
    image = np.require(image, requirements=["C", "W"])  # decoded images already are; torch accepts no others
    region = torch.from_numpy(image)[top : top + height, left : left + width].contiguous()
    tensor = region[None].permute(0, 3, 1, 2)  # contiguous and channels last: no copy, and torch returns the same
    resized = F.interpolate(tensor, size=view.resize, mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    top, left = view.window
    return resized[top : top + view.img_size, left : left + view.img_size].contiguous().numpy()


def _mirror(image: Pixels) -> Pixels:
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


_OPERATIONS: dict[str, Callable[[Pixels, float], Pixels]] = {
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
    "Invert": lambda image, _: cv2.bitwise_not(image),
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": _color,
    "Contrast": _contrast,
    "Brightness": _brightness,
    "Sharpness": _sharpness,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateXRel": _translate_x,
    "TranslateYRel": _translate_y,
}
