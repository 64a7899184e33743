"""The learning rate over steps, against the curves written down by hand and torch's own cosine."""

import pytest
import torch

from shared.experiment.config import Experiment
from shared.experiment.learning_rate import central_lr, lr_at, round_lr
from shared.experiment.sections import OptimConfig


def plan(**federation) -> Experiment:
    optim = {"lr": 0.2, "warmup_steps": 3, "decay": federation.pop("decay", "cosine")}
    return Experiment.model_validate({"optim": optim, "federation": {"rounds": 4, "local_steps": 5, **federation}})


def test_lr_ramps_up_and_stays():
    config = OptimConfig(lr=1.0, warmup_steps=4)
    assert [lr_at(step, config, 6) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert lr_at(0, OptimConfig(lr=0.5), 6) == 0.5


def test_decay_is_torchs_cosine_and_stays_at_its_end():
    config, weight = OptimConfig(lr=0.3, decay="cosine"), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.3)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
    for step in range(8):
        assert lr_at(step, config, 8) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert lr_at(8, config, 8) == lr_at(11, config, 8) == 0.0
    assert lr_at(0, config, 0) == 0.3


def test_a_central_training_decays_over_its_steps():
    experiment = Experiment.model_validate({"train": {"steps": 6}, "optim": {"lr": 0.2, "decay": "cosine"}})
    assert central_lr(experiment)(3) == pytest.approx(0.1)


def test_rounds_of_a_run_put_together_are_one_training():
    whole = [lr_at(step, plan().optim, 20) for step in range(20)]
    rounds = [round_lr(plan(schedule="run"), number) for number in range(1, 5)]
    assert [rate(step) for rate in rounds for step in range(5)] == whole
    assert whole[0] < whole[2] and sorted(whole[3:], reverse=True) == whole[3:]


@pytest.mark.parametrize("decay", ["none", "cosine"])
def test_rounds_of_their_own_all_look_alike(decay):
    first, third = (round_lr(plan(decay=decay), number) for number in (1, 3))
    assert [first(step) for step in range(5)] == [third(step) for step in range(5)]
    assert first(4) == lr_at(4, plan(decay=decay).optim, 5)
