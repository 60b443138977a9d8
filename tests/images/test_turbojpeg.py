"""A decoded region is a slice of the decoded image, bit for bit; and where it cannot be, the whole image is decoded."""

import io
import random
import tarfile
from collections import Counter
from functools import partial

import numpy as np
import pytest
from PIL import Image
from support.builders import encoded, photo, shared_data

from pipeline.errors import BadImageError
from pipeline.images import turbojpeg
from pipeline.images.decode import decode, decode_for, image_size
from pipeline.images.samples import Box
from pipeline.pixels.render import draw_encoded, render, render_into
from pipeline.settings.files import load_recipe
from pipeline.views.view import draw_view


@pytest.fixture
def installed():
    if not turbojpeg.is_installed():
        pytest.skip("no TurboJPEG library of version 3 is installed: pip install 'deit-cli[region]'")


@pytest.fixture
def always(installed, monkeypatch):
    """Regions are decoded also where it does not pay."""
    monkeypatch.setattr(turbojpeg, "_LEAST_PIXELS", 0)
    monkeypatch.setattr(turbojpeg, "_MOST_TIME", 2.0)


def noisy(height: int, width: int) -> Image.Image:
    """A photo with noise in every channel, so that each pixel's chroma differs from its neighbours'."""
    noise = np.random.default_rng(height).integers(-40, 40, (height, width, 3))
    return Image.fromarray(np.clip(photo(width, height, max(width, 5))[:, :width] + noise, 0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88, **options)
    return buffer.getvalue()


def photographs() -> list[bytes]:
    with tarfile.open(next(shared_data("imagenet-sample").glob("*.tar"))) as tar:
        return [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]  # pyright: ignore[reportOptionalMemberAccess]


def assert_slices(image: bytes, boxes: list[Box]) -> bool:
    """Check that the part for some boxes has their pixels in the whole image; return whether it is smaller than that."""
    whole = decode(image, key="k")
    pixels, y, x = decode_for(image, boxes, key="k")
    for top, left, tall, wide in boxes:
        got = pixels[top - y : top - y + tall, left - x : left - x + wide]
        np.testing.assert_array_equal(got, whole[top : top + tall, left : left + wide], err_msg=f"{boxes}")
    return pixels.shape != whole.shape


def boxes(height: int, width: int, count: int = 40):
    """Return the whole image, its four corners, and boxes at random."""
    numbers = random.Random(height * width)
    yield 0, 0, height, width
    yield from [(0, 0, 1, 1), (height - 1, 0, 1, 1), (0, width - 1, 1, 1), (height - 1, width - 1, 1, 1)]
    for _ in range(count):
        top, left = numbers.randrange(height), numbers.randrange(width)
        yield top, left, numbers.randint(1, height - top), numbers.randint(1, width - left)


ENCODINGS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "restarts after rows": {"restart_marker_rows": 1},
    "restarts after blocks": {"restart_marker_blocks": 3},
    "optimised": {"optimize": True},
}


@pytest.mark.parametrize("encoding", [*ENCODINGS, "grey"])
@pytest.mark.parametrize(("height", "width"), [(1, 40), (17, 1), (8, 8), (16, 16), (33, 47), (241, 321)])
def test_a_region_is_the_slice_of_the_whole(always, encoding, height, width):
    picture = noisy(height, width)
    image = jpeg(picture.convert("L")) if encoding == "grey" else jpeg(picture, **ENCODINGS[encoding])
    whole = decode(image, key="k")
    for top, left, tall, wide in boxes(height, width):
        part = turbojpeg.decode_region(image, (top, left, tall, wide))
        assert part is not None
        pixels, y, x = part
        got = pixels[top - y : top - y + tall, left - x : left - x + wide]
        np.testing.assert_array_equal(
            got, whole[top : top + tall, left : left + wide], err_msg=f"{top, left, tall, wide}"
        )


def test_the_part_for_several_crops_has_the_pixels_of_the_whole_photograph(installed):
    recipe, smaller = load_recipe("deit"), Counter()
    for number, image in enumerate(photographs()):
        height, width = image_size(image, key="photo")
        for views in (1, 2, 3):
            drawn = [draw_view(recipe, f"{number}", view, height=height, width=width) for view in range(views)]
            smaller[views] += assert_slices(image, [view.crop for view in drawn])
    assert smaller[1] > smaller[2] > smaller[3] > 60  # of 125


@pytest.mark.parametrize("encoding", [*ENCODINGS, "grey", "progressive"])
@pytest.mark.parametrize(("height", "width"), [(17, 1), (16, 16), (33, 47), (241, 321)])
def test_the_part_for_several_boxes_has_the_pixels_of_the_whole(always, encoding, height, width):
    picture = noisy(height, width)
    more = ENCODINGS | {"progressive": {"progressive": True}}
    image = jpeg(picture.convert("L")) if encoding == "grey" else jpeg(picture, **more[encoding])
    several = list(boxes(height, width, 24))[1:]
    smaller = [assert_slices(image, several[first : first + 3]) for first in range(0, len(several), 3)]
    assert any(smaller) == (encoding != "progressive")


def test_the_part_for_several_boxes_is_the_smallest_that_contains_them(always):
    pixels, y, x = decode_for(jpeg(noisy(240, 320)), [(100, 160, 10, 20), (120, 176, 20, 24)], key="k")
    assert pixels.shape == (44, 72, 3)
    assert (y, x) == (98, 144)


def test_less_than_the_whole_is_decoded(always):
    part = turbojpeg.decode_region(jpeg(noisy(240, 320)), (100, 150, 40, 50))
    assert part is not None
    pixels, y, x = part
    assert pixels.shape == (44, 88, 3)  # two rows above and below; from a block before to a block after
    assert (y, x) == (98, 128)


def test_views_of_photographs_are_those_of_the_whole_images(installed, monkeypatch):
    recipe, regions, out = load_recipe("deit"), [], np.empty((1, 224, 224, 3), np.uint8)
    decode_region = turbojpeg.decode_region

    def counted(*args):
        regions.append(decode_region(*args))
        return regions[-1]

    monkeypatch.setattr("pipeline.images.decode.decode_region", counted)
    for number, image in enumerate(photographs()[:60]):
        whole = decode(image, key="photo")
        drawn = draw_view(recipe, f"{number}", number, height=whole.shape[0], width=whole.shape[1])
        draw_encoded(image, recipe, f"{number}", range(number, number + 1), partial(render_into, list(out)))
        np.testing.assert_array_equal(out[0], render(whole, drawn))
    assert sum(part is not None for part in regions) > 50  # nearly every crop is worth it


RARE = {
    "progressive": lambda: jpeg(noisy(200, 200), progressive=True),
    "four colours": lambda: jpeg(noisy(200, 200).convert("CMYK")),
    "a small image": lambda: jpeg(noisy(100, 100)),
    "cut": lambda: jpeg(noisy(200, 200))[:2000],
    "a header alone": lambda: jpeg(noisy(200, 200))[:40],
    "no JPEG": lambda: b"\xff\xd8\xff" + b"0" * 100,
}


@pytest.mark.parametrize("what", RARE)
def test_what_is_no_plain_jpeg_is_left_to_the_other_decoders(installed, what):
    assert turbojpeg.decode_region(RARE[what](), (150, 150, 20, 20)) is None


SAVES = [
    # box in 200 x 200 pixels, whether it is decoded alone
    ((0, 0, 192, 192), True),
    ((0, 0, 194, 194), False),
    # a little of the last rows: most of the time is saved in the inverse DCT
    ((180, 0, 20, 200), True),
    # nothing is saved below, and little above
    ((30, 0, 170, 200), False),
    # nothing is saved at the side, but the entropy decoder stops early
    ((0, 0, 180, 200), True),
]


@pytest.mark.parametrize(("box", "alone"), SAVES)
def test_a_box_is_decoded_alone_if_that_saves_time(installed, box, alone):
    assert (turbojpeg.decode_region(jpeg(noisy(200, 200)), box) is not None) == alone


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_without_the_library_the_whole_image_is_decoded(monkeypatch, kind):
    monkeypatch.setattr(turbojpeg, "_library", lambda: None)
    assert not turbojpeg.is_installed()
    image = encoded(photo(0, 200, 200), kind)
    pixels, top, left = decode_for(image, [(150, 150, 20, 20)], key="k")
    np.testing.assert_array_equal(pixels, decode(image, key="k"))
    assert (top, left) == (0, 0)


def test_a_damaged_image_is_the_same_error_as_everywhere():
    with pytest.raises(BadImageError, match="image 'k'"):
        decode_for(jpeg(noisy(200, 200))[:2000], [(150, 150, 20, 20)], key="k")


def test_an_image_of_many_scans_is_refused_before_a_part_of_it_is_decoded(always):
    image = jpeg(noisy(200, 200))
    scan = image.index(b"\xff\xda")
    # each scan says that it has one of the three components
    one = image[scan : scan + 4] + b"\1" + image[scan + 5 : -2]
    with pytest.raises(BadImageError, match="too many scans: 101, at most 100 are read"):
        decode_for(image[:scan] + 101 * one + image[-2:], [(150, 150, 20, 20)], key="k")


def test_a_library_of_another_version_is_passed_over(monkeypatch):
    turbojpeg._library.cache_clear()
    monkeypatch.setattr(turbojpeg, "_NAMES", ("libm.so.6", "no-such-library.so"))
    monkeypatch.setattr(turbojpeg, "_packaged", lambda: [])
    assert turbojpeg._library() is None
    turbojpeg._library.cache_clear()
