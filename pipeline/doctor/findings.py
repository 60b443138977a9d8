"""The results of an examination: rows with measured facts, and findings with a problem and its fix."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.text import count


@dataclass(frozen=True)
class Finding:
    """A problem, or a warning of a possible problem.

    Attributes:
        what: rule and value, one line.
        way_out: instructions for fixing it.
        is_warning: True if everything works anyway.
    """

    what: str
    way_out: str
    is_warning: bool = False

    def __str__(self) -> str:
        return f"{'warning' if self.is_warning else 'PROBLEM'}: {self.what}. {self.way_out}"


@dataclass(frozen=True)
class Row:
    """An examined fact: its name, its text for people, and its value for machines (by default the text)."""

    name: str
    text: str
    value: Any = None


@dataclass
class Section:
    """A section of a report, filled during the examination."""

    title: str
    rows: list[Row] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def row(self, name: str, text: str, value: Any = None) -> None:
        """Add a row with a fact."""
        self.rows.append(Row(name, text, value))

    def problem(self, what: str, way_out: str) -> None:
        """Add a problem and its fix."""
        self.findings.append(Finding(what, way_out))

    def warning(self, what: str, way_out: str) -> None:
        """Add a warning and its fix."""
        self.findings.append(Finding(what, way_out, is_warning=True))


def verdict(sections: Sequence[Section]) -> tuple[int, int]:
    """Return the number of problems and the number of warnings."""
    found = [finding.is_warning for section in sections for finding in section.findings]
    return found.count(False), found.count(True)


def report_table(sections: Sequence[Section]) -> str:
    """Return a report for people: each section's rows and then its findings, and at the end the number of findings."""
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
