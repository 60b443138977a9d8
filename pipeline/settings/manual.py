"""Man pages: one for each command, made from the texts of `--help`.

click-man (0.6) was tried for it. Its pages cut the first sentence after 45 characters, join the lines of the examples and
lose the backslash at their ends, pass on click's control character for kept lines (27 warnings of mandoc), and know no
headings for options. So the few macros of man(7) are written here.
"""

import datetime
import importlib.metadata
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path

import click

from pipeline.errors import UsageError
from pipeline.settings.fields import GROUPS
from pipeline.settings.options import GroupedOption, variable
from pipeline.storage.atomic import refusals_named, replace_file

MARK = '.\\" made by deit-cli man from its help\n'  # first line of every page: such a file may be replaced
EXIT_CODES = (
    ("0", "The command did what was asked."),
    ("1", "It could not; stderr says why, and what to do."),
    ("2", "An option, an argument, a variable or a file of settings is wrong."),
    ("70", "An unforeseen error: stderr names the report of it."),
    ("130, 143", "It was stopped by Ctrl-C or SIGTERM; the last message says how to continue."),
)


def write_pages(program: click.Group, folder: Path) -> list[Path]:
    """Write the man page of the program and of each of its commands; return their paths.

    The date of the pages is that of SOURCE_DATE_EPOCH, if it is set, else that of today.

    Raises:
        UsageError: a file with the name of a page is no such page; nothing was written.
    """
    footer = f'"{_date():%Y-%m-%d}" "deit-cli {importlib.metadata.version("deit-cli")}" "deit-cli"'
    pages = {folder / f"{_name(ctx)}.1": _page(ctx, footer) for ctx in _contexts(program, None)}
    for path in pages:
        with refusals_named(path):
            ours = not path.exists() or (path.is_file() and path.read_bytes().startswith(MARK.encode()))
        if not ours:
            raise UsageError(f"{path} is no page that deit-cli wrote, and is not replaced", fix="Choose another --out")
    for path, text in pages.items():
        replace_file(path, text.encode())
    return list(pages)


def _date() -> datetime.datetime:
    """Return the date of the pages: that of SOURCE_DATE_EPOCH, if it is set, else that of today."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if not epoch:
        return datetime.datetime.now()
    try:
        return datetime.datetime.fromtimestamp(int(epoch), datetime.UTC)
    except (ValueError, OverflowError, OSError):
        raise UsageError(
            f"SOURCE_DATE_EPOCH must be a number of seconds since 1970, got {epoch!r}", fix="Unset it"
        ) from None


def _contexts(command: click.Command, parent: click.Context | None) -> Iterator[click.Context]:
    context = command.make_context(str(command.name), [], parent=parent, resilient_parsing=True)
    yield context
    if isinstance(command, click.Group):
        for name in sorted(command.commands):
            yield from _contexts(command.commands[name], context)


def _name(context: click.Context) -> str:
    return context.command_path.replace(" ", "-")


def _page(context: click.Context, footer: str) -> str:
    command, name = context.command, _name(context)
    usage = " ".join(command.collect_usage_pieces(context))
    lines = [
        f".TH {_roff(name.upper())} 1 {footer}",
        ".SH NAME",
        f"{_roff(name)} \\- {_roff(command.get_short_help_str(limit=1000).rstrip('.'))}",
        ".SH SYNOPSIS",
        f"\\fB{_roff(context.command_path)}\\fP {_roff(usage)}",
        *_help(inspect.cleandoc(command.help or "")),
        *_options(context),
        *_commands(context),
        *_environment(context),
        ".SH EXIT STATUS",
        *(line for code, text in EXIT_CODES for line in (".TP", code, _roff(text))),
        *_see_also(context),
    ]
    return MARK + "\n".join(lines) + "\n"


def _help(text: str) -> Iterator[str]:
    """Yield the description, and the examples, whose lines are kept."""
    paragraphs = [part for part in text.replace("\b\n", "\b").split("\n\n") if part.strip()]
    yield ".SH DESCRIPTION"
    for number, part in enumerate(part for part in paragraphs if not part.startswith("\b")):
        yield from ((".PP",) if number else ())
        yield _roff(" ".join(part.split()))
    for part in (part for part in paragraphs if part.startswith("\b")):
        title, *kept = part.removeprefix("\b").splitlines()
        yield from (f".SH {title.rstrip(':').upper()}", ".nf", *map(_roff, kept), ".fi")


def _options(context: click.Context) -> Iterator[str]:
    """Yield the options under the headings of `--help`."""
    options = [option for option in context.command.get_params(context) if isinstance(option, click.Option)]
    yield ".SH OPTIONS"
    for group in (*GROUPS, None):
        shown = [option for option in options if getattr(option, "group", None) == group and not option.hidden]
        yield from ([f".SS {_roff(group or 'Other')}"] if shown else ())
        for option in shown:
            names, text = option.get_help_record(context) or ("", "")
            yield from (".TP", re.sub(r"(?<![\w\\-])((?:\\-){1,2}[\w\\-]+)", r"\\fB\1\\fP", _roff(names)), _roff(text))


def _commands(context: click.Context) -> Iterator[str]:
    command = context.command
    if not isinstance(command, click.Group):
        return
    yield ".SH COMMANDS"
    for name in sorted(command.commands):
        yield from (".TP", f"\\fB{_roff(name)}\\fP", _roff(command.commands[name].get_short_help_str(limit=1000)))


def _environment(context: click.Context) -> Iterator[str]:
    options = [option for option in context.command.params if isinstance(option, GroupedOption)]
    shown = next((option for option in options if option.name != "config"), None)
    if shown and context.parent is not None:
        example = shown.variables(context)[0]
        prefix = variable(*context.command_path.split()[1:], "")
        yield ".SH ENVIRONMENT"
        yield _roff(
            f"{prefix}OPTION sets an option: {example} is {shown.long[0]}. An option on the command line overrides it;"
            " it overrides the file of --config."
        )


def _see_also(context: click.Context) -> Iterator[str]:
    parents = [context.parent] if context.parent else []
    below = context.command.commands if isinstance(context.command, click.Group) else {}
    names = [*(_name(parent) for parent in parents), *(f"{_name(context)}-{name}" for name in sorted(below))]
    if names:
        yield ".SH SEE ALSO"
        yield ", ".join(f"\\fB{_roff(name)}\\fP(1)" for name in names)


def _roff(text: str) -> str:
    """Return a text in which nothing is a command of roff, and a hyphen is the one that can be copied."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    escaped = re.sub(r"`([^`]+)`", r"\\fB\1\\fP", escaped)
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped
