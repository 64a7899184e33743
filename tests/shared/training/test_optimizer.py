"""AdamW groups and the learning rate."""

import pytest
import torch

from shared.diffusion.uvit import UViT
from shared.experiment.sections import OptimConfig
from shared.training.optimizer import make_optimizer, set_lr


def tiny() -> UViT:
    torch.manual_seed(0)
    return UViT(in_channels=3, grid_size=4, patch_size=2, width=32, num_blocks=3, num_heads=4)


def test_positions_norms_and_biases_are_not_decayed():
    model = tiny()
    optimizer = make_optimizer(model, OptimConfig(weight_decay=0.03))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        is_matrix = name.endswith("weight") and "norm" not in name and name != "positions.weight"
        assert decay[id(parameter)] == (0.03 if is_matrix else 0.0), name


def test_everything_is_decayed_on_demand():
    model = tiny()
    groups = make_optimizer(model, OptimConfig(weight_decay=0.03, decay_all=True)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.03]
    assert {id(p) for p in groups[0]["params"]} == {id(p) for p in model.parameters()}


def test_update_matches_the_adamw_equations():
    config = OptimConfig(lr=1e-2, betas=(0.9, 0.8), weight_decay=0.1)
    model = torch.nn.Linear(3, 2).double()
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    optimizer = make_optimizer(model, config)
    state = {name: (torch.zeros_like(x), torch.zeros_like(x)) for name, x in (("w", weight), ("b", bias))}
    for step in range(1, 4):
        gradients = {"w": torch.randn_like(weight), "b": torch.randn_like(bias)}
        model.weight.grad, model.bias.grad = gradients["w"].clone(), gradients["b"].clone()
        optimizer.step()
        for name, x, decay in (("w", weight, 0.1), ("b", bias, 0.0)):
            m, v = state[name]
            m.lerp_(gradients[name], 0.1)
            v.mul_(0.8).addcmul_(gradients[name], gradients[name], value=0.2)
            x.mul_(1 - 1e-2 * decay)
            x.sub_(1e-2 * (m / (1 - 0.9**step)) / ((v / (1 - 0.8**step)).sqrt() + 1e-8))
    torch.testing.assert_close(model.weight.detach(), weight)
    torch.testing.assert_close(model.bias.detach(), bias)


def test_frozen_parameters_are_left_out():
    model = tiny()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".attention." in name)
    optimizer = make_optimizer(model, OptimConfig())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 9


def test_set_lr_reaches_every_group():
    optimizer = make_optimizer(tiny(), OptimConfig())
    set_lr(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


@pytest.mark.parametrize("steps", [3])
def test_training_reduces_the_loss(steps):
    model = tiny()
    optimizer = make_optimizer(model, OptimConfig(lr=1e-3))
    tokens, ids = torch.randn(4, 16, 12), torch.arange(16).expand(4, -1)
    t = torch.zeros(4, dtype=torch.long)
    losses = []
    for _ in range(steps):
        loss = (model(tokens, t, ids) - tokens).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
