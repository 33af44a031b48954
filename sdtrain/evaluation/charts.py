"""Line charts as inline SVG that follows the page's light or dark theme and loads nothing."""

from __future__ import annotations

import html
import io
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Placeholders that matplotlib writes into the SVG; the page's stylesheet says what they mean in each theme.
_THEME = {"#010101": "var(--ink)", "#020202": "var(--muted)", "#030303": "var(--line)"}
_SERIES = {f"#0{i}0{i}0{i}": f"var(--series-{i - 3})" for i in range(4, 10)}
INK, MUTED, LINE = _THEME
SERIES_COLOURS = tuple(_SERIES)
MAX_POINTS = 1500


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart.

    Attributes:
        label: Its name in the legend; an empty one leaves it out.
        x: Ascending.
        y: As many.
        colour: Number of the series colour.
        faint: Thin and pale: work that was thrown away.
        dots: Draw points instead of a line.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True, slots=True)
class Mark:
    """A vertical line with a word, such as a restart."""

    x: float
    text: str


@dataclass(frozen=True, slots=True)
class Chart:
    """What a chart shows.

    Attributes:
        title: Said by screen readers; the page prints its own heading.
        x_label: Under the x axis.
        y_label: Beside the y axis.
        lines: Drawn in this order.
        marks: Vertical lines.
        log_y: Logarithmic y axis.
    """

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    marks: Sequence[Mark] = field(default_factory=tuple)
    log_y: bool = False


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MAX_POINTS points: means of equal stretches, so that no stretch is left out."""
    if len(x) <= MAX_POINTS:
        return list(x), list(y)
    edges = [round(i * len(x) / MAX_POINTS) for i in range(MAX_POINTS + 1)]
    spans = [slice(start, end) for start, end in itertools.pairwise(edges)]
    return [sum(x[s]) / len(x[s]) for s in spans], [sum(y[s]) / len(y[s]) for s in spans]


def smoothed(values: Sequence[float], half_width: int) -> list[float]:
    """Means over `half_width` points to each side, fewer at the ends; centred, so that a fall is not shown late."""
    sums = [0.0, *itertools.accumulate(values)]
    result = []
    for i in range(len(values)):
        reach = min(half_width, i, len(values) - 1 - i)
        result.append((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
    return result


def chart_svg(chart: Chart, name: str) -> str:
    """An `<svg>` element.

    Args:
        chart: What it shows.
        name: Prefix of all ids inside, unique on the page.
    """
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, str | float] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": MUTED,
        "axes.edgecolor": LINE,
        "xtick.color": LINE,
        "xtick.labelcolor": MUTED,
        "ytick.color": LINE,
        "ytick.labelcolor": MUTED,
        "grid.color": LINE,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8.4, 3.1), layout="constrained")
        axes = figure.add_subplot()
        _draw(axes, chart)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _embeddable(buffer.getvalue(), chart.title, name)


def _draw(axes: Axes, chart: Chart) -> None:
    for line in chart.lines:
        x, y = thinned(line.x, line.y)
        colour = SERIES_COLOURS[line.colour % len(SERIES_COLOURS)]
        axes.plot(
            x,
            y,
            color=colour,
            label=line.label or None,
            solid_joinstyle="round",
            linestyle="none" if line.dots else "-",
            linewidth=0.9 if line.faint else 1.7,
            alpha=0.35 if line.faint else 1.0,
            marker="o" if line.dots else "none",
            markersize=4,
        )
    for i, mark in enumerate(chart.marks):
        axes.axvline(mark.x, color=MUTED, linewidth=1, linestyle=(0, (3, 2)))
        axes.annotate(
            mark.text,
            (mark.x, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -4 - 12 * (i % 4)),  # neighbours do not cover each other
            textcoords="offset points",
            va="top",
            fontsize=8,
            color=MUTED,
        )
    if chart.log_y:
        axes.set_yscale("log")
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.grid(axis="y", linewidth=0.6, alpha=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    axes.margins(x=0.01)
    if any(line.label for line in chart.lines):
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.2, labelcolor=INK)


def _embeddable(document: str, title: str, name: str) -> str:
    """The bare element of an SVG document: themed colours, ids of its own, no metadata."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'xlink:href="#', f'href="#{name}-', svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    for placeholder, variable in (_THEME | _SERIES).items():
        svg = svg.replace(placeholder, variable)
    opening = re.compile(r"<svg[^>]*>")
    viewbox = re.search(r'viewBox="[^"]*"', svg)
    assert viewbox is not None, "matplotlib writes a viewBox"
    head = f'<svg class="chart" role="img" aria-label="{html.escape(title)}" {viewbox[0]} xmlns="http://www.w3.org/2000/svg">'
    return opening.sub(lambda _: head, svg, count=1).strip()
