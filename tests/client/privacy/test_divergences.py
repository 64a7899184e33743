"""Renyi divergences of a step: those of Opacus, and none where the numbers cannot be held."""

import math

import numpy as np
import pytest
from opacus.accountants import RDPAccountant
from opacus.accountants.analysis import rdp as renyi

from client.privacy import divergences
from client.privacy.accounting import epsilon
from client.records.spending import Spending


def test_the_orders_are_those_of_opacus():
    assert divergences.ORDERS.tolist() == RDPAccountant.DEFAULT_ALPHAS


@pytest.mark.parametrize(
    ("sigma", "rate"),
    [(1.1, 0.5), (0.7, 0.2), (5.0, 0.01), (0.1, 0.3), (30.0, 0.7), (0.45, 1e-4), (2.0, 0.999), (3.0, 1.0)],
)
def test_divergences_are_those_of_opacus_at_whole_and_other_orders(sigma: float, rate: float):
    places = [0, 9, 14, 29, 46, 88, 98, 99, 120, 150]
    orders = [float(divergences.ORDERS[place]) for place in places]
    expected = renyi.compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=orders)
    np.testing.assert_allclose(divergences.divergences(rate, sigma)[places], expected, rtol=1e-6, atol=1e-13)


@pytest.mark.parametrize("sigma", [1e-9, 1e-5])
def test_too_little_noise_for_the_series_has_no_bound(sigma: float):
    with pytest.raises(ValueError, match="too little noise"):
        divergences.divergences(0.5, sigma)
    assert epsilon([Spending(sigma, 0.5, 1)], 1e-5) == math.inf


def test_a_series_that_does_not_end_has_no_bound(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(divergences, "MOST_TERMS", 100)
    with pytest.raises(ValueError, match="does not end"):
        divergences.divergences(0.5, 12.5)
