"""Per-unit clipping against a loop of single-unit backward passes, in float64."""

import pytest
import torch
from torch import Tensor, nn

from client.privacy.clipping import clipped_gradients, sum_clipped, validate
from shared.diffusion.uvit import UViT
from shared.errors import InputError

GRID, PATCH, CHANNELS = 4, 2, 3
N, P = GRID**2, PATCH**2 * CHANNELS


def small_model(width: int, blocks: int, heads: int) -> UViT:
    torch.manual_seed(0)
    model = UViT(
        in_channels=CHANNELS, grid_size=GRID, patch_size=PATCH, width=width, num_blocks=blocks, num_heads=heads
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.double()


def batch(size: int, draws: int, visible: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size + 7 * draws + visible)
    tokens = torch.randn(size, draws * visible, P, generator=generator, dtype=torch.float64)
    t = torch.randint(1000, (size, draws), generator=generator)
    order = torch.rand(size, draws, N, generator=generator).argsort(-1)[..., :visible].reshape(size, draws * visible)
    target = torch.randn(tokens.shape, generator=generator, dtype=torch.float64) * torch.logspace(
        -2, 1, max(size, 1), dtype=torch.float64
    )[:size].view(-1, 1, 1)
    return tokens, t if draws > 1 else t[:, 0], order, target


def losses(model: nn.Module, tokens: Tensor, t: Tensor, ids: Tensor, target: Tensor) -> Tensor:
    return (model(tokens, t, ids) - target).square().mean((1, 2))


def reference(model: nn.Module, inputs: tuple[Tensor, ...], bound: float) -> tuple[Tensor, list[Tensor]]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total = [torch.zeros_like(parameter) for parameter in parameters]
    norms = []
    for row in range(len(inputs[0])):
        one = tuple(each[row : row + 1] for each in inputs)
        gradients = torch.autograd.grad(losses(model, *one)[0], parameters)
        norm = torch.sqrt(sum(gradient.square().sum() for gradient in gradients))
        norms.append(norm)
        for summed, gradient in zip(total, gradients, strict=True):
            summed.add_(gradient, alpha=min(1.0, bound / float(norm)))
    return torch.stack(norms) if norms else torch.zeros(0), total


CASES = [
    pytest.param(32, 3, 4, size, draws, visible, id=f"B{size}-K{draws}-V{visible}")
    for size, draws, visible in [(3, 1, N), (3, 4, N), (5, 1, 5), (4, 4, 5), (N, 1, N), (1, 1, N), (2, 4, 1)]
] + [
    pytest.param(192, 7, 6, 3, 1, N, id="T"),
    pytest.param(192, 7, 6, 2, 4, 5, id="T-masked-K4"),
    pytest.param(128, 13, 8, 2, 1, N, id="like-S"),
    pytest.param(128, 13, 8, 2, 4, 6, id="like-S-masked-K4"),
]


@pytest.mark.parametrize(("width", "blocks", "heads", "size", "draws", "visible"), CASES)
def test_clipped_sum_equals_a_loop_over_single_units(
    width: int,
    blocks: int,
    heads: int,
    size: int,
    draws: int,
    visible: int,
):
    model, inputs = small_model(width, blocks, heads), batch(size, draws, visible)
    norms, _ = reference(model, inputs, 1.0)
    bound = float(norms.median())
    _, expected = reference(model, inputs, bound)
    found, sums = clipped_gradients(model, lambda: losses(model, *inputs), bound)
    torch.testing.assert_close(found, norms, rtol=1e-12, atol=0)
    scale = max(float(each.abs().max()) for each in expected)
    for (name, parameter), wanted in zip(model.named_parameters(), expected, strict=True):
        error = (sums[parameter] - wanted).abs().max()
        assert error <= 1e-13 * scale, name


@pytest.mark.parametrize(("size", "draws", "visible"), [(3, 1, N), (4, 3, 5), (0, 2, 5)])
def test_clipped_sum_of_a_network_of_two_sequences_equals_a_loop_over_single_units(size, draws, visible):
    torch.manual_seed(0)
    model = UViT(
        in_channels=CHANNELS, grid_size=GRID, patch_size=PATCH, width=32, num_blocks=3, num_heads=4, sequences=(1, 2)
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    validate(model.double())
    tokens, t, first, target = batch(size, draws, visible)
    other = (first + 1) % N
    shape = size, draws, visible
    ids = torch.cat([first.view(shape), other.view(shape)], 2).view(size, 2 * draws * visible)
    inputs = tokens, t, ids, target
    norms, expected = reference(model, inputs, 0.3)
    found, sums = clipped_gradients(model, lambda: losses(model, *inputs), 0.3)
    assert len(found) == size
    torch.testing.assert_close(found, norms.double(), rtol=1e-12, atol=0)
    for (name, parameter), wanted in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(sums[parameter].double(), wanted, rtol=1e-10, atol=1e-13, msg=name)


def test_empty_batch_gives_zero_gradients():
    model = small_model(32, 3, 4)
    norms, sums = clipped_gradients(model, lambda: losses(model, *batch(0, 4, 5)), 1.0)
    assert norms.shape == (0,)
    assert all(bool((sums[parameter] == 0).all()) for parameter in model.parameters())


def test_no_unit_contributes_more_than_the_bound_in_bfloat16():
    model, (tokens, t, ids, target) = small_model(32, 3, 4).float(), batch(1, 1, N)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return losses(model, tokens.float(), t, ids, 100 * target.float())

    norms, sums = clipped_gradients(model, loss, 0.05)
    assert norms > 0.05
    norm = torch.sqrt(sum(each.double().square().sum() for each in sums.values()))
    assert norm == pytest.approx(0.05, rel=1e-4)
    assert norm <= 0.05 * (1 + 1e-6)


def test_draws_are_averaged_before_clipping():
    model, (tokens, t, ids, target) = small_model(32, 3, 4), batch(1, 4, N)
    norm, sums = clipped_gradients(model, lambda: losses(model, tokens, t, ids, target), 1e9)
    gradients = [sums[parameter] for parameter in model.parameters()]
    apart = [
        torch.autograd.grad(
            losses(
                model,
                tokens[:, k * N : (k + 1) * N],
                t[:, k],
                ids[:, k * N : (k + 1) * N],
                target[:, k * N : (k + 1) * N],
            )[0],
            list(model.parameters()),
        )
        for k in range(4)
    ]
    for gradient, *draws in zip(gradients, *apart, strict=True):
        torch.testing.assert_close(gradient, torch.stack(draws).mean(0), rtol=1e-9, atol=1e-14)
    assert norm > 0


def test_frozen_tensors_are_left_alone_and_do_not_count():
    model, inputs = small_model(32, 3, 4), batch(3, 1, N)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("attention" in name)
    norms, _ = reference(model, inputs, 1.0)
    found, sums = clipped_gradients(model, lambda: losses(model, *inputs), 1.0)
    torch.testing.assert_close(found, norms)
    assert all((parameter in sums) == ("attention" in name) for name, parameter in model.named_parameters())


def test_loss_of_a_wrong_shape_is_stopped():
    model, inputs = small_model(32, 3, 4), batch(2, 1, N)
    with pytest.raises(AssertionError):
        clipped_gradients(model, lambda: losses(model, *inputs)[:, None], 1.0)


def test_unused_trainable_layer_is_stopped():
    model, inputs = small_model(32, 3, 4), batch(2, 1, N)
    model.unused = nn.Linear(2, 2)
    with pytest.raises(AssertionError):
        clipped_gradients(model, lambda: losses(model, *inputs), 1.0)


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e300])
def test_unit_whose_gradient_is_not_finite_counts_as_zero_and_changes_no_other(bad: float):
    model, (tokens, t, ids, target) = small_model(32, 3, 4), batch(4, 1, N)
    target[2] = bad
    found = clipped_gradients(model, lambda: losses(model, tokens, t, ids, target), 0.5)[1]
    target[2] = 0
    is_present = torch.tensor([True, True, False, True])
    expected = clipped_gradients(model, lambda: losses(model, tokens, t, ids, target), 0.5, is_present)[1]
    for parameter in model.parameters():
        assert torch.equal(found[parameter], expected[parameter])


def test_unit_of_huge_parts_that_cancel_cannot_move_the_sum_of_the_others():
    # The units' gradients are not kept here, but computed again: 16 units of 2 tokens on a layer of 64 x 64.
    layer = nn.Linear(64, 64, bias=False)
    model = nn.Sequential(layer)
    inputs, weights = torch.zeros(16, 2, 64), torch.zeros(16, 2, 64)
    inputs[:15, 0, 0] = weights[:15, 0, 0] = 1
    inputs[15, :, 0], weights[15, :, 0] = 1, torch.tensor([1e9, -1e9])
    norms, sums = clipped_gradients(model, lambda: (model(inputs) * weights).sum((1, 2)), 1.0)
    assert norms[15] == 0
    assert float(sums[layer.weight][0, 0]) == 15
    weights[15] *= 1e-7
    sums = clipped_gradients(model, lambda: (model(inputs) * weights).sum((1, 2)), 1.0)[1]
    assert float(sums[layer.weight][0, 0]) == 15


@pytest.mark.parametrize("length", [4000, 20_000])
def test_unit_of_one_large_and_many_small_parts_does_not_hide_their_length(length: int):
    # Each square is less than half a unit in the last place of the first one, so adding them one by one adds nothing.
    model = nn.Sequential(nn.Linear(length, 4, bias=False))
    inputs = torch.full((1, 1, length), 2.0**-12.6)
    inputs[..., ::500] = 1
    sums = clipped_gradients(model, lambda: model(inputs).sum((1, 2)), 1.0)[1]
    assert float(sums[model[0].weight].double().norm()) == pytest.approx(1, abs=1.4e-4)


@pytest.mark.parametrize("units", [32, 33, 100])
def test_sum_of_many_units_is_off_by_less_than_the_margin_covers(units: int):
    layer = nn.Linear(3, 2, bias=False)
    model = nn.Sequential(layer)
    inputs = torch.randn(units, 1, 3, generator=torch.Generator().manual_seed(units))
    sums = clipped_gradients(model, lambda: model(inputs).sum((1, 2)), 0.5)[1]
    each = inputs[:, 0, None].double().expand(-1, 2, -1)
    clipped = each * (0.5 / each.flatten(1).norm(dim=1)).clamp(max=1)[:, None, None]
    assert float((sums[layer.weight] - clipped.sum(0)).norm()) <= -(-units // 32) * 32**2 * 2.0**-24 * 0.5
    assert sums[layer.weight].dtype == (torch.float64 if units > 32 else torch.float32)


def test_tiny_bound_holds_although_squares_underflow():
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    inputs = torch.full((1, 1, 8), 1e-12)
    sums = clipped_gradients(model, lambda: (model(inputs) * 1e-12).sum((1, 2)), 1e-25)[1]
    assert float(sums[model[0].weight].double().norm()) <= 1e-25


class Bare(nn.Module):
    """A tensor without a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


def test_models_that_would_void_the_guarantee_are_refused():
    with pytest.raises(InputError, match="owned by a Bare"):
        validate(Bare())
    with pytest.raises(InputError, match="owned by a Conv2d"):
        validate(nn.Sequential(nn.Conv2d(3, 3, 3)))
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    with pytest.raises(InputError, match="is also"):
        validate(tied)
    validate(small_model(32, 3, 4))


def test_given_gradients_of_half_precision_are_clipped_in_full_and_absent_units_left_out():
    layer = nn.Linear(40, 3)
    rows = {parameter: torch.randn(4, *parameter.shape).bfloat16() for parameter in layer.parameters()}
    is_present, bound = torch.tensor([True, False, True, True]), 0.7
    sums = sum_clipped(layer, rows, bound, is_present)
    flat = torch.cat([each.double().flatten(1) for each in rows.values()], 1)[is_present]
    expected = (flat * (bound / flat.norm(dim=1, keepdim=True)).clamp(max=1)).sum(0)
    found = torch.cat([sums[parameter].flatten() for parameter in layer.parameters()])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
