"""The golden views of renderer 2: the same pixels in every version, with every kernel, on every machine."""

import json
import re
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import pytest
from support.defined_views import draw_by_definition, render_by_definition
from support.golden_views import PATH, RECIPES, cases, images, sha256
from support.pillow_views import render_with_pillow

from pipeline.pixels.render import render_view
from pipeline.views.recipe import PRESETS, Recipe
from pipeline.views.view import View, draw_view

GOLDEN = json.loads(PATH.read_text(encoding="utf-8"))
IMAGES = images()


def views_of(recipe: str) -> list[dict[str, Any]]:
    return [view for view in GOLDEN["views"] if view["recipe"] == recipe]


@cache
def recipe_of(name: str) -> Recipe:
    return Recipe(**GOLDEN["recipes"][name])


def drawn(golden: dict[str, Any]) -> View:
    """Return a golden view as the definition draws it."""
    height, width = IMAGES[golden["image"]].shape[:2]
    return draw_by_definition(recipe_of(golden["recipe"]), golden["key"], golden["view"], height, width)


def test_the_file_has_200_views_of_ten_images_with_every_preset_and_both_filters():
    assert len(GOLDEN["views"]) == 200
    assert len(GOLDEN["images"]) == 10
    assert {recipe_of(name).id for name in GOLDEN["recipes"]} >= {preset.id for preset in PRESETS.values()}
    assert {recipe_of(name).interpolation for name in GOLDEN["recipes"]} == {"bicubic", "bilinear", "random"}
    named = [(view["recipe"], view["image"], view["view"]) for view in GOLDEN["views"]]
    assert named == [(name, image, view) for name, _, image, view in cases()]


def test_the_views_have_every_operation_quarter_turns_and_erased_boxes():
    views = [drawn(golden) for golden in GOLDEN["views"]]
    ops = [op for view in views for op in view.ops]
    assert len({op.name.removesuffix("Increasing") for op in ops}) == 15
    assert {(op.name, op.interpolation) for op in ops} >= {("Rotate", "bicubic"), ("Rotate", "bilinear")}
    assert {op.argument for op in ops if op.name == "Rotate"} >= {-90.0, 90.0}
    assert sum(view.erase is not None for view in views) > 40
    assert {view.flip for view in views} == {False, True}


def test_few_views_have_the_same_pixels():
    """Only those of images of one colour, or of one pixel, and the middle that does not depend on the view."""
    assert len({golden["sha256"] for golden in GOLDEN["views"]}) > 185


@pytest.mark.parametrize("name", IMAGES)
def test_the_images_are_the_same(name):
    assert GOLDEN["images"][name] == {"shape": list(IMAGES[name].shape), "sha256": sha256(IMAGES[name])}


@pytest.mark.parametrize("recipe", GOLDEN["recipes"])
def test_the_reference_gives_the_golden_views(recipe):
    for golden in views_of(recipe):
        pixels = render_by_definition(IMAGES[golden["image"]], drawn(golden))
        assert sha256(pixels) == golden["sha256"], golden


@pytest.mark.parametrize("recipe", GOLDEN["recipes"])
def test_the_renderer_gives_the_golden_views(recipe):
    for golden in views_of(recipe):
        pixels = render_view(IMAGES[golden["image"]], recipe_of(recipe), golden["key"], golden["view"])
        assert sha256(pixels) == golden["sha256"], (
            f"views of stored labels change; raise RENDERER if it must be: {golden}"
        )


def test_the_golden_views_are_drawn_as_the_definition_draws_them():
    for golden in GOLDEN["views"]:
        height, width = IMAGES[golden["image"]].shape[:2]
        recipe = recipe_of(golden["recipe"])
        assert draw_view(recipe, golden["key"], golden["view"], height=height, width=width) == drawn(golden)


@pytest.mark.parametrize("recipe", RECIPES)
def test_pillow_and_timm_give_the_golden_views(recipe):
    """See test_definition.py for where Pillow may differ on processors that fuse products and sums."""
    for golden in islice(views_of(recipe), 0, None, 5):
        assert sha256(render_with_pillow(IMAGES[golden["image"]], drawn(golden))) == golden["sha256"], golden


def test_one_changed_level_is_another_hash():
    golden = views_of("deit at 64")[0]
    pixels = render_by_definition(IMAGES[golden["image"]], drawn(golden))
    changed = pixels.copy()
    changed[0, 0, 0] ^= 1
    assert re.fullmatch("[0-9a-f]{64}", golden["sha256"])
    assert sha256(np.asfortranarray(pixels)) == golden["sha256"] != sha256(changed)
