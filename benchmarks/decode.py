"""Decoding photographs: where the time goes, and what is gained by decoding less.

    OMP_NUM_THREADS=1 python benchmarks/decode.py --data imagenet-sample --rounds 9 --out benchmarks/results/decode.json

One process on one core, microseconds of processor time per image; what is compared takes turns at every image, each time in another
order. It needs libjpeg-turbo 3. *whole*: all ways of decoding whole images, and their parts. The last row of a JPEG alone costs the
entropy decoding of all of it, and the inverse DCT of one row of blocks; an eighth of the size costs the entropy decoding, too, and one
pixel of each block. *crops*: the part that the crops of V views of the recipe `deit` need. *packed*: images that were shrunk to a
shorter side of 256 pixels as `pack` does it (Lanczos, 4:2:0), in several encodings. *views*: rendering from photographs, from packed
images, and from the pixels of packed images, which are not decoded.
"""

import ctypes
import io
import os
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import thread_time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from photographs import read_photos
from PIL import Image
from rounds import machine, medians, options, ratios, write_json

from pipeline.images import turbojpeg
from pipeline.images.decode import _around_all, _has_one_scan, decode, decode_for, image_size
from pipeline.images.samples import Box
from pipeline.pixels.render import draw_decoded, draw_encoded, render_into
from pipeline.settings.files import load_recipe
from pipeline.views.view import draw_view

Call = Callable[[], object]
RECIPE = load_recipe("deit", {})
VIEWS = (1, 2, 3, 4, 8)
SHORTER = 256
QUALITIES = (95, 90)
ENCODINGS: dict[str, dict[str, Any]] = {
    "as packed": {},
    "optimised Huffman codes": {"optimize": True},
    "restarts after each row": {"restart_marker_rows": 1},
    "restarts after 4 blocks": {"restart_marker_blocks": 4},
}
_WHOLE, _NOT_SCALED, _EIGHTH = (0, 0, 0, 0), (1, 1), (1, 8)


@dataclass(frozen=True)
class Photo:
    """A JPEG, its height and its width."""

    image: bytes
    height: int
    width: int


class Library:
    """libjpeg-turbo 3, with a decompressor and a buffer that are kept."""

    def __init__(self, photos: Iterable[Photo]) -> None:
        self._library = turbojpeg._library()
        if self._library is None:
            raise SystemExit("no TurboJPEG library of version 3 is installed: pip install 'deit-cli[region]'")
        self._library.tj3SetScalingFactor.argtypes = [ctypes.c_void_p, _Factor]
        self._handle = self._library.tj3Init(turbojpeg._DECOMPRESS)
        self._buffer = np.empty(max(3 * photo.height * photo.width for photo in photos), np.uint8)

    def init(self) -> None:
        """Make a decompressor, and destroy it."""
        self._library.tj3Destroy(self._library.tj3Init(turbojpeg._DECOMPRESS))

    def new_handle(self, photo: Photo) -> None:
        """Decode as simplejpeg does: with a new decompressor, into new memory."""
        with turbojpeg._decompressor(self._library) as handle:
            self._decode(handle, photo, np.empty((photo.height, photo.width, 3), np.uint8))

    def kept_handle(self, photo: Photo) -> None:
        """Decode with the kept decompressor into new memory."""
        self._decode(self._handle, photo, np.empty((photo.height, photo.width, 3), np.uint8))

    def kept_buffer(self, photo: Photo) -> None:
        """Decode with the kept decompressor into the kept buffer."""
        self._decode(self._handle, photo, self._buffer)

    def rows(self, photo: Photo, first: float, last: float) -> None:
        """Decode rows between two shares of the height, at least one, into the kept buffer."""
        top = min(int(first * photo.height), photo.height - 1)
        count = max(1, int(last * photo.height) - top)
        self._decode(self._handle, photo, self._buffer, (0, top, photo.width, count))

    def eighth(self, photo: Photo) -> None:
        """Decode at an eighth of the size."""
        self._decode(self._handle, photo, self._buffer, factor=_EIGHTH)

    def _decode(
        self,
        handle: int,
        photo: Photo,
        into: NDArray[np.uint8],
        region: tuple[int, int, int, int] = _WHOLE,
        factor: tuple[int, int] = _NOT_SCALED,
    ) -> None:
        image, library = photo.image, self._library
        failed = (
            library.tj3DecompressHeader(handle, image, len(image))
            or library.tj3SetScalingFactor(handle, _Factor(*factor))
            or library.tj3SetCroppingRegion(handle, turbojpeg._Region(*region))
            or library.tj3Decompress8(handle, image, len(image), into.ctypes.data, 0, turbojpeg._RGB)
        )
        if failed:
            raise SystemExit("a photograph cannot be decoded by libjpeg-turbo 3")


class _Factor(ctypes.Structure):
    _fields_ = [("numerator", ctypes.c_int), ("denominator", ctypes.c_int)]


def photos_of(images: Iterable[bytes]) -> list[Photo]:
    """Return photographs with their sizes."""
    return [Photo(image, *image_size(image, key="photo")) for image in images]


def ways(library: Library, photos: Sequence[Photo]) -> dict[str, Callable[[Photo], object]]:
    """Return all ways of decoding a whole photograph, and the parts of it."""
    exact = {"colorspace": "RGB", "fastdct": False, "fastupsample": False, "strict": True}
    kept = np.empty(max(3 * photo.height * photo.width for photo in photos), np.uint8)
    return {
        "decode": lambda photo: decode(photo.image, key="photo"),
        "simplejpeg": lambda photo: simplejpeg.decode_jpeg(photo.image, **exact),
        "simplejpeg, kept buffer": lambda photo: simplejpeg.decode_jpeg(photo.image, **exact, buffer=kept),
        "libjpeg-turbo 3, new handle": library.new_handle,
        "libjpeg-turbo 3, kept handle": library.kept_handle,
        "libjpeg-turbo 3, kept handle and buffer": library.kept_buffer,
        "last row": partial(library.rows, first=1, last=1),
        "an eighth of the size": library.eighth,
        "first row": partial(library.rows, first=0, last=0),
        "upper half": partial(library.rows, first=0, last=0.5),
        "lower half": partial(library.rows, first=0.5, last=1),
        "new handle": lambda _: library.init(),
        "image_size": lambda photo: image_size(photo.image, key="photo"),
        "is there one scan?": lambda photo: _has_one_scan(photo.image),
        "count scan markers": lambda photo: photo.image.count(b"\xff\xda"),
        "new memory, written": lambda photo: np.empty((photo.height, photo.width, 3), np.uint8).fill(0),
        "kept memory, written": lambda photo: kept[: 3 * photo.height * photo.width].fill(0),
    }


def crops(photo: Photo, name: str, views: range) -> list[Box]:
    """Return the crops of some views."""
    return [draw_view(RECIPE, name, view, height=photo.height, width=photo.width).crop for view in views]


def in_rounds(count: int, work: Callable[[int], Mapping[str, Sequence[Call]]], to: str) -> dict[str, Any]:
    """Let competitors take turns; return their medians, their ratios to one of them, and all rounds.

    Args:
        count: rounds.
        work: the calls of each competitor for a round, one for each image.
        to: the competitor that ratios are taken to.
    """
    found = []
    for number in range(count):
        found.append(microseconds(work(number)))
        print({name: round(value) for name, value in found[-1].items()}, flush=True)
    return {"median_us": medians(found), "ratio": ratios(found, to, 3), "rounds": found}


def microseconds(work: Mapping[str, Sequence[Call]]) -> dict[str, float]:
    """Return the mean time of each competitor's calls. All work on one image before the next one, each time in another order."""
    numbers, names, spent = random.Random(0), list(work), dict.fromkeys(work, 0.0)
    for image in range(len(work[names[0]])):
        for name in numbers.sample(names, len(names)):
            call = work[name][image]
            began = thread_time()
            call()
            spent[name] += thread_time() - began
    return {name: 1e6 * seconds / len(work[name]) for name, seconds in spent.items()}


def whole(photos: Sequence[Photo], rounds: int) -> dict[str, Any]:
    """Measure all ways of decoding a whole photograph."""
    work = {name: [partial(way, photo) for photo in photos] for name, way in ways(Library(photos), photos).items()}
    return in_rounds(rounds, lambda _: work, "decode")


def of_crops(photos: Sequence[Photo], rounds: int) -> dict[str, Any]:
    """Measure decoding for the crops of 1 to 8 views, other views in each round, and the size of what they need."""

    def work(number: int) -> Mapping[str, Sequence[Call]]:
        several = {f"{views} views": parts(photos, range(number * views, number * views + views)) for views in VIEWS}
        return {"decode": wholes(photo.image for photo in photos)} | several

    areas = {f"{views} views": shares(photos, range(views)) for views in VIEWS}
    return in_rounds(rounds, work, "decode") | {"share_of_area": areas}


def wholes(images: Iterable[bytes]) -> list[Call]:
    """Return the calls that decode whole images."""
    return [partial(decode, image, key="photo") for image in images]


def parts(photos: Sequence[Photo], views: range) -> list[Call]:
    """Return the calls that decode what some views need."""
    return [partial(decode_part, photo.image, crops(photo, str(name), views)) for name, photo in enumerate(photos)]


def decode_part(image: bytes, boxes: list[Box]) -> object:
    """Decode as `draw_encoded` may: the size is asked for first, to draw the views."""
    image_size(image, key="photo")
    return decode_for(image, boxes, key="photo")


def shares(photos: Sequence[Photo], views: range) -> dict[str, float]:
    """Return how much of the images the smallest box around all crops covers."""
    found = []
    for name, photo in enumerate(photos):
        _, _, tall, wide = _around_all(crops(photo, str(name), views))
        found.append(tall * wide / (photo.height * photo.width))
    tenth, *_, ninth = statistics.quantiles(found, n=10)
    return {"mean": round(statistics.mean(found), 3), "10 %": round(tenth, 3), "90 %": round(ninth, 3)}


def of_packed(photos: Sequence[Photo], rounds: int, quality: int) -> dict[str, Any]:
    """Measure images of a shorter side of 256 pixels in several encodings: their bytes, and decoding them."""
    pixels = [shrunk(photo) for photo in photos]
    sets = {"photographs": [photo.image for photo in photos]}
    sets |= {name: [encoded(each, quality, how) for each in pixels] for name, how in ENCODINGS.items()}
    packed = photos_of(sets["as packed"])

    def work(number: int) -> Mapping[str, Sequence[Call]]:
        all_of_them = {name: wholes(images) for name, images in sets.items()}
        return all_of_them | {"as packed, 1 view": parts(packed, range(number, number + 1))}

    sizes = {name: round(statistics.mean(map(len, images))) for name, images in sets.items()}
    return {"bytes": sizes} | in_rounds(rounds, work, "as packed")


def of_views(photos: Sequence[Photo], rounds: int) -> dict[str, Any]:
    """Measure one view of photographs, of packed images, and of packed images that are decoded already."""
    images = [photo.image for photo in photos]
    sets = {"photographs": images}
    sets |= {
        f"packed, quality {quality}": [encoded(shrunk(photo), quality, {}) for photo in photos] for quality in QUALITIES
    }
    pixels = [decode(image, key="photo") for image in sets["packed, quality 95"]]
    into = partial(render_into, list(np.empty((1, RECIPE.img_size, RECIPE.img_size, 3), np.uint8)))

    def work(number: int) -> Mapping[str, Sequence[Call]]:
        views = range(number, number + 1)
        rendered = {
            name: [partial(draw_encoded, each, RECIPE, str(key), views, into) for key, each in enumerate(images)]
            for name, images in sets.items()
        }
        return rendered | {
            "pixels": [partial(draw_decoded, each, RECIPE, str(key), views, into) for key, each in enumerate(pixels)]
        }

    return in_rounds(rounds, work, "photographs")


def shrunk(photo: Photo) -> NDArray[np.uint8]:
    """Return the pixels of a photograph with the shorter side at 256 pixels, as `pack` resizes it."""
    least = min(photo.height, photo.width)
    size = (SHORTER * photo.width // least, SHORTER * photo.height // least)
    return np.asarray(Image.fromarray(decode(photo.image, key="photo")).resize(size, Image.Resampling.LANCZOS))


def encoded(pixels: NDArray[np.uint8], quality: int, how: Mapping[str, Any]) -> bytes:
    """Return a JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling="4:2:0", **how)
    return buffer.getvalue()


def main() -> None:
    parser = options(__doc__, rounds=9)
    parser.add_argument("--data", type=Path, required=True, help="folder with a tar of JPEGs")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    photos = photos_of(image for _, _, image in read_photos(next(args.data.glob("*.tar"))))
    kinds = [simplejpeg.decode_jpeg_header(photo.image)[3] for photo in photos]
    result: dict[str, Any] = {
        "what": "microseconds of processor time per image, one process on one core",
        "machine": args.machine or machine(),
        "images": len(photos),
        "bytes": round(statistics.mean(len(photo.image) for photo in photos)),
        "pixels": round(statistics.mean(photo.height * photo.width for photo in photos)),
        "subsampling": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
    }
    result["whole"] = whole(photos, args.rounds)
    result["crops"] = of_crops(photos, args.rounds)
    result["packed"] = {f"quality {quality}": of_packed(photos, args.rounds, quality) for quality in QUALITIES}
    result["views"] = of_views(photos, args.rounds)
    write_json(args.out, result)


if __name__ == "__main__":
    main()
