"""How configs become options of the command line, each with its help, type and default; and options that commands share."""

import dataclasses
import logging
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

log = logging.getLogger("deit_cli")


class ViewsType(click.ParamType):
    """START:STOP, or a number of views from 0."""

    name = "START:STOP"

    @staticmethod
    def text(views: tuple[int, int]) -> str:
        """Return how a user would write it."""
        return f"{views[0]}:{views[1]}"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Turn the text into two numbers."""
        if isinstance(value, tuple):
            return value
        start, colon, stop = str(value).partition(":")
        try:
            return (int(start or 0), int(stop)) if colon else (0, int(start))
        except ValueError:
            self.fail(f"{value!r} is not START:STOP, such as 0:30", param, ctx)


class NumberOrAuto(click.ParamType):
    """A whole number, or `auto`."""

    name = "INTEGER|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """Turn the text into a number, unless it is `auto`."""
        text = str(value).lower()
        try:
            return text if text == "auto" else int(text)
        except ValueError:
            self.fail(f"{value!r} is neither a whole number nor auto", param, ctx)


def options_of(config: type, *, skip: frozenset[str] = frozenset()) -> Callable[[Any], Any]:
    """Return a decorator that adds an option for every field of a config: its help, its type, its default."""
    hints = typing.get_type_hints(config)

    def decorate(command: Any) -> Any:
        for field in reversed(dataclasses.fields(config)):
            if field.name not in skip:
                command = _option(field, hints[field.name])(command)
        return command

    return decorate


def _option(field: dataclasses.Field[Any], hint: Any) -> Callable[[Any], Any]:
    flag = field.name.replace("_", "-")
    kind, repeats = _plain_type(hint)
    declaration = f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}"
    default: Any = field.default
    if _click_type(kind).__class__ is ViewsType and isinstance(default, tuple):
        default = ViewsType.text(default)
    known: dict[str, Any] = {"required": True} if default is dataclasses.MISSING else {"default": default}
    if (bare := field.metadata.get("bare")) is not None:
        known |= {"is_flag": False, "flag_value": bare}
    shown = default is not dataclasses.MISSING and default not in (None, False, ())
    return click.option(
        declaration,
        *field.metadata.get("flags", ()),
        field.name,
        type=None if kind is bool else _click_type(kind),
        help=field.metadata["help"],
        show_default=shown,
        multiple=repeats,
        **known,
    )


def _plain_type(hint: Any) -> tuple[Any, bool]:
    """Return the type of one value of a field, without its None, and whether the option repeats."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        return (kinds[0] if len(kinds) == 1 else NumberOrAuto()), False
    if typing.get_origin(hint) is tuple and typing.get_args(hint)[1:] == (...,):
        return typing.get_args(hint)[0], True
    return hint, False


def _click_type(kind: Any) -> Any:
    if typing.get_origin(kind) is typing.Literal:
        return click.Choice(typing.get_args(kind))
    if kind is Path:
        return click.Path(path_type=Path)
    return ViewsType() if typing.get_origin(kind) is tuple else kind


def recipe_options(command: Any) -> Any:
    """Add --recipe and --set."""
    command = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="FIELD=VALUE",
        help="Change a field of the recipe, such as img_size=32; repeatable.",
    )(command)
    return click.option(
        "--recipe", default=None, show_default="deit", help="deit, deit-384, crop-flip, none, or a YAML file."
    )(command)


LOG_JSON = click.option(
    "--log-json",
    type=click.Path(path_type=Path),
    help="Append messages and progress to this file, a JSON object a line.",
)


RECIPE_FIELDS = "deit_cli.recipe_fields"  # what a file of settings says under `set`, in the command's context


def config_option(*kinds: type) -> Callable[[Any], Any]:
    """Return a decorator that adds -c/--config: a file with the fields of these configs, under what is passed."""

    def read(context: click.Context, _: click.Parameter, path: Path | None) -> None:
        if path is None:
            return
        from pipeline.settings.files import read_settings

        settings = read_settings(path, *kinds)
        context.meta[RECIPE_FIELDS] = {str(k).replace("-", "_"): v for k, v in settings.pop("set", {}).items()}
        context.default_map = settings

    return click.option(
        "-c",
        "--config",
        type=click.Path(path_type=Path),
        metavar="FILE.yaml",
        is_eager=True,
        expose_value=False,
        callback=read,
        help="Take these options from a YAML file (name: value); what is passed here goes before it.",
    )


def chosen_recipe(name: str | None, overrides: tuple[str, ...]) -> Any:
    """Return the recipe of --recipe, --set and the file of settings."""
    from pipeline.settings.files import load_recipe, parse_override
    from pipeline.views.recipe import DEFAULT_RECIPE

    return load_recipe(name or DEFAULT_RECIPE, recipe_fields() | dict(parse_override(text) for text in overrides))


def recipe_fields() -> dict[str, Any]:
    """Return the fields of the recipe that the file of settings has."""
    return click.get_current_context().meta.get(RECIPE_FIELDS, {})


def say_settings(*configs: Any, recipe: Any) -> None:
    """Log what differs from the defaults, as options that can be passed again."""
    from pipeline.settings.files import describe_settings

    log.info("settings: %s", describe_settings(*configs, recipe=recipe))


def split_values(values: dict[str, Any], *kinds: type) -> Any:
    """Make one config of each kind from the values of its own options."""
    return tuple(
        kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.name in values}) for kind in kinds
    )


SECONDS = click.option(
    "--seconds",
    type=click.FloatRange(0.1, 600),
    default=2.0,
    help="Spent on each measurement, about.",
)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
