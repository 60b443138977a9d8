"""Options of the command line: those of configs, each with its help, type and default, and those shared by commands."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click

from pipeline.settings.fields import REQUIRED, Setting, Views, settings_of

log = logging.getLogger("deit_cli")


class ViewsType(click.ParamType):
    """A range START:STOP, or a number of views from 0."""

    name = "START:STOP"

    @staticmethod
    def text(views: tuple[int, int]) -> str:
        """Return the text that a user would write for these views."""
        return f"{views[0]}:{views[1]}"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Return the two numbers of the text."""
        if isinstance(value, tuple):
            return value
        start, colon, stop = str(value).partition(":")
        try:
            return (int(start or 0), int(stop)) if colon else (0, int(start))
        except ValueError:
            self.fail(f"{value!r} is not START:STOP, such as 0:30", param, ctx)


class NumberOrWord(click.ParamType):
    """A whole number, or one of a few words such as `auto`."""

    def __init__(self, words: tuple[str, ...]) -> None:
        self.words = words
        self.name = "|".join(("INTEGER", *words))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """Return the number, or the text if it is one of the words."""
        text = str(value).lower()
        try:
            return text if text in self.words else int(text)
        except ValueError:
            self.fail(f"{value!r} is neither a whole number nor {' or '.join(self.words)}", param, ctx)


class Numbers(click.ParamType):
    """Numbers with commas between them, as a tuple; for an option that may be repeated as well."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Return the numbers of the text."""
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} are not numbers with commas between them, such as 0.7,0.3", param, ctx)

    @staticmethod
    def joined(context: click.Context, param: click.Parameter, values: Any) -> tuple[float, ...]:
        """Return the numbers of all times that the option was passed."""
        return tuple(number for each in values for number in each)


class GroupedOption(click.Option):
    """An option with a heading in `--help`: one of `fields.GROUPS`."""

    def __init__(self, *args: Any, group: str, **known: Any) -> None:
        super().__init__(*args, **known)
        self.group = group


plain_option = partial(click.option, cls=GroupedOption)  # for a single command; options_of makes those of configs


def options_of(
    config: type, *, where: Callable[[Setting], bool] = lambda _: True, helps: Mapping[str, str] = MappingProxyType({})
) -> Callable[[Any], Any]:
    """Return a decorator that adds an option for every setting of a config for which `where` is true.

    `helps` has the help texts of options that mean something else in this command: name of the setting -> text.
    """

    def decorate(command: Any) -> Any:
        for setting in reversed(settings_of(config)):
            setting = dataclasses.replace(setting, help=helps.get(setting.name, setting.help))
            command = _option(setting)(command) if where(setting) else command
        return command

    return decorate


def _option(setting: Setting) -> Callable[[Any], Any]:
    default = ViewsType.text(setting.default) if setting.kind == Views and setting.default else setting.default
    known: dict[str, Any] = {"required": True} if default is REQUIRED else {"default": default}
    if setting.bare is not None:
        known |= {"is_flag": False, "flag_value": setting.bare}
    if isinstance(_type_of(setting), Numbers):
        known |= {"callback": Numbers.joined}
    return plain_option(
        f"{setting.flag}/--no-{setting.flag[2:]}" if setting.kind is bool else setting.flag,
        *setting.flags,
        setting.name,
        type=_type_of(setting),
        help=setting.help,
        metavar=setting.metavar,
        group=setting.group,
        show_default=default not in (REQUIRED, None, ()),
        multiple=setting.repeats,
        **known,
    )


def _type_of(setting: Setting) -> Any:
    """Return click's type of one value; None for a flag."""
    if setting.words:
        return NumberOrWord(setting.words) if setting.kind else click.Choice(setting.words)
    if setting.repeats and setting.kind is float:
        return Numbers()
    return {Path: click.Path(path_type=Path), Views: ViewsType(), bool: None}.get(setting.kind, setting.kind)


def recipe_options(default: str) -> Callable[[Any], Any]:
    """Return a decorator that adds --recipe, whose default is described by `default`, and --set."""
    presets = "deit (224 pixels), deit-384 (384 pixels), crop-flip (random crop and flip), none (centre crop)"
    recipe = plain_option(
        "--recipe",
        help=f"Recipe, the settings of augmentation: {presets}, or a YAML file; by default {default}.",
        group="Views",
    )
    override = plain_option(
        "--set",
        "overrides",
        multiple=True,
        metavar="FIELD=VALUE",
        help="Change one field of the recipe, such as img_size=32; an unknown field lists all. Repeat the option for several.",
        group="Views",
    )
    return lambda command: recipe(override(command))


LOG_JSON = plain_option(
    "--log-json",
    type=click.Path(path_type=Path),
    help="File to which messages and progress are appended, one JSON object per line.",
    group="Logging",
)
AS_JSON = plain_option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.", group="Output")


RECIPE_FIELDS = "deit_cli.recipe_fields"  # key in the command's context for the settings under `set` in a file


def config_option(*kinds: type, recipe: bool = False) -> Callable[[Any], Any]:
    """Return a decorator that adds -c/--config: a file with settings of these configs, which the other options override.

    `recipe` says whether the command has a recipe, so that the file may have `recipe` and, below `set`, fields of it.
    """
    fields = ", and recipe fields below `set:`" if recipe else ""

    def read(context: click.Context, _: click.Parameter, path: Path | None) -> None:
        if path is None:
            return
        from pipeline.settings.files import read_settings

        settings = read_settings(path, *kinds, recipe=recipe)
        context.meta[RECIPE_FIELDS] = {str(k).replace("-", "_"): v for k, v in settings.pop("set", {}).items()}
        context.default_map = settings

    return plain_option(
        "-c",
        "--config",
        type=click.Path(path_type=Path),
        metavar="FILE.yaml",
        is_eager=True,
        expose_value=False,
        callback=read,
        help=f"YAML file with options, one per line, such as `batch_size: 256`{fields}. Options on the command line override it.",
        group="Run",
    )


def split_values(values: dict[str, Any], *kinds: type) -> Any:
    """Return one config of each kind, made from the values of its own options."""
    return tuple(
        kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.name in values}) for kind in kinds
    )


def chosen_recipe(values: Mapping[str, Any]) -> Any:
    """Return the recipe of --recipe, --set and the file of settings."""
    from pipeline.settings.files import load_recipe, parse_override
    from pipeline.views.recipe import DEFAULT_RECIPE

    overrides = recipe_fields() | dict(parse_override(text) for text in values["overrides"])
    return load_recipe(values["recipe"] or DEFAULT_RECIPE, overrides)


def asked_recipe(values: Mapping[str, Any]) -> Any:
    """Return the recipe as `chosen_recipe` does; None if neither the options nor the file set any part of it."""
    said = values["recipe"] is not None or values["overrides"] or recipe_fields()
    return chosen_recipe(values) if said else None


def recipe_fields() -> dict[str, Any]:
    """Return the recipe fields from the file of settings."""
    return click.get_current_context().meta.get(RECIPE_FIELDS, {})


def say_settings(*configs: Any, recipe: Any) -> None:
    """Log the settings that differ from the defaults, as options that can be passed again."""
    from pipeline.settings.files import describe_settings

    log.info("settings: %s", describe_settings(*configs, recipe=recipe))
