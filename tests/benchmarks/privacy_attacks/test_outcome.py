"""The judgement of an attack."""

import math

import pytest
from scipy.stats import binomtest

from benchmarks.privacy_attacks.outcome import Outcome


@pytest.mark.parametrize(("trials", "correct"), [(200, 200), (200, 123), (40, 0), (7, 6)])
def test_bound_is_that_of_clopper_and_pearson(trials, correct):
    expected = binomtest(correct, trials, alternative="greater").proportion_ci(0.95, "exact").low
    assert Outcome("guess", trials, correct, 0.0).lowest_success == pytest.approx(expected, abs=1e-9)


def test_epsilon_allows_its_success_and_no_more():
    assert Outcome("guess", 200, 150, math.log(3)).allowed_success == pytest.approx(0.75)
    assert Outcome("guess", 200, 150, math.log(3)).is_held
    assert not Outcome("guess", 200, 170, math.log(3)).is_held
    assert not Outcome("guess", 200, 120, 0.0).is_held
    assert Outcome("guess", 200, 105, 0.0).is_held
