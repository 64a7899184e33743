import pytest

from server.report.svg_charts import Series, is_same_drawing, line_chart

X, Y = [1.0, 10.0, 100.0], [3.0, 2.0, 1.5]


def chart(label="arm", y=Y, y_label="distance"):
    return line_chart([Series(label, X, y), Series("other", X, Y)], "images", y_label, log_x=True)


def test_coordinates_that_differ_out_of_sight_are_the_same_drawing():
    # Ids are derived from coordinates, so these charts differ in both.
    nearly = chart(y=[3.0, 2.0, 1.50001])
    assert nearly != chart()
    assert is_same_drawing(nearly, chart())


@pytest.mark.parametrize(
    "changed",
    [chart(y=[3.0, 2.0, 1.52]), chart(label="arms"), chart(y_label="distance 2"), chart(y=[3.0, None, 1.5])],
    ids=["value", "label", "axis", "gap"],
)
def test_another_series_label_or_limit_is_another_drawing(changed):
    assert not is_same_drawing(changed, chart())


def test_a_drawing_without_one_of_the_series_is_another():
    assert not is_same_drawing(line_chart([Series("arm", X, Y)], "images", "distance", log_x=True), chart())


def test_a_bound_that_moved_is_another_drawing():
    low, high = (chart().replace("0 0 316.8", f"0 0 {width}") for width in ("316.8", "316.9"))
    assert not is_same_drawing(low, high)
