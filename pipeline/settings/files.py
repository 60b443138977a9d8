"""Settings in a YAML file, with the names of command-line options and the types of the config's fields.

Like the command line, a file may have `recipe` and `set`; `set` is a mapping of recipe fields.
"""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pipeline.errors import RecipeError, UsageError
from pipeline.settings.fields import Setting, as_written, option, settings_of
from pipeline.storage.yaml import parse_yaml, read_yaml, to_flow
from pipeline.text import did_you_mean
from pipeline.views.recipe import DEFAULT_RECIPE, PRESETS, Recipe


@dataclass(frozen=True)
class _RecipeSettings:
    """Settings of a file that belong to no config: --recipe and --set."""

    recipe: str | None = option(None, "", group="Views")
    set: dict = option(None, "", group="Views")


NO_SETTINGS: Mapping[str, Setting] = MappingProxyType({})


def read_settings(
    path: Path, *kinds: type, recipe: bool = True, options: Mapping[str, Setting] = NO_SETTINGS
) -> dict[str, Any]:
    """Return the settings of a file: field name -> value. Options that are passed on the command line override them.

    Args:
        path: a YAML file of `name: value` lines; hyphens and underscores are the same.
        kinds: the configs whose fields the file may set.
        recipe: whether the file may set `recipe` and `set`, too.
        options: further settings by their names in the file: those of options that belong to no config.

    Raises:
        UsageError: the file cannot be read, a name is unknown or is set twice, or a value has another type.
    """
    return settings_in(read_yaml(path), path, *kinds, recipe=recipe, options=options)


def settings_in(
    values: Any, path: object, *kinds: type, recipe: bool = True, options: Mapping[str, Setting] = NO_SETTINGS
) -> dict[str, Any]:
    """Return the settings of a mapping from YAML, as `read_settings` does; `path` is its place, for errors."""
    if not isinstance(values, dict):
        raise UsageError(f"{path}: a file of settings holds `name: value` lines, got {type(values).__name__}")
    settings = [setting for kind in (*kinds, *([_RecipeSettings] if recipe else [])) for setting in settings_of(kind)]
    by_name = {**options, **{name: setting for setting in settings for name in setting.names}}
    found: dict[str, Any] = {}
    for key, value in values.items():
        setting = by_name.get(str(key).replace("-", "_"))
        if setting is None:
            raise UsageError(f"{path}: there is no setting {str(key)!r}. {_way_out(str(key), by_name)}")
        if setting.name in found:
            raise UsageError(f"{path}: {setting.name} is set twice, the second time as {key}")
        if not setting.takes(value):
            raise UsageError(f"{path}: {key} must be {setting.wanted}, got {_short(value)}")
        _refuse_no_text(value, f"{path}: {key}")
        found[setting.name] = _as_option(value, setting)
    return found


def plain_settings(config: Any) -> dict[str, Any]:
    """Return a config in the form of a settings file; a setting that is None is left out."""
    values = {each.name: as_written(getattr(config, each.name), each) for each in settings_of(type(config))}
    return {name: _plain(value) for name, value in values.items() if value is not None}


def recipe_settings(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe in the form of a settings file: the nearest preset as `recipe`, the other fields as `set`."""
    fields = recipe.model_dump(mode="json")

    def changes(preset: str) -> dict[str, Any]:
        known = PRESETS[preset].model_dump(mode="json")
        return {name: value for name, value in fields.items() if value != known[name]}

    nearest = min(PRESETS, key=lambda preset: len(changes(preset)))
    return {"recipe": nearest} | ({"set": changes(nearest)} if changes(nearest) else {})


def describe_settings(*configs: Any, recipe: Recipe | None = None) -> str:
    """Return the settings that differ from the defaults as options: `--labels shards --epochs 100 --set img_size=32`.

    Passed to the command line, they make the same configs and the same recipe.
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
    """Yield the options for all settings that differ from their defaults; a repeatable option comes once for each value."""
    for setting in settings_of(type(config)):
        value = getattr(config, setting.name)
        if value is None or value == setting.default:
            continue
        if isinstance(value, bool):
            yield setting.flag if value else f"--no-{setting.flag[2:]}"
            continue
        for item in value if setting.repeats else [_plain(value)]:
            yield from (setting.flag, str(item))


def _refuse_no_text(value: Any, where: str) -> None:
    """Raise UsageError for a text that a command line refuses too: an empty path would be the current folder."""
    for text in value if isinstance(value, list) else [value]:
        if text == "":
            raise UsageError(f"{where} has an empty value. Leave it out, or give one")
        if isinstance(text, str) and "\0" in text:
            raise UsageError(f"{where} must not contain a zero character, got {_short(text)}")


def _way_out(key: str, names: Mapping[str, Setting]) -> str:
    return did_you_mean(key.replace("-", "_"), names) or "Settings are named as the options that --help shows"


def _as_option(value: Any, setting: Setting) -> Any:
    """Return a value in the form that click takes from a map of defaults."""
    if isinstance(value, list):
        return tuple(value)
    return (value,) if setting.repeats else value


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        numbers = bool(value) and all(isinstance(item, int) for item in value)
        return ":".join(map(str, value)) if numbers else [_plain(item) for item in value]
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def load_recipe(name_or_path: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """Return a preset by name, or the recipe of a YAML file, with fields replaced by `overrides`.

    A YAML file holds recipe fields; `preset: NAME` names the preset for all other fields (default `deit`).
    """
    values = {} if name_or_path in PRESETS else _read_yaml(Path(name_or_path))
    preset = values.pop("preset", name_or_path if name_or_path in PRESETS else DEFAULT_RECIPE)
    if not isinstance(preset, str) or preset not in PRESETS:
        similar = did_you_mean(preset, PRESETS) if isinstance(preset, str) else None
        raise RecipeError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}", fix=similar)
    return PRESETS[preset].with_fields(**values | (overrides or {}))


def parse_override(text: str) -> tuple[str, Any]:
    """Return field and value of one `field=value` of the command line; the value is YAML."""
    name, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"a recipe override is FIELD=VALUE, such as img_size=32, got {text!r}")
    try:
        return name.strip().replace("-", "_"), parse_yaml(value, where=text)
    except UsageError as error:
        raise RecipeError(str(error)) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RecipeError(
            f"a recipe is one of {', '.join(PRESETS)} or a YAML file, got {str(path)!r}",
            fix=did_you_mean(str(path), PRESETS),
        )
    try:
        values = read_yaml(path)
    except UsageError as error:
        raise RecipeError(str(error)) from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe file holds `field: value` lines, got {type(values).__name__}")
    return {str(name): value for name, value in values.items()}
