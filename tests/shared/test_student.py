import numpy as np
import pytest
from scipy.stats import sem, t

from shared.student import STUDENT_95, mean_interval


def test_the_table_is_students():
    freedom = np.arange(1, len(STUDENT_95) + 1)
    assert pytest.approx(t.ppf(0.975, freedom), rel=1e-3) == STUDENT_95


@pytest.mark.parametrize("values", [[3.0, 7.5], [1.1, 1.4, 0.7], list(np.linspace(2, 9, 11) ** 2)])
def test_a_mean_has_its_interval(values):
    mean, low, high = mean_interval(values)
    assert mean == pytest.approx(np.mean(values))
    assert (low, high) == pytest.approx(t.interval(0.95, len(values) - 1, mean, sem(values)), rel=1e-2)


def test_more_values_than_the_table_has_are_given_an_interval_that_is_not_too_narrow():
    values = np.random.default_rng(3).normal(size=60).tolist()
    _, low, high = mean_interval(values)
    exact = t.interval(0.95, 59, np.mean(values), sem(values))
    assert low <= exact[0] < exact[1] <= high


def test_one_value_says_nothing_of_its_spread():
    with pytest.raises(ValueError, match="1 values"):
        mean_interval([4.0])
