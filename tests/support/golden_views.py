"""The golden views of renderer 2, `tests/golden/views-v2.json`: made once by the reference, and the same in every later version.

    python -m support.golden_views (in tests/)

The file has the SHA-256 of 200 views of ten small images. The images are made of integers, so no library decides them.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.views.recipe import PRESETS, Recipe
from support.defined_views import draw_by_definition, render_by_definition

Pixels = NDArray[np.uint8]
PATH = Path(__file__).parents[1] / "golden/views-v2.json"

# Recipe, and its number of views of each image.
RECIPES: dict[str, tuple[Recipe, int]] = {
    "deit": (PRESETS["deit"], 1),
    "crop-flip": (PRESETS["crop-flip"], 1),
    "none": (PRESETS["none"], 1),
    "deit at 64": (Recipe(img_size=64), 3),
    "random filters": (Recipe(img_size=48, interpolation="random", aa="rand-m9-mstd0.5-inc1-n3-p0.9"), 3),
    "bilinear": (Recipe(img_size=41, interpolation="bilinear"), 2),
    "beyond 10": (Recipe(img_size=40, interpolation="random", aa="rand-m14-mstd4-mmax30-inc1-n3-p0.9", seed=1), 2),
    "not increasing": (Recipe(img_size=32, aa="rand-m7-mstd101-n4-p0.8", reprob=1.0, hflip=0.9), 2),
    # half of the levels are 30, at which Rotate is a quarter turn
    "turned": (Recipe(img_size=24, aa="rand-m30-mstd25-mmax30-n6-p1", reprob=0.0), 2),
    "bilinear middle": (PRESETS["none"].with_fields(img_size=32, interpolation="bilinear", crop_pct=0.9), 1),
    "one pixel": (Recipe(img_size=1, interpolation="random", reprob=1.0), 1),
}
OF_ONE_IMAGE = [
    ("deit-384", PRESETS["deit-384"], "photo", 0),
    ("deit-384", PRESETS["deit-384"], "tall", 1),
    *(("erased", Recipe(interpolation="random", reprob=1.0), "photo", view) for view in range(8)),
]


def waves(height: int, width: int) -> NDArray[np.int64]:
    """Return smooth colours with edges and grain, 0..255, int64 [height, width, 3]."""
    y, x = np.mgrid[0:height, 0:width]
    grain = bits(height, width) % 9

    def wave(dx: int, dy: int) -> NDArray[np.int64]:
        return np.abs((dx * x + dy * y) % 510 - 255)  # a triangle

    smooth = np.stack([wave(3, 7) + wave(5, -2), wave(-4, 6) + wave(2, 3), wave(1, 9) + wave(8, 1)], axis=-1) // 2
    edge = (x - width // 2) ** 2 + 2 * (y - height // 3) ** 2 < (height * width) // 9
    return np.clip(np.where(edge[..., None], 255 - smooth, smooth) + grain - 4, 0, 255)


def bits(height: int, width: int) -> NDArray[np.int64]:
    """Return random bytes, int64 [height, width, 3]; NumPy promises that these words never change."""
    words = np.random.Philox(key=height * 1000 + width).random_raw(height * width * 3)
    return (words >> np.uint64(56)).astype(np.int64).reshape(height, width, 3)


def images() -> dict[str, Pixels]:
    """Return the ten images, uint8 [H, W, 3]."""
    made = {
        "photo": waves(150, 200),
        "grey": np.repeat(waves(90, 67)[..., 1:2], 3, axis=2),
        "noise": bits(64, 64),
        "flat": np.full((33, 47, 3), (12, 200, 91)),
        "one pixel": np.full((1, 1, 3), (250, 3, 77)),
        "one row": waves(1, 131),
        "wide": waves(17, 400),
        "tall": waves(450, 31),
        "dark": 9 + waves(80, 101) // 16,
        "saturated": bits(41, 83) // 128 * 255,
    }
    return {name: pixels.astype(np.uint8) for name, pixels in made.items()}


def cases() -> Iterator[tuple[str, Recipe, str, int]]:
    """Yield recipe name, recipe, image name and view number of each golden view."""
    for recipe_name, (recipe, views) in RECIPES.items():
        for image in images():
            for view in range(views):
                yield recipe_name, recipe, image, view
    yield from OF_ONE_IMAGE


def sha256(pixels: Pixels) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def golden_views() -> dict[str, Any]:
    """Return what the file holds."""
    pictures, views = images(), []
    for recipe_name, recipe, image, view in cases():
        key, (height, width) = f"golden/{image}", pictures[image].shape[:2]
        drawn = draw_by_definition(recipe, key, view, height, width)
        pixels = render_by_definition(pictures[image], drawn)
        views.append({"recipe": recipe_name, "image": image, "key": key, "view": view, "sha256": sha256(pixels)})
    used = {name: recipe for name, recipe, *_ in cases()}
    return {
        "what": "SHA-256 of the pixels of views of renderer 2, uint8 [img_size, img_size, 3] row by row (docs/views-v2.md)",
        "images": {name: {"shape": pixels.shape, "sha256": sha256(pixels)} for name, pixels in pictures.items()},
        "recipes": {name: recipe.model_dump(mode="json") for name, recipe in used.items()},
        "views": views,
    }


if __name__ == "__main__":
    content = golden_views()
    lines = json.dumps(content | {"views": []}, indent=1).removesuffix("[]\n}")
    each = ",\n".join(f"  {json.dumps(view)}" for view in content["views"])
    PATH.write_text(f"{lines}[\n{each}\n ]\n}}\n")
