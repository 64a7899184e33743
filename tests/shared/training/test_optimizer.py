"""AdamW's groups, Muon beside it, and the learning rate."""

import pytest
import torch

from shared.diffusion.uvit import UViT
from shared.experiment.sections import OptimConfig
from shared.training.optimizer import load_moments, make_optimizer, moments_of, orthogonal, set_lr


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


def test_steps_are_torchs_own_bit_for_bit():
    """Only what torch wraps around its methods for its compiler is left out."""
    config, models = OptimConfig(lr=1e-2, betas=(0.9, 0.8), weight_decay=0.1), [tiny(), tiny()]
    ours = make_optimizer(models[0], config)
    places = {id(parameter): number for number, parameter in enumerate(models[0].parameters())}
    theirs_of = list(models[1].parameters())
    groups = [{**group, "params": [theirs_of[places[id(p)]] for p in group["params"]]} for group in ours.param_groups]
    theirs = torch.optim.AdamW(groups, fused=True)
    for number in range(3):
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            optimizer.zero_grad()
            with_gradients(model, number)
            set_lr(optimizer, 1e-2 / (1 + number))
            optimizer.step()
    for mine, other in zip(models[0].parameters(), theirs_of, strict=True):
        assert torch.equal(mine, other)
        assert ours.state[mine].keys() == theirs.state[other].keys()
        assert all(torch.equal(ours.state[mine][name], theirs.state[other][name]) for name in ours.state[mine])
    assert torch.is_grad_enabled()


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


MUON = OptimConfig(optimizer="muon", lr=1e-2, betas=(0.9, 0.8), weight_decay=0.1)
NO_MATRIX_OF_A_BLOCK = {"embedding.weight", "positions.weight", "output.weight"}


def with_gradients(model: UViT, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=random)


def test_matrices_of_blocks_go_torchs_muons_way_and_the_rest_adamws():
    """Torch's computes in bfloat16: the same to a hundredth of a step."""
    ours, theirs = tiny(), tiny()
    named = dict(theirs.named_parameters())
    hidden = {name for name, p in named.items() if p.ndim == 2 and name not in NO_MATRIX_OF_A_BLOCK}
    assert len(hidden) == 13
    others = torch.nn.ParameterList(p for name, p in named.items() if name not in hidden)
    chosen = make_optimizer(ours, MUON)
    muon = torch.optim.Muon([named[name] for name in sorted(hidden)], 1e-2, 0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, 1e-2, (0.9, 0.8), weight_decay=0.0)
    adamw_decayed = torch.optim.AdamW(
        [named[name] for name in ("embedding.weight", "output.weight")], 1e-2, (0.9, 0.8), weight_decay=0.1
    )
    adamw.param_groups[0]["params"] = [p for p in adamw.param_groups[0]["params"] if p.ndim < 2 or len(p) == 17]
    for seed, lr in enumerate((1e-2, 5e-3, 2e-2)):
        for model in (ours, theirs):
            with_gradients(model, seed)
        for optimizer in (chosen, muon, adamw, adamw_decayed):
            set_lr(optimizer, lr)
            optimizer.step()
    for name, parameter in ours.named_parameters():
        tolerance = {"rtol": 0.0, "atol": 2e-3} if name in hidden else {}
        torch.testing.assert_close(parameter, named[name], **tolerance)


@pytest.mark.parametrize("shape", [(5, 3), (3, 8), (6, 6)])
def test_singular_values_come_near_one_and_no_step_is_longer_than_adamws(shape):
    for seed in range(5):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        u, sizes, vt = torch.linalg.svd(matrix, full_matrices=False)
        found = orthogonal(matrix)
        inside = u.T @ found @ vt.T
        torch.testing.assert_close(inside, torch.diag(torch.diagonal(inside)), atol=1e-4, rtol=0)
        assert torch.diagonal(inside).max() < 1.21
        assert (torch.diagonal(inside)[sizes > 0.1 * sizes.max()] > 0.6).all()
        assert 0.2 * max(shape) ** 0.5 * float(found.norm()) <= 0.25 * matrix.numel() ** 0.5
    assert orthogonal(torch.zeros(shape)).abs().max() == 0


def test_muon_goes_on_from_its_momenta():
    whole, parts = tiny(), tiny()
    first, second = make_optimizer(whole, MUON), make_optimizer(parts, MUON)
    for seed in (0, 1):
        for model, optimizer in ((whole, first), (parts, second)):
            with_gradients(model, seed)
            optimizer.step()
    kept = {name: array.copy() for name, array in moments_of(second, dict(parts.named_parameters())).items()}
    assert {name.rsplit(".", 1)[1] for name in kept} == {"exp_avg", "exp_avg_sq", "momentum_buffer"}
    resumed = make_optimizer(parts, MUON)
    load_moments(resumed, dict(parts.named_parameters()), kept, 2)
    for model, optimizer in ((whole, first), (parts, resumed)):
        with_gradients(model, 2)
        optimizer.step()
    for ours, theirs in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_step_that_is_not_finite_changes_nothing_of_muons():
    model = tiny()
    optimizer, before = make_optimizer(model, MUON), [parameter.detach().clone() for parameter in model.parameters()]
    with_gradients(model, 0)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))
    assert not moments_of(optimizer, dict(model.named_parameters()))
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert not any(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(("pattern", "count"), [("qkv", 3), ("norm", 14)])
def test_muon_may_have_all_or_none_of_what_is_trained(pattern, count):
    model = tiny()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(pattern in name)
    optimizer = make_optimizer(model, MUON)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == count
    with_gradients(model, 0)
    optimizer.step()


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
