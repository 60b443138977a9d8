"""Options of the command line: those of configs, each with its help, type and default, and those shared by commands.

A value comes from the command line, else from an environment variable, else from the file of -c, else it is the default.
"""

import dataclasses
import json
import logging
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click
from click.core import ParameterSource

from pipeline.errors import UsageError
from pipeline.settings.fields import REQUIRED, Setting, Views, settings_of
from pipeline.text import did_you_mean

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


class Choice(click.Choice):
    """One of a few words; the error for another names the most similar."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the choice."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            nearest = did_you_mean(str(value), map(str, self.choices))
            self.fail(" ".join(filter(None, (error.message, nearest))), param, ctx)


PREFIX = "DEIT_CLI"  # of every environment variable that sets an option
# Options that describe a machine and not the work: a variable without the name of a command sets them in all commands.
CACHE = ("--cache-dir", "--cache-size", "--min-rate")
COMMON = (*CACHE, "--device")


def variable(*words: str) -> str:
    """Return the name of an environment variable: `DEIT_CLI_TRAIN_LR_BASE` for train and --lr-base."""
    return "_".join((PREFIX, *words)).replace("--", "").replace("-", "_").upper()


def without_options(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without the variables that set options; those of the cache stay, which change no result."""
    kept = {variable(name) for name in CACHE}
    return {name: value for name, value in environment.items() if name in kept or not name.startswith(f"{PREFIX}_")}


class GroupedOption(click.Option):
    """An option with a heading in `--help`, and an environment variable.

    Attributes:
        group: the heading, one of `fields.GROUPS`.
        setting: the field of a config that it sets; None if it belongs to no config.
    """

    def __init__(self, *args: Any, group: str, setting: Setting | None = None, **known: Any) -> None:
        super().__init__(*args, **known)
        self.group = group
        self.setting = setting

    @property
    def long(self) -> list[str]:
        """All names with two hyphens that turn the option on; the first is its main name."""
        return [name for name in self.opts if name.startswith("--")]

    def variables(self, ctx: click.Context) -> list[str]:
        """Return the variables that set the option, the one with precedence first; none for a command outside the program."""
        if ctx.parent is None and not isinstance(ctx.command, click.Group):
            return []
        command = ctx.command_path.split()[1:]
        common = [variable(name) for name in self.long if name in COMMON]
        return [variable(*command, name) for name in self.long] + common

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """Return the text of the option's variable; an empty one counts as not set. Completion needs none."""
        if ctx.resilient_parsing:
            return None
        return next((os.environ[name] for name in self.variables(ctx) if os.environ.get(name)), None)

    def value_from_envvar(self, ctx: click.Context) -> Any:
        """Return the value of the option's variable; several values have spaces between them, and quotes as in a shell."""
        text = self.resolve_envvar_value(ctx)
        if text is None or not self.multiple:
            return super().value_from_envvar(ctx)
        try:
            return shlex.split(text)
        except ValueError as error:
            raise UsageError(f"{self._variable(ctx)}: {error}, got {text!r}") from None

    def _variable(self, ctx: click.Context) -> str:
        return next((name for name in self.variables(ctx) if os.environ.get(name)), "")

    def origin(self, ctx: click.Context) -> str | None:
        """Return the variable or the file that the value comes from; None if it was passed, or is the default."""
        source = ctx.get_parameter_source(str(self.name))
        if source is ParameterSource.ENVIRONMENT:
            return self._variable(ctx)
        return str(ctx.meta.get(CONFIG_FILE)) if source is ParameterSource.DEFAULT_MAP else None

    def get_error_hint(self, ctx: click.Context | None) -> str:
        """Return the name of the option, and where a value comes from that was not passed."""
        origin = ctx and self.origin(ctx)
        return super().get_error_hint(ctx) + (f" (from {origin})" if origin else "")


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
        setting=setting,
        show_default=default not in (REQUIRED, None, ()),
        multiple=setting.repeats,
        **known,
    )


def _type_of(setting: Setting) -> Any:
    """Return click's type of one value; None for a flag."""
    if setting.words:
        return NumberOrWord(setting.words) if setting.kind else Choice(setting.words)
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
AS_JSON = plain_option("--json", "as_json", is_flag=True, help="Print the result as JSON.", group="Output")


def show_result(result: Any) -> None:
    """Print a result on stdout: a text as it is, anything else as one JSON value."""
    click.echo(result if isinstance(result, str) else json.dumps(result, indent=1))


def file_record(path: Path, **more: Any) -> dict[str, Any]:
    """Return a file that a command wrote, as JSON values."""
    return {"path": str(path), "bytes": path.stat().st_size, **more}


RECIPE_FIELDS = "deit_cli.recipe_fields"  # key in the command's context for the settings under `set` in a file
CONFIG_FILE = "deit_cli.config_file"  # and for the path of that file


def config_option(*kinds: type, recipe: bool = False) -> Callable[[Any], Any]:
    """Return a decorator that adds -c/--config: a file with settings, which the environment and the other options override.

    Every command has this option without the decorator, for a file with its own options.

    Args:
        kinds: configs of which the file may have settings that are no options of the command, which ignores them.
        recipe: whether the command has a recipe, so that the file may have `recipe` and, below `set`, fields of it.
    """
    fields = ", and recipe fields below `set:`" if recipe else ""
    return plain_option(
        "-c",
        "--config",
        type=click.Path(path_type=Path),
        metavar="FILE.yaml",
        is_eager=True,
        expose_value=False,
        callback=partial(_read_config, kinds=kinds, recipe=recipe),
        help=f"YAML file with options, a line `name: value` for each{fields}. Options on the command line override it.",
        group="Run",
    )


def _read_config(
    context: click.Context, _: click.Parameter, path: Path | None, *, kinds: tuple[type, ...], recipe: bool
) -> None:
    if path is None or context.resilient_parsing:
        return
    from pipeline.settings.files import read_settings

    settings = read_settings(path, *kinds, recipe=recipe, options=dict(_settings_of_options(context.command)))
    context.meta[CONFIG_FILE] = path
    context.meta[RECIPE_FIELDS] = {str(k).replace("-", "_"): v for k, v in settings.pop("set", {}).items()}
    context.default_map = settings


def _settings_of_options(command: click.Command) -> Iterator[tuple[str, Setting]]:
    """Yield name in a file and setting of each option; recipe fields are a mapping there, and no list of texts."""
    for option in command.params:
        if isinstance(option, GroupedOption) and option.name not in ("config", "overrides"):
            if option.setting is not None:
                yield from ((name, option.setting) for name in option.setting.names)
            else:
                yield from ((name[2:].replace("-", "_"), _setting_of(option)) for name in option.long)


def _setting_of(option: GroupedOption) -> Setting:
    """Return the setting that a file may have for an option without a config."""
    kinds = {"integer": int, "integer range": int, "float": float, "float range": float, "boolean": bool, "path": Path}
    words = tuple(map(str, option.type.choices)) if isinstance(option.type, click.Choice) else ()
    kind = None if words else Views if isinstance(option.type, ViewsType) else kinds.get(option.type.name, str)
    return Setting(
        name=str(option.name),
        default=None,
        help="",
        flags=(),
        group=option.group,  # pyright: ignore[reportArgumentType]
        low=None,
        high=None,
        bare=None,
        metavar=None,
        free=False,
        timed=False,
        planned=False,
        kind=kind,
        words=words,
        optional=True,
        repeats=option.multiple,
    )


LOUDNESS = "deit_cli.loudness"  # key in the command's context for the sources that ask for quiet or verbose


def loudness_options() -> list[GroupedOption]:
    """Return -q/--quiet and -v/--verbose, which every command has, and the program in front of them."""
    quiet = "Show only warnings, errors and the result: no messages and no progress."
    verbose = "Show all messages, and the traceback of an unexpected error."
    return [_loudness_option("-q", "--quiet", quiet), _loudness_option("-v", "--verbose", verbose)]


def _loudness_option(short: str, long: str, text: str) -> GroupedOption:
    def note(context: click.Context, option: click.Parameter, value: bool) -> None:
        if value and not context.resilient_parsing:
            source = context.get_parameter_source(str(option.name))
            context.meta.setdefault(LOUDNESS, {}).setdefault(source, set()).add(option.name)

    return GroupedOption([short, long], is_flag=True, expose_value=False, callback=note, help=text, group="Logging")


def loudness(context: click.Context) -> str:
    """Return `quiet`, `verbose` or `normal`: what the command line asks for, else the environment, else the file of -c."""
    asked = context.meta.get(LOUDNESS, {})
    for source in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP):
        if len(names := asked.get(source, ())) > 1:
            raise UsageError("--quiet and --verbose contradict each other: pass one of them")
        if names:
            return next(iter(names))
    return "normal"


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
    """Log the settings that differ from the defaults, as options that can be passed again; and the variables behind them."""
    from pipeline.settings.files import describe_settings

    used = variables_used(click.get_current_context())
    origin = f" (with {', '.join(used)} of the environment)" if used else ""
    log.info("settings: %s%s", describe_settings(*configs, recipe=recipe), origin)


def variables_used(context: click.Context) -> list[str]:
    """Return the environment variables that set options of the running command."""
    options = [option for option in context.command.params if isinstance(option, GroupedOption)]
    from_there = [o for o in options if context.get_parameter_source(str(o.name)) is ParameterSource.ENVIRONMENT]
    return [str(option.origin(context)) for option in from_there]
