"""Numbers and sizes for people, and checks of names that go into files and messages."""

import difflib
import re
from collections.abc import Collection, Iterable, Sequence

from pipeline.errors import SourceError, UsageError

SAFE_NAME = re.compile(r"[A-Za-z0-9._-]+")  # names of files and folders in a label set
CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
MAX_KEY_BYTES = 1024
_BYTES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BYTES |= {f"{prefix}I": 2 ** (10 * power) for power, prefix in enumerate("KMGT", start=1)}


def count(number: int, what: str, plural: str = "s") -> str:
    """Return a count with its noun: `1 view`, `2,000 views`."""
    return f"{number:,} {what}{'' if number == 1 else plural}"


def duration(hours: float) -> str:
    """Return a duration as text, in seconds, minutes or hours, whichever suits its length."""
    if hours < 1 / 30:
        return f"{3600 * hours:.3g} s"
    return f"{60 * hours:.3g} min" if hours < 2 else f"{hours:,.0f} h" if hours >= 100 else f"{hours:.3g} h"


def byte_size(number: float) -> str:
    """Return a number of bytes as text, in decimal units: `512 B`, `1.5 GB`."""
    unit = next(
        (unit for unit in ("B", "kB", "MB", "GB") if abs(number) < 1000 or (number := number / 1000) is None), "TB"
    )
    return f"{number:,.0f} B" if unit == "B" else f"{number:,.1f} {unit}"


def parse_bytes(text: str, *, what: str) -> int:
    """Return the number of bytes in a size such as `500MB`, `1.5 TB` (decimal) or `64GiB` (powers of 1,024).

    Args:
        text: size with its unit.
        what: name of the setting, for the error.

    Raises:
        UsageError: the text is not such a size, or the size is not above 0.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?I?)B", text.strip().upper(), re.ASCII)
    number = float(match[1]) * _BYTES[match[2]] if match and match[2] in _BYTES else 0
    if number < 1:
        raise UsageError(f"{what} must be a size such as 500MB, 50GB or 2TB, got {text!r}")
    return int(number)


def check_name(name: str, what: str) -> str:
    """Check that every file format and log line can carry a sample key or class name, and return it.

    Args:
        name: sample key or class name.
        what: place and kind of the name, for the error: `train-0.tar: byte 512: sample key`.

    Raises:
        SourceError: the name is not UTF-8, is empty or too long, or contains control characters.
    """
    try:
        size = len(name.encode())
    except UnicodeEncodeError:  # Python decodes file names that are not UTF-8 to surrogates
        raise SourceError(f"{what} must be valid UTF-8, got {name!r}", fix="Rename it") from None
    if not 0 < size <= MAX_KEY_BYTES:
        raise SourceError(f"{what} must have 1 to {MAX_KEY_BYTES} bytes, got {size}: {name[:80]!r}", fix="Rename it")
    if CONTROL_CHARACTERS.search(name):
        raise SourceError(f"{what} must not contain control characters, got {name!r}", fix="Rename it")
    return name


def printable(text: str) -> str:
    """Return a text in which control characters are replaced, so that a name in somebody's data cannot drive a terminal."""
    return CONTROL_CHARACTERS.sub("\N{REPLACEMENT CHARACTER}", text)


def first_few(names: Sequence[str], limit: int) -> str:
    """Return at most `limit` names as text, and the number of the others: `a, b and 2 more`."""
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def did_you_mean(word: str, names: Iterable[str]) -> str | None:
    """Return a question with the name that is most similar to a word, or None if none is similar."""
    close = difflib.get_close_matches(word, names, n=1)
    return f"Did you mean {close[0]}?" if close else None


def listed(names: Sequence[str]) -> str:
    """Return all names as text: `a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def aligned(rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,), indent: str = "") -> str:
    """Return rows of cells as a table: columns are as wide on a terminal as their widest cell, with two spaces between.

    Control characters in cells are replaced; characters that take two columns, such as Chinese ones, count as two.

    Args:
        rows: cells, the same number in each row.
        left: columns that are aligned to the left; all others are aligned to the right.
        indent: text in front of each line.
    """
    from rich.cells import cell_len

    shown = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*shown, strict=True)]
    lines = []
    for row in shown:
        gaps = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = (cell + gap if at in left else gap + cell for at, (cell, gap) in enumerate(zip(row, gaps, strict=True)))
        lines.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def two_columns(rows: Sequence[tuple[str, str]]) -> str:
    """Return rows of a name and a text as a table, one row per line."""
    return "\n".join(f"{name:15}{text}" for name, text in rows)
