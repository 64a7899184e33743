# ruff: noqa: N803, N806
"""The sum of per-unit clipped gradients in one backward pass.

For a layer with inputs a and output gradients g, the gradient of unit b is a product of a_b and g_b alone. So the
layers' inputs and output gradients are kept, the norm of each unit's whole gradient is computed from them layer by
layer, and the clipped sum is one matrix product per layer with g scaled by the unit's clipping factor. Compared with
the two backward passes of fast gradient clipping (Lee and Kifer, arXiv 2009.03106) this is book-keeping (Bu et al.,
arXiv 2210.00038). Norms and sums are computed in float32 from the same tensors, so the bound on a unit's contribution
does not depend on the precision of the forward pass.

Shapes: B units, L tokens, I and O inputs and outputs of a layer, D width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from shared.diffusion.uvit import Positions
from shared.errors import InputError

LAYERS = (nn.Linear, nn.LayerNorm, Positions)


class NonFiniteGradientError(ArithmeticError):
    """A unit's gradient holds infinities or is not a number; the round ends without an update."""


@dataclass
class _Call:
    """One use of a layer; after the backward pass either its per-unit gradients or what they are made of."""

    layer: nn.Module
    inputs: tuple[Tensor, ...]
    output_gradient: Tensor | None = None
    per_unit: dict[Tensor, Tensor] | None = None
    norms: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def receive(self, g: Tensor) -> None:
        """Measure the units' gradients as soon as the backward pass gets here; keep whatever takes less room."""
        per_unit = _per_unit(self, g)
        self.norms = [torch.linalg.vector_norm(each.flatten(1), dim=1) for each in per_unit.values()]
        if sum(each.nbytes for each in per_unit.values()) <= g.nbytes + sum(each.nbytes for each in self.inputs):
            self.per_unit, self.inputs = per_unit, ()
        else:
            self.output_gradient = g


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


def clipped_gradients(model: nn.Module, loss: Callable[[], Tensor], bound: float) -> Tensor:
    """Leave in `.grad` of each trainable tensor the sum over units of min(1, bound / norm_b) times gradient_b.

    Args:
        model: passed `validate`; every trainable layer is used exactly once by `loss`.
        loss: the forward pass; returns one loss per unit, (B,); B may be 0.
        bound: largest L2 norm of one unit's gradient over all trainable tensors.

    Raises:
        NonFiniteGradientError: nothing may be made of such a gradient; no step is taken.

    Returns:
        (B,) norms before clipping. They are private: never release them.
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
    if not bool(norms_B.isfinite().all()):
        raise NonFiniteGradientError("a gradient is not finite: lower optim.lr or train in float32")
    factors_B = (bound / (norms_B + 1e-6)).clamp(max=1.0)
    for call in calls:
        for parameter, total in _clipped_sum(call, factors_B).items():
            parameter.grad = total
        call.per_unit, call.output_gradient, call.inputs = None, None, ()
    return norms_B


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


def _clipped_sum(call: _Call, factors_B: Tensor) -> dict[Tensor, Tensor]:
    """Sum over units of factor times gradient: from the kept gradients, or in one product that never holds them."""
    if call.per_unit is not None:
        return {
            parameter: (factors_B @ each.flatten(1)).view_as(parameter) for parameter, each in call.per_unit.items()
        }
    assert call.output_gradient is not None
    layer, x, g = call.layer, call.inputs[0], call.output_gradient
    g = g.to(_wide(g)) * factors_B.view(-1, *[1] * (g.ndim - 1))
    x = x.to(g.dtype)
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
