"""What a person sees of recipes: the presets, the fields of one with their meaning, the differences of two, and a file of one."""

from collections.abc import Mapping
from typing import Any

from pipeline.errors import UsageError
from pipeline.labels.manifest import short
from pipeline.storage.yaml import to_flow
from pipeline.text import aligned
from pipeline.views.recipe import DEFAULT_RECIPE, PRESETS, Recipe

ABOUT = {
    "deit": "DeiT's augmentation at 224 pixels (arXiv 2012.12877, table 9)",
    "deit-384": "the same at 384 pixels, for fine-tuning",
    "crop-flip": "random crop and flip: the recipe of FKD",
    "none": "a centre crop: all views of an image are the same",
}


def describe_recipes(recipes: Mapping[str, Recipe]) -> dict[str, Any]:
    """Return what `recipes` shows, as plain JSON values.

    Args:
        recipes: by the name that the user gave: none of them lists the presets, one gives its fields, two their differences.

    Raises:
        UsageError: there are more than two.
    """
    if len(recipes) > 2:
        raise UsageError(f"one recipe is shown, or two are compared, got {len(recipes)}: {', '.join(recipes)}")
    if not recipes:
        return {"presets": {name: _summary(recipe) | {"about": ABOUT[name]} for name, recipe in PRESETS.items()}}
    compared = recipes if len(recipes) == 2 else {**recipes, DEFAULT_RECIPE: PRESETS[DEFAULT_RECIPE]}
    values = {name: recipe.model_dump(mode="json") for name, recipe in compared.items()}
    return {
        "recipes": {name: _summary(recipe) for name, recipe in recipes.items()},
        "compared": list(compared),
        "fields": {
            field: {
                "meaning": info.title,
                "allowed": info.description,
                "values": {name: fields[field] for name, fields in values.items() if field in fields},
                "differs": len({to_flow(fields.get(field)) for fields in values.values()}) > 1,
            }
            for field, info in Recipe.model_fields.items()
        },
    }


def recipes_table(found: Mapping[str, Any]) -> str:
    """Return the result of `describe_recipes` as text for people."""
    if "presets" in found:
        rows = [("recipe", "id", "differs from deit", "what it is")]
        rows += [
            (name, short(each["id"]), _said(each["changes"]), each["about"]) for name, each in found["presets"].items()
        ]
        return aligned(rows, left=(0, 1, 2, 3))
    names, asked = found["compared"], found["recipes"]
    ids = [(f"recipe {name}", each["id"]) for name, each in asked.items()]
    fields = {name: each for name, each in found["fields"].items() if each["differs"] or len(asked) == 1}
    if not fields:
        return aligned(ids, left=(0, 1)) + "\nno field differs: they are one recipe"
    shown = [("field", *names, "meaning")]
    shown += [(name, *_values(each, names, full=len(asked) > 1), each["meaning"]) for name, each in fields.items()]
    return "\n".join([aligned(ids, left=(0, 1)), "", aligned(shown, left=range(len(shown[0])))])


def recipe_yaml(recipes: Mapping[str, Recipe]) -> str:
    """Return one recipe as YAML for `--recipe FILE`, each field with its meaning.

    Raises:
        UsageError: not one recipe is given.
    """
    if len(recipes) != 1:
        raise UsageError(f"--yaml prints one recipe, got {len(recipes)}", fix="Pass one preset or file")
    ((name, recipe),) = recipes.items()
    lines = [f"# recipe {name}, id {recipe.id}"]
    for field, value in recipe.model_dump(mode="json").items():
        lines.append(f"{field}: {to_flow(value)} # {Recipe.model_fields[field].title}")
    return "\n".join(lines)


def _summary(recipe: Recipe) -> dict[str, Any]:
    """Return the id of a recipe and its differences from the default one."""
    default = PRESETS[DEFAULT_RECIPE].model_dump(mode="json")
    fields = recipe.model_dump(mode="json")
    return {"id": recipe.id, "changes": {name: value for name, value in fields.items() if value != default[name]}}


def _said(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {to_flow(value)}" for name, value in changes.items()) or "-"


def _values(field: Mapping[str, Any], names: list[str], *, full: bool) -> list[str]:
    """Return the value of a field in each recipe; beside a single recipe, that of the default one only where it differs."""
    first, *others = [to_flow(field["values"][name]) if name in field["values"] else "-" for name in names]
    return [first, *(other if full or field["differs"] else "" for other in others)]
