"""Image bytes -> pixels: exact, bounded, and with one named error for everything that is not an image.

JPEG goes through simplejpeg (libjpeg-turbo, exact mode: the pixels of Pillow, one and a half times as fast), the rest
through Pillow. The format is chosen by the first bytes, never by the file name. EXIF orientation is not applied.
"""

import io
import threading
import warnings
from collections.abc import Iterator
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
# classification set comes near.
MAX_PIXELS = 89_478_485

JPEG_QUALITY = 95  # of what is encoded here

# Encoders make about ten. Each scan of a progressive JPEG goes over all of its pixels, and may itself be empty: 350 kB of them
# took a minute.
MAX_SCANS = 100

# Where libjpeg-turbo and Pillow make the same RGB. For CMYK and YCCK they do not: Pillow is the reference there.
_TURBO_COLOURS = frozenset({"YCbCr", "Gray"})

_JPEG = b"\xff\xd8\xff"
_SCAN = b"\xff\xda"

# Pillow's warnings can be switched off for the whole process only, so threads take turns.
_PILLOW = threading.Lock()


class _Refused(Exception):
    """Why an image is not read, in our own words."""


def decode(image: bytes, *, key: str) -> NDArray[np.uint8]:
    """Decode one JPEG, PNG or WebP image.

    Args:
        image: the encoded file.
        key: the sample key, for the error.

    Returns:
        uint8 [H, W, 3], RGB, C-contiguous.

    Raises:
        BadImageError: whatever the bytes are, no other error leaves this function.
    """
    with _named_errors(key):
        if _format_of(image) == "JPEG":
            return _decode_jpeg(image)
        return _decode_pillow(image)


def decode_around(image: bytes, box: Box, *, key: str) -> tuple[NDArray[np.uint8], int, int]:
    """Decode a box of an image, and as much around it as the decoder needs.

    Args:
        image: the encoded file; one that decodes as a whole, as `turbojpeg.decode_region` says.
        box: top, left, height, width; inside of the image.
        key: the sample key, for the error.

    Returns:
        uint8 [H, W, 3], RGB, C-contiguous, a part of the image that holds the box, and its top and left in the image.

    Raises:
        BadImageError: the image cannot be decoded.
    """
    part = decode_region(image, box) if image[:3] == _JPEG else None
    return part or (decode(image, key=key), 0, 0)


def shrink(image: bytes, shorter: int, *, key: str) -> bytes:
    """Return an image with its shorter side resized to `shorter` pixels, as a JPEG of quality 95 (4:2:0), RGB.

    An image that is not larger is returned as it is, byte for byte: nothing is enlarged, or encoded again for nothing.

    Args:
        image: the encoded file.
        shorter: pixels.
        key: the sample key, for the error.

    Raises:
        BadImageError: the image cannot be decoded.
    """
    pixels = decode(image, key=key)
    height, width = pixels.shape[:2]
    least = min(height, width)
    if least <= shorter:
        return image
    size = (shorter * width // least, shorter * height // least)
    with _named_errors(key):  # Pillow's bicubic is antialiased
        resized = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
        return encode(np.asarray(resized), "JPEG", subsampling="4:2:0")


def encode(
    pixels: NDArray[np.uint8], kind: Literal["PNG", "JPEG"], *, subsampling: Literal["4:4:4", "4:2:0"] = "4:4:4"
) -> bytes:
    """Encode pixels, uint8 [H, W, 3], RGB: as PNG, which loses nothing, or as JPEG of quality 95."""
    buffer = io.BytesIO()
    options = {"quality": JPEG_QUALITY, "subsampling": subsampling} if kind == "JPEG" else {}
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def image_size(image: bytes, *, key: str) -> tuple[int, int]:
    """Return (height, width) from the header alone; more than MAX_PIXELS is an error here too."""
    with _named_errors(key):
        if _format_of(image) == "JPEG" and (header := _jpeg_header(image)):
            return header[0], header[1]
        with _opened(image) as opened:
            return opened.height, opened.width


@contextmanager
def _named_errors(key: str) -> Iterator[None]:
    try:
        yield
    except _Refused as refused:
        raise BadImageError(key, str(refused)) from None
    except Exception as error:  # Pillow's readers raise eight types, KeyError and struct.error among them
        raise BadImageError(key, f"damaged or truncated: {error}") from error


def _format_of(image: bytes) -> str:
    if image[:3] == _JPEG:
        if (scans := image.count(_SCAN)) > MAX_SCANS:
            raise _Refused(f"too many scans: {scans}, at most {MAX_SCANS} are read")
        return "JPEG"
    if image[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "WEBP"
    if not image:
        raise _Refused("empty file")
    raise _Refused(f"not a JPEG, PNG or WebP image: starts with {bytes(image[:8])!r}")


def _check_pixels(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise _Refused(f"too many pixels: {height}x{width} = {height * width}, at most {MAX_PIXELS} are read")


def _jpeg_header(image: bytes) -> tuple[int, int, str] | None:
    """Return (height, width, colour space), or None where simplejpeg does not know the chroma subsampling."""
    try:
        height, width, colour, _ = simplejpeg.decode_jpeg_header(image)
    except ValueError as error:
        if "subsampling" in str(error):  # legal but rare factors, which Pillow reads; or the header is cut
            return None
        raise
    height, width = int(height), int(width)
    _check_pixels(height, width)
    return height, width, colour


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
    """Open with Pillow, in the one format that the first bytes name, silently; no pixel is decoded yet."""
    with _PILLOW, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            opened = Image.open(io.BytesIO(image), formats=(_format_of(image),))
        except UnidentifiedImageError:  # its text is the address of a buffer
            raise _Refused("damaged or truncated header") from None
        except Image.DecompressionBombError as error:
            raise _Refused(f"too many pixels, at most {MAX_PIXELS} are read: {error}") from None
        with opened:
            _check_pixels(opened.height, opened.width)
            yield opened
