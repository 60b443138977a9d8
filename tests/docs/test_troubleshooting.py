"""docs/troubleshooting.md is true: each message that it quotes is one that the code raises, with this exception and this exit code."""

import ast
import itertools
import re
import signal
from collections.abc import Iterator
from pathlib import Path

from pipeline import errors
from pipeline.crash import CRASHED
from pipeline.labels import format
from pipeline.settings import program

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/troubleshooting.md").read_text()
HEADINGS = re.findall(r"^### `(.+)`\n\nExit code ([\d or]+), `(\w+)`\.", PAGE, flags=re.MULTILINE)
OTHER = "…"  # stands for what differs from case to case
KNOWN = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
NAMES = {name: value for name, value in vars(format).items() if isinstance(value, str)}  # such as MANIFEST_NAME


def texts_of(node: ast.expr) -> list[str]:
    """Return every text that an expression may have, with OTHER for the values in it."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=values):
            return ["".join(texts) for texts in itertools.product(*map(texts_of, values))]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return ["".join(texts) for texts in itertools.product(texts_of(left), texts_of(right))]
        case ast.IfExp(body=body, orelse=orelse):
            return [*texts_of(body), *texts_of(orelse)]
        case ast.FormattedValue(value=ast.Name(id=name)) if name in NAMES:
            return [NAMES[name]]
        case ast.Call(func=ast.Name(id="printable"), args=[text]):
            return texts_of(text)
        case _:
            return [OTHER]


def raised() -> Iterator[tuple[str, str]]:
    """Yield the exception and the text of every error in the code."""
    for path in [ROOT / "cli.py", *ROOT.glob("pipeline/**/*.py"), *ROOT.glob("trainer/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KNOWN and node.args:
                image = node.func.id == "BadImageError" and len(node.args) > 1
                for text in texts_of(node.args[1 if image else 0]):
                    yield node.func.id, f"image {OTHER}: {text}" if image else text


RAISED = set(raised())


def is_said(message: str, text: str) -> bool:
    """Return whether a message of the page is a text of the code or its beginning, values aside, and mostly its own words."""
    pieces = text.split(OTHER)
    for end in range(1, len(pieces) + 1):
        own = pieces[:end]
        pattern = ".*?".join(map(re.escape, own)) + ("" if end == len(pieces) else ".*?")
        if re.fullmatch(pattern, message) and 2 * sum(map(len, own)) > len(message.replace(OTHER, "")):
            return True
    return False


def exit_codes(name: str) -> set[int]:
    if name == "StoppedError":
        return {errors.StoppedError("", number).exit_code for number in (signal.SIGINT, signal.SIGTERM)}
    return {KNOWN[name].exit_code}


def test_the_page_has_the_messages_that_are_met_most():
    assert len(HEADINGS) == PAGE.count("\n### ")
    assert len({message for message, _, _ in HEADINGS}) == len(HEADINGS) >= 25


def test_each_message_is_raised_with_its_exception_and_exit_code():
    for message, codes, name in HEADINGS:
        assert any(kind == name and is_said(message, text) for kind, text in RAISED), message
        assert {int(code) for code in codes.split(" or ")} == exit_codes(name), message


def test_words_that_no_error_has_are_found_out():
    assert not any(is_said("… is not a label set: it has no manifest.json", text) for _, text in RAISED)
    assert not any(is_said("… already holds two runs", text) for _, text in RAISED)


def test_the_unexpected_error_is_told_as_it_is():
    heading, code = re.search(r"^## `error: … (This is .+)`\n\nExit code (\d+)\.", PAGE, flags=re.MULTILINE).groups()
    assert heading in Path(program.__file__).read_text()
    assert int(code) == CRASHED
