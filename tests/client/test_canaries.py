"""A small version of `python -m benchmarks.canaries`: DP-SGD without noise is caught, with noise epsilon holds."""

import numpy as np
import pytest

from benchmarks.canaries import DELTA, audit, lower_bound, p_value
from client.privacy import epsilon
from client.spending import Spending


@pytest.mark.parametrize("clipping", ["fast", "hooks"])
def test_training_without_noise_is_caught(clipping: str):
    assert audit(1e-9, 0.5, 10, np.random.default_rng(0), clipping) >= 3


def test_training_with_noise_stays_below_the_ledgers_epsilon():
    assert audit(1.0, 0.5, 10, np.random.default_rng(1)) <= epsilon([Spending(1.0, 0.5, 10)], DELTA)


def test_bound_of_guessing_by_chance_is_zero():
    assert lower_bound(1000, 200, 100) == 0
    assert lower_bound(1000, 200, 200) == pytest.approx(4.17, abs=0.05)


@pytest.mark.parametrize(
    ("guesses", "right", "candidate", "expected"),
    [(200, 150, 1.2, 0.76285720786), (200, 200, 4.1, 0.04102701313), (10, 7, 0.5, 0.44501284634)],
)
def test_p_values_are_those_of_scipys_binomial_distribution(
    guesses: int, right: int, candidate: float, expected: float
):
    assert p_value(1000, guesses, right, candidate) == pytest.approx(expected, abs=1e-10)
