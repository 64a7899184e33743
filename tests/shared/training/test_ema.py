"""The moving average: formula, warm-up, restoring."""

import pytest
import torch
from torch import nn

from shared.errors import InputError
from shared.training.ema import Ema, ema_decay_at


def test_decay_warms_up_and_is_capped():
    assert ema_decay_at(0, 0.999) == 0.1
    assert ema_decay_at(90, 0.999) == 0.91
    assert ema_decay_at(10**6, 0.999) == 0.999


def test_average_follows_the_recursion():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    ema = Ema(model, 0.5)
    expected = model.weight.detach().clone()
    for step in range(20):
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight))
        ema.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(ema.state()["weight"], expected)
    assert ema.step == 20


def test_restored_average_continues_bitwise():
    model = nn.Linear(3, 2)
    first, second = Ema(model, 0.9), Ema(model, 0.9)
    for _ in range(3):
        with torch.no_grad():
            model.weight.mul_(1.1)
        first.update()
    second.load_state({name: tensor.clone() for name, tensor in first.state().items()}, first.step)
    for ema in (first, second):
        ema.update()
    assert all(torch.equal(first.state()[name], second.state()[name]) for name in first.state())


def test_copy_to_overwrites_another_model_and_leaves_the_average():
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    ema = Ema(model, 0.9)
    ema.copy_to(other)
    assert torch.equal(other.weight, model.weight)
    with torch.no_grad():
        other.weight.zero_()
    assert torch.equal(ema.state()["weight"], model.weight)


def test_foreign_names_and_shapes_are_refused():
    ema = Ema(nn.Linear(3, 2), 0.9)
    with pytest.raises(InputError, match="'bias' is on one side only"):
        ema.load_state({"weight": torch.zeros(2, 3)}, 0)
    with pytest.raises(InputError, match=r"'weight' has shape \(3, 2\)"):
        ema.load_state({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, 0)
