# ruff: noqa: N803, N806, N815
"""The sum of per-unit clipped gradients in one backward pass.

For a layer with inputs a and output gradients g, the gradient of unit b is a product of a_b and g_b alone. So the
layers' inputs and output gradients are kept, the norm of each unit's whole gradient is computed from them layer by
layer, and the clipped sum is one matrix product per layer with g scaled by the unit's clipping factor. Compared with
the two backward passes of fast gradient clipping (Lee and Kifer, arXiv 2009.03106) this is book-keeping (Bu et al.,
arXiv 2210.00038). Norms and sums are computed in float32 from the same tensors, so the bound on a unit's contribution
does not depend on the precision of the forward pass.

The sum is a total function of the units: one whose gradient is not a number, is infinite, or of which the product over
all tokens would be made of numbers far larger than their sum counts as zero and changes no other unit.

Shapes: B units, L tokens, I and O inputs and outputs of a layer, D width.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from shared.diffusion.uvit import Positions
from shared.errors import InputError

LAYERS = (nn.Linear, nn.LayerNorm, Positions)
CANCELLATION = 2.0**10
"""A unit counts as zero when its tokens' gradients together are so many times longer than their sum, and than C.

Float32 would lose more digits of the other units in that sum than the clipping margin covers."""
LOST_SQUARE = 2.0**-74
"""Numbers below this may be missing from a float32 norm: their squares underflow."""


@dataclass
class _Call:
    """One use of a layer; after the backward pass either its per-unit gradients or what they are made of."""

    layer: nn.Module
    inputs: tuple[Tensor, ...]
    output_gradient: Tensor | None = None
    per_unit: dict[Tensor, Tensor] | None = None
    norms: list[Tensor] = field(default_factory=list)
    length_B: Tensor | None = None
    """Summed norms of the tokens' gradients, where the sum over tokens is left to the product over all units."""

    @torch.no_grad()
    def receive(self, g: Tensor) -> None:
        """Measure the units' gradients as soon as the backward pass gets here; keep whatever takes less room."""
        per_unit = _per_unit(self, g)
        self.norms = [_norms(each) for each in per_unit.values()]
        if sum(each.nbytes for each in per_unit.values()) <= g.nbytes + sum(each.nbytes for each in self.inputs):
            self.per_unit, self.inputs = per_unit, ()
        else:
            self.output_gradient, self.length_B = g, _length(self, g)


def validate(model: nn.Module) -> None:
    """Refuse a network whose per-unit gradients are not computed exactly here.

    Raises:
        InputError: a trainable tensor is not the sole property of one layer of a known kind.
    """
    owners: dict[int, str] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{module_name}.{name}"
            if not parameter.requires_grad:
                continue
            if id(parameter) in owners:
                raise InputError(f"tensor {full} is also {owners[id(parameter)]}: DP training needs untied tensors")
            if type(module) not in LAYERS:
                raise InputError(
                    f"tensor {full} is owned by a {type(module).__name__}: DP training knows "
                    f"{', '.join(layer.__name__ for layer in LAYERS)}"
                )
            owners[id(parameter)] = full


def clipped_gradients(
    model: nn.Module, loss: Callable[[], Tensor], bound: float, is_present_B: Tensor | None = None
) -> Tensor:
    """Leave in `.grad` of each trainable tensor the sum over units of min(1, bound / norm_b) times gradient_b.

    Args:
        model: passed `validate`; every trainable layer is used exactly once by `loss`.
        loss: the forward pass; returns one loss per unit, (B,); B may be 0.
        bound: largest L2 norm of one unit's gradient over all trainable tensors.
        is_present_B: rows of the batch that are units; the others count as zero. Default: all.

    Returns:
        (B,) norms before clipping, infinite or undefined for some units that count as zero. They are private: never
        release them.
    """
    with _recorded(model) as (calls, outputs):
        loss_B = loss()
    # (B, 1) would broadcast against the (B,) factors to (B, B) and void the guarantee without an error.
    assert loss_B.ndim == 1
    used = [id(call.layer) for call in calls]
    assert sorted(used) == sorted(id(layer) for layer in _trainable_layers(model)), "each layer exactly once"
    # Everything lies behind the first layer's output; asking for its gradient alone computes no weight gradients.
    torch.autograd.grad(loss_B.sum(), outputs)
    assert all(call.norms for call in calls), "a layer that the loss does not depend on"
    norms_B: Tensor = torch.linalg.vector_norm(torch.stack([norm for call in calls for norm in call.norms]), dim=0)
    lengths = [call.length_B for call in calls if call.length_B is not None]
    length_B = torch.stack(lengths).sum(0) if lengths else torch.zeros_like(norms_B)
    factors_B = _factors(model, norms_B, length_B, bound, is_present_B)
    for call in calls:
        for parameter, total in _clipped_sum(call, factors_B).items():
            parameter.grad = total
        call.per_unit, call.output_gradient, call.inputs = None, None, ()
    return norms_B


def sum_clipped(model: nn.Module, per_unit: dict[nn.Parameter, Tensor], bound: float, is_present_B: Tensor) -> None:
    """As `clipped_gradients`, from gradients of all units, (B, *shape of the parameter) for each trainable tensor."""
    wide = {parameter: each.to(_wide(each)) for parameter, each in per_unit.items()}
    norms_B: Tensor = torch.linalg.vector_norm(torch.stack([_norms(each) for each in wide.values()]), dim=0)
    factors_B = _factors(model, norms_B, torch.zeros_like(norms_B), bound, is_present_B)
    for parameter, each in wide.items():
        parameter.grad = _weighted_sum(factors_B, each).view_as(parameter)


def _factors(model: nn.Module, norms_B: Tensor, length_B: Tensor, bound: float, is_present_B: Tensor | None) -> Tensor:
    """(B,) clipping factors; zero for a unit that does not count."""
    num_values = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    # What underflow may have hidden keeps a tiny bound true, too.
    largest_B = norms_B + LOST_SQUARE * math.sqrt(num_values)
    factors_B = (bound / largest_B).clamp(max=1.0)
    counts_B = norms_B.isfinite() & (length_B <= CANCELLATION * norms_B.clamp(min=bound))
    if is_present_B is not None:
        counts_B &= is_present_B
    return torch.where(counts_B, factors_B, 0.0)


@contextmanager
def _recorded(model: nn.Module) -> Iterator[tuple[list[_Call], list[Tensor]]]:
    calls: list[_Call] = []
    outputs: list[Tensor] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append(_Call(layer, tuple(each.detach() for each in inputs)))
        output.register_hook(calls[-1].receive)  # type: ignore[no-untyped-call]
        # Holding the others would keep memory that the backward pass sets free.
        if not outputs:
            outputs.append(output)

    handles = [layer.register_forward_hook(note) for layer in _trainable_layers(model)]
    try:
        yield calls, outputs
    finally:
        for handle in handles:
            handle.remove()


def _trainable_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if any(p.requires_grad for p in module.parameters(recurse=False))]


def _per_unit(call: _Call, g: Tensor) -> dict[Tensor, Tensor]:
    """Gradient of each unit, (B, *parameter.shape), in float32 or wider."""
    layer, x = call.layer, call.inputs[0]
    x, g = x.to(_wide(x)), g.to(_wide(g))
    match layer:
        case nn.Linear():
            return _wanted((layer.weight, torch.einsum("blo,bli->boi", g, x)), (layer.bias, g.sum(1)))
        case nn.LayerNorm():
            return _wanted((layer.weight, (_normed(layer, x) * g).sum(1)), (layer.bias, g.sum(1)))
        case Positions():
            return {layer.weight: position_gradients(layer, call.inputs[1], g)}
        case _:
            raise AssertionError("validate lets no other layer pass")


def _length(call: _Call, g: Tensor) -> Tensor:
    """(B,) sum over the tokens of the norm of their part of the unit's gradient."""
    layer, x = call.layer, call.inputs[0]
    x, g = x.to(_wide(x)), g.to(_wide(g))
    if isinstance(layer, nn.LayerNorm):
        x = _normed(layer, x)
    # A product with g of one token is no longer than the product of both norms; that of a bias or position is g.
    length_BL: Tensor = torch.linalg.vector_norm(g, dim=-1) * (1 + torch.linalg.vector_norm(x, dim=-1))
    return length_BL.sum(1)


def _clipped_sum(call: _Call, factors_B: Tensor) -> dict[Tensor, Tensor]:
    """Sum over units of factor times gradient: from the kept gradients, or in one product that never holds them."""
    if call.per_unit is not None:
        return {
            parameter: _weighted_sum(factors_B, each).view_as(parameter) for parameter, each in call.per_unit.items()
        }
    assert call.output_gradient is not None
    layer, x, g = call.layer, call.inputs[0], call.output_gradient
    x, g = x.to(_wide(g)), g.to(_wide(g))
    if not bool(factors_B.all()):
        # Zero times infinity is not zero: units that do not count are overwritten.
        x, g = _without(x, factors_B), _without(g, factors_B)
    g = g * factors_B.view(-1, *[1] * (g.ndim - 1))
    match layer:
        case nn.Linear():
            return _wanted((layer.weight, g.flatten(0, 1).T @ x.flatten(0, 1)), (layer.bias, g.sum((0, 1))))
        case nn.LayerNorm():
            return _wanted((layer.weight, (_normed(layer, x) * g).sum((0, 1))), (layer.bias, g.sum((0, 1))))
        case Positions():
            total = torch.zeros_like(layer.weight)
            return {layer.weight: total.index_add_(0, call.inputs[1].flatten(), g.flatten(0, 1).to(total.dtype))}
        case _:
            raise AssertionError("validate lets no other layer pass")


def _weighted_sum(factors_B: Tensor, each: Tensor) -> Tensor:
    rows = each.flatten(1)
    return factors_B @ (rows if bool(factors_B.all()) else _without(rows, factors_B))


def _without(x: Tensor, factors_B: Tensor) -> Tensor:
    """`x` with zeros in the rows whose factor is zero."""
    return x.masked_fill((factors_B == 0).view(-1, *[1] * (x.ndim - 1)), 0.0)


def _norms(each: Tensor) -> Tensor:
    norms_B: Tensor = torch.linalg.vector_norm(each.flatten(1), dim=1)
    return norms_B


def position_gradients(layer: Positions, ids_BL: Tensor, g_BLD: Tensor) -> Tensor:
    """(B, count, D): gradients of tokens at the same position, for instance of several draws, add up."""
    gradients = g_BLD.new_zeros(len(g_BLD), *layer.weight.shape)
    return gradients.scatter_add_(1, ids_BL[..., None].expand_as(g_BLD), g_BLD)


def _normed(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, layer.normalized_shape, eps=layer.eps)


def _wanted(*found: tuple[Tensor | None, Tensor]) -> dict[Tensor, Tensor]:
    return {parameter: value for parameter, value in found if parameter is not None and parameter.requires_grad}


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
