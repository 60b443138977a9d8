"""Settings in a YAML file: the names are those of the command line's options, the types those of the config's fields.

`recipe` and `set` may stand there too, as on the command line; `set` is a mapping of recipe fields.
"""

import dataclasses
import difflib
import shlex
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import RecipeError, UsageError
from pipeline.storage.yaml import parse_yaml, read_yaml, to_flow
from pipeline.views.recipe import DEFAULT_RECIPE, PRESETS, Recipe

RECIPE_HINTS: dict[str, Any] = {"recipe": str | None, "set": dict}


def read_settings(path: Path, *kinds: type) -> dict[str, Any]:
    """Return what a file sets: field name -> value, for the command line to put under the options that were given.

    Args:
        path: a YAML file of `name: value` lines; hyphens and underscores are the same.
        kinds: the configs whose fields may stand in it.

    Raises:
        UsageError: unreadable, a name that no config has or that stands there twice, or a value of another type.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UsageError(f"{path}: a file of settings holds `name: value` lines, got {type(values).__name__}")
    hints, names = _known(kinds)
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = names.get(str(key).replace("-", "_"))
        if name is None:
            raise UsageError(f"{path}: there is no setting {str(key)!r}. {_nearest(str(key), names)}")
        if name in found:
            raise UsageError(f"{path}: {name} stands there twice, the second time as {key}")
        if not _fits(value, hints[name]):
            raise UsageError(f"{path}: {key} must be {_wanted(hints[name])}, got {_short(value)}")
        found[name] = _as_option(value, hints[name])
    return found


def plain_settings(config: Any) -> dict[str, Any]:
    """Return a config as a file would hold it; what is None is left out, because that is every option's absence."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: _plain(value) for name, value in values.items() if value is not None}


def recipe_settings(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as a file would hold it: the nearest preset under `recipe`, what differs from it under `set`."""
    fields = recipe.model_dump(mode="json")

    def changes(preset: str) -> dict[str, Any]:
        known = PRESETS[preset].model_dump(mode="json")
        return {name: value for name, value in fields.items() if value != known[name]}

    nearest = min(PRESETS, key=lambda preset: len(changes(preset)))
    return {"recipe": nearest} | ({"set": changes(nearest)} if changes(nearest) else {})


def describe_settings(*configs: Any, recipe: Recipe | None = None) -> str:
    """Return what differs from the defaults as a shell reads it: `--labels shards --epochs 100 --set img_size=32`.

    The command line makes the same configs and the same recipe of it.
    """
    words = [word for config in configs for word in _words(config)]
    if recipe is not None:
        settings = recipe_settings(recipe)
        words += ["--recipe", settings["recipe"]] if settings["recipe"] != DEFAULT_RECIPE else []
        words += [
            word for name, value in settings.get("set", {}).items() for word in ("--set", f"{name}={to_flow(value)}")
        ]
    return shlex.join(words)


def _words(config: Any) -> Iterator[str]:
    """Yield the options of all that differs from a config's defaults, an option that repeats for each of its values."""
    for name, value in plain_settings(config).items():
        flag = name.replace("_", "-")
        if value == _default(config, name):
            continue
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
            continue
        for item in value if isinstance(value, list) else [value]:
            yield from (f"--{flag}", str(item))


def _known(kinds: tuple[type, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the type of each setting, and under which names it may stand: its own and its further options'."""
    hints, names = dict(RECIPE_HINTS), {name: name for name in RECIPE_HINTS}
    for kind in kinds:
        hints |= typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            flags = [flag[2:].replace("-", "_") for flag in field.metadata.get("flags", ()) if flag.startswith("--")]
            names |= dict.fromkeys((*flags, field.name), field.name)
    return hints, names


def _nearest(key: str, names: dict[str, str]) -> str:
    close = difflib.get_close_matches(key.replace("-", "_"), names, n=1)
    return f"Did you mean {close[0]}?" if close else "Settings are named as the options that --help shows"


def _choices(hint: Any) -> Iterator[Any]:
    """Yield the types that a hint allows."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        yield from typing.get_args(hint)
    else:
        yield hint


def _fits(value: Any, hint: Any) -> bool:
    return any(_is_a(value, kind) for kind in _choices(hint))


def _is_a(value: Any, kind: Any) -> bool:
    arguments, origin = typing.get_args(kind), typing.get_origin(kind)
    if origin is typing.Literal:
        return isinstance(value, str) and value in arguments
    if origin is tuple and arguments[1:] == (...,):  # a repeatable option: one value or a list of them
        return _is_a(value, arguments[0]) or (isinstance(value, list) and all(_is_a(v, arguments[0]) for v in value))
    if origin is tuple:  # START:STOP, or a number from 0
        pair = isinstance(value, list) and len(value) == 2 and all(_is_a(v, int) for v in value)
        return pair or isinstance(value, str) or _is_a(value, int)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, str if kind is Path else kind)


def _as_option(value: Any, hint: Any) -> Any:
    """Return the value as click takes it from a map of defaults."""
    if typing.get_origin(hint) is not tuple or (isinstance(value, (str, int)) and typing.get_args(hint)[1:] != (...,)):
        return value
    return tuple(value) if isinstance(value, list) else (value,)


def _wanted(hint: Any) -> str:
    return " or ".join(dict.fromkeys(_name_of(kind) for kind in _choices(hint)))


def _name_of(kind: Any) -> str:
    arguments, origin = typing.get_args(kind), typing.get_origin(kind)
    if origin is typing.Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(arguments)
    if origin is tuple:
        return (
            f"{_name_of(arguments[0])} or a list of them" if arguments[1:] == (...,) else "START:STOP or a whole number"
        )
    known = {int: "a whole number", float: "a number", bool: "true or false", dict: "a mapping of recipe fields"}
    return {**known, types.NoneType: "null"}.get(kind, "text (in quotes)")


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        numbers = bool(value) and all(isinstance(item, int) for item in value)
        return ":".join(map(str, value)) if numbers else [_plain(item) for item in value]
    return value


def _default(config: Any, name: str) -> Any:
    default = type(config).__dataclass_fields__[name].default
    return _plain(default)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def load_recipe(name_or_path: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """Return a preset by name, or the recipe of a YAML file, with fields replaced by `overrides`.

    A YAML file holds recipe fields; `preset: NAME` in it says which preset the others start from (default `deit`).
    """
    values = {} if name_or_path in PRESETS else _read_yaml(Path(name_or_path))
    preset = values.pop("preset", name_or_path if name_or_path in PRESETS else DEFAULT_RECIPE)
    if not isinstance(preset, str) or preset not in PRESETS:
        raise RecipeError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    return PRESETS[preset].with_fields(**values | (overrides or {}))


def parse_override(text: str) -> tuple[str, Any]:
    """Read one `field=value` of the command line; the value is YAML."""
    name, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"a recipe override is FIELD=VALUE, such as img_size=32, got {text!r}")
    try:
        return name.strip().replace("-", "_"), parse_yaml(value, where=text)
    except UsageError as error:
        raise RecipeError(str(error)) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RecipeError(f"a recipe is one of {', '.join(PRESETS)} or a YAML file, got {str(path)!r}")
    try:
        values = read_yaml(path)
    except UsageError as error:
        raise RecipeError(str(error)) from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe file holds `field: value` lines, got {type(values).__name__}")
    return {str(name): value for name, value in values.items()}
