"""The pages of `report`, read back: their numbers, addresses and ids."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from pipeline.text import byte_size


class Page(HTMLParser):
    """Every `<data>` element with its text, every address, every id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.numbers: list[tuple[dict[str, str | None], str]] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self._open: dict[str, str | None] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self.tags.append(tag)
        self.ids += [str(known["id"])] if "id" in known else []
        self.addresses += [str(known[name]) for name in ("href", "src", "srcset", "action") if name in known]
        self._open = known if tag == "data" else None

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self.numbers.append((self._open, data))
            self._open = None


def data_of(page: Path) -> Path:
    return page.with_name(f"{page.stem}-data.json")


def looked_up(report: Any, pointer: str) -> Any:
    """Return the value at a JSON pointer (RFC 6901)."""
    for step in pointer.split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        report = report[int(step)] if isinstance(report, list) else report[step]
    return report


def check_numbers(page: Path) -> int:
    """Check that every number of a page is the one at its place in the JSON file beside it, and return how many there are."""
    report = json.loads(data_of(page).read_bytes())
    numbers = Page(page.read_text()).numbers
    for known, text in numbers:
        value = looked_up(report, str(known["data-from"]))
        assert repr(value) == known["value"], known
        assert text == (format(value, known["data-form"]) if known.get("data-form") else byte_size(value)), known
    return len(numbers)
