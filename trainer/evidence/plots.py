"""Plots as SVG text for a page: words stay text, and the page's style sheet decides the colours.

matplotlib writes colours into the SVG. The functions here draw with placeholders, which are then replaced by `currentColor`
and the style sheet's variables `--c0` to `--c7`, `--line` and `--card`, so that one SVG serves light and dark pages.
"""

import io
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

SERIES = 8  # colours in the style sheet
LONGEST = 44  # letters of a name in a chart; the tables have whole names
_INK, _LINE, _CARD = "#010203", "#040506", "#070809"
_COLOURS = tuple(f"#0a0b{number:02x}" for number in range(SERIES))
_REPLACED = {_INK: "currentColor", _LINE: "var(--line)", _CARD: "var(--card)"} | {
    c: f"var(--c{i})" for i, c in enumerate(_COLOURS)
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.5,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": "none",
}
_DASHES, _HATCHES = ("-", "--", ":", "-."), ("", "///", "..", "xxx")
_WIDTH = 4.2  # inches: at this size the letters can be read on a screen of 360 pixels


def bars(
    names: Sequence[str],
    middles: Sequence[float],
    spreads: Sequence[tuple[float, float] | None],
    *,
    label: str,
    colours: Mapping[str, int] = MappingProxyType({}),
) -> str:
    """Return horizontal bars, the first on top, with their values and the range of each as a line.

    Args:
        names: names of the bars.
        middles: lengths of the bars, finite.
        spreads: lowest and highest value behind each bar; None: no line.
        label: name and unit of the axis.
        colours: name -> number of its colour; others get the number of their place.
    """

    def draw(axes: Any) -> None:
        places = range(len(names))
        numbers = [colours.get(name, place) for place, name in enumerate(names)]
        axes.barh(
            places,
            middles,
            color=[_colour(number) for number in numbers],
            hatch=[_HATCHES[_turn(number)] for number in numbers],
            edgecolor=_CARD,
            linewidth=0,
            height=0.62,
        )
        start = _start([*middles, *(low for low, _ in filter(None, spreads))])
        highest = max([*middles, *(high for _, high in filter(None, spreads))])
        axes.set_xlim(start, highest + 0.16 * (highest - start or 1))
        for place, middle, spread in zip(places, middles, spreads, strict=True):
            if spread:
                axes.plot(spread, (place, place), color=_INK, linewidth=1.4, marker="|", markersize=7)
            end = max(middle, spread[1]) if spread else middle
            axes.annotate(f"{middle:.1f}", (end, place), (4, 0), textcoords="offset points", va="center", weight="bold")
        axes.set_yticks(places, [textwrap.fill(_shown(name), 24) for name in names])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"{label} (the axis starts at {start:g})" if start else label)

    return _drawn(draw, height=0.75 + 0.42 * len(names), salt=label + "".join(names))


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    colours: Mapping[str, int] = MappingProxyType({}),
    diagonal: bool = False,
    percent: bool = False,
    low: float | None = None,
    high: float | None = None,
) -> str:
    """Return one line with its points for each series, and a legend.

    Args:
        series: name -> x and y values of the points, finite.
        x: name and unit of the x axis.
        y: name and unit of the y axis.
        colours: name -> number of its colour; others get the number of their place.
        diagonal: whether to draw y = x; then both axes have the same ends.
        percent: whether x is a share of 0..1 that is shown in percent.
        low: lower end of the y axis; None: from the values.
        high: upper end of the y axis; None: from the values.
    """

    def draw(axes: Any) -> None:
        if diagonal:
            axes.axline((0, 0), slope=1, color=_INK, linewidth=0.8, linestyle=":")
            axes.set_xlim(low, high)
        for number, (name, (across, up)) in enumerate(series.items()):
            axes.plot(
                across,
                up,
                label=_shown(name),
                color=_colour(colours.get(name, number)),
                marker=_marker(colours.get(name, number)),
                linestyle=_DASHES[_turn(colours.get(name, number))],
                markersize=2.6,
                linewidth=1.5,
            )
        if percent:
            axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        if all(isinstance(value, int) for across, _ in series.values() for value in across):
            axes.locator_params(axis="x", integer=True)
        axes.set_ylim(bottom=low, top=high)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)

    rows = -(-len(series) // 2)
    return _drawn(draw, height=2.5 + 0.17 * rows, salt=x + y + "".join(series))


def frontier(
    names: Sequence[str],
    x: Sequence[float],
    top1: Sequence[float],
    size: Sequence[float] | None = None,
    *,
    label: str,
    more: bool,
    colours: Mapping[str, int] = MappingProxyType({}),
) -> str:
    """Return accuracy over speed or cost: a point for each network, the frontier, and a legend.

    A network is on the frontier if no other is at least as good in both, and better in one.

    Args:
        names: names of the networks.
        x: speed or cost, above 0.
        top1: accuracy in percent.
        size: areas of the points, in any unit; None: all are small.
        label: name and unit of the x axis.
        more: whether more of x is better, as for a speed.
        colours: name -> number of its colour; others get the number of their place.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    def draw(axes: Any) -> None:
        areas = [45.0] * len(names) if size is None else [25 + 400 * each / max(size) for each in size]
        for i, name in enumerate(names):
            number = colours.get(name, i)
            axes.scatter(
                x[i], top1[i], s=areas[i], color=_colour(number), marker=_marker(number), alpha=0.75, linewidths=0
            )
            axes.scatter([], [], color=_colour(number), marker=_marker(number), linewidths=0, label=_shown(name))
        best = sorted((x[i], top1[i]) for i in frontier_of([each if more else -each for each in x], top1))
        axes.plot(*zip(*best, strict=True), color=_INK, linewidth=0.9, linestyle="--")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.15, y=0.15)
        axes.set_xlabel(label)
        axes.set_ylabel("top-1, %")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)

    return _drawn(draw, height=2.6 + 0.17 * -(-len(names) // 2), salt=label + "".join(names))


def frontier_of(x: Sequence[float], top1: Sequence[float]) -> list[int]:
    """Return the positions of the points that no other beats: at least as large in both, and larger in one."""
    points = list(zip(x, top1, strict=True))
    return [i for i, (a, b) in enumerate(points) if not any(c >= a and d >= b and (c, d) != (a, b) for c, d in points)]


def _shown(name: str) -> str:
    """Return a name for a legend: the middle of a long one is left out, and one that begins with `_` is not hidden."""
    short = name if len(name) <= LONGEST else f"{name[: LONGEST // 2]}…{name[-LONGEST // 2 :]}"
    return f"\N{ZERO WIDTH SPACE}{short}" if short.startswith("_") else short


def _colour(number: int) -> str:
    return _COLOURS[number % SERIES]


def _turn(number: int) -> int:
    """Return how often the colours have begun again: then marker, dashes and hatches are others, four of each."""
    return number // SERIES % 4


def _marker(number: int) -> str:
    return "osD^"[_turn(number)]


def _start(values: Sequence[float]) -> float:
    """Return where an axis of percent begins: at 0, or at a round number if all values are far above it."""
    lowest = min(values)
    return float(max(0, 5 * (int(lowest) // 5) - 5)) if lowest > 50 else min(0.0, lowest)


def _drawn(draw: Callable[[Any], None], *, height: float, salt: str) -> str:
    """Return the `<svg>` element of what `draw` draws. `salt` keeps the ids of one page apart."""
    import warnings

    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": salt}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has the letters that the font lacks
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure.add_subplot())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', svg, count=1)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would style the whole page
    return re.sub(r"<[^>]*>", lambda tag: _restyled(tag[0]), svg)


def _restyled(tag: str) -> str:
    """Return a tag of matplotlib's SVG with the page's colours and letters; the text between tags stays as it is."""
    tag = re.sub(r"font-family: [^;\"]*", "font-family: inherit", tag)
    tag = re.sub(r' id="[\w.]+_\d+"', "", tag)  # the same in every figure, and nothing refers to them
    tag = tag.replace("xlink:href", "href")  # the namespace is not declared in a page
    for placeholder, colour in _REPLACED.items():
        tag = tag.replace(placeholder, colour)
    return tag
