"""What is seen while a command runs: messages on stderr, a bar on a terminal, elsewhere a line now and then."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from pipeline.repeats import FirstOfEachKind


class ToStderr(logging.Handler):
    """Messages to whatever stderr is at the time: a progress bar takes its place for as long as it is shown.

    Of warnings that a loop repeats it shows the first of each kind, unless `every` asks for all.
    """

    def __init__(self, *, every: bool = False) -> None:
        super().__init__()
        self.first = FirstOfEachKind()
        if not every:
            self.addFilter(self.first)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        click.echo(self.format(record), err=True)


def say_counts() -> None:
    """Say how often the warnings came of which only the first was shown."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, ToStderr):
            handler.first.log_counts()


@contextmanager
def shown_progress(log_json: Path | None = None) -> Iterator[Callable[[Any], None]]:
    """Show a bar on a terminal, elsewhere a log line now and then; and write a JSON log where one is asked for."""
    from pipeline.machine.progress import json_log

    with json_log(log_json) as write:
        try:
            with _bar() if sys.stderr.isatty() else _lines() as show:

                def update(tick: Any) -> None:
                    show(tick)
                    write(tick)

                yield update
        finally:
            say_counts()


@contextmanager
def _lines() -> Iterator[Callable[[Any], None]]:
    from pipeline.machine.progress import now_and_then, say
    from trainer import pace

    say_step = pace.now_and_then()

    def say_tick(tick: Any) -> None:
        if not isinstance(tick, pace.Step):
            say(tick)

    with now_and_then(say_tick, every_s=60) as look:

        def update(tick: Any) -> None:
            look(tick)  # a step too: it ends the phase before it, whose last line comes now
            if isinstance(tick, pace.Step):
                say_step(tick)

        yield update


@contextmanager
def _bar() -> Iterator[Callable[[Any], None]]:
    from rich import progress as bars
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    from pipeline.machine.progress import state
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
        below = pace.state(tick) if isinstance(tick, pace.Step) else state(tick)
        rows.update(tasks[tick.phase], completed=tick.done, total=tick.total, **shown)
        live.update(Group(rows, Text(below)))
        live.start()  # only now: before it there may be questions to the user

    try:
        yield update
    finally:
        live.stop()
