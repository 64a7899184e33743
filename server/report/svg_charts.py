"""Line charts as inline SVG that follow the page's colours, light or dark."""

import hashlib
import io
import math
import re
from dataclasses import dataclass
from html import escape
from itertools import cycle
from typing import Any

COLOURS = ("--series-1", "--series-2", "--series-3", "--series-4", "--series-5", "--series-6")
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P")
# Placeholders that no chart uses otherwise; after drawing they become CSS variables.
_PLACEHOLDERS = {f"#0a0b{index:02x}": f"var({name})" for index, name in enumerate((*COLOURS, "--ink", "--line"), 1)}
_INK, _LINE = list(_PLACEHOLDERS)[-2:]
_LIGHT = ("#0b63b5", "#c2410c", "#15803d", "#7e22ce", "#a16207", "#be185d", "#1d2126", "#d9dce0")
_DARK = ("#7ab8f5", "#fb9a66", "#6fd08c", "#c99af5", "#e5c15a", "#f48fb8", "#e8eaed", "#3a4047")
WIDTH_INCHES, HEIGHT_INCHES = 4.4, 2.9
MARKED_POINTS = 40
INSIDE_LEGEND = 4
HEADROOM = 0.08
INVISIBLE_POINTS = 0.02
_NUMBER = re.compile(r"(?<![\w#.])-?\d+(?:\.\d+)?(?:e-?\d+)?(?![\w.:])")
_ID = re.compile(r'(?<= id=")[\w-]+|(?<=#)[\w-]+(?=["\)])')


@dataclass(frozen=True)
class Series:
    """One line of a chart; a None in `y` is a gap."""

    label: str
    x: list[float]
    y: list[float | None]
    low_high: list[tuple[float, float] | None] | None = None
    """Interval at each point, drawn as a bar."""
    is_limit: bool = False
    """A bound that other lines are seen against: thin, without markers, in the colour of the text."""


def line_chart(
    series: list[Series],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    from_zero: bool = False,
) -> str:
    """SVG text of a chart, without XML header, sized by its container.

    Colour, dash and marker all tell the lines apart, so that the chart also works printed in grey.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    salt = hashlib.sha256(repr((series, x_label, y_label)).encode()).hexdigest()[:12]
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9, "font.family": "sans-serif"}
    with mpl.rc_context(style):
        figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout="constrained")
        axes = figure.subplots()
        looks = zip(cycle(list(_PLACEHOLDERS)[: len(COLOURS)]), cycle(_DASHES), cycle(_MARKERS), strict=False)
        for line, (colour, dash, marker) in zip(series, looks, strict=False):
            _draw(axes, line, colour, dash, marker)
        if log_y:
            axes.set_yscale("log")
        elif from_zero:
            axes.set_ylim(*_limits(series))
        _frame(axes, x_label, y_label)
        if log_x:
            axes.set_xscale("log")
        if len(series) > INSIDE_LEGEND:
            # Below the axes, so that it hides no line.
            figure.set_size_inches(WIDTH_INCHES, HEIGHT_INCHES + 0.16 * -(-len(series) // 2))
            figure.legend(frameon=False, labelcolor=_INK, fontsize=8, loc="outside lower center", ncols=2)
        elif len(series) > 1:
            axes.legend(frameon=False, labelcolor=_INK, fontsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), y_label)


def standalone(svg: str) -> str:
    """A chart as a file of its own: the colours that a page would give it, light or dark as the viewer asks."""
    light, dark = (
        ";".join(f"{name}:{colour}" for name, colour in zip((*COLOURS, "--ink", "--line"), colours, strict=True))
        for colours in (_LIGHT, _DARK)
    )
    style = f"<style>svg{{{light}}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    return svg.replace("</title>", f"</title>{style}", 1)


def is_same_drawing(one: str, other: str) -> bool:
    """Whether two SVG texts show the same: every series, label and limit, and the coordinates to what an eye can see.

    The last digits of coordinates, and the ids that are derived from them, differ from processor to processor.
    """
    return _NUMBER.split(_named(one)) == _NUMBER.split(_named(other)) and all(
        abs(float(ours) - float(theirs)) < INVISIBLE_POINTS
        for ours, theirs in zip(_NUMBER.findall(_named(one)), _NUMBER.findall(_named(other)), strict=True)
    )


def _named(svg: str) -> str:
    """The text with ids numbered in the order in which they come."""
    numbers: dict[str, int] = {}
    return _ID.sub(lambda match: f"id{numbers.setdefault(match[0], len(numbers))}:", svg)


def _as_it_is(label: str) -> str:
    """A label of which matplotlib makes no formula, and which it shows in the legend also with `_` in front."""
    shown = label.replace("$", r"\$")
    return f"\u200b{shown}" if shown.startswith("_") else shown


def _draw(axes: Any, line: Series, colour: str, dash: str, marker: str) -> None:  # noqa: ANN401  # matplotlib
    values = [float("nan") if value is None else value for value in line.y]
    if line.is_limit:
        axes.plot(line.x, values, color=_INK, linestyle="--", linewidth=1.0, label=_as_it_is(line.label))
        return
    # Markers on a long curve would hide it.
    shown: dict[str, Any] = {"marker": marker, "markersize": 4} if len(values) <= MARKED_POINTS else {}
    axes.plot(line.x, values, color=colour, linestyle=dash, linewidth=1.6, label=_as_it_is(line.label), **shown)
    for x, interval in zip(line.x, line.low_high or [], strict=False):
        if interval is not None:
            axes.plot([x, x], interval, color=colour, linewidth=1, alpha=0.7)


def _limits(series: list[Series]) -> tuple[float, float]:
    """From zero, or the lowest interval below it, to above the highest point or interval: nothing is cut off."""
    values = [value for line in series for value in line.y if value is not None and math.isfinite(value)]
    values += [bound for line in series for interval in line.low_high or [] if interval for bound in interval]
    low, high = min([0.0, *values]), max([0.0, *values])
    room = HEADROOM * (high - low or 1.0)
    return low - (room if low < 0 else 0.0), high + room


def _frame(axes: Any, x_label: str, y_label: str) -> None:  # noqa: ANN401  # matplotlib
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(_as_it_is(x_label), color=_INK)
    axes.set_ylabel(_as_it_is(y_label), color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=1))
    axes.grid(visible=True, color=_LINE, linewidth=0.6)
    axes.tick_params(which="both", colors=_INK)
    for spine in axes.spines.values():
        spine.set_color(_LINE)


def _inline(svg: str, title: str) -> str:
    """Only the element, with CSS colours, no fixed size and no ids that nothing refers to."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 role="img"', svg, count=1)
    svg = svg.replace(">", f"><title>{escape(title)}</title>", 1)
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([\w-]+)"', lambda match: match[0] if match[1] in used else "", svg)
    for placeholder, variable in _PLACEHOLDERS.items():
        svg = svg.replace(placeholder, variable)
    return svg
