"""Canaries: DP-SGD without noise is caught, with noise the ledger's epsilon holds."""

import numpy as np
import pytest
import torch

from client.privacy.accounting import epsilon
from client.privacy.canaries import (
    CANARIES,
    NO_NOISE,
    audit_canaries,
    canary_loss,
    canary_plan,
    lower_bound,
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
def test_training_without_noise_is_caught(clipping: str):
    plan = canary_plan(experiment(clipping=clipping), noise_multiplier=NO_NOISE)
    found = audit_canaries(plan, DELTA, np.random.default_rng(0))
    assert found.bound >= 3 and found.correct > 190
    assert found.bound <= found.epsilon == float("inf")


def test_training_with_noise_stays_below_the_ledgers_epsilon_of_all_rounds():
    found = audit_canaries(canary_plan(experiment()), DELTA, np.random.default_rng(1))
    assert found.epsilon == epsilon([Spending(1.0, 0.5, 10)], DELTA)
    assert found.is_sound and 100 < found.correct < 200


def test_persons_draws_are_one_canary():
    plan = canary_plan(experiment(unit="person", draws=3), noise_multiplier=NO_NOISE)
    present = np.arange(0, CANARIES, 2)
    scores = train_and_score(plan, present, torch.device("cpu"), "float32")
    assert (scores[1::2] < 1e-6).all() and (scores[::2] > 1e-3).mean() > 0.99


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
    assert lower_bound(1000, 200, 100, DELTA) == 0
    assert lower_bound(1000, 200, 200, DELTA) == pytest.approx(4.17, abs=0.05)
