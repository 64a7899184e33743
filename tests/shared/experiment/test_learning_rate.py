"""The learning rate over steps, against the curve written down by hand."""

import pytest

from shared.experiment.config import Experiment
from shared.experiment.learning_rate import lr_at, round_lr
from shared.experiment.sections import OptimConfig


def plan(**federation) -> Experiment:
    optim = {"lr": 0.2, "warmup_steps": 8}
    return Experiment.model_validate({"optim": optim, "federation": {"rounds": 4, "local_steps": 5, **federation}})


def test_lr_ramps_up_and_stays():
    config = OptimConfig(lr=1.0, warmup_steps=4)
    assert [lr_at(step, config) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert lr_at(0, OptimConfig(lr=0.5)) == 0.5


def test_a_warm_up_from_zero_is_the_authors_ramp():
    config = OptimConfig(lr=4e-3, warmup_steps=4, warmup_from_zero=True)
    assert [lr_at(step, config) for step in range(6)] == pytest.approx([0, 1e-3, 2e-3, 3e-3, 4e-3, 4e-3])
    assert lr_at(0, OptimConfig(lr=4e-3, warmup_from_zero=True)) == 4e-3


def test_rounds_of_a_run_with_one_warm_up_are_one_training_put_together():
    """Even where the warm-up is longer than a round."""
    rounds = [round_lr(plan(warmup="run"), number) for number in range(1, 5)]
    assert [rate(step) for rate in rounds for step in range(5)] == [lr_at(step, plan().optim) for step in range(20)]
    assert rounds[0](4) < rounds[1](0) < rounds[1](2) == rounds[3](0)


def test_rounds_of_their_own_all_look_alike():
    first, third = (round_lr(plan(), number) for number in (1, 3))
    assert [first(step) for step in range(5)] == [third(step) for step in range(5)]
    assert first(4) == lr_at(4, plan().optim)
