"""The plain renderer 1: what `pipeline.pixels.renderer1.render` must equal bit for bit, written for reading and not for speed.

It obeys the same `View`, and shares no pixel code with the fast one: NumPy index arithmetic, integer sums, one pass for
each thought. The two library calls that define the pixels (torch's antialiased resize, OpenCV's cubic warp of rotations)
are made in their plainest form.
"""

import math

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from pipeline.views.draws import Draws
from pipeline.views.noise import noise_levels
from pipeline.views.view import Erase, View

Pixels = NDArray[np.uint8]
FILL = (124, 116, 104)


def render_plainly(image: Pixels, view: View) -> Pixels:
    top, left, tall, wide = view.crop
    planes = torch.from_numpy(image[top : top + tall, left : left + wide].transpose(2, 0, 1).copy())[None]
    resized = F.interpolate(planes, size=view.resize, mode="bicubic", antialias=True)[0].numpy().transpose(1, 2, 0)
    top, left = view.window
    pixels = resized[top : top + view.img_size, left : left + view.img_size].copy()
    if view.flip:
        pixels = pixels[:, ::-1].copy()
    for op in view.ops:
        pixels = operate(pixels, op.name.removesuffix("Increasing"), op.argument)
    return erased(pixels, view.erase) if view.erase else pixels


def operate(image: Pixels, name: str, argument: float) -> Pixels:
    height, width = image.shape[:2]
    match name:
        case "AutoContrast":
            return per_channel(image, [stretched(image[..., channel]) for channel in range(3)])
        case "Equalize":
            return per_channel(image, [flattened(image[..., channel]) for channel in range(3)])
        case "Invert":
            return 255 - image
        case "Posterize":
            return image if argument >= 8 else image // 2 ** (8 - int(argument)) * 2 ** (8 - int(argument))
        case "Solarize":
            return np.where(image < argument, image, 255 - image)
        case "SolarizeAdd":
            return np.where(image < 128, np.minimum(255, image.astype(int) + int(argument)), image).astype(np.uint8)
        case "Brightness":
            return per_channel(image, [blended(0, argument)] * 3)
        case "Contrast":
            return per_channel(image, [blended(int(grey(image).mean() + 0.5), argument)] * 3)
        case "Color":
            return cv2.addWeighted(image, argument, np.repeat(grey(image)[..., None], 3, axis=2), 1 - argument, 0)
        case "Sharpness":
            smooth = image.copy()
            if min(height, width) > 2:
                kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
                smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, kernel)[1:-1, 1:-1]
            return cv2.addWeighted(image, argument, smooth, 1 - argument, 0)
        case "Rotate":
            cos, sin = math.cos(math.radians(-argument)), math.sin(math.radians(-argument))
            x, y = width / 2, height / 2
            return warped(image, [[cos, sin, x - cos * x - sin * y], [-sin, cos, y + sin * x - cos * y]])
        case "ShearX":
            return slid(image, [argument * (y + 0.5) for y in range(height)])
        case "ShearY":
            return operate(image.transpose(1, 0, 2), "ShearX", argument).transpose(1, 0, 2)
        case "TranslateXRel":
            return slid(image, [argument * width] * height)
        case "TranslateYRel":
            return operate(image.transpose(1, 0, 2), "TranslateXRel", argument).transpose(1, 0, 2)
    raise ValueError(name)


def per_channel(image: Pixels, tables: list[NDArray[np.uint8]]) -> Pixels:
    return np.stack([table[image[..., channel]] for channel, table in enumerate(tables)], axis=-1)


def stretched(channel: Pixels) -> NDArray[np.uint8]:
    low, high = int(channel.min()), int(channel.max())
    if high <= low:
        return np.arange(256, dtype=np.uint8)
    scale = 255.0 / (high - low)
    return np.clip(np.trunc(np.arange(256) * scale - low * scale), 0, 255).astype(np.uint8)


def flattened(channel: Pixels) -> NDArray[np.uint8]:
    histogram = np.bincount(channel.ravel(), minlength=256)
    used = histogram[histogram > 0]
    step = (int(used.sum()) - int(used[-1])) // 255
    if len(used) <= 1 or step == 0:
        return np.arange(256, dtype=np.uint8)
    below = np.array([int(histogram[:level].sum()) for level in range(256)])
    return np.clip((step // 2 + below) // step, 0, 255).astype(np.uint8)


def blended(base: int, factor: float) -> NDArray[np.uint8]:
    levels = np.arange(256, dtype=np.float32)
    return np.clip(np.float32(base) + np.float32(factor) * (levels - base), 0, 255).astype(np.uint8)


def grey(image: Pixels) -> NDArray[np.uint8]:
    red, green, blue = (image[..., channel].astype(np.uint32) for channel in range(3))
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(np.uint8)


def slid(image: Pixels, shifts: list[float]) -> Pixels:
    """Sample row y at x + shifts[y]; what lies outside of the image is FILL."""
    result = np.empty_like(image)
    for y, shift in enumerate(shifts):
        whole = math.floor(shift)
        total = np.float32(0)
        for tap in (-1, 0, 1, 2):
            columns = np.arange(image.shape[1]) + whole + tap
            inside = (columns >= 0) & (columns < image.shape[1])
            pixels = np.where(inside[:, None], image[y, np.where(inside, columns, 0)], FILL)
            total = total + np.float32(cubic(abs(shift - whole - tap))) * pixels.astype(np.float32)
        result[y] = np.clip(np.rint(total), 0, 255)
    return result


def cubic(distance: float) -> float:
    """Keys' cubic convolution kernel with a = -3/4."""
    if distance <= 1:
        return 1.25 * distance**3 - 2.25 * distance**2 + 1
    return -0.75 * distance**3 + 3.75 * distance**2 - 6 * distance + 3


def warped(image: Pixels, matrix: list[list[float]]) -> Pixels:
    (a, b, c), (d, e, f) = matrix
    centred = np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]])
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    size = (image.shape[1], image.shape[0])
    return cv2.warpAffine(image, centred, size, flags=flags, borderMode=cv2.BORDER_CONSTANT, borderValue=FILL)


def erased(pixels: Pixels, erase: Erase) -> Pixels:
    top, left, tall, wide = erase.box
    table = noise_levels()
    words = Draws(erase.noise.to_bytes(8, "little")).raw(-(-tall * wide * 3 // 4))
    quantiles = [int(word) >> shift & 0xFFFF for word in words for shift in (0, 16, 32, 48)]
    result, at = pixels.copy(), iter(quantiles)
    for channel in range(3):
        for y in range(top, top + tall):
            for x in range(left, left + wide):
                result[y, x, channel] = table[channel][next(at)]
    return result
