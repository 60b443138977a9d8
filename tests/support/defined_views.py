"""Views by their definition: docs/views-v2.md line by line, written for reading and not for speed.

No code of `pipeline.views` takes part in what is computed here; only its dataclasses do. Pixels are NumPy arrays, so every operation on real
numbers is rounded on its own. Draws are exact numbers (`Fraction`, `Decimal` of 100 digits), rounded once.
"""

import hashlib
import math
import struct
from collections.abc import Callable, Iterator
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from functools import cache

import numpy as np
from numpy.typing import NDArray

from pipeline.images.samples import Box
from pipeline.views.recipe import Interpolation, RandAugment, Recipe
from pipeline.views.view import DrawnOp, Erase, View

Pixels = NDArray[np.uint8]  # uint8 [H, W, 3]
Reals = NDArray[np.float64]
FILL = (124, 116, 104)
MEAN, STD = ("0.485", "0.456", "0.406"), ("0.229", "0.224", "0.225")
DEGREE = float.fromhex("0x1.1df46a2529d39p-6")
DIGITS = Context(prec=100)

# --- section 3: rendering -------------------------------------------------------------------------------------


def render_by_definition(image: Pixels, view: View) -> Pixels:
    """Return the pixels of a view, uint8 [img_size, img_size, 3]."""
    top, left, height, width = view.crop
    pixels = resize(image[top : top + height, left : left + width], view.resize, view.interpolation)
    top, left = view.window
    pixels = pixels[top : top + view.img_size, left : left + view.img_size]
    if view.flip:
        pixels = pixels[:, ::-1]
    for op in view.ops:
        pixels = operate(pixels, op.name, op.argument, op.interpolation)
    return erase(pixels, view.erase) if view.erase else pixels.copy()


def clip(values: NDArray) -> NDArray:
    """Limit values to 0..255."""
    return np.minimum(np.maximum(values, 0), 255)


# Resize


def resize(pixels: Pixels, size: tuple[int, int], interpolation: str) -> Pixels:
    """Resize uint8 [H, W, 3] to size (h, w): every row first, then every column."""
    height, width = size
    return turned(resize_rows(turned(resize_rows(pixels, width, interpolation)), height, interpolation))


def turned(pixels: Pixels) -> Pixels:
    """Exchange rows and columns."""
    return pixels.transpose(1, 0, 2)


def resize_rows(pixels: Pixels, width: int, interpolation: str) -> Pixels:
    """Resize every row to a width."""
    if width == pixels.shape[1]:
        return pixels
    columns = []
    for i in range(width):
        first, weights = resize_weights(i, pixels.shape[1], width, interpolation)
        inputs = pixels[:, first : first + len(weights)].astype(np.int64)
        total = 2**21 + np.sum(inputs * np.array(weights)[None, :, None], axis=1)
        columns.append(clip(total >> 22).astype(np.uint8))
    return np.stack(columns, axis=1)


def resize_weights(i: int, old: int, new: int, interpolation: str) -> tuple[int, list[int]]:
    """Return the first input of output i, and the weights of that input and the following ones, in units of 2**-22."""
    kernel, r = {"bicubic": (bicubic, 2.0), "bilinear": (bilinear, 1.0)}[interpolation]
    scale = old / new
    f = max(scale, 1.0)
    support, centre = r * f, (i + 0.5) * scale
    first, last = max(0, math.trunc(centre - support + 0.5)), min(old, math.trunc(centre + support + 0.5))
    weights = [kernel(abs((j - centre + 0.5) * (1 / f))) for j in range(first, last)]
    total = 0.0
    for weight in weights:  # not sum(), which compensates for rounding from Python 3.12 on
        total += weight
    if total != 0:
        weights = [weight / total for weight in weights]
    return first, [math.trunc(weight * 2**22 + (-0.5 if weight < 0 else 0.5)) for weight in weights]


def bicubic(x: float) -> float:
    if x < 1:
        return ((1.5 * x - 2.5) * x) * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0


def bilinear(x: float) -> float:
    return 1 - x if x < 1 else 0.0


# Operations


def operate(pixels: Pixels, name: str, argument: float, interpolation: str) -> Pixels:
    """Return the image after one operation of RandAugment, with its name in timm."""
    match name.removesuffix("Increasing"):
        case "AutoContrast":
            return each_channel(pixels, auto_contrast)
        case "Equalize":
            return each_channel(pixels, equalize)
        case "Invert":
            return 255 - pixels
        case "Posterize":
            bits = min(max(int(argument), 0), 8)
            return (pixels.astype(int) // 2 ** (8 - bits) * 2 ** (8 - bits)).astype(np.uint8)
        case "Solarize":
            return np.where(pixels < argument, pixels, 255 - pixels)
        case "SolarizeAdd":
            return np.where(pixels < 128, np.minimum(255, pixels.astype(int) + int(argument)), pixels).astype(np.uint8)
        case "Brightness":
            return blend(np.zeros_like(pixels), pixels, argument)
        case "Contrast":
            total, n = int(luma(pixels).sum()), pixels.shape[0] * pixels.shape[1]
            return blend(np.full_like(pixels, (2 * total + n) // (2 * n)), pixels, argument)
        case "Color":
            return blend(np.repeat(luma(pixels)[..., None], 3, axis=2), pixels, argument)
        case "Sharpness":
            return blend(smooth(pixels), pixels, argument)
        case "Rotate":
            return rotate(pixels, argument, interpolation)
        case "ShearX":
            return affine(pixels, (1.0, argument, 0.0, 0.0, 1.0, 0.0), interpolation)
        case "ShearY":
            return affine(pixels, (1.0, 0.0, 0.0, argument, 1.0, 0.0), interpolation)
        case "TranslateXRel":
            return affine(pixels, (1.0, 0.0, argument * pixels.shape[1], 0.0, 1.0, 0.0), interpolation)
        case "TranslateYRel":
            return affine(pixels, (1.0, 0.0, 0.0, 0.0, 1.0, argument * pixels.shape[0]), interpolation)
    raise ValueError(name)


def each_channel(pixels: Pixels, operation: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]) -> Pixels:
    return np.stack([operation(pixels[..., channel]) for channel in range(3)], axis=-1)


def auto_contrast(channel: NDArray[np.uint8]) -> NDArray[np.uint8]:
    low, high = int(channel.min()), int(channel.max())
    if high <= low:
        return channel
    scale = 255 / (high - low)
    return clip(np.trunc(channel * scale + (-low * scale))).astype(np.uint8)


def equalize(channel: NDArray[np.uint8]) -> NDArray[np.uint8]:
    counts = [int(np.sum(channel == level)) for level in range(256)]
    n = channel.size - counts[int(channel.max())]
    step = n // 255
    if channel.min() == channel.max() or step == 0:
        return channel
    table = [min(255, (step // 2 + sum(counts[:level])) // step) for level in range(256)]
    return np.array(table, np.uint8)[channel]


def luma(pixels: Pixels) -> NDArray[np.uint8]:
    red, green, blue = (pixels[..., channel].astype(np.int64) for channel in range(3))
    return ((19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16).astype(np.uint8)


def smooth(pixels: Pixels) -> Pixels:
    """Return the base of Sharpness."""
    height, width = pixels.shape[:2]
    result = pixels.copy()
    if min(height, width) >= 3:
        v = pixels.astype(np.int64)
        rows = v[:-2] + v[1:-1] + v[2:]
        around = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
        result[1:-1, 1:-1] = (2 * (around + 4 * v[1:-1, 1:-1]) + 13) // 26
    return result


def blend(base: Pixels, pixels: Pixels, factor: float) -> Pixels:
    """Return trunc(clip(b + m * (p - b))), in real32."""
    b, p, m = base.astype(np.float32), pixels.astype(np.float32), np.float32(factor)
    return np.trunc(clip(b + m * (p - b))).astype(np.uint8)


# Affine


def rotate(pixels: Pixels, degrees: float, interpolation: str) -> Pixels:
    height, width = pixels.shape[:2]
    delta = math.fmod(degrees, 360.0)
    if delta < 0:
        delta += 360.0
    if delta == 0:
        return pixels
    if delta == 180:
        return pixels[::-1, ::-1]
    if delta in (90, 270) and height == width:
        return np.rot90(pixels, int(delta) // 90)
    c, s = cos_sin_15(delta)
    x = c * (-width / 2) + s * (-height / 2) + 0 + width / 2
    y = -s * (-width / 2) + c * (-height / 2) + 0 + height / 2
    return affine(pixels, (c, s, x, -s, c, y), interpolation)


def affine(pixels: Pixels, matrix: tuple[float, ...], interpolation: str) -> Pixels:
    """Sample the image at the positions that the matrix gives for each pixel."""
    height, width = pixels.shape[:2]
    a, b, c, d, e, f = matrix
    x, y = np.arange(width)[None, :] + 0.5, np.arange(height)[:, None] + 0.5
    u, v = a * x + b * y + c, d * x + e * y + f
    inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
    result = np.empty_like(pixels)
    result[...] = FILL
    sampler = {"bicubic": sample_bicubic, "bilinear": sample_bilinear}[interpolation]
    result[inside] = sampler(pixels.astype(np.float64), u[inside] - 0.5, v[inside] - 0.5)
    return result


def sample_bicubic(image: Reals, u: Reals, v: Reals) -> Pixels:
    """Return the image at positions u and v, float64 [N] each, as uint8 [N, 3]."""
    x, y = np.floor(u), np.floor(v)
    p, q = (u - x)[:, None], (v - y)[:, None]
    rows = rows_of(image, y, (-1, 0, 1, 2), lambda row: cubic(*(at(image, row, x + k) for k in (-1, 0, 1, 2)), p))
    return np.trunc(clip(cubic(*rows, q))).astype(np.uint8)


def sample_bilinear(image: Reals, u: Reals, v: Reals) -> Pixels:
    """Return the image at positions u and v, float64 [N] each, as uint8 [N, 3]."""
    x, y = np.floor(u), np.floor(v)
    p, q = (u - x)[:, None], (v - y)[:, None]
    rows = rows_of(image, y, (0, 1), lambda row: linear(at(image, row, x), at(image, row, x + 1), p))
    return np.trunc(linear(*rows, q)).astype(np.uint8)


def rows_of(image: Reals, y: Reals, steps: tuple[int, ...], value: Callable[[Reals], Reals]) -> list[Reals]:
    """Return the value of each row y + step; a row that does not exist has that of the row before it, the first is the nearest one."""
    last = image.shape[0] - 1
    rows = [value(np.clip(y + steps[0], 0, last))]
    for step in steps[1:]:
        row = y + step
        exists = ((row >= 0) & (row <= last))[:, None]
        rows.append(np.where(exists, value(np.clip(row, 0, last)), rows[-1]))
    return rows


def at(image: Reals, row: Reals, column: Reals) -> Reals:
    """Return pixels, float64 [N, 3]; columns are limited to those of the image."""
    return image[row.astype(int), np.clip(column, 0, image.shape[1] - 1).astype(int)]


def cubic(g: Reals, h: Reals, i: Reals, j: Reals, t: Reals) -> Reals:
    p2 = -g + i
    p3 = ((2 * (g - h)) + i) - j
    p4 = ((-g + h) - i) + j
    return h + t * (p2 + t * (p3 + t * p4))


def linear(g: Reals, h: Reals, t: Reals) -> Reals:
    return g + (h - g) * t


# The erased box


def erase(pixels: Pixels, erased: Erase) -> Pixels:
    top, left, height, width = erased.box
    words = stream_of_bytes(erased.noise.to_bytes(8, "little"))
    numbers = philox((next(words), next(words)), 3 * height * width)
    result = pixels.copy()
    for channel in range(3):
        of_channel = numbers[channel * height * width :][: height * width].reshape(height, width)
        result[top : top + height, left : left + width, channel] = noise_levels()[channel][of_channel]
    return result


def philox(key: tuple[int, int], count: int) -> NDArray[np.int64]:
    """Return so many 16-bit numbers of Philox4x64-10 (Salmon and others, SC 2011)."""
    numbers = []
    for counter in range(1, -(-count // 16) + 1):
        c0, c1, c2, c3 = counter, 0, 0, 0
        k0, k1 = key
        for _ in range(10):
            first, second = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
            c0, c1, c2, c3 = second >> 64 ^ c1 ^ k0, second % 2**64, first >> 64 ^ c3 ^ k1, first % 2**64
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) % 2**64, (k1 + 0xBB67AE8584CAA73B) % 2**64
        numbers += [word >> shift & 0xFFFF for word in (c0, c1, c2, c3) for shift in (0, 16, 32, 48)]
    return np.array(numbers[:count], np.int64)


@cache
def noise_levels() -> Pixels:
    """Return the level of each 16-bit number, uint8 [3, 65536]."""
    quantiles = [as241(Decimal(2 * i + 1) / 2**17) for i in range(2**15, 2**16)]
    quantiles = [-q for q in reversed(quantiles)] + quantiles  # it is odd about one half
    levels = [
        [min(max(round(255 * (Decimal(mean) + Decimal(std) * q)), 0), 255) for q in quantiles]
        for mean, std in zip(MEAN, STD, strict=True)
    ]
    return np.array(levels, np.uint8)


# --- section 2: drawing ---------------------------------------------------------------------------------------

OPERATIONS = [
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast", "Brightness", "Sharpness",
    "ShearX", "ShearY", "TranslateXRel", "TranslateYRel",
]  # fmt: skip
TAKE_INC = {"Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness"}


class Stream:
    """The random words of one decision, and what is drawn from them (docs/format-v1.md, section 6)."""

    def __init__(self, *name: str) -> None:
        parts = [part.encode() for part in name]
        self.words = stream_of_bytes(b"".join(struct.pack("<I", len(part)) + part for part in parts))

    def word(self) -> int:
        return next(self.words)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * ((self.word() >> 11) * 2.0**-53)

    def chance(self, probability: float) -> bool:
        return self.uniform(0.0, 1.0) < probability

    def integer(self, stop: int) -> int:
        return (self.word() * stop) >> 64

    def normal(self, mean: float, deviation: float) -> float:
        return mean + deviation * normal_32(min(((self.word() >> 11) + 0.5) * 2.0**-53, 1 - 2.0**-53))


def stream_of_bytes(name: bytes) -> Iterator[int]:
    """Yield the 64-bit words of a stream, which is BLAKE2b in counter mode."""
    seed = hashlib.blake2b(name, digest_size=32).digest()
    block = 0
    while True:
        yield from struct.unpack("<8Q", hashlib.blake2b(seed + struct.pack("<Q", block)).digest())
        block += 1


def draw_by_definition(recipe: Recipe, key: str, view: int, height: int, width: int) -> View:
    """Draw the parameters of one view of one image of a size."""

    def stream(purpose: str) -> Stream:
        return Stream(recipe.id, key, str(view), purpose)

    if recipe.crop == "center":
        crop, resized, window = centre(recipe, height, width)
    else:
        crop = random_crop(stream("crop"), recipe, height, width)
        resized, window = (recipe.img_size, recipe.img_size), (0, 0)
    layers, draws = recipe.randaugment.layers if recipe.randaugment else 0, stream("interpolation")
    filters: list[Interpolation] = [filter_of(recipe, draws) for _ in range(1 + layers)]
    return View(
        crop=crop,
        resize=resized,
        window=window,
        img_size=recipe.img_size,
        flip=stream("flip").chance(recipe.hflip),
        ops=random_ops(stream("randaug"), recipe.randaugment, filters[1:]),
        erase=random_erase(stream("erase"), recipe),
        interpolation=filters[0],
        renderer=2,
    )


def filter_of(recipe: Recipe, draws: Stream) -> Interpolation:
    if recipe.interpolation == "random":
        return "bilinear" if draws.chance(0.5) else "bicubic"
    return recipe.interpolation


def random_crop(draws: Stream, recipe: Recipe, height: int, width: int) -> Box:
    for _ in range(10):
        area = draws.uniform(*recipe.scale) * height * width
        aspect = exp_32(draws.uniform(log_32(recipe.ratio[0]), log_32(recipe.ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = draws.integer(height - h + 1), draws.integer(width - w + 1)
            return top, left, h, w
    h = min(height, max(1, round(width / recipe.ratio[0])))
    w = min(width, max(1, round(height * recipe.ratio[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def centre(recipe: Recipe, height: int, width: int) -> tuple[Box, tuple[int, int], tuple[int, int]]:
    """Return crop, resize and window of the middle; of a strip only 8 times its shorter side."""
    h, w = min(height, 8 * width), min(width, 8 * height)
    crop = (height - h) // 2, (width - w) // 2, h, w
    shorter = math.floor(recipe.img_size / recipe.crop_pct)
    resized = shorter * h // min(h, w), shorter * w // min(h, w)
    return crop, resized, (round((resized[0] - recipe.img_size) / 2), round((resized[1] - recipe.img_size) / 2))


def random_ops(draws: Stream, settings: RandAugment | None, filters: list[Interpolation]) -> tuple[DrawnOp, ...]:
    if settings is None:
        return ()
    ops = []
    for interpolation in filters:
        name = OPERATIONS[draws.integer(15)]
        applied = draws.chance(settings.prob)
        if settings.magnitude_std > 100:
            level = draws.uniform(0.0, settings.magnitude)
        else:
            level = draws.normal(settings.magnitude, settings.magnitude_std)
        level = min(max(level, 0.0), settings.magnitude_max)
        negate = draws.chance(0.5)
        if applied:
            full = f"{name}Increasing" if settings.increasing and name in TAKE_INC else name
            ops.append(DrawnOp(full, argument_of(name, level, negate, settings.increasing), interpolation))
    return tuple(ops)


def argument_of(name: str, level: float, negate: bool, increasing: bool) -> float:
    t, s = level / 10, -1.0 if negate else 1.0
    match name:
        case "Rotate":
            return s * t * 30
        case "Posterize":
            return 4 - math.trunc(t * 4) if increasing else math.trunc(t * 4)
        case "Solarize":
            return 256 - min(256, math.trunc(t * 256)) if increasing else min(256, math.trunc(t * 256))
        case "SolarizeAdd":
            return min(128, math.trunc(t * 110))
        case "Color" | "Contrast" | "Brightness" | "Sharpness":
            return max(0.1, 1 + s * t * 0.9) if increasing else t * 1.8 + 0.1
        case "ShearX" | "ShearY":
            return s * t * 0.3
        case "TranslateXRel" | "TranslateYRel":
            return s * t * 0.45
    return 0.0


def random_erase(draws: Stream, recipe: Recipe) -> Erase | None:
    if not draws.chance(recipe.reprob):
        return None
    size = recipe.img_size
    for _ in range(10):
        area = draws.uniform(0.02, 1 / 3) * size * size
        aspect = exp_32(draws.uniform(log_32(0.3), log_32(1 / 0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < size and w < size:
            top, left = draws.integer(size - h + 1), draws.integer(size - w + 1)
            return Erase(box=(top, left, h, w), noise=draws.word())
    return None


# --- exact functions, rounded once ----------------------------------------------------------------------------


def exp_32(value: float) -> float:
    """Return e**value, to 2**-32."""
    return on_grid(Decimal(value).exp(DIGITS), 32)


@cache
def log_32(value: float) -> float:
    """Return the natural logarithm, to 2**-32."""
    return on_grid(Decimal(value).ln(DIGITS), 32)


def normal_32(share: float) -> float:
    """Return the normal quantile, to 2**-32."""
    return on_grid(as241(Decimal(share)), 32)


def on_grid(value: Decimal, bits: int) -> float:
    """Return the multiple of 2**-bits that is nearest, half to even."""
    return float(Fraction(round(Fraction(value) * 2**bits), 2**bits))


# Wichura, Applied Statistics 37(3), 1988, PPND16: numerator and denominator, constant term first.
CENTRE = (
    "3.387132872796366608 133.14166789178437745 1971.5909503065514427 13731.693765509461125"
    " 45921.953931549871457 67265.770927008700853 33430.575583588128105 2509.0809287301226727",
    "1 42.313330701600911252 687.1870074920579083 5394.1960214247511077"
    " 21213.794301586595867 39307.89580009271061 28729.085735721942674 5226.495278852854561",
)
NEAR = (
    "1.42343711074968357734 4.6303378461565452959 5.7694972214606914055 3.64784832476320460504"
    " 1.27045825245236838258 0.24178072517745061177 0.0227238449892691845833 0.00077454501427834140764",
    "1 2.05319162663775882187 1.6763848301838038494 0.68976733498510000455"
    " 0.14810397642748007459 0.0151986665636164571966 0.0005475938084995344946 1.05075007164441684324e-9",
)
FAR = (
    "6.6579046435011037772 5.4637849111641143699 1.7848265399172913358 0.29656057182850489123"
    " 0.026532189526576123093 0.001242660947388078438600 2.71155556874348757815e-5 2.01033439929228813265e-7",
    "1 0.59983220655588793769 0.13692988092273580531 0.0148753612908506148525"
    " 7.868691311456132591e-4 1.8463183175100546818e-5 1.4215117583164458887e-7 2.04426310338993978564e-15",
)


def as241(share: Decimal) -> Decimal:
    """Return the normal quantile by AS 241, to about 100 digits."""
    with localcontext(DIGITS):
        q = share - Decimal("0.5")
        if abs(q) <= Decimal("0.425"):
            return q * quotient(CENTRE, Decimal("0.180625") - q * q)
        r = (-min(share, 1 - share).ln()).sqrt()
        value = quotient(NEAR, r - Decimal("1.6")) if r <= 5 else quotient(FAR, r - 5)
        return -value if q < 0 else value


def quotient(polynomials: tuple[str, str], r: Decimal) -> Decimal:
    above, below = (sum((Decimal(c) * r**k for k, c in enumerate(text.split())), Decimal(0)) for text in polynomials)
    return above / below


def cos_sin_15(degrees: float) -> tuple[float, float]:
    """Return cosine and sine of minus so many degrees, rounded to real64, then to 15 decimals, then to real64."""
    theta = Fraction(-(degrees * DEGREE))
    terms = [Fraction(1)]
    for k in range(1, 80):  # 7**80 / 80! is below 10**-50
        terms.append(terms[-1] * theta / k)
    cos, sin = (sum(terms[odd::4]) - sum(terms[odd + 2 :: 4]) for odd in (0, 1))
    return to_15_decimals(float(cos)), to_15_decimals(float(sin))


def to_15_decimals(value: float) -> float:
    return float(Fraction(round(Fraction(value) * 10**15), 10**15))
