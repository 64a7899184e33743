"""The moving average: formula, warm-up, restoring."""

import pytest
import torch
from torch import nn

from shared.errors import InputError
from shared.experiment.sections import OptimConfig
from shared.training.ema import Ema, ema_decay_at


def test_decay_warms_up_and_is_capped():
    assert ema_decay_at(0, 0.999) == 0.1
    assert ema_decay_at(90, 0.999) == 0.91
    assert ema_decay_at(10**6, 0.999) == 0.999


def test_average_follows_the_recursion():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    ema = Ema(model, OptimConfig(ema_decay=0.5))
    expected = model.weight.detach().clone()
    for step in range(20):
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight))
        ema.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(ema.state()["weight"], expected)
    assert ema.step == 20


def test_the_authors_warm_up_copies_then_rises_as_a_power():
    assert [ema_decay_at(step, 0.999, "power") for step in (0, 7, 100)] == [0, 0, 0]
    assert ema_decay_at(101, 0.999, "power") == pytest.approx(1 - 2 ** (-2 / 3))
    # Averaging horizons in steps, as ema_pytorch 0.8.3 has them.
    horizons = [1 / (1 - ema_decay_at(step, 0.999, "power")) for step in (1000, 2000, 5000, 9000, 20_000)]
    assert [round(each) for each in horizons] == [93, 153, 289, 429, 734]
    assert ema_decay_at(31_700, 0.999, "power") < 0.999
    assert ema_decay_at(31_800, 0.999, "power") == 0.999


def test_the_average_moves_every_so_many_steps_only():
    model = nn.Linear(1, 1, bias=False).double()
    ema = Ema(model, OptimConfig(ema_decay=0.5, ema_every=3))
    ema.step = 300
    expected = model.weight.detach().clone()
    for step in range(300, 308):
        with torch.no_grad():
            model.weight.add_(1)
        ema.update()
        if step % 3 == 0:
            expected = 0.5 * expected + 0.5 * model.weight.detach()
        torch.testing.assert_close(ema.state()["weight"], expected)


def test_copies_of_the_authors_warm_up_are_exact():
    model = nn.Linear(5, 4)
    ema = Ema(model, OptimConfig(ema_warmup="power"))
    for _ in range(2):
        with torch.no_grad():
            model.weight.mul_(1.7)
        ema.update()
    assert torch.equal(ema.state()["weight"], model.weight)


def test_restored_average_continues_bitwise():
    model = nn.Linear(3, 2)
    first, second = Ema(model, OptimConfig(ema_decay=0.9)), Ema(model, OptimConfig(ema_decay=0.9))
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
    ema = Ema(model, OptimConfig(ema_decay=0.9))
    ema.copy_to(other)
    assert torch.equal(other.weight, model.weight)
    with torch.no_grad():
        other.weight.zero_()
    assert torch.equal(ema.state()["weight"], model.weight)


def test_foreign_names_and_shapes_are_refused():
    ema = Ema(nn.Linear(3, 2), OptimConfig(ema_decay=0.9))
    with pytest.raises(InputError, match="'bias' is on one side only"):
        ema.load_state({"weight": torch.zeros(2, 3)}, 0)
    with pytest.raises(InputError, match=r"'weight' has shape \(3, 2\)"):
        ema.load_state({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, 0)
