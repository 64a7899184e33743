"""The coordinator's own epsilon against the sites' accountant, which shares no code with it."""

import math

import pytest

from client.privacy import accounting
from client.records.spending import Spending
from server.planning.epsilon_forecast import Steps, epsilon
from shared.errors import InputError


@pytest.mark.parametrize(
    ("sigma", "rate", "steps", "delta"),
    [(0.9, 0.2, 14, 1e-5), (0.7, 0.05, 60, 1e-6), (1.0, 0.01, 3000, 1e-5), (3.73, 1.0, 1, 1e-5), (5.0, 1.0, 20, 1e-7)],
)
def test_it_is_the_sites_to_a_percent(sigma, rate, steps, delta):
    charged = accounting.epsilon([Spending(sigma, rate, steps)], delta)
    assert epsilon([Steps(sigma, rate, steps)], delta) == pytest.approx(charged, rel=0.012, abs=0.012)


def test_parts_of_a_plan_compose():
    """A mean image (one step on everybody) and rounds: less than the sum of both, as the sites' accountant has it."""
    parts = [Steps(3.73, 1.0, 1), Steps(0.9, 0.2, 14)]
    charged = accounting.epsilon([Spending(*part) for part in parts], 1e-5)
    found = epsilon(parts, 1e-5)
    assert found == pytest.approx(charged, rel=0.012)
    assert epsilon(parts[1:], 1e-5) < found < sum(epsilon([part], 1e-5) for part in parts)
    assert epsilon(parts[::-1], 1e-5) == pytest.approx(found, rel=1e-3)


def test_one_gaussian_step_has_the_closed_form():
    """Balle and Wang, arXiv 1805.06083, theorem 8: delta of N(0, sigma) against N(1, sigma) at epsilon."""
    sigma, delta = 2.0, 1e-5

    def phi(x):
        return math.erfc(-x / math.sqrt(2)) / 2

    found = epsilon([Steps(sigma, 1.0, 1)], delta)
    closed = phi(0.5 / sigma - found * sigma) - math.exp(found) * phi(-0.5 / sigma - found * sigma)
    assert closed == pytest.approx(delta, rel=0.02)


def test_no_steps_cost_nothing_and_a_huge_plan_has_no_bound():
    assert epsilon([Steps(1.0, 0.5, 0)], 1e-5) == 0.0
    assert epsilon([Steps(0.02, 1.0, 10**6)], 1e-5) == math.inf


@pytest.mark.parametrize("steps", [Steps(0.0, 0.1, 1), Steps(1.0, 0.0, 1), Steps(1.0, 1.1, 1), Steps(1.0, 0.1, 10**9)])
def test_constants_out_of_range_are_refused(steps):
    with pytest.raises(InputError, match="out of range"):
        epsilon([steps], 1e-5)
