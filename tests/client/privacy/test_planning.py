"""How far a budget reaches."""

import math

import pytest

from client.privacy import planning
from client.privacy.accounting import epsilon
from client.privacy.planning import LEAST_NOISE, MOST_NOISE, noise_that_fits, num_that_fit
from client.records.spending import Spending


def test_rounds_and_noise_that_fit_lie_at_the_cap():
    part = Spending(1.0254, 64 / 3000, 50)
    assert num_that_fit([part], part, 1e-5, 4.0, 40) == 19
    assert num_that_fit([], part, 1e-5, 4.0, 3) == 3
    noise = noise_that_fits([], 64 / 3000, 1000, 1e-5, 4.0)
    assert noise == pytest.approx(1.0254, rel=0.004)
    assert epsilon([Spending(noise, 64 / 3000, 1000)], 1e-5) <= 4.0
    assert noise_that_fits([part._replace(steps=2000)], 0.02, 10, 1e-5, 4.0) == math.inf
    assert noise_that_fits([], 1e-4, 1, 1e-5, 4.0) == LEAST_NOISE


def test_the_smallest_noise_that_fits_is_found_from_above(monkeypatch: pytest.MonkeyPatch):
    """With an epsilon of a known form the crossing is known: 3 / sigma, infinite below 0.7."""
    monkeypatch.setattr(
        planning, "epsilon", lambda history, _: 3.0 / history[-1][0] if history[-1][0] >= 0.7 else math.inf
    )
    for cap in (0.01, 0.5, 1.7, 4.0):
        found = noise_that_fits([], 0.1, 5, 1e-5, cap)
        assert 3.0 / cap <= found <= max(3.0 / cap, 0.7) * 1.0021
    assert noise_that_fits([], 0.1, 5, 1e-5, 3.0 / MOST_NOISE) == pytest.approx(MOST_NOISE, rel=0.0021)
    assert noise_that_fits([], 0.1, 5, 1e-5, 2.9 / MOST_NOISE) == math.inf


def test_rounds_that_fit_are_counted_in_whole_rounds_beside_the_history(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planning, "epsilon", lambda history, _: float(sum(row.steps for row in history)))
    past, part = [Spending(1.0, 0.1, 10)], Spending(1.0, 0.1, 7)
    assert [num_that_fit(past, part, 1e-5, cap, 100) for cap in (16.0, 17.0, 23.9, 24.0, 1e9)] == [0, 1, 1, 2, 100]
    assert num_that_fit(past, part, 1e-5, 1e9, 0) == 0
