"""A report as one HTML file: made from the values of report-data.json alone, so that every number on the page can be looked up there.

The template gets the values as `Traced`, which remember where they are in report-data.json. A filter shows a number as a `<data>` element
with its exact value and this place (RFC 6901).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline.text import byte_size
from trainer.evidence import plots

TEMPLATE = "report.html"


class Traced:
    """A JSON value and its place in the report. Attributes and items are traced, too; a missing name is false.

    Attributes:
        value: JSON value; None if there is none at this place.
        pointer: its place as a JSON pointer.
    """

    __slots__ = ("pointer", "value")

    def __init__(self, value: Any, pointer: str = "") -> None:
        self.value, self.pointer = value, pointer

    def __getattr__(self, name: str) -> "Traced":
        if name.startswith("__"):
            raise AttributeError(name)
        return self[name]

    def __getitem__(self, name: Any) -> "Traced":
        found = self.value
        if isinstance(found, Mapping):
            found = found.get(name)
        elif isinstance(found, Sequence) and isinstance(name, int) and name < len(found):
            found = found[name]
        else:
            found = None
        step = str(name).replace("~", "~0").replace("/", "~1")
        return Traced(found, f"{self.pointer}/{step}")

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the items of a list, or over names and values of an object."""
        if isinstance(self.value, Mapping):
            return iter([(name, self[name]) for name in self.value])
        return iter([self[place] for place in range(len(self.value or ()))])

    def __len__(self) -> int:
        return len(self.value or ())

    def __bool__(self) -> bool:
        return self.value is not None and self.value != [] and self.value != {} and self.value != ""

    def __str__(self) -> str:
        return "" if self.value is None else str(self.value)


def render_page(report: Mapping[str, Any], images: Mapping[str, str], *, data_file: str) -> str:
    """Return the HTML of a report.

    Args:
        report: content of report-data.json.
        images: data URIs of the pictures that the report names.
        data_file: name of the JSON file beside the page.
    """
    environment = templates()
    environment.filters |= {"num": number, "size": size, "plain": plain, "together": together}
    return environment.get_template(TEMPLATE).render(
        report=Traced(report),
        images=images,
        data_file=data_file,
        charts={name: draw for name, draw in _charts(report).items() if draw},
    )


def templates() -> Environment:
    """Return the page templates of this package; they escape every text."""
    return Environment(
        loader=PackageLoader("trainer.evidence"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def number(found: Traced, form: str = ".1f", unit: str = "") -> Any:
    """Return a number as text with its place in report-data.json, or a dash if there is none.

    Args:
        found: number, or a value that is not there.
        form: format specification, such as `.1f` or `,`.
        unit: text behind the number.
    """
    if found.value is None:
        return Markup("–")
    text = format(found.value, form)
    return Markup('<data value="{}" data-from="{}" data-form="{}">{}</data>{}').format(
        repr(found.value), found.pointer, form, text, unit
    )


def size(found: Traced) -> Any:
    """Return a number of bytes with its unit and its place in report-data.json."""
    if found.value is None:
        return Markup("–")
    return Markup('<data value="{}" data-from="{}">{}</data>').format(
        repr(found.value), found.pointer, byte_size(found.value)
    )


def plain(found: Any) -> str:
    """Return a name of JSON as words: `class_head` as `class head`."""
    return str(found).replace("_", " ")


def together(lines: Traced) -> list[list[Traced]]:
    """Return the lines of a chart in groups that have the same x values: each group is one table."""
    groups: dict[tuple[float, ...], list[Traced]] = {}
    for line in lines:
        groups.setdefault(tuple(line.x.value), []).append(line)
    return list(groups.values())


def _charts(report: Mapping[str, Any]) -> dict[str, str]:
    """Return the SVG of each chart that the values allow; the page lists the numbers behind each."""
    names = [each["name"] for each in (*report["results"], *report["runs"])]
    colours = {name: number for number, name in enumerate(dict.fromkeys(names))}  # of a run, the same in every chart
    charts = (
        _result_charts(report, colours)
        | _token_charts(report, colours)
        | _calibration_charts(report)
        | _cost_charts(report, colours)
    )
    return {name: Markup(svg) for name, svg in charts.items()}


def _result_charts(report: Mapping[str, Any], colours: Mapping[str, int]) -> dict[str, str]:
    """Return the bars of the results and the curves of the trainings."""
    found: dict[str, str] = {}
    if shown := report["results"]:
        found["results"] = plots.bars(
            [each["name"] for each in shown],
            [each["top1"] for each in shown],
            [None if each["low"] is None else (each["low"], each["high"]) for each in shown],
            label="top-1, %",
            colours=colours,
        )
    for name, curve in report["curves"].items():
        series = {line["name"]: (line["x"], line["y"]) for line in curve["lines"]}
        found[f"curve {name}"] = plots.lines(
            series, x="progress of the training", y=curve["label"], colours=colours, percent=True
        )
    return found


def _token_charts(report: Mapping[str, Any], colours: Mapping[str, int]) -> dict[str, str]:
    """Return the cosine of the two tokens by block, and along the training."""
    found: dict[str, str] = {}
    if tokens := report["tokens"]:
        series = {each["name"]: (each["depth"], each["cosine"]) for each in tokens}
        found["tokens"] = plots.lines(
            series, x="block (0: what enters the first)", y="cosine of the two tokens", colours=colours, high=1.02
        )
    if along := {each["name"]: each["along_training"] for each in report["tokens"] if each["along_training"]}:
        series = {
            name: ([point["update"] for point in points], [point["output"] for point in points])
            for name, points in along.items()
        }
        found["tokens along training"] = plots.lines(
            series, x="updates", y="cosine at the output", colours=colours, high=1.02
        )
    return found


def _calibration_charts(report: Mapping[str, Any]) -> dict[str, str]:
    """Return the share of right answers by confidence, a chart for each network."""
    found: dict[str, str] = {}
    for number, each in enumerate(report["calibration"]):
        series = {
            plain(answer): (
                [b["confidence"] for b in bins if b["images"]],
                [b["accuracy"] for b in bins if b["images"]],
            )
            for answer, bins in each["answers"].items()
        }
        found[f"calibration {number}"] = plots.lines(
            series, x="confidence", y="share of right answers", diagonal=True, percent=True, low=-0.03, high=1.03
        )
    return found


def _cost_charts(report: Mapping[str, Any], colours: Mapping[str, int]) -> dict[str, str]:
    """Return accuracy against the speed of inference, and against the cost of training."""
    found: dict[str, str] = {}
    if rows := report["tradeoff"]:
        found["tradeoff"] = plots.frontier(
            [each["name"] for each in rows],
            [each["images_per_s"] for each in rows],
            [each["top1"] for each in rows],
            [each["parameters"] for each in rows],
            label="images/s",
            more=True,
            colours=colours,
        )
    if rows := report["costs"]:
        found["costs"] = plots.frontier(
            [each["name"] for each in rows],
            [each["total_s"] for each in rows],
            [each["top1"] for each in rows],
            label="seconds: teacher, labels and student",
            more=False,
            colours=colours,
        )
    return found
