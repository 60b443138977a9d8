"""Completion of values in a shell: models, recipes and their fields, and paths. The scripts for the shells are click's.

An answer takes under half a second: neither torch nor timm is imported.
"""

import importlib.util
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class

PROGRAM = "deit-cli"
VARIABLE = "_DEIT_CLI_COMPLETE"  # which click reads: the shell asks for completions with it
SHELLS = ("bash", "zsh", "fish")
SHORT_STUDENTS = ("deit-ti", "deit-s", "deit-b")
PLACES = re.compile(r"PATH|FOLDER|FILE|RUN|STUDY")  # in the metavar of a parameter that takes a path
# Two changes to click's scripts. Bash adds a space behind every completion, but behind `img_size=` the value follows.
# Fish shows the help of a command up to its first comma.
_CHANGES = {
    "COMPREPLY+=($value)": "COMPREPLY+=($value)\n            if [[ $value == *= ]]; then compopt -o nospace; fi",
    'string split "," $completion': 'string split -m 1 "," $completion',
}


def script(shell: str) -> str:
    """Return the script that completes command lines of this program in a shell, one of `SHELLS`."""
    kind = get_completion_class(shell)
    assert kind is not None
    text = kind(click.Command(PROGRAM), {}, PROGRAM, VARIABLE).source()
    for part, changed in _CHANGES.items():
        text = text.replace(part, changed)
    return text


class Completed(click.ParamType):
    """Text, with completion."""

    name = "text"

    def __init__(self, complete: Callable[[str], Iterable[CompletionItem]]) -> None:
        self._complete = complete

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the text as it is."""
        return click.STRING.convert(value, param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return what may stand in place of the incomplete word."""
        return list(self._complete(incomplete))


def completed(parameter: click.Parameter) -> click.ParamType:
    """Return the type of a parameter, with completion if it is a text of which the values are known."""
    if type(parameter.type) is not type(click.STRING):
        return parameter.type
    by_name = {"model": _students, "teacher": _teachers, "recipe": _recipes, "overrides": _recipe_fields}
    if parameter.name in by_name:
        return Completed(by_name[parameter.name])
    return Completed(_paths) if PLACES.search(parameter.metavar or "") else parameter.type


def _paths(incomplete: str) -> Iterable[CompletionItem]:
    return [CompletionItem(incomplete, type="file")]  # the shell completes paths itself


def _items(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def _students(incomplete: str) -> Iterable[CompletionItem]:
    return _items([*SHORT_STUDENTS, *_timm_models(tags="." in incomplete)], incomplete)


def _teachers(incomplete: str) -> Iterable[CompletionItem]:
    """Return models; paths for what looks like one, because an exported folder may be a teacher, too."""
    return _paths(incomplete) if "/" in incomplete else _items(_timm_models(tags="." in incomplete), incomplete)


def _timm_models(*, tags: bool) -> list[str]:
    """Return the names of timm's models, with `tags` those of their published weights: read from its files."""
    found = importlib.util.find_spec("timm")  # does not import it
    folder = Path(found.origin).parent / "models" if found and found.origin else Path()
    pattern = r"^\s+['\"](\w+\.\w+)['\"]\s*:" if tags else r"^@register_model\s+def (\w+)\("
    texts = (path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    return sorted({name for text in texts for name in re.findall(pattern, text, flags=re.MULTILINE)})


def _recipes(incomplete: str) -> Iterable[CompletionItem]:
    from pipeline.views.recipe import PRESETS

    return _items(PRESETS, incomplete) or _paths(incomplete)


def _recipe_fields(incomplete: str) -> Iterable[CompletionItem]:
    from pipeline.views.recipe import Recipe

    return _items((f"{name}=" for name in Recipe.model_fields), incomplete.replace("-", "_"))
