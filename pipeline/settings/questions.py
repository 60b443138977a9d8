"""Questions on the terminal: one at a time, each answer checked before the next question."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from pipeline.errors import DeitCliError, UsageError

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Questions:
    """Asks for values that no option gave.

    Attributes:
        assume_defaults: take the default of every question instead of asking.
    """

    assume_defaults: bool = False

    def check_askable(self, given: Mapping[str, Any]) -> None:
        """Raise UsageError if somebody must be asked and there is no terminal; `given` has the value of each option."""
        missing = [flag for flag, value in given.items() if value is None]
        if missing and not self.assume_defaults and not sys.stdin.isatty():
            raise UsageError(
                f"nobody can be asked: standard input is no terminal, and these options are missing: {', '.join(missing)}",
                fix="Pass them, or --yes to take the default of all that have one",
            )

    def ask(self, text: str, given: Any, *, flag: str, default: Any = None, check: Callable[[str], Answer]) -> Answer:
        """Return the checked answer: that of the option, the default, or what the user types. A wrong one is asked for again.

        Args:
            text: the question, without a question mark.
            given: value of the option; None: not passed.
            flag: the option, for the error where there is no default.
            default: the default; None: there is none.
            check: returns the value of an answer, or raises DeitCliError.

        Raises:
            UsageError: there is no answer and no default.
        """
        if given is not None:
            return check(str(given))
        if self.assume_defaults:
            if default is None:
                raise UsageError(f"{flag} has no default", fix="Pass it, with --yes for the others")
            return check(str(default))

        def typed(answer: Any) -> Answer:  # a default that was accepted comes as it is
            try:
                return check(str(answer))
            except DeitCliError as error:
                raise click.UsageError(str(error)) from error  # click shows it and asks again

        return click.prompt(text, default=default, value_proc=typed, err=True)
