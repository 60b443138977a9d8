"""Image bytes -> pixels: exact, limited in size, and with BadImageError for everything that is not an image.

simplejpeg decodes JPEG (libjpeg-turbo, exact mode: the same pixels as Pillow, 1.5 times as fast), and Pillow decodes the
other formats. The first bytes decide the format, never the file name. EXIF orientation is not applied.
"""

import io
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pipeline.errors import BadImageError
from pipeline.images.samples import Box
from pipeline.images.turbojpeg import decode_region

# Pillow's own limit (Image.MAX_IMAGE_PIXELS: 256 MiB of RGB). A 24 kB PNG can unpack to 560 MiB; no photograph of a
# classification set is nearly as large.
MAX_PIXELS = 89_478_485

JPEG_QUALITY = 95  # quality of the JPEG files that are encoded here, unless the user chooses another

# Encoders write about ten. The decoder goes over all pixels for each scan of a progressive JPEG, even for an empty one: 350 kB
# of empty scans took a minute.
MAX_SCANS = 100

# Colour spaces for which libjpeg-turbo and Pillow return the same RGB. For CMYK and YCCK they differ: Pillow is the reference.
_TURBO_COLOURS = frozenset({"YCbCr", "Gray"})

_KERNELS = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}

_JPEG = b"\xff\xd8\xff"
_SCAN = b"\xff\xda"
# Frames of a JPEG that is neither progressive nor lossless nor arithmetically coded.
_ONE_PASS = frozenset({0xC0, 0xC1})
# Markers of a usual header: these frames, Huffman tables, scan, quantisation tables, restart interval, APP0 to APP15, comment.
_SEGMENTS = _ONE_PASS | {0xC4, _SCAN[1], 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE}

# Pillow's warnings can only be switched off for the whole process, so threads take turns.
_PILLOW = threading.Lock()


class _Refused(Exception):
    """The reason why an image is refused, as our own message."""


def decode(image: bytes, *, key: str) -> NDArray[np.uint8]:
    """Decode one JPEG, PNG or WebP image.

    Args:
        image: the encoded file.
        key: the sample key, for the error.

    Returns:
        uint8 [H, W, 3], RGB, C-contiguous.

    Raises:
        BadImageError: the image cannot be decoded; no bytes cause any other error.
    """
    with _named_errors(key):
        return _decode_whole(image, _format_to_decode(image))


def decode_for(image: bytes, boxes: Sequence[Box], *, key: str) -> tuple[NDArray[np.uint8], int, int]:
    """Decode what some boxes of an image need: the smallest part that contains all of them, with a margin, or the whole.

    Args:
        image: the encoded file; the whole image must be known to decode, see `turbojpeg.decode_region`.
        boxes: one or more of top, left, height, width; inside the image, whose size `image_size` returns.
        key: the sample key, for the error.

    Returns:
        the part of the image that contains the boxes, uint8 [H, W, 3], RGB, C-contiguous; its top and its left in the image.

    Raises:
        BadImageError: the image cannot be decoded.
    """
    with _named_errors(key):
        kind = _format_to_decode(image)
    if kind == "JPEG" and (part := decode_region(image, _around_all(boxes))):
        return part
    with _named_errors(key):
        return _decode_whole(image, kind), 0, 0


def shrink(
    image: bytes,
    shorter: int,
    *,
    key: str,
    kernel: Literal["bicubic", "lanczos"] = "bicubic",
    quality: int = JPEG_QUALITY,
) -> bytes:
    """Return an image with its shorter side resized to `shorter` pixels, as a JPEG (4:2:0), RGB.

    An image that is not larger is returned byte for byte: no image is enlarged, or encoded again without need.

    Args:
        image: the encoded file.
        shorter: length of the shorter side, pixels.
        key: the sample key, for the error.
        kernel: Pillow's kernel for the resize; it is antialiased.
        quality: JPEG quality, 1..100.

    Raises:
        BadImageError: the image cannot be decoded.
    """
    pixels = decode(image, key=key)
    height, width = pixels.shape[:2]
    least = min(height, width)
    if least <= shorter:
        return image
    size = (shorter * width // least, shorter * height // least)
    with _named_errors(key):
        resized = Image.fromarray(pixels).resize(size, _KERNELS[kernel])
        return encode(np.asarray(resized), "JPEG", subsampling="4:2:0", quality=quality)


def encode(
    pixels: NDArray[np.uint8],
    kind: Literal["PNG", "JPEG"],
    *,
    subsampling: Literal["4:4:4", "4:2:0"] = "4:4:4",
    quality: int = JPEG_QUALITY,
) -> bytes:
    """Return encoded pixels (uint8 [H, W, 3], RGB, or [H, W], grey): as lossless PNG, or as JPEG of a quality in 1..100."""
    buffer = io.BytesIO()
    options = {"quality": quality, "subsampling": subsampling} if kind == "JPEG" else {}
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def image_size(image: bytes, *, key: str) -> tuple[int, int]:
    """Return (height, width) from the header alone; more than MAX_PIXELS pixels is an error, as in `decode`."""
    with _named_errors(key):
        if _format_of(image) == "JPEG" and (header := _jpeg_header(image)):
            return header[0], header[1]
        with _opened(image) as opened:
            return opened.height, opened.width


def _around_all(boxes: Sequence[Box]) -> Box:
    """Return the smallest box that contains all boxes."""
    top, left = min(box[0] for box in boxes), min(box[1] for box in boxes)
    bottom, right = max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes)
    return top, left, bottom - top, right - left


@contextmanager
def _named_errors(key: str) -> Iterator[None]:
    try:
        yield
    except _Refused as refused:
        raise BadImageError(key, str(refused)) from None
    except Exception as error:  # Pillow's readers raise eight types of error, including KeyError and struct.error
        raise BadImageError(key, f"damaged or truncated: {error}") from error


def _format_of(image: bytes) -> str:
    if image[:3] == _JPEG:
        return "JPEG"
    if image[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "WEBP"
    if not image:
        raise _Refused("empty file")
    raise _Refused(f"not a JPEG, PNG or WebP image: starts with {bytes(image[:8])!r}")


def _format_to_decode(image: bytes) -> str:
    """Return the format; a JPEG of too many scans is refused."""
    kind = _format_of(image)
    if kind == "JPEG" and not _has_one_scan(image) and (scans := image.count(_SCAN)) > MAX_SCANS:
        raise _Refused(f"too many scans: {scans}, at most {MAX_SCANS} are read")
    return kind


def _has_one_scan(image: bytes) -> bool:
    """Return whether the header of a JPEG says that its first scan has all of the image; False if the header is unusual.

    To count the markers in all bytes takes a twelfth of the time of decoding.
    """
    position, components = 2, 0
    while position + 10 <= len(image) and image[position] == 0xFF and image[position + 1] in _SEGMENTS:
        marker = image[position + 1]
        if marker == _SCAN[1]:
            return image[position + 4] == components
        if marker in _ONE_PASS:
            components = image[position + 9]
        position += 2 + int.from_bytes(image[position + 2 : position + 4], "big")
    return False


def _check_pixels(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise _Refused(f"too many pixels: {height}x{width} = {height * width}, at most {MAX_PIXELS} are read")


def _jpeg_header(image: bytes) -> tuple[int, int, str] | None:
    """Return (height, width, colour space), or None if simplejpeg does not know the chroma subsampling."""
    try:
        height, width, colour, _ = simplejpeg.decode_jpeg_header(image)
    except ValueError as error:
        if "subsampling" in str(error):  # factors that are legal but rare (Pillow reads them), or a cut header
            return None
        raise
    height, width = int(height), int(width)
    _check_pixels(height, width)
    return height, width, colour


def _decode_whole(image: bytes, kind: str) -> NDArray[np.uint8]:
    return _decode_jpeg(image) if kind == "JPEG" else _decode_pillow(image)


def _decode_jpeg(image: bytes) -> NDArray[np.uint8]:
    header = _jpeg_header(image)
    if header is None or header[2] not in _TURBO_COLOURS:
        return _decode_pillow(image)
    return simplejpeg.decode_jpeg(image, "RGB", fastdct=False, fastupsample=False, strict=True)


def _decode_pillow(image: bytes) -> NDArray[np.uint8]:
    with _opened(image) as opened:
        return np.array(opened.convert("RGB"))


@contextmanager
def _opened(image: bytes) -> Iterator[Image.Image]:
    """Open an image with Pillow, without warnings, as the format of its first bytes; no pixel is decoded yet."""
    with _PILLOW, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            opened = Image.open(io.BytesIO(image), formats=(_format_of(image),))
        except UnidentifiedImageError:  # its message is only the address of a buffer
            raise _Refused("damaged or truncated header") from None
        except Image.DecompressionBombError as error:
            raise _Refused(f"too many pixels, at most {MAX_PIXELS} are read: {error}") from None
        with opened:
            _check_pixels(opened.height, opened.width)
            yield opened
