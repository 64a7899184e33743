"""Parts of a live page as JSON: facts, tables, lines, curves, pictures; bounded, and every text one printable line."""

import math
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from shared.messages.text import one_line

MOST_POINTS = 240
"""Of a curve: more than a chart of this width shows."""
MOST_SERIES = 6
MOST_ROWS, MOST_LINES, MOST_TEXT = 250, 100, 400

Part = dict[str, Any]
Cell = str | dict[str, Any]


def cell(text: object, state: str = "", share: float | None = None) -> Cell:
    """A cell of a table.

    Args:
        text: shown.
        state: an outcome of a round or `none`, which colours it.
        share: of a cap, 0 to 1 (more is shown as full), drawn as a bar.
    """
    shown = one_line(str(text), MOST_TEXT)
    if share is not None:
        return {"text": shown, "state": state, "share": round(share, 4)}
    return {"text": shown, "state": state} if state else shown


def title(text: str) -> Part:
    """The page's heading."""
    return {"id": "title", "kind": "title", "title": one_line(text, MOST_TEXT)}


def facts(name: str, heading: str, rows: Iterable[tuple[str, object]]) -> Part:
    """Names and values below each other."""
    return _part(name, "facts", heading) | {"rows": [[key, _cell(value)] for key, value in rows]}


def table(
    name: str,
    heading: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    note: str = "",
    empty: str = "none",
    text_columns: Sequence[str] = (),
    is_wide: bool = True,
) -> Part:
    """A table of at most `MOST_ROWS` rows; `note` stands below it, `empty` in its place without rows."""
    kept = [[_cell(each) for each in row] for row in islice(rows, MOST_ROWS)]
    heads = [{"name": each, "kind": "text" if each in text_columns else ""} for each in columns]
    return _part(name, "table", heading) | {
        "columns": heads,
        "rows": kept,
        "note": one_line(note),
        "empty": empty,
        "wide": is_wide,
    }


def lines(
    name: str,
    heading: str,
    texts: Iterable[tuple[str, str]],
    *,
    note: str = "",
    empty: str = "none",
    is_wide: bool = True,
) -> Part:
    """At most `MOST_LINES` lines of text, each with a state that colours it."""
    kept = [[one_line(text, MOST_TEXT), state] for text, state in islice(texts, MOST_LINES)]
    return _part(name, "lines", heading) | {"lines": kept, "note": one_line(note), "empty": empty, "wide": is_wide}


def chart(
    name: str,
    heading: str,
    x: str,
    series: Sequence[tuple[str, Sequence[float], Sequence[float | None]]],
    *,
    limits: Sequence[tuple[str, float]] = (),
    note: str = "",
) -> Part | None:
    """Curves (name, x, y) over rounds, each thinned to `MOST_POINTS` points; None where nothing finite is to be drawn.

    Args:
        name: of the part.
        heading: of the chart.
        x: what the horizontal axis counts.
        series: at most `MOST_SERIES` of them are drawn; what is not finite is left out.
        limits: bounds that the curves are seen against.
        note: below the chart.
    """
    drawn = [(label, thinned(xs, ys)) for label, xs, ys in series[:MOST_SERIES]]
    drawn = [(label, points) for label, points in drawn if points]
    if not drawn:
        return None
    newest = ", ".join(f"{label} {points[-1][1]:.4g} at {x} {points[-1][0]:g}" for label, points in drawn)
    return _part(name, "chart", heading) | {
        "x": x,
        "series": [{"name": one_line(label, MOST_TEXT), "points": points} for label, points in drawn],
        "limits": [{"name": one_line(label, MOST_TEXT), "value": value} for label, value in limits],
        "label": one_line(f"{heading}; newest: {newest}"),
        "note": one_line(note),
    }


def thinned(xs: Sequence[float], ys: Sequence[float | None]) -> list[list[float]]:
    """At most `MOST_POINTS` points of a curve, evenly by position, the newest among them; what is not finite is not."""
    step = max(1, -(-len(ys) // MOST_POINTS))
    # Counted from the newest, which moves: the points before it stay where they are until a step is full.
    chosen = sorted({*range(0, len(ys), step), len(ys) - 1}) if ys else []
    points = [(xs[index], ys[index]) for index in chosen]
    return [[float(x), float(f"{y:.6g}")] for x, y in points if y is not None and math.isfinite(y)][-MOST_POINTS:]


def pictures(name: str, heading: str, named: Iterable[tuple[str, str]]) -> Part:
    """Pictures that the page fetches by name, each with a caption."""
    shown = [{"name": key, "caption": one_line(caption, MOST_TEXT)} for key, caption in named]
    return _part(name, "pictures", heading) | {"pictures": shown, "wide": True}


def _part(name: str, kind: str, heading: str) -> Part:
    return {"id": name, "kind": kind, "title": one_line(heading, MOST_TEXT)}


def _cell(value: object) -> Cell:
    return value if isinstance(value, dict) else cell(value)
