"""The program around its commands: signals, exit codes, one line for each error, and `--help` in groups.

Every command gets here what all commands share: -c, -q, -v, environment variables, and completion of its values.
"""

import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import click

from pipeline.errors import DeitCliError, StoppedError, UsageError
from pipeline.settings.completion import completed
from pipeline.settings.fields import GROUPS
from pipeline.settings.options import (
    Choice,
    GroupedOption,
    config_option,
    loudness,
    loudness_options,
    variable,
    variables_used,
)
from pipeline.text import did_you_mean

CONTEXT: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "show_default": True,
    "max_content_width": 110,
    "token_normalize_func": lambda token: token.replace("_", "-"),  # DeiT writes --output_dir, timm --output-dir
}
CONTINUES = "the same command continues"
OTHER = "Other"  # heading of options without a group, such as --help, and of commands without one
# Heading in the help of a group -> its commands, in the order of their use.
SECTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "deit-cli": {
        "Start": ("init", "demo", "doctor"),
        "Label": ("pack", "index", "estimate", "precompute"),
        "Train": ("recipes", "models", "train", "evaluate"),
        "See": ("runs", "analyse", "report", "compare"),
        "Share": ("labels", "export"),
        "Other tools": ("bench", "completion", "man"),
    },
    "labels": {
        "See": ("info", "show", "audit"),
        "Check": ("verify", "sign"),
        "Copy": ("push", "pull", "card"),
        "Extend": ("extend", "merge"),
        "Exchange with other programs": ("export", "import"),
    },
    "bench": {"Measurements": ("stage1", "stage2", "inference")},
}
log = logging.getLogger("deit_cli")


class Command(click.Command):
    """A command that refuses empty values, shows its options in groups, and keeps their values for a crash report.

    Attributes:
        continues: how to continue a stopped command, for its last message; empty: it starts again from the beginning.
    """

    def __init__(self, *args: Any, continues: str = "", **known: Any) -> None:
        super().__init__(*args, context_settings=CONTEXT, **known)
        self.continues = continues
        names = {parameter.name for parameter in self.params}
        if "config" not in names and any(isinstance(each, GroupedOption) for each in self.params):
            config_option(recipe="overrides" in names)(self)
        self.params += loudness_options()
        for parameter in self.params:
            parameter.type = _helpful(parameter)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Return the remaining arguments; refuse an empty one, which a shell makes of an unset variable."""
        if not ctx.resilient_parsing:  # while a shell completes a command line, words may still be missing
            _refuse_empty(args)
            self._refuse_unknown_variables(ctx)
        return super().parse_args(ctx, args)

    def _refuse_unknown_variables(self, ctx: click.Context) -> None:
        options = [option for option in self.params if isinstance(option, GroupedOption)]
        known = {name for option in options for name in option.variables(ctx)}
        prefix = variable(*ctx.command_path.split()[1:], "")
        for name in sorted(os.environ) if known else ():
            if name.startswith(prefix) and name not in known:
                nearest = did_you_mean(name.removeprefix(prefix), [each.removeprefix(prefix) for each in known])
                fix = nearest or f"Unset it: variables are named as the options of {ctx.command_path}"
                raise UsageError(f"{name}: {ctx.command_path} has no such option", fix=fix)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        if isinstance(ctx.obj, dict):
            ctx.obj |= {"command": ctx.command_path} | ctx.params
        root = ctx.find_root().command
        if isinstance(root, Group):
            root.set_up(loudness(ctx))
        if used := variables_used(ctx):
            log.debug("from the environment: %s", ", ".join(used))
        try:
            return super().invoke(ctx)
        except UsageError as error:
            raise _with_origins(error, ctx) from error.__cause__

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under the headings of their groups, all in one column."""
        groups: dict[str, list[tuple[str, str]]] = {group: [] for group in (*GROUPS, OTHER)}
        for parameter in self.get_params(ctx):
            row = parameter.get_help_record(ctx)
            if row is not None and not isinstance(parameter, click.Argument):
                groups[getattr(parameter, "group", OTHER)].append(row)
        width = min(WIDEST, max(len(names) for rows in groups.values() for names, _ in rows))
        for group, rows in groups.items():
            if rows:
                with formatter.section(group):
                    formatter.write_dl([(names.ljust(width), text) for names, text in rows], col_max=WIDEST)


WIDEST = 36  # maximum width of option names before their help; longer names have their own line


def _helpful(parameter: click.Parameter) -> click.ParamType:
    """Return the type of a parameter, with completion of its values, and with similar choices in its errors."""
    if type(parameter.type) is click.Choice:
        return Choice(parameter.type.choices, parameter.type.case_sensitive)
    return completed(parameter)


def _refuse_empty(args: list[str]) -> None:
    for before, argument in zip(["", *args], args, strict=False):
        if argument == "" or re.fullmatch(r"--[\w-]+=", argument):
            where = argument.removesuffix("=") or before
            raise UsageError(
                f"{where or 'an argument'} has an empty value: is a variable not set? Leave it out, or give one"
            )


def _with_origins(error: UsageError, ctx: click.Context) -> UsageError:
    """Add to an error where the options come from that it names, if they were not passed on the command line."""
    named = re.findall(r"(?<![\w-])--[a-z][\w-]*", error.what)
    options = [option for option in ctx.command.params if isinstance(option, GroupedOption)]
    origins = {option.long[0]: option.origin(ctx) for option in options if set(named) & set(option.long)}
    told = ", ".join(f"{flag} comes from {origin}" for flag, origin in origins.items() if origin)
    if told and len(error.args) == 1:
        error.args = (f"{error.what} ({told})",)
    return error


class Group(click.Group):
    """A group of such commands and groups; `--help` lists them under headings.

    Attributes:
        set_up: called before a command runs, with what `loudness` returns. Only that of the outermost group counts.
    """

    command_class = Command
    group_class = type

    def __init__(self, *args: Any, set_up: Callable[[str], None] = lambda _: None, **known: Any) -> None:
        super().__init__(*args, **known)
        self.params += loudness_options()
        self.set_up = set_up

    def sections(self) -> dict[str, list[str]]:
        """Return the names of the visible commands under their headings."""
        visible = [name for name, command in self.commands.items() if not command.hidden]
        titles = SECTIONS.get(str(self.name), {})
        found = {title: [name for name in names if name in visible] for title, names in titles.items()}
        listed = {name for names in found.values() for name in names}
        return {t: names for t, names in (*found.items(), (OTHER, sorted(set(visible) - listed))) if names}

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each command with the whole first sentence of its help, under the headings."""
        sections = self.sections()
        width = max((len(name) for names in sections.values() for name in names), default=0)
        for title, names in sections.items():
            with formatter.section(title):
                rows = [(name.ljust(width), self.commands[name].get_short_help_str(limit=1000)) for name in names]
                formatter.write_dl(rows)


class Terminated(BaseException):
    """The exception for SIGTERM, which a scheduler sends before it takes the machine away."""


def run(commands: Group) -> None:
    """Run the command line; every error is one line on stderr and an exit code."""
    signal.signal(signal.SIGTERM, _stop_once(Terminated))
    signal.signal(signal.SIGINT, _stop_once(KeyboardInterrupt))
    settings: dict[str, Any] = {}
    threading.excepthook = partial(_report_thread, settings)
    try:
        code = commands.main(prog_name="deit-cli", standalone_mode=False, obj=settings)
    except Terminated:
        click.echo(f"terminated{_continued(commands, settings)}", err=True)
        code = 128 + signal.SIGTERM
    except StoppedError as error:
        click.echo(str(error), err=True)
        code = error.exit_code
    except DeitCliError as error:
        onward = _continued(commands, settings) if error.interrupts else ""
        click.echo("error: " + str(error).replace("\n", "\\n") + onward, err=True)  # a name may have such a character
        code = error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:  # a group without a command: its message is the help
        click.echo(error.message, err=True)
        code = error.exit_code
    except click.ClickException as error:
        click.echo(f"error: {one_line(error)}", err=True)
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo(f"stopped{_continued(commands, settings)}", err=True)
        code = 130
    except Exception as error:  # an unforeseen error
        from pipeline.crash import CRASHED

        click.echo(_reported(error, settings), err=True)
        code = CRASHED
    sys.exit(code)


def one_line(error: click.ClickException) -> str:
    """Return an error of click, a value or a name that it cannot take, as one line with the place of the help."""
    # Names of options or commands, the most similar first.
    similar = _override_for(error) or getattr(error, "possibilities", None)
    said = f"{error.message} Did you mean '{similar[0]}'?" if similar else " ".join(error.format_message().split())
    context = error.ctx if isinstance(error, click.UsageError) else None
    return f"{said} Help: {context.command_path} --help" if context else said


def _override_for(error: click.ClickException) -> list[str]:
    """Return the `--set` for an option that does not exist but has the name of a recipe field; otherwise []."""
    if not isinstance(error, click.NoSuchOption) or error.ctx is None:
        return []
    if all(parameter.name != "overrides" for parameter in error.ctx.command.params):
        return []
    from pipeline.views.recipe import Recipe  # here, because --help must be fast

    field = error.option_name.lstrip("-").replace("-", "_")
    return [f"--set {field}=..."] if field in Recipe.model_fields else []


def _stop_once(reason: type[BaseException]) -> Callable[..., None]:
    """Return a signal handler that raises `reason`; further signals are ignored, so that they do not disturb the shutdown."""

    def stop(*_: object) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise reason

    return stop


def _continued(commands: Group, settings: dict[str, Any]) -> str:
    """Return how to continue the command that was stopped, if it can be continued."""
    command: Any = commands
    for name in settings.get("command", "").split()[1:]:
        command = command.commands[name]
    return f"; {command.continues}" if isinstance(command, Command) and command.continues else ""


def _report_thread(settings: dict[str, Any], of_thread: threading.ExceptHookArgs) -> None:
    """Report an unforeseen error that ended a thread; the command goes on."""
    if not issubclass(of_thread.exc_type, SystemExit):
        click.echo(_reported(of_thread.exc_value, settings), err=True)


def _reported(error: BaseException | None, settings: dict[str, Any]) -> str:
    """Write the report of an unforeseen error, and return the message for the user."""
    from pipeline.crash import crash_of, save_report

    crash = crash_of(error or RuntimeError("unknown"))
    path = save_report(crash, sys.argv[1:], settings)
    kept = f"the report is in {path}" if path else "the report could not be written: no folder takes it"
    said = f"error: {crash.summary}. This is a fault of deit-cli, and {kept}: please send it with a bug report"
    return f"{crash.traceback}{said}" if log.isEnabledFor(logging.DEBUG) else said
