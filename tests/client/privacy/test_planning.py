"""How far a budget reaches."""

import math

import pytest

from client.privacy.accounting import epsilon
from client.privacy.planning import LEAST_NOISE, noise_that_fits, num_that_fit
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
