"""What an examination finds: rows that say how things are, and findings that say what is wrong and the way out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.text import count


@dataclass(frozen=True)
class Finding:
    """Something that is wrong (a problem), or may become so (a warning).

    Attributes:
        what: the rule and the value, one line.
        way_out: what to do about it.
        is_warning: whether everything works anyway.
    """

    what: str
    way_out: str
    is_warning: bool = False

    def __str__(self) -> str:
        return f"{'warning' if self.is_warning else 'PROBLEM'}: {self.what}. {self.way_out}"


@dataclass(frozen=True)
class Row:
    """One thing that was looked at: its name, what a person reads, and what a machine reads (by default the same)."""

    name: str
    text: str
    value: Any = None


@dataclass
class Section:
    """What belongs together in a report; it grows while things are looked at."""

    title: str
    rows: list[Row] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def row(self, name: str, text: str, value: Any = None) -> None:
        """Say how something is."""
        self.rows.append(Row(name, text, value))

    def problem(self, what: str, way_out: str) -> None:
        """Say what is wrong, and the way out."""
        self.findings.append(Finding(what, way_out))

    def warning(self, what: str, way_out: str) -> None:
        """Say what may become a problem, and the way out."""
        self.findings.append(Finding(what, way_out, is_warning=True))


def verdict(sections: Sequence[Section]) -> tuple[int, int]:
    """Return how many problems and how many warnings there are."""
    found = [finding.is_warning for section in sections for finding in section.findings]
    return found.count(False), found.count(True)


def report_table(sections: Sequence[Section]) -> str:
    """Return a report for people: the findings of a section stand below its rows, and their number at the end."""
    lines: list[str] = []
    for section in sections:
        lines.append(section.title)
        lines += [f"  {row.name:24} {row.text}".rstrip() for row in section.rows]
        lines += [f"  ! {finding}" for finding in section.findings]
        lines.append("")
    problems, warnings = verdict(sections)
    lines.append(f"{count(problems, 'problem') if problems else 'no problem'}, {count(warnings, 'warning')}")
    return "\n".join(lines)


def report_json(sections: Sequence[Section]) -> dict[str, Any]:
    """Return a report for machines: `sections`, then `problems` and `warnings`, each with `what` and `way_out`."""
    found = [(section.title, finding) for section in sections for finding in section.findings]
    listed = {
        name: [
            {"section": title, "what": finding.what, "way_out": finding.way_out}
            for title, finding in found
            if finding.is_warning == is_warning
        ]
        for name, is_warning in (("problems", False), ("warnings", True))
    }
    values = {
        section.title: {row.name: row.text if row.value is None else row.value for row in section.rows}
        for section in sections
    }
    return {"sections": values} | listed
