"""What a history of steps costs: epsilon against independent accountants, and at the edges."""

import math

import numpy as np
import pytest
from opacus.accountants.analysis.prv import Domain, PoissonSubsampledGaussianPRV, compute_safe_domain_size
from scipy.integrate import quad
from scipy.stats import norm

from client.privacy import accounting
from client.privacy.accounting import epsilon, fast_length, guess_success, power, safe_reach
from client.records.spending import Spending
from shared.errors import InputError

# Reference values: q = 64/3000 and delta 1e-5, computed with dp-accounting's PLD accountant.
PLD = [(0.5, 50, 8.264), (1.0, 50, 1.216), (1.0, 1000, 4.188), (2.0, 50, 0.310), (2.0, 1000, 1.428)]


@pytest.mark.parametrize(("sigma", "steps", "expected"), PLD)
def test_epsilon_matches_an_independent_accountant(sigma: float, steps: int, expected: float):
    found = epsilon([Spending(sigma, 64 / 3000, steps)], 1e-5)
    assert found == pytest.approx(expected, rel=0.01, abs=0.012)


def test_epsilon_of_twenty_rounds_is_that_of_a_thousand_steps():
    rounds = [Spending(1.0254, 64 / 3000, 50)] * 20
    assert epsilon(rounds, 1e-5) == pytest.approx(3.996, abs=0.01)
    assert epsilon(rounds, 1e-5) == epsilon([Spending(1.0254, 64 / 3000, 1000)], 1e-5)
    assert epsilon([*rounds, rounds[0]], 1e-5) > 4


def test_epsilon_of_unequal_plans_does_not_depend_on_their_order():
    one, two = Spending(1.0, 0.02, 10), Spending(2.0, 0.05, 30)
    assert epsilon([one, two, one], 1e-5) == epsilon([two, one, one], 1e-5)
    assert epsilon([one, two], 1e-5) > max(epsilon([one], 1e-5), epsilon([two], 1e-5))


@pytest.mark.filterwarnings("ignore:Optimal order:UserWarning")  # at large noise; the grid only gets wider
def test_grid_reaches_as_far_as_opacus_has_it():
    history = [(1.0, 0.2, 40), (0.7, 0.05, 3), (30.0, 1.0, 1)]
    prvs = [PoissonSubsampledGaussianPRV(rate, sigma) for sigma, rate, _ in history]
    expected = compute_safe_domain_size(prvs, [steps for _, _, steps in history], 0.01, 1e-8)
    assert safe_reach(history, 0.01, 1e-8) == pytest.approx(expected, rel=1e-12)


def test_huge_plans_cost_precision_and_then_have_no_bound_but_never_the_memory(monkeypatch: pytest.MonkeyPatch):
    plan = [Spending(1.0, 0.5, 100)]
    exact = epsilon(plan, 1e-5)
    monkeypatch.setattr(accounting, "LARGEST_GRID", 2**15)
    accounting._upper_epsilon.cache_clear()
    assert exact < epsilon(plan, 1e-5) < exact + 2
    assert epsilon([Spending(2.0, 0.2, 3 * 10**8)], 1e-5) == math.inf
    accounting._upper_epsilon.cache_clear()


def test_epsilon_at_the_edges():
    assert epsilon([], 1e-5) == 0
    assert epsilon([Spending(1.0, 0.1, 0)], 1e-5) == 0
    assert epsilon([Spending(0.0, 0.1, 1)], 1e-5) == math.inf
    assert epsilon([Spending(1.0, 0.1, 1), Spending(0.0, 0.1, 1)], 1e-5) == math.inf, "one step without noise is enough"
    assert 0 < epsilon([Spending(5.0, 1.0, 1)], 1e-5) < 2, "the plain Gaussian mechanism"


def test_the_grid_holds_the_whole_distribution_of_a_step_with_its_tails():
    prv, domain = PoissonSubsampledGaussianPRV(0.02, 1.0), Domain.create_aligned(-20.0, 20.0, 1e-3)
    pmf, shift = accounting._discretized(prv, domain)
    edges = np.linspace(domain.t_min - domain.dt / 2, domain.t_max + domain.dt / 2, domain.size + 1)
    with np.errstate(all="ignore"):
        cdf = np.nan_to_num(prv.cdf(edges))
    assert np.abs(pmf - np.diff(cdf) / (cdf[-1] - cdf[0])).max() < 1e-16
    assert abs(shift) < domain.dt / 2


def test_the_mean_of_the_loss_of_many_steps_is_that_of_one_times_their_number():
    sigma, rate, steps = 1.0, 0.2, 400

    def weighted(x: float) -> float:
        density = (1 - rate) * norm.pdf(x, 0, sigma) + rate * norm.pdf(x, 1, sigma)
        return float(density * math.log(1 - rate + rate * math.exp((2 * x - 1) / (2 * sigma**2))))

    loss = accounting._privacy_loss([Spending(sigma, rate, steps)], 1.0, 1e-8)
    mean = float(np.dot(loss.domain.ts, loss.pmf))
    assert mean == pytest.approx(steps * quad(weighted, -12, 13, epsabs=1e-13)[0], abs=1e-6)


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (2.0, 4), (8.0, 9)])
def test_a_guess_about_full_steps_is_right_as_often_as_between_two_gaussians(sigma: float, steps: int):
    """k full steps at sigma are one Gaussian of mu = sqrt(k) / sigma; the best place to cut is half-way."""
    assert guess_success(Spending(sigma, 1.0, steps)) == pytest.approx(norm.cdf(math.sqrt(steps) / sigma / 2), abs=1e-3)
    assert 0.5 < guess_success(Spending(sigma, 0.1, steps)) < guess_success(Spending(sigma, 1.0, steps))


def test_a_plan_whose_privacy_loss_fits_into_no_memory_cannot_be_audited(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(accounting, "LARGEST_GRID", 2**10)
    with pytest.raises(InputError, match=r"noise multiplier 1, rate 0\.5 and 100 steps cannot be audited"):
        guess_success(Spending(1.0, 0.5, 100))


def test_transforms_have_lengths_without_large_prime_factors():
    smooth = [2**a * 3**b * 5**c for a in range(1, 24) for b in range(8) for c in range(6)]
    for size in (2, 3, 97, 1000, 1025, 30_011, 2**20 + 1):
        assert fast_length(size) == min(each for each in smooth if each >= size)


def test_power_by_squaring_is_the_power():
    base = np.exp(1j * np.linspace(0, 3, 7)) * np.linspace(0.5, 1, 7)
    for exponent in (1, 2, 3, 10, 37):
        np.testing.assert_allclose(power(base, exponent), base**exponent, rtol=1e-12)
    assert (power(base, 0) == 1).all()
