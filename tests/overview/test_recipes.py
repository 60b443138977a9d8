"""`deit-cli recipes`: what it says of recipes is what they are, and the YAML that it prints makes the same recipe."""

import json

import pytest
from support.commands import invoke

from pipeline.overview.recipes import ABOUT
from pipeline.settings.files import load_recipe
from pipeline.views.recipe import PRESETS, Recipe


def test_every_field_has_a_meaning_and_every_preset_a_line():
    assert [name for name, field in Recipe.model_fields.items() if not field.title or not field.description] == []
    assert list(ABOUT) == list(PRESETS)


def test_the_list_has_every_preset_with_its_id_and_its_changes():
    code, shown = invoke("recipes", "--json")
    presets = json.loads(shown)["presets"]
    assert code == 0
    assert {name: each["id"] for name, each in presets.items()} == {name: each.id for name, each in PRESETS.items()}
    for name, each in presets.items():
        assert PRESETS["deit"].with_fields(**each["changes"]).id == PRESETS[name].id
    assert "crop-flip  9da66ba3e2cf  aa null, reprob 0.0, mixup 0.0, cutmix 0.0" in invoke("recipes")[1]


def test_one_recipe_shows_its_fields_and_deits_value_where_it_differs(tmp_path):
    (tmp_path / "mine.yaml").write_text("preset: crop-flip\nimg_size: 32\n")
    code, shown = invoke("recipes", str(tmp_path / "mine.yaml"))
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line}
    assert code == 0
    assert rows["img_size"][1:3] == ["32", "224"]
    assert rows["aa"][1:3] == ["null", "rand-m9-mstd0.5-inc1"]
    assert rows["hflip"][1:3] == ["0.5", "probability"]
    assert set(Recipe.model_fields) <= set(rows)


def test_two_recipes_show_only_where_they_differ():
    code, shown = invoke("recipes", "deit", "deit-384")
    rows = [line.split() for line in shown.splitlines()]
    assert code == 0
    assert rows[:2] == [["recipe", "deit", PRESETS["deit"].id], ["recipe", "deit-384", PRESETS["deit-384"].id]]
    assert [row[:3] for row in rows[4:]] == [["img_size", "224", "384"]]


def test_recipes_that_are_equal_say_so(tmp_path):
    (tmp_path / "same.yaml").write_text("preset: deit\n")
    assert "they are one recipe" in invoke("recipes", "deit", str(tmp_path / "same.yaml"))[1]


def test_a_recipe_of_renderer_1_has_one_field_less(tmp_path):
    (tmp_path / "old.yaml").write_text("renderer: 1\n")
    shown = invoke("recipes", "deit", str(tmp_path / "old.yaml"))[1]
    assert [line.split()[:3] for line in shown.splitlines()[4:]] == [
        ["interpolation", "bicubic", "-"],
        ["renderer", "2", "1"],
    ]


@pytest.mark.parametrize("asked", [*PRESETS, "file"])
def test_the_yaml_of_a_recipe_is_that_recipe(tmp_path, asked):
    mine = tmp_path / "mine.yaml"
    mine.write_text("scale: [0.4, 1.0]\naa: rand-m5-mstd0.5-inc1\n")
    name = str(mine) if asked == "file" else asked
    code, shown = invoke("recipes", name, "--yaml")
    (tmp_path / "printed.yaml").write_text(shown)
    assert code == 0
    assert load_recipe(str(tmp_path / "printed.yaml")).id == load_recipe(name).id


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("fancy",), "a recipe is one of deit, deit-384, crop-flip, none or a YAML file, got 'fancy'"),
        (("deit", "none", "crop-flip"), "one recipe is shown, or two are compared, got 3"),
        (("deit", "none", "--yaml"), "--yaml prints one recipe, got 2"),
        (("--yaml",), "--yaml prints one recipe, got 0"),
    ],
)
def test_bad_input_is_one_line(arguments, said):
    code, shown = invoke("recipes", *arguments)
    assert code == 2
    assert said in shown
