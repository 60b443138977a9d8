"""Output while a command runs: messages on stderr, and a progress bar on a terminal or regular log lines elsewhere."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click

from pipeline.repeats import FirstOfEachKind, warn_counted


class ToStderr(logging.Handler):
    """Log handler that writes to the current `sys.stderr`, which a progress bar replaces while it is shown.

    If a loop repeats a warning, only the first is shown; with `every`, all are.
    """

    def __init__(self, level: int = logging.NOTSET, *, every: bool = False) -> None:
        super().__init__(level)
        self.first = FirstOfEachKind()
        if not every:
            self.addFilter(self.first)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        click.echo(self.format(record), err=True)


log = logging.getLogger("deit_cli")


def _say_once(record: logging.LogRecord) -> bool:
    """Return whether a message of the Hub's client is its own affair; its retries become warnings of ours, which are counted.

    It logs two lines for each try, and shows each of them twice: in its own handler and in ours.
    """
    text = record.getMessage()
    if record.levelno != logging.WARNING:
        return True
    if "thrown while requesting" in text or text.startswith("Rate limited"):
        warn_counted(log, "failed requests to the Hub", "the Hub is asked again: %s", text)
        return False
    return not text.startswith("Retrying in")


def set_up(loudness: str) -> None:
    """Send log messages to stderr: warnings and errors if `loudness` is quiet, all if it is verbose.

    A quiet command shows no messages, but --log-json gets them.
    """
    shown = logging.WARNING if loudness == "quiet" else logging.NOTSET
    handler = ToStderr(shown, every=loudness == "verbose")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    log.setLevel(logging.DEBUG if loudness == "verbose" else logging.INFO)
    logging.getLogger("huggingface_hub.utils._http").addFilter(_say_once)


def _is_quiet() -> bool:
    """Return whether nobody would see a message at level INFO: with --quiet, and on all ranks but the first."""
    handlers = [handler for handler in logging.getLogger().handlers if isinstance(handler, ToStderr)]
    return not log.isEnabledFor(logging.INFO) or any(handler.level > logging.INFO for handler in handlers)


def say_counts() -> None:
    """Log the counts of repeated warnings; only the first of each kind was shown."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, ToStderr):
            handler.first.log_counts()


class ShownProgress:
    """Progress display: sends the progress of a command to a terminal or the log, and to a file.

    Attributes:
        last: last tick or step; None before the first.
    """

    def __init__(self, *tell: Callable[[Any], None]) -> None:
        self._tell = tell
        self.last: Any = None

    def __call__(self, tick: Any) -> None:
        """Show a tick of stage 1 or a step of training."""
        self.last = tick
        for tell in self._tell:
            tell(tick)


@contextmanager
def shown_progress(log_json: Path | None = None) -> Iterator[ShownProgress]:
    """Show a bar on a terminal, or log a line at intervals; nothing if the command is quiet.

    `log_json` names a file that gets the progress as well, also of a quiet command.
    """
    from pipeline.machine.progress import json_log

    with json_log(log_json) as write:
        try:
            with nullcontext(_nothing) if _is_quiet() else _bar() if sys.stderr.isatty() else _lines() as show:
                yield ShownProgress(show, write)
        finally:
            say_counts()


def _nothing(_: Any) -> None:
    """Show nothing of a tick."""


@contextmanager
def _lines() -> Iterator[Callable[[Any], None]]:
    from pipeline.machine.progress import log_tick, throttled
    from trainer import pace

    log_step = pace.log_steps()

    def log_other(tick: Any) -> None:
        if not isinstance(tick, pace.Step):
            log_tick(tick)

    with throttled(log_other, every_s=60) as update:
        # A step goes to both: it ends the previous phase, whose last line is written now.
        yield ShownProgress(update, lambda tick: log_step(tick) if isinstance(tick, pace.Step) else None)


@contextmanager
def _bar() -> Iterator[Callable[[Any], None]]:
    from rich import progress as bars
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    from pipeline.machine.progress import tick_text
    from trainer import pace

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(bar_width=None),
        bars.TextColumn("{task.fields[count]}", style="progress.download"),
        bars.TextColumn("{task.fields[left]}"),
    )
    rows = bars.Progress(*columns, expand=True)
    live = Live(rows, console=Console(stderr=True), transient=True)
    tasks: dict[str, bars.TaskID] = {}

    def update(tick: Any) -> None:
        if tick.phase not in tasks:
            tasks[tick.phase] = rows.add_task(tick.phase, count="", left="")
        shown: dict[str, Any] = {"count": f"{tick.done:,}/{tick.total:,}"}
        if isinstance(tick, pace.Step):
            done = f"{100 * tick.done // tick.total} %"
            shown = {"description": pace.place(tick), "count": done, "left": pace.left(tick)}
        below = pace.step_text(tick) if isinstance(tick, pace.Step) else tick_text(tick)
        rows.update(tasks[tick.phase], completed=tick.done, total=tick.total, **shown)
        live.update(Group(rows, Text(below)))
        live.start()  # start late, because a command may first ask the user something

    try:
        yield update
    finally:
        live.stop()
