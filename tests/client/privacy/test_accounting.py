"""What a history of steps costs: epsilon against independent accountants, and at the edges."""

import math

import numpy as np
import pytest
from opacus.accountants.analysis.prv import Domain, PoissonSubsampledGaussianPRV, compute_safe_domain_size
from opacus.accountants.analysis.prv.prvs import TruncatedPrivacyRandomVariable
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
@pytest.mark.parametrize(
    "history",
    [[(1.0, 0.2, 40), (0.7, 0.05, 3), (30.0, 1.0, 1)], [(0.5, 0.02, 50)], [(4.0, 0.01, 9000)], [(0.1, 1.0, 2)]],
)
def test_grid_reaches_as_far_as_opacus_has_it_and_hardly_further(history: list[tuple[float, float, int]]):
    prvs = [PoissonSubsampledGaussianPRV(rate, sigma) for sigma, rate, _ in history]
    expected = compute_safe_domain_size(prvs, [steps for _, _, steps in history], 0.01, 1e-8)
    assert expected <= safe_reach(history, 0.01, 1e-8) < 1.03 * expected


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


@pytest.mark.parametrize(
    ("share", "is_fine"), [(0.49, True), (-0.49, True), (0.51, False), (-0.51, False), (math.nan, False)]
)
def test_a_grid_whose_mean_is_half_a_step_off_is_too_coarse(
    monkeypatch: pytest.MonkeyPatch, share: float, is_fine: bool
):
    prv, domain = PoissonSubsampledGaussianPRV(0.02, 1.0), Domain.create_aligned(-20.0, 20.0, 1e-2)
    pmf, _ = accounting._discretized(prv, domain)
    mean = float(np.dot(domain.ts, pmf)) + share * domain.dt
    monkeypatch.setattr(accounting, "truncated_mean", lambda *_: mean)
    if is_fine:
        assert accounting._discretized(prv, domain)[1] == pytest.approx(share * domain.dt)
    else:
        with pytest.raises(RuntimeError, match="too coarse"):
            accounting._discretized(prv, domain)


@pytest.mark.parametrize(
    ("sigma", "rate", "least", "most"),
    [
        *((1.0, 0.02, -20, 20), (0.5, 0.3, -40, 40), (0.3, 1.0, -100, 100), (2.0, 1e-4, -4, 4), (0.1, 0.7, -300, 300)),
        *((30.0, 1.0, -4, 4), (1.0, 0.999, -9, 9), (1.0, 0.5, -0.3, 0.4), (0.8, 1.0, -1.0, 2.5)),
    ],
)
def test_the_mean_between_two_losses_is_what_a_sum_over_many_small_steps_has(
    sigma: float, rate: float, least: float, most: float
):
    """The reference is the middle of each of many small steps of the noise, where the loss lies between the two."""
    x = np.linspace(-13 * sigma, 1 + 13 * sigma, 400_001)
    density = (1 - rate) * norm.pdf(x, 0, sigma) + rate * norm.pdf(x, 1, sigma)
    loss = np.logaddexp(np.log1p(-rate) if rate < 1 else -np.inf, np.log(rate) + (2 * x - 1) / (2 * sigma**2))
    inside = (loss >= least) & (loss <= most)
    expected = float((loss[inside] * density[inside]).sum() / density[inside].sum())
    found = accounting.truncated_mean(PoissonSubsampledGaussianPRV(rate, sigma), least, most)
    # Where a step is cut through, up to one of them counts too much.
    step = (x[1] - x[0]) * density[inside].max() / (density[inside].sum() * (x[1] - x[0])) * np.abs(loss[inside]).max()
    assert found == pytest.approx(expected, rel=1e-6, abs=step + 1e-10)


@pytest.mark.parametrize("doubt", [1e-11, math.nan])
def test_a_mean_about_which_two_rules_disagree_is_integrated_as_opacus_does(
    monkeypatch: pytest.MonkeyPatch, doubt: float
):
    prv = PoissonSubsampledGaussianPRV(0.1, 1.0)
    monkeypatch.setattr(accounting, "_mean_by_rule", lambda *given: 7.0 + doubt * given[-1])
    assert accounting.truncated_mean(prv, -20.0, 20.0) == pytest.approx(
        TruncatedPrivacyRandomVariable(prv, -20.0, 20.0).mean()
    )
    monkeypatch.setattr(accounting, "_mean_by_rule", lambda *given: 7.0 + 1e-14 * given[-1])
    assert accounting.truncated_mean(prv, -20.0, 20.0) == pytest.approx(7.0)


@pytest.mark.parametrize("sigma", [0.049, 0.025, 1e-3])
def test_a_step_whose_loss_leaves_float64_has_no_bound_rather_than_one_too_small(sigma: float):
    assert epsilon([Spending(sigma, 0.1, 1)], 1e-5) == math.inf
    with pytest.raises(InputError, match="give more noise"):
        guess_success(Spending(sigma, 0.1, 1))


@pytest.mark.parametrize(("sigma", "steps"), [(0.05, 1), (0.1, 3), (0.3, 50)])
def test_little_noise_costs_at_least_what_one_gaussian_does(sigma: float, steps: int):
    """Full steps are one Gaussian of mu = sqrt(k) / sigma; its delta at an epsilon is closed (arXiv 1805.06530)."""
    mu, found = math.sqrt(steps) / sigma, epsilon([Spending(sigma, 1.0, steps)], 1e-5)

    def delta(eps: float) -> float:
        return float(norm.cdf(mu / 2 - eps / mu) - math.exp(eps + norm.logcdf(-mu / 2 - eps / mu)))

    assert delta(found) <= 1e-5 < delta(found - 0.05)
