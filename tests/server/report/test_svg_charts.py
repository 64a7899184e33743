import re

import pytest

from server.report.svg_charts import Series, _limits, is_same_drawing, line_chart

X, Y = [1.0, 10.0, 100.0], [3.0, 2.0, 1.5]


def draw(label="arm", y=Y, y_label="distance"):
    return line_chart([Series(label, X, y), Series("other", X, Y)], "images", y_label, log_x=True)


@pytest.fixture(scope="module")
def drawn():
    """The chart that others are compared with."""
    return draw()


def test_the_same_figures_give_the_same_bytes(drawn):
    assert draw() == drawn


def test_coordinates_that_differ_out_of_sight_are_the_same_drawing(drawn):
    # Ids are derived from coordinates, so these charts differ in both.
    nearly = draw(y=[3.0, 2.0, 1.50001])
    assert nearly != drawn
    assert is_same_drawing(nearly, drawn)


@pytest.mark.parametrize(
    "changed",
    [{"y": [3.0, 2.0, 1.52]}, {"label": "arms"}, {"y_label": "distance 2"}, {"y": [3.0, None, 1.5]}],
    ids=["value", "label", "axis", "gap"],
)
def test_another_series_label_or_limit_is_another_drawing(drawn, changed):
    assert not is_same_drawing(draw(**changed), drawn)


def test_a_drawing_without_one_of_the_series_is_another(drawn):
    assert not is_same_drawing(line_chart([Series("arm", X, Y)], "images", "distance", log_x=True), drawn)


def test_a_bound_that_moved_is_another_drawing(drawn):
    low, high = (drawn.replace("0 0 316.8", f"0 0 {width}") for width in ("316.8", "316.9"))
    assert not is_same_drawing(low, high)


def test_nothing_is_cut_off_at_the_edges():
    line = Series("a", [0, 1, 2], [3.0, None, 9.44], [(2.0, 4.0), None, (-1.0, 20.0)])
    low, high = _limits([line, Series("cap", [0, 2], [8.0, 8.0])])
    assert low < -1 and 20.5 < high < 24
    assert _limits([Series("a", [0, 1], [3.0, 4.0])])[0] == 0
    low, high = _limits([Series("a", [0], [0.0])])
    assert low == 0 < high
    assert _limits([Series("a", [0, 1], [float("nan"), 5.0])])[1] == pytest.approx(5.4)


@pytest.mark.parametrize(("x", "expected"), [([1.0], ["1"]), ([0.0, 1.0], ["0", "1"]), ([3.0, 4.0], ["3", "4"])])
def test_ticks_of_rounds_are_whole_numbers(x, expected):
    svg = line_chart([Series("a", x, [2.0 * place for place in x])], "round", "distance", from_zero=True)
    axis = svg[svg.index("matplotlib.axis_1") if "matplotlib.axis_1" in svg else 0 : svg.index(">round<")]
    assert re.findall(r"<text[^>]*>([^<]+)</text>", axis) == expected


@pytest.mark.parametrize("label", [r"$\foo$ faces", "from $5 to $6", "_scans", "a_b^c"])
def test_names_are_shown_as_they_are_and_make_no_formula(label: str):
    """Labels are names of folders, too: matplotlib reads `$` as mathematics and hides what begins with `_`."""
    shown = draw(label=label, y_label=f"distance to {label}")
    assert label in re.sub("\u200b", "", shown) and "distance to" in shown
