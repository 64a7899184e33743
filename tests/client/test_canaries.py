"""A small version of `python -m benchmarks.canaries`: DP-SGD without noise is caught, with noise epsilon holds."""

import numpy as np
import pytest

from benchmarks.canaries import DELTA, audit, lower_bound
from client.ledger import Spending
from client.privacy import epsilon


@pytest.mark.parametrize("clipping", ["fast", "hooks"])
def test_training_without_noise_is_caught(clipping: str):
    assert audit(1e-9, 0.5, 10, np.random.default_rng(0), clipping) >= 3


def test_training_with_noise_stays_below_the_ledgers_epsilon():
    assert audit(1.0, 0.5, 10, np.random.default_rng(1)) <= epsilon([Spending(1.0, 0.5, 10)], DELTA)


def test_bound_of_guessing_by_chance_is_zero():
    assert lower_bound(1000, 200, 100) == 0
    assert lower_bound(1000, 200, 200) == pytest.approx(4.17, abs=0.05)
