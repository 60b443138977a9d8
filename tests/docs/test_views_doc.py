"""docs/views-v2.md says what the code does: its check values, its tables and its numbers."""

import hashlib
import json
import re
from pathlib import Path

import pytest
from support.defined_views import draw_by_definition, noise_levels
from support.golden_views import PATH, images

from pipeline.views.pairs import draw_mix
from pipeline.views.randaugment import OPERATIONS
from pipeline.views.recipe import PRESETS, RENDERER, Recipe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/views-v2.md").read_text()
MEASURED = json.loads((ROOT / "benchmarks/results/pixels.json").read_text())["differences"]
GOLDEN = json.loads(PATH.read_text())["views"]
RECIPES = {
    "`deit`": "deit",
    "`deit`, `img_size` 64": "deit at 64",
    "`deit`, `interpolation` random, `reprob` 1": "erased",
}


def rows_after(text: str) -> list[list[str]]:
    """Return the cells of the first table after a text, without its first two lines."""
    lines = PAGE.split(text, 1)[1].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    table: list[list[str]] = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table[2:]


def test_the_page_is_that_of_the_renderer():
    assert f'`"renderer": {RENDERER}`' in PAGE


def test_the_operations_have_their_positions():
    named = [(number, name) for numbers, names, *_ in rows_after("are timm's:") for number, name in zip(numbers.split(", "), names.split(", "), strict=True)]  # fmt: skip
    assert named == [(str(number), op.name) for number, op in enumerate(OPERATIONS)]


def test_operations_change_under_inc_where_the_page_says_so():
    shown = {name: cell for _, names, _, cell in rows_after("are timm's:") for name in names.split(", ")}
    assert {name for name, cell in shown.items() if cell not in ("", "the same")} == {
        op.name for op in OPERATIONS if op.increasing
    }


def test_every_operation_has_a_row_that_defines_it():
    rows = [*rows_after("The operations of K"), *rows_after("**Blend** of a base")]
    assert sorted(name for row in rows for name in row[0].split(", ")) == sorted(op.name for op in OPERATIONS)


def test_the_table_of_noise_has_the_hash():
    assert f"`{hashlib.sha256(noise_levels().tobytes()).hexdigest()}`" in PAGE


def test_the_id_of_the_recipe_is_that_of_the_preset():
    assert f"The id of the recipe `deit` is `{PRESETS['deit'].id}`" in PAGE


@pytest.mark.parametrize("row", rows_after("## 6 Check values")[:3], ids=lambda row: row[0])
def test_check_values_are_golden_views(row):
    recipe, image, view, what, sha256 = row
    name = re.findall(r"`(.*?)`", image)[0]
    (golden,) = [each for each in GOLDEN if (each["recipe"], each["image"], str(each["view"])) == (RECIPES[recipe], name, view)]  # fmt: skip
    assert (golden["key"], f"`{golden['sha256']}`") == (f"golden/{name}", sha256)
    settings = {"`deit`": {}, "`deit`, `img_size` 64": {"img_size": 64}}.get(recipe, {"interpolation": "random", "reprob": 1.0})  # fmt: skip
    pixels = images()[name]
    drawn = draw_by_definition(Recipe(**settings), golden["key"], golden["view"], *pixels.shape[:2])
    top, left, height, width = drawn.crop
    if pixels.shape[:2] != (height, width):
        assert f"crop {height} x {width} at top {top}, left {left}" in what
    (op,) = drawn.ops
    assert f"{op.name} {op.argument}" in what
    assert drawn.flip == ("flip" in what)
    if drawn.erase:
        top, left, height, width = drawn.erase.box
        assert f"erased {height} x {width} at top {top}, left {left}, noise {drawn.erase.noise}" in what
    assert bool(drawn.erase) == ("erased" in what)
    if "random" in recipe:
        assert re.findall("bicubic|bilinear", what) == [drawn.interpolation, op.interpolation]


def test_the_check_value_of_a_mix_is_its_lam():
    recipe, _, view, what, _ = rows_after("## 6 Check values")[3]
    mix = draw_mix(PRESETS["deit"], "golden/photo", int(view))
    assert (recipe, mix.box, what) == ("`deit`", None, f"mixup with lam {mix.lam!r}")


def test_one_colour_images_are_as_the_page_says():
    for name, shape, colour in (("one pixel", (1, 1, 3), (250, 3, 77)), ("flat", (33, 47, 3), (12, 200, 91))):
        assert images()[name].shape == shape
        assert (images()[name] == colour).all()
        assert f"of {colour}" in PAGE


def names_of(label: str) -> list[str]:
    """Return the measurements of a row of the table of differences."""
    if "resize" in label:
        return ["resize, bicubic, against one call of this Pillow" if "one call" in label else "resize, bicubic"]
    return ["views of the recipe deit"] if "whole" in label else label.split(", ")


def test_the_differences_are_the_measured_ones():
    seen = set()
    for label, *cells in rows_after("How far renderers are"):
        seen |= {*names_of(label)}
        for renderer, cell in enumerate(cells, start=1):
            found = [MEASURED[name][f"renderer_{renderer}"] for name in names_of(label)]
            shares = sorted({f"{100 * each['differ']:.1f}" for each in found})
            shown = f"{' to '.join(shares)} %, {max(each['largest'] for each in found)}"
            assert cell == ("0" if shares == ["0.0"] else shown), label
    assert seen == {name for name in MEASURED if "bilinear" not in name}
    assert all(MEASURED[name]["renderer_2"]["largest"] == 0 for name in MEASURED if "one call" not in name)
