"""How far the pixels of views are from those of Pillow and timm: for each operation, for the resize, and for whole views.

    python benchmarks/pixels.py --data imagenet-sample --out benchmarks/results/pixels.json

Renderer 1 (label sets made before docs/views-v2.md) stands beside renderer 2. Both obey the same parameters, and so do timm's functions on a
Pillow image. Operations are applied to each photograph at 224 x 224, at magnitudes about DeiT's (9), in both directions. Views are those of
DeiT's recipe without the erased box, which is our own. `differ` is the share of values (three a pixel) that are another level than Pillow's;
`largest` is the largest difference in levels. The definition resizes rows first, as Pillow does until version 12; Pillow 13 begins with the
columns of what shrinks most in height, and what this changes stands apart.
"""

import itertools
import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rounds import machine, options, write_json
from timm.data import auto_augment

from pipeline.images.decode import decode
from pipeline.pixels.render import render
from pipeline.settings.files import load_recipe
from pipeline.views.randaugment import FILL, INCREASING, op_argument
from pipeline.views.recipe import Interpolation, Recipe
from pipeline.views.view import DrawnOp, View, draw_view

Pixels = NDArray[np.uint8]
SIZE = 224
MAGNITUDES = (8.3, 9.0, 9.6)
FILTERS: dict[Interpolation, Image.Resampling] = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


class Differences:
    """What was compared so far."""

    def __init__(self) -> None:
        self.values = self.other = self.largest = 0

    def add(self, ours: Pixels, theirs: Pixels) -> None:
        distance = np.abs(ours.astype(np.int16) - theirs)
        self.values += distance.size
        self.other += int(np.count_nonzero(distance))
        self.largest = max(self.largest, int(distance.max()))

    def found(self) -> dict[str, float]:
        return {"differ": round(self.other / self.values, 6), "largest": self.largest}


def whole(size: int, **parts: Any) -> View:
    """Return the view that shows all of an image of this size."""
    return View(crop=(0, 0, size, size), resize=(size, size), window=(0, 0), img_size=size, **parts)


def timms(picture: Image.Image, op: DrawnOp) -> Image.Image:
    """Apply timm's function for an operation, as its training transforms call it."""
    if op.name.startswith("Posterize") and op.argument <= 0:
        return Image.new("RGB", picture.size)  # what Pillow gave until version 13, which refuses to keep no bit
    arguments = () if auto_augment.LEVEL_TO_ARG[op.name] is None else (op.argument,)
    return auto_augment.NAME_TO_OP[op.name](picture, *arguments, fillcolor=FILL, resample=FILTERS[op.interpolation])


def cropped(image: Pixels, view: View) -> Image.Image:
    top, left, height, width = view.crop
    return Image.fromarray(image[top : top + height, left : left + width])


def resized(picture: Image.Image, view: View) -> Image.Image:
    """Resize rows first in every version of Pillow."""
    height, width = view.resize
    rows = picture.resize((width, picture.height), FILTERS[view.interpolation])
    return rows.resize((width, height), FILTERS[view.interpolation])


def timms_view(image: Pixels, view: View) -> Pixels:
    """Return a view of a random crop without an erased box, by Pillow and timm."""
    picture = resized(cropped(image, view), view)
    if view.flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for op in view.ops:
        picture = timms(picture, op)
    return np.asarray(picture)


def drawn_ops(name: str) -> Iterator[DrawnOp]:
    """Yield an operation at each magnitude, in both directions, with each filter that it uses."""
    filters: tuple[Interpolation, ...] = ("bicubic", "bilinear") if name in GEOMETRIC else ("bicubic",)
    arguments = {op_argument(name, level, negate=negate) for level in MAGNITUDES for negate in (False, True)}
    for argument, interpolation in itertools.product(sorted(arguments), filters):
        yield DrawnOp(name, argument, interpolation)


def compare(photographs: list[Pixels], views: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return for each operation, resize and recipe how far each renderer is from Pillow; renderer 1 has no bilinear filter."""
    found: dict[str, dict[str, Differences]] = {}

    def add(what: str, image: Pixels, view: View, theirs: Pixels) -> None:
        renderers = found.setdefault(what, {})
        for renderer in (1, 2) if "bilinear" not in what else (2,):
            ours = render(image, replace(view, renderer=renderer))
            renderers.setdefault(f"renderer_{renderer}", Differences()).add(ours, theirs)

    resizes: dict[Interpolation, Recipe] = {
        name: load_recipe("crop-flip", {"interpolation": name, "hflip": 0.0}) for name in FILTERS
    }
    deit = load_recipe("deit", {"reprob": 0.0})
    for number, image in enumerate(photographs):
        size = {"height": image.shape[0], "width": image.shape[1]}
        picture = Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        square = np.array(picture)
        for op in itertools.chain.from_iterable(map(drawn_ops, INCREASING)):
            what = f"{op.name.removesuffix('Increasing')}{', bilinear' * (op.interpolation == 'bilinear')}"
            add(what, square, whole(SIZE, ops=(op,)), np.asarray(timms(picture, op)))
        for view in range(views):
            for name, recipe in resizes.items():
                drawn = draw_view(recipe, str(number), view, **size)
                crop = cropped(image, drawn)
                add(f"resize, {name}", image, drawn, np.asarray(resized(crop, drawn)))
                once = np.asarray(crop.resize((SIZE, SIZE), FILTERS[name]))
                add(f"resize, {name}, against one call of this Pillow", image, drawn, once)
            drawn = draw_view(deit, str(number), view, **size)
            add("views of the recipe deit", image, drawn, timms_view(image, drawn))
    return {what: {name: each.found() for name, each in renderers.items()} for what, renderers in sorted(found.items())}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with a tar of JPEGs")
    parser.add_argument("--images", type=int, default=125, help="photographs")
    parser.add_argument("--views", type=int, default=4, help="random crops and views of each photograph")
    args = parser.parse_args()
    with tarfile.open(next(args.data.glob("*.tar"))) as archive:
        files = [archive.extractfile(member) for member in archive if member.name.endswith(".jpg")][: args.images]
        photographs = [decode(file.read(), key="photograph") for file in files if file is not None]
    differences = compare(photographs, args.views)
    result = {
        "what": "values of views that are another level than those of Pillow and timm, and the largest difference in levels",
        "machine": args.machine or machine() | {"pillow": metadata.version("pillow")},
        "photographs": len(photographs),
        "views_of_each": args.views,
        "differences": differences,
    }
    write_json(args.out, result)
    print(json.dumps(differences, indent=1))


if __name__ == "__main__":
    main()
