import json
import math

from shared.pages.parts import MOST_LINES, MOST_POINTS, MOST_ROWS, MOST_SERIES, cell, chart, lines, table, thinned


def test_a_curve_keeps_its_newest_point_and_its_place():
    xs = list(range(1, 2001))
    points = thinned(xs, [float(x) ** 2 for x in xs])
    assert len(points) <= MOST_POINTS
    assert points[-1] == [2000.0, 4e6] and all(y == float(f"{x * x:.6g}") for x, y in points)
    assert thinned([], []) == []


def test_what_is_not_finite_is_no_point():
    assert thinned([1, 2, 3, 4], [1.0, None, math.inf, math.nan]) == [[1.0, 1.0]]
    assert chart("c", "Loss", "round", [("loss", [1], [None])]) is None


def test_a_chart_says_its_newest_values_for_those_who_cannot_see_it():
    part = chart("c", "Loss", "round", [("north", [1, 2], [0.5, 0.25])])
    assert part is not None and part["label"] == "Loss; newest: north 0.25 at round 2"


def test_parts_are_bounded_and_json():
    many = [[f"row {number}", cell("x" * 9999, "answered", 0.123456)] for number in range(999)]
    part = table("t", "T", ["a", "b"], many)
    assert len(part["rows"]) == MOST_ROWS and part["rows"][0][1]["share"] == 0.1235
    assert len(lines("l", "L", [("y", "")] * 999)["lines"]) == MOST_LINES
    drawn = chart("c", "C", "round", [(str(number), [1], [1.0]) for number in range(99)])
    assert drawn is not None and len(drawn["series"]) == MOST_SERIES
    json.dumps([part, drawn], allow_nan=False)


def test_texts_are_one_printable_line():
    assert cell("a\nb\x1b[1m\u202ec") == "a b [1m c"
    assert table("t", "h\r\n", ["c"], [["x\u2028y"]])["rows"] == [["x y"]]
