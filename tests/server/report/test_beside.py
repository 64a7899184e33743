"""Models measured beside a run's own: nothing is called better where the intervals do not say so."""

import pytest

from server.report.beside import BESIDE_FILE, Beside, Model, read_beside, write_beside
from shared.errors import InputError

OWN = Model(name="private", loss=0.08, distance=0.30, distance_interval=(0.28, 0.32))


def other(difference: tuple[float, float], interval: tuple[float, float] | None) -> Model:
    return Model(name="other", loss=0.085, loss_difference=difference, distance=0.3, distance_interval=interval)


def beside(*models: Model) -> Beside:
    return Beside(metric="fd_x", num_loss_images=300, num_images=200, models=(OWN, *models))


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [((0.001, 0.002), "better"), ((-0.002, -0.001), "worse"), ((-0.001, 0.002), "not told apart"),
     ((0.0, 0.1), "not told apart")],
)  # fmt: skip
def test_loss_is_better_only_when_the_interval_of_the_difference_is_above_zero(difference, verdict):
    assert beside().loss_verdict(other(difference, None)) == verdict


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [((0.33, 0.4), "better"), ((0.1, 0.27), "worse"), ((0.31, 0.4), "not told apart"), ((0.29, 0.31), "not told apart"),
     (None, "not told apart")],
)  # fmt: skip
def test_distance_is_better_only_when_the_intervals_are_apart(interval, verdict):
    assert beside().distance_verdict(other((0.0, 0.0), interval)) == verdict


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [((0.01, 0.2), "better"), ((-0.2, -0.01), "worse"), ((-0.01, 0.2), "not told apart")],
)
def test_where_the_difference_of_distances_is_known_it_alone_decides(difference, verdict):
    model = other((0.0, 0.0), (0.1, 0.5)).model_copy(update={"distance_difference": difference})
    assert beside().distance_verdict(model) == verdict


def test_it_is_kept_in_the_run_and_a_damaged_file_is_one_line(tmp_path):
    assert read_beside(tmp_path) is None
    written = beside(other((0.001, 0.002), (0.33, 0.4)))
    write_beside(tmp_path, written)
    assert read_beside(tmp_path) == written
    for text in ("{", '{"metric": "fd", "models": []}', "[]", written.model_dump_json().replace("0.08", "NaN")):
        (tmp_path / BESIDE_FILE).write_text(text)
        with pytest.raises(InputError, match=r"beside\.json is damaged"):
            read_beside(tmp_path)
