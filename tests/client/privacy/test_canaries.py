"""Canaries: DP-SGD without noise is caught, with noise the ledger's epsilon holds."""

import math
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import pytest
import torch
from scipy.stats import binom

from client.privacy import canaries
from client.privacy.accounting import epsilon
from client.privacy.canaries import (
    CANARIES,
    NO_NOISE,
    audit_canaries,
    canary_loss,
    canary_plan,
    lower_bound,
    lower_success,
    tail,
    train_and_score,
)
from client.records.spending import Spending
from shared.errors import InputError
from shared.experiment.config import Experiment, parse_experiment

DELTA = 1e-5


def experiment(sigma=1.0, rate=0.5, steps=5, rounds=2, **privacy) -> Experiment:
    constants = {"mechanism": "dp-sgd", "noise_multiplier": sigma, "sample_rate": rate, "expected_batch": 100}
    sections = {
        "federation": {"local_steps": steps, "rounds": rounds},
        "privacy": {**constants, "micro_batch": 64, **privacy},
    }
    return Experiment.model_validate(sections)


@pytest.mark.parametrize("clipping", ["fast", "hooks"])
def test_training_without_noise_is_caught(clipping: str, monkeypatch):
    monkeypatch.setattr(canaries, "BISECTIONS", 3)
    plan = canary_plan(experiment(clipping=clipping), noise_multiplier=NO_NOISE)
    found = audit_canaries(plan, DELTA, np.random.default_rng(0))
    assert found.bound >= 3 and found.correct > 980
    assert found.bound <= found.epsilon == float("inf")


def test_training_with_noise_is_bounded_from_below_by_most_of_its_epsilon(monkeypatch):
    monkeypatch.setattr(canaries, "BISECTIONS", 7)
    found = audit_canaries(canary_plan(experiment()), DELTA, np.random.default_rng(1))
    assert found.epsilon == epsilon([Spending(1.0, 0.5, 10)], DELTA)
    # Noise is fresh each time, and a bound of 95 percent passes the truth in one of twenty: `is_sound` judges that.
    assert found.is_sound and 0.6 * found.epsilon < found.bound < 1.2 * found.epsilon


def test_half_of_the_noise_is_called_unsound(monkeypatch):
    honest = canaries.train_and_score
    less = lambda plan, *rest: honest(canary_plan(plan, noise_multiplier=1.0), *rest)  # noqa: E731
    monkeypatch.setattr(canaries, "train_and_score", less)
    monkeypatch.setattr(canaries, "BISECTIONS", 4)
    found = audit_canaries(canary_plan(experiment(sigma=2.0, rounds=1)), DELTA, np.random.default_rng(2))
    assert not found.is_sound and found.bound > found.epsilon


def test_persons_draws_are_one_canary():
    plan = canary_plan(experiment(unit="person", draws=3), noise_multiplier=NO_NOISE)
    present = np.arange(0, CANARIES, 2)
    scores = train_and_score(plan, present, torch.device("cpu"), "float32")
    assert (scores[1::2] < 0).all() and (scores[::2] > 0).mean() > 0.99


def test_a_canarys_gradient_is_its_own_coordinate():
    model = torch.nn.Sequential(torch.nn.Linear(CANARIES, 1, bias=False))
    images = torch.zeros(1, 1, 3, 8, 8, dtype=torch.uint8)
    images[0, 0, 0, 0, :2] = torch.tensor([2, 5], dtype=torch.uint8)
    canary_loss(model, None, experiment(), images).sum().backward()
    gradient = model[0].weight.grad[0]
    assert gradient[517] == -50 and gradient.count_nonzero() == 1


def test_plan_without_dp_has_nothing_to_audit():
    with pytest.raises(InputError, match="without DP"):
        canary_plan(parse_experiment(""))


def test_bound_of_guessing_by_chance_is_zero():
    assert lower_bound(500, Spending(2.0, 1.0, 4), DELTA) == 0


def test_bound_is_the_epsilon_of_the_gaussian_whose_guesses_are_that_good():
    # Four full steps at sigma s are one Gaussian of mu = 2 / s, and a guess is right with probability Phi(mu / 2).
    sigma = 1 / NormalDist().inv_cdf(lower_success(760))
    found = lower_bound(760, Spending(2.0, 1.0, 4), DELTA)
    assert found == pytest.approx(epsilon([Spending(sigma, 1.0, 4)], DELTA), rel=0.02)


def test_confidence_is_that_of_clopper_and_pearson():
    for correct in (1, 760, 1000):
        assert tail(correct, lower_success(correct)) == pytest.approx(0.05, rel=1e-9)
    assert (lower_success(0), tail(0, 0.3)) == (0.0, 1.0)
    exact = Fraction(sum(math.comb(1000, k) * 7**k * 3 ** (1000 - k) for k in range(760, 1001)), 10**1000)
    assert tail(760, 0.7) == pytest.approx(float(exact), rel=1e-9)


@pytest.mark.parametrize(("correct", "promised"), [(560, 0.3), (731, 1.1), (498, 2.0)])
def test_a_promise_is_judged_by_the_binomial_tail_of_its_epsilon(correct: int, promised: float):
    expected = binom.sf(correct - 1, CANARIES, 1 / (1 + math.exp(-promised)))
    assert canaries.promise_p_value(correct, promised, 0.0) == pytest.approx(expected, rel=1e-9)
    # Delta forgives some guesses more: theorem 5.2, term by term.
    law = binom(CANARIES, 1 / (1 + math.exp(-promised)))
    alpha = max((law.cdf(correct - 1) - law.cdf(correct - 1 - i)) / i for i in range(1, correct + 1))
    forgiven = canaries.promise_p_value(correct, promised, 1e-5)
    assert forgiven == pytest.approx(expected + 2 * CANARIES * 1e-5 * alpha, rel=1e-9) and forgiven <= 1


@pytest.mark.parametrize(("noise", "promise", "is_sound"), [(1, 1, True), (1e-4, 1, False), (1, 1e-4, False)])
def test_a_training_is_sound_when_neither_noise_nor_promise_is_refuted(noise: float, promise: float, is_sound: bool):
    found = canaries.CanaryResult(0.0, CANARIES, 500, 1.0, noise, promise)
    assert found.is_sound is is_sound


def test_canaries_train_for_all_rounds_of_a_plan():
    plan = canaries.canary_plan(experiment(steps=7, rounds=5))
    assert plan.federation.local_steps == 35
