"""Image bytes to pixels: the same pixels as Pillow, or a BadImageError that says why."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import BadImageError
from pipeline.images.decode import MAX_PIXELS, _has_one_scan, decode, image_size


def picture(height: int = 48, width: int = 70) -> Image.Image:
    """Return smooth colours with some noise: every frequency and every channel differs."""
    y, x = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(7).integers(0, 40, (height, width, 3))
    waves = np.stack([3 * x, 4 * y, 2 * x + y], axis=-1) % 215
    return Image.fromarray((waves + noise).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def as_pillow(image: bytes) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.array(Image.open(io.BytesIO(image)).convert("RGB"))


def png_header(height: int, width: int) -> bytes:
    """Return a PNG of any size in 1 bit grey, whose pixels are missing."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    header = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 9) + b"IDAT" + b"\0" * 9


def vp8x_header(height: int, width: int) -> bytes:
    """Return an extended WebP of which only the canvas size is there."""
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + canvas
    return b"RIFF" + struct.pack("<I", len(body)) + body


def resized_jpeg(image: bytes, height: int, width: int) -> bytes:
    """Return the JPEG with another size written in its frame header."""
    frame = image.index(b"\xff\xc0")
    return image[: frame + 5] + struct.pack(">HH", height, width) + image[frame + 9 :]


def with_second_sampling(image: bytes, factors: int) -> bytes:
    """Return the JPEG with other sampling factors written for its second component."""
    position = image.index(b"\xff\xc0") + 14
    return image[:position] + bytes([factors]) + image[position + 1 :]


JPEG = encoded(picture(), "JPEG", quality=90)
PROGRESSIVE = encoded(picture(), "JPEG", progressive=True)
PNG = encoded(picture(), "PNG")
WEBP = encoded(picture(), "WEBP")
PALETTE = picture().quantize(16)

PIXELS = [
    # name, bytes
    ("jpeg 4:2:0", encoded(picture(), "JPEG", subsampling=2)),
    ("jpeg 4:2:2", encoded(picture(), "JPEG", subsampling=1)),
    ("jpeg 4:4:4", encoded(picture(), "JPEG", subsampling=0)),
    ("jpeg grey", encoded(picture().convert("L"), "JPEG")),
    ("jpeg progressive", PROGRESSIVE),
    ("jpeg odd size", encoded(picture(33, 17), "JPEG", subsampling=2)),
    ("jpeg one pixel", encoded(picture(1, 1), "JPEG")),
    ("jpeg long", encoded(picture(1, 5000), "JPEG")),
    ("jpeg with bytes behind its end", JPEG + b"camera maker's notes"),
    # turbo's own CMYK to RGB differs from Pillow's
    ("jpeg cmyk", encoded(picture().convert("CMYK"), "JPEG")),
    # sampling factors for which simplejpeg has no name
    ("jpeg 2x2, 2x1, 1x1", with_second_sampling(encoded(picture(), "JPEG", subsampling=2), 0x21)),
    # components stored as RGB, without the YCbCr transform
    ("jpeg rgb", encoded(picture(), "JPEG", keep_rgb=True)),
    ("png", PNG),
    ("png grey", encoded(picture().convert("L"), "PNG")),
    ("png 1 bit", encoded(picture().convert("1"), "PNG")),
    ("png 16 bit", encoded(Image.fromarray(np.arange(3000, dtype=np.uint16).reshape(50, 60) * 20), "PNG")),
    ("png alpha", encoded(picture().convert("RGBA"), "PNG")),
    # Pillow warns about this one: transparency of a palette as bytes
    ("png palette, transparent", encoded(PALETTE, "PNG", transparency=bytes(range(16)))),
    ("webp", WEBP),
    ("webp lossless, alpha", encoded(picture().convert("RGBA"), "WEBP", lossless=True)),
    # the first frame counts
    ("webp animated", encoded(picture(), "WEBP", save_all=True, append_images=[picture().rotate(90)])),
]


@pytest.mark.parametrize(("name", "image"), PIXELS, ids=[name for name, _ in PIXELS])
def test_pixels_are_those_of_pillow(name, image):
    pixels = decode(image, key=name)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, as_pillow(image))
    assert image_size(image, key=name) == pixels.shape[:2]


def test_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert decode(encoded(picture(20, 30), "JPEG", exif=exif), key="k").shape == (20, 30, 3)


def test_no_warning_leaks_and_the_callers_filters_stay():
    transparent = encoded(PALETTE, "PNG", transparency=bytes(range(16)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        decode(transparent, key="k")
        with pytest.raises(BadImageError):
            decode(png_header(10_000, 10_000), key="k")
        assert warnings.filters == before
    assert caught == []


REFUSED = [
    # bytes, what the reason says
    (b"", "empty file"),
    # an error page saved under the image's name
    (b"<html><body>404", r"not a JPEG, PNG or WebP image: starts with b'<html><b'"),
    # formats whose readers are larger, or start other programs (EPS)
    (encoded(picture(), "GIF"), "starts with b'GIF87a"),
    (encoded(picture(), "BMP"), "starts with b.BM"),
    (b"%!PS-Adobe-3.0 EPSF-3.0", "starts with b'%!PS-Ado'"),
    # a WAV file is RIFF too
    (b"RIFF\x24\0\0\0WAVEfmt ", "starts with b'RIFF"),
    (JPEG[:3], "damaged or truncated"),
    (JPEG[:-2], "damaged or truncated"),
    (JPEG[:-20], "damaged or truncated"),
    (JPEG[: len(JPEG) // 2], "damaged or truncated"),
    (PROGRESSIVE[: len(PROGRESSIVE) // 2], "damaged or truncated"),
    (encoded(picture().convert("CMYK"), "JPEG")[:-500], "damaged or truncated"),
    (PNG[: len(PNG) // 2], "damaged or truncated"),
    (PNG[:20], "damaged or truncated"),
    (WEBP[: len(WEBP) // 2], "damaged or truncated"),
    # 100 Mpx: Pillow only warns
    (png_header(10_000, 10_000), f"too many pixels: 10000x10000 = 100000000, at most {MAX_PIXELS} are read"),
    # 196 Mpx: Pillow raises its own error
    (png_header(14_000, 14_000), rf"too many pixels, at most {MAX_PIXELS} are read.*196000000"),
    # Pillow before 13 refuses it in its own words
    (
        vp8x_header(16_000, 16_000),
        rf"too many pixels, at most {MAX_PIXELS} are read.*256000000|could not create decoder object",
    ),
    (resized_jpeg(JPEG, 65_500, 65_500), "too many pixels: 65500x65500 = 4290250000"),
]


@pytest.mark.parametrize(("image", "reason"), REFUSED)
def test_what_is_not_a_whole_image_is_refused_with_its_key_and_a_reason(image, reason):
    with pytest.raises(BadImageError, match=reason) as caught:
        decode(image, key="n01440764/n01440764_10026")
    assert caught.value.key == "n01440764/n01440764_10026"
    assert str(caught.value).startswith("image 'n01440764/n01440764_10026': ")
    assert "object at" not in caught.value.reason  # the same text every time: no address in it


def test_an_image_of_exactly_the_limit_is_not_refused_for_its_size():
    assert 9_459 * 9_459 < MAX_PIXELS < 9_460 * 9_460
    assert image_size(png_header(9_459, 9_459), key="k") == (9_459, 9_459)
    with pytest.raises(BadImageError, match="too many pixels"):
        image_size(png_header(9_460, 9_460), key="k")


@pytest.mark.parametrize("image", [JPEG, PROGRESSIVE], ids=["baseline", "progressive"])
def test_every_cut_of_a_jpeg_is_an_error(image):
    for length in range(0, len(image), 5):
        with pytest.raises(BadImageError):
            decode(image[:length], key="k")


def scans_of(image: bytes) -> bytes:
    return image[image.index(b"\xff\xda") : -2]


def of_one_component(image: bytes) -> bytes:
    """Return a JPEG of three components whose first scan says that it has only one of them."""
    scan = image.index(b"\xff\xda") + 4
    return image[:scan] + b"\1" + image[scan + 1 :]


GREY = encoded(picture().convert("L"), "JPEG")
ONE_SCAN = [
    # name, JPEG, whether the header says that there is one scan
    ("4:2:0", JPEG, True),
    ("4:4:4", encoded(picture(), "JPEG", subsampling=0), True),
    ("grey", GREY, True),
    ("cmyk", encoded(picture().convert("CMYK"), "JPEG"), True),
    ("restarts", encoded(picture(), "JPEG", restart_marker_rows=1), True),
    ("comment, profile", encoded(picture(), "JPEG", comment=b"\xff\xda", icc_profile=b"p" * 70_000), True),
    # the marker in an earlier segment is not a scan
    ("thumbnail", JPEG[:2] + b"\xff\xe1" + struct.pack(">H", len(JPEG) + 2) + JPEG + JPEG[2:], True),
    ("progressive", PROGRESSIVE, False),
    ("a scan for each component", of_one_component(JPEG), False),
    # legal, but not worth understanding
    ("fill bytes", JPEG[:2] + b"\xff" + JPEG[2:], False),
    ("bytes between segments", JPEG[:2] + b"\0" + JPEG[2:], False),
    ("no frame", JPEG[:2] + scans_of(JPEG), False),
    ("arithmetic", JPEG.replace(b"\xff\xc0", b"\xff\xc9", 1), False),
    ("header alone", JPEG[: JPEG.index(b"\xff\xda")], False),
    ("cut in its scan header", JPEG[: JPEG.index(b"\xff\xda") + 5], False),
    ("start alone", JPEG[:3], False),
    ("no length", JPEG[:2] + b"\xff\xe1\0\0" + JPEG[2:], False),
]


@pytest.mark.parametrize(("name", "image", "one"), ONE_SCAN, ids=[name for name, *_ in ONE_SCAN])
def test_the_header_says_whether_there_is_one_scan(name, image, one):
    assert _has_one_scan(image) == one


TOO_MANY = "too many scans: 101, at most 100 are read"


@pytest.mark.parametrize("image", [PROGRESSIVE, of_one_component(JPEG)], ids=["progressive", "by component"])
@pytest.mark.parametrize(("scans", "reason"), [(101, TOO_MANY), (100, "damaged or truncated")])
def test_a_jpeg_of_more_than_100_scans_is_refused_for_their_number(image, scans, reason):
    """A hundred of them are given to the decoder, which does not accept one twice."""
    more = scans - image.count(b"\xff\xda")
    last = image[image.rindex(b"\xff\xda") : -2]
    with pytest.raises(BadImageError, match=reason):
        decode(image[:-2] + more * last + image[-2:], key="k")


@pytest.mark.parametrize("image", [JPEG, GREY], ids=["colour", "grey"])
def test_what_follows_a_scan_of_the_whole_image_is_not_decoded(image):
    """So the number of these scans does not matter: the decoder refuses the second one."""
    with pytest.raises(BadImageError, match="damaged or truncated"):
        decode(image[:-2] + 2000 * scans_of(image) + image[-2:], key="k")


def test_damage_is_not_reported_by_the_c_library_on_stderr(capfd):
    with pytest.raises(BadImageError):
        decode(JPEG[:-20], key="k")
    with pytest.raises(BadImageError):
        decode(JPEG[:300] + b"\xff\xd9\0\0" + JPEG[300:], key="k")
    assert capfd.readouterr() == ("", "")


def outcome(image: bytes) -> None:
    """Decode; anything but an array or a BadImageError fails the test."""
    try:
        pixels = decode(image, key="k")
    except BadImageError:
        return
    assert pixels.ndim == 3
    assert image_size(image, key="k") == pixels.shape[:2]


@given(st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x40\0\0\0WEBP"]), st.binary(max_size=300))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_random_bytes_give_an_array_or_a_bad_image_error(magic, tail):
    outcome(magic + tail)


FILES = [JPEG, PROGRESSIVE, PNG, WEBP, encoded(picture().convert("CMYK"), "JPEG"), encoded(PALETTE, "PNG")]


@given(st.sampled_from(FILES), st.lists(st.tuples(st.integers(0), st.integers(0, 7)), max_size=4), st.integers(0, 3))
@settings(max_examples=500, deadline=None, derandomize=True)
def test_flipped_and_cut_files_give_an_array_or_a_bad_image_error(image, flips, cut):
    damaged = bytearray(image)
    for position, bit in flips:
        # Half of the flips go to the first 700 bytes, where the headers and tables are.
        damaged[position % (700 if bit % 2 else len(damaged))] ^= 1 << bit
    outcome(bytes(damaged[: len(damaged) - cut * len(damaged) // 4]))
