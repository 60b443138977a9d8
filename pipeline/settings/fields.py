"""Fields of config dataclasses: each setting is written once, with its default, help, range, choices and group.

Command-line options, files of settings, range checks and the list of settings that may change on resume come from the field.
"""

import dataclasses
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import UsageError

Group = Literal[
    "Data",
    "Output",
    "Views",
    "Teacher",
    "Stored labels",
    "Student",
    "Distillation",
    "Optimisation",
    "Evaluation",
    "Measurement",
    "Signature",
    "Licence",
    "Run",
    "Logging",
]
GROUPS: tuple[Group, ...] = typing.get_args(Group)  # in the order in which --help shows them
Views = tuple[int, int]  # start and stop
REQUIRED: Any = MISSING


def option(
    default: Any,
    text: str,
    *flags: str,
    group: Group,
    low: float | None = None,
    high: float | None = None,
    bare: str | None = None,
    metavar: str | None = None,
    free: bool = False,
    timed: bool = True,
    planned: bool = False,
) -> Any:
    """Return a config field with all properties of the setting.

    The type hint of the field adds the rest: a `Literal` lists the choices, `| None` means that the setting may be left
    out, and a tuple of any length means that the option may be repeated.

    Args:
        default: value of the field, or REQUIRED.
        text: help text.
        flags: other names of the option on the command line and in files.
        group: heading in `--help`.
        low: smallest value; None: any.
        high: largest value; None: any. It needs a `low`.
        bare: value of the option when it is passed without a value; None: a value is required.
        metavar: the value in `--help`, such as FOLDER|URL; None: the name of its type.
        free: whether a resumed run may change it.
        timed: whether `estimate` and `bench` have this option, too: it changes the speed of the work.
        planned: whether the plan of a label set fixes it, so that `labels extend` does not have this option.
    """
    known = {"help": text, "flags": flags, "group": group, "low": low, "high": high, "bare": bare, "metavar": metavar}
    return dataclasses.field(default=default, metadata=known | {"free": free, "timed": timed, "planned": planned})


data_option = partial(option, group="Data")
output_option = partial(option, group="Output")
views_option = partial(option, group="Views")
teacher_option = partial(option, group="Teacher")
stored_option = partial(option, group="Stored labels")
student_option = partial(option, group="Student")
distillation_option = partial(option, group="Distillation")
optimisation_option = partial(option, group="Optimisation")
evaluation_option = partial(option, group="Evaluation")
measurement_option = partial(option, group="Measurement")
signature_option = partial(option, group="Signature")
run_option = partial(option, group="Run")
logging_option = partial(option, group="Logging")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A field of a config, with the arguments of `option` and its type hint. Attributes not listed here are those of `option`.

    Attributes:
        name: name of the field.
        kind: type of one value: a key of `KINDS`; None where only `words` are allowed.
        words: values of the hint's `Literal`.
        optional: whether None is a value.
        repeats: whether the value is a tuple of any length.
    """

    name: str
    default: Any
    help: str
    flags: tuple[str, ...]
    group: Group
    low: float | None
    high: float | None
    bare: str | None
    metavar: str | None
    free: bool
    timed: bool
    planned: bool
    kind: Any
    words: tuple[str, ...]
    optional: bool
    repeats: bool

    @property
    def flag(self) -> str:
        """Name of the option on the command line."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the setting in a file."""
        return *(flag[2:].replace("-", "_") for flag in self.flags if flag.startswith("--")), self.name

    @property
    def wanted(self) -> str:
        """The allowed values in a file, for an error message."""
        parts = [KINDS[self.kind].text + (" or a list of them" if self.repeats else "")] if self.kind else []
        parts += [("one of " if len(self.words) > 1 else "") + ", ".join(self.words)] if self.words else []
        return " or ".join([*parts, "null"] if self.optional else parts)

    def takes(self, value: Any) -> bool:
        """Return whether a value of a file has the right type."""
        if value is None:
            return self.optional
        return all(map(self._takes_one, value)) if self.repeats and isinstance(value, list) else self._takes_one(value)

    def _takes_one(self, value: Any) -> bool:
        return (isinstance(value, str) and value in self.words) or (self.kind and KINDS[self.kind].holds(value))

    def check(self, value: Any) -> None:
        """Raise UsageError for a value, or one of several, that is out of range or not among the choices."""
        for each in value if self.repeats and isinstance(value, tuple) else (value,):
            self._check_one(each)

    def _check_one(self, value: Any) -> None:
        if value is None or value in self.words:
            return
        if self.kind is None:
            raise UsageError(f"{self.flag} must be one of {', '.join(self.words)}, got {value!r}")
        if self.low is not None and not self.low <= value <= (math.inf if self.high is None else self.high):
            raise UsageError(f"{self.flag} must be {_range(self.low, self.high)}, got {value}")


def _range(low: float, high: float | None) -> str:
    first, last = (str(end) if isinstance(end, int) else f"{end:g}" for end in (low, high or 0))
    return f"at least {first}" if high is None else f"in {first}..{last}"


def as_written(value: Any, setting: Setting) -> Any:
    """Return a value as people write it in a file: of an option that may be repeated, nothing, a single value, or a list."""
    if not setting.repeats:
        return value
    return list(value) if len(value) > 1 else next(iter(value), None)


@functools.cache
def settings_of(config: type) -> tuple[Setting, ...]:
    """Return the settings of a config dataclass in the order of its fields, its own before those that it inherits."""
    hints = typing.get_type_hints(config)
    own = inspect.get_annotations(config)
    fields = sorted(dataclasses.fields(config), key=lambda field: field.name not in own)
    return tuple(
        Setting(name=field.name, default=field.default, **field.metadata, **_read_hint(hints[field.name]))
        for field in fields
    )


def check_settings(config: Any) -> None:
    """Raise UsageError for a field of a config that is out of range or not among its choices."""
    for setting in settings_of(type(config)):
        setting.check(getattr(config, setting.name))


def _read_hint(hint: Any) -> dict[str, Any]:
    """Return kind, words, optional and repeats of a type hint."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    words = tuple(word for kind in kinds if typing.get_origin(kind) is Literal for word in typing.get_args(kind))
    kind = next((kind for kind in kinds if kind is not types.NoneType and typing.get_origin(kind) is not Literal), None)
    repeats = typing.get_args(kind)[1:] == (...,)
    kind = typing.get_args(kind)[0] if repeats else kind
    return {"kind": kind, "words": words, "optional": types.NoneType in kinds, "repeats": repeats}


@dataclass(frozen=True)
class Kind:
    """A type of value in a file of settings.

    Attributes:
        text: name of the type in an error message.
        holds: whether a value from YAML has this type.
    """

    text: str
    holds: Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_views(value: Any) -> bool:
    pair = isinstance(value, list) and len(value) == 2 and all(map(_is_whole, value))
    return pair or isinstance(value, str) or _is_whole(value)


_TEXT = Kind("text (in quotes)", lambda value: isinstance(value, str))
KINDS: dict[Any, Kind] = {
    str: _TEXT,
    Path: _TEXT,
    int: Kind("a whole number", _is_whole),
    float: Kind("a number", lambda value: isinstance(value, float) or _is_whole(value)),
    bool: Kind("true or false", lambda value: isinstance(value, bool)),
    Views: Kind("START:STOP or a whole number", _is_views),
    dict: Kind("a mapping of recipe fields", lambda value: isinstance(value, dict)),
}
