"""The program around its commands: signals, exit codes, one line for each error, and `--help` with options in groups."""

import logging
import re
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import click

from pipeline.errors import DeitCliError, StoppedError, UsageError
from pipeline.settings.fields import GROUPS

CONTEXT: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "show_default": True,
    "max_content_width": 110,
    "token_normalize_func": lambda token: token.replace("_", "-"),  # DeiT writes --output_dir, timm --output-dir
}
CONTINUES = "the same command continues"
OTHER = "Other"  # heading of options without a group, such as --help
log = logging.getLogger("deit_cli")


class Command(click.Command):
    """A command that refuses empty values, shows its options in groups, and keeps their values for a crash report.

    Attributes:
        continues: how to continue a stopped command, for its last message; empty: it starts again from the beginning.
    """

    def __init__(self, *args: Any, continues: str = "", **known: Any) -> None:
        super().__init__(*args, context_settings=CONTEXT, **known)
        self.continues = continues

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Return the remaining arguments; refuse an empty one, which a shell makes of an unset variable."""
        for before, argument in zip(["", *args], args, strict=False):
            if argument == "" or re.fullmatch(r"--[\w-]+=", argument):
                where = argument.removesuffix("=") or before
                raise UsageError(
                    f"{where or 'an argument'} has an empty value: is a variable not set? Leave it out, or give one"
                )
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        if isinstance(ctx.obj, dict):
            ctx.obj |= {"command": ctx.command_path} | ctx.params
        return super().invoke(ctx)

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


class Group(click.Group):
    """A group of such commands and groups."""

    command_class = Command
    group_class = type


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
        click.echo("error: " + str(error).replace("\n", "\\n"), err=True)  # a name may have such a character
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo(f"stopped{_continued(commands, settings)}", err=True)
        code = 130
    except Exception as error:  # an unforeseen error
        from pipeline.crash import CRASHED

        click.echo(_reported(error, settings), err=True)
        code = CRASHED
    sys.exit(code)


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
