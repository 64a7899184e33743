# ruff: noqa: N803, N806
"""The sum of per-unit clipped gradients in one backward pass.

For a layer with inputs a and output gradients g, the gradient of unit b is a product of a_b and g_b alone. So the
layers' inputs and output gradients are kept, the norm of each unit's whole gradient is computed from them layer by
layer, and then, layer by layer once more, the sum of the same gradients times the units' clipping factors. Compared
with the two backward passes of fast gradient clipping (Lee and Kifer, arXiv 2009.03106) this is book-keeping (Bu et
al., arXiv 2210.00038). The numbers that are measured are the numbers that are added, in float32, whatever the precision
of the forward pass: what cancels inside a unit has cancelled before, so a unit never counts for more than the bound.

The sum is a total function of the units: one whose gradient is not a number or is infinite counts as zero and changes
no other unit, nor how long the others take.

How far float32 is off, with e = 2^-24 (rounding to nearest, in any order): a sum of `GROUP` units' contributions, each
at most C long, by at most GROUP^2 e C = 6.2e-5 C; a norm by at most e (I/2 + 2) of itself, for rows of I numbers
(1.3e-4 for I = `LONG`): what is beyond one row is added in float64.

Shapes: B units, L tokens, I and O inputs and outputs of a layer, D width.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from shared.diffusion.uvit import Positions
from shared.errors import InputError

Sums = dict[Tensor, Tensor]
"""By trainable tensor."""
LAYERS = (nn.Linear, nn.LayerNorm, Positions)
GROUP = 32
"""Units that are added in float32; sums of groups are added in float64."""
LONG = 4096
"""Numbers of a row that are squared and added in float32."""
LOST_SQUARE = 2.0**-63
"""Numbers below this may be missing from a float32 norm: their squares are below the normal numbers."""


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
        self.norms = [_norms(each) for each in per_unit.values()]
        if sum(each.nbytes for each in per_unit.values()) <= g.nbytes + sum(each.nbytes for each in self.inputs):
            self.per_unit, self.inputs = per_unit, ()
        else:
            self.output_gradient = g

    @torch.no_grad()
    def gradients(self) -> dict[Tensor, Tensor]:
        """The units' gradients that `receive` has measured, bit by bit."""
        if self.per_unit is not None:
            return self.per_unit
        assert self.output_gradient is not None
        return _per_unit(self, self.output_gradient)


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
) -> tuple[Tensor, Sums]:
    """The sum over units of min(1, bound / norm_b) times gradient_b, for each trainable tensor.

    Args:
        model: passed `validate`; every trainable layer is used exactly once by `loss`.
        loss: the forward pass; returns one loss per unit, (B,); B may be 0.
        bound: largest L2 norm of one unit's gradient over all trainable tensors.
        is_present_B: rows of the batch that are units; the others count as zero. Default: all.

    Returns:
        (B,) float64 norms before clipping, infinite or undefined for units that count as zero: they are private, never
        release them; and the sums by tensor, float32, or float64 for more than `GROUP` units.
    """
    calls = _backward(model, loss)
    norms_B = _whole(norm for call in calls for norm in call.norms)
    factors_B = _factors(model, norms_B, bound, is_present_B)
    sums: Sums = {}
    for call in calls:
        sums |= _weighted_sums(factors_B, call.gradients())
        call.per_unit, call.output_gradient, call.inputs = None, None, ()
    return norms_B, sums


def unit_gradients(model: nn.Module, loss: Callable[[], Tensor]) -> Iterator[Tensor]:
    """What `clipped_gradients` measures and adds: (B, *shape) for one trainable tensor after the other."""
    for call in _backward(model, loss):
        yield from call.gradients().values()


def sum_clipped(model: nn.Module, per_unit: dict[nn.Parameter, Tensor], bound: float, is_present_B: Tensor) -> Sums:
    """As `clipped_gradients`, from gradients of all units, (B, *shape of the parameter) for each trainable tensor."""
    wide: Sums = {parameter: each.to(_wide(each)) for parameter, each in per_unit.items()}
    factors_B = _factors(model, _whole(map(_norms, wide.values())), bound, is_present_B)
    return _weighted_sums(factors_B, wide)


def _backward(model: nn.Module, loss: Callable[[], Tensor]) -> list[_Call]:
    """Each layer's one use, after a forward and a backward pass that computes no weight gradients."""
    with _recorded(model) as (calls, outputs):
        loss_B = loss()
    # (B, 1) would broadcast against the (B,) factors to (B, B) and void the guarantee without an error.
    assert loss_B.ndim == 1
    used = [id(call.layer) for call in calls]
    assert sorted(used) == sorted(id(layer) for layer in _trainable_layers(model)), "each layer exactly once"
    # Everything lies behind the outputs of layers that no other stands before: their gradients need no weight's.
    torch.autograd.grad(loss_B.sum(), outputs)
    assert all(call.norms for call in calls), "a layer that the loss does not depend on"
    return calls


def _factors(model: nn.Module, norms_B: Tensor, bound: float, is_present_B: Tensor | None) -> Tensor:
    """(B,) clipping factors, float64; zero for a unit that does not count."""
    num_values = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    # What underflow may have hidden keeps a tiny bound true, too.
    largest_B = norms_B + LOST_SQUARE * math.sqrt(num_values)
    counts_B = norms_B.isfinite()
    if is_present_B is not None:
        counts_B &= is_present_B
    return torch.where(counts_B, (bound / largest_B).clamp(max=1.0), 0.0)


@contextmanager
def _recorded(model: nn.Module) -> Iterator[tuple[list[_Call], list[Tensor]]]:
    calls: list[_Call] = []
    outputs: list[Tensor] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append(_Call(layer, tuple(each.detach() for each in inputs)))
        output.register_hook(calls[-1].receive)  # type: ignore[no-untyped-call]
        # Holding the others would keep memory that the backward pass sets free.
        if not any(each.requires_grad for each in inputs):
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
    # In one order of memory, so that products are the same bits when they are computed again.
    x, g = x.to(_wide(x)).contiguous(), g.to(_wide(g)).contiguous()
    match layer:
        case nn.Linear():
            return _wanted((layer.weight, torch.bmm(g.transpose(1, 2), x)), (layer.bias, g.sum(1)))
        case nn.LayerNorm():
            return _wanted((layer.weight, (_normed(layer, x) * g).sum(1)), (layer.bias, g.sum(1)))
        case Positions():
            return {layer.weight: position_gradients(layer, call.inputs[1], g)}
        case _:
            raise AssertionError("validate lets no other layer pass")


def _weighted_sums(factors_B: Tensor, per_unit: Mapping[Tensor, Tensor]) -> Sums:
    """Sums over units of factor times gradient; changes `per_unit`."""
    none = (factors_B == 0).nonzero()[:, 0]
    return {parameter: _weighted_sum(factors_B, none, each).view_as(parameter) for parameter, each in per_unit.items()}


def _weighted_sum(factors_B: Tensor, none: Tensor, each: Tensor) -> Tensor:
    rows = each.flatten(1)
    # Zero times infinity is not zero. Only the rows of units that do not count are touched: that takes next to no time.
    rows.index_fill_(0, none, 0.0)
    factors, groups = torch.split(factors_B.to(each.dtype), GROUP), torch.split(rows, GROUP)
    sums = [some @ gradients for some, gradients in zip(factors, groups, strict=True)]
    return sums[0] if len(sums) == 1 else torch.stack(sums).double().sum(0)


def _norms(each: Tensor) -> Tensor:
    """(B,) norms of the units' gradients: of short rows in their own precision, of all rows in float64."""
    rows: Tensor = torch.linalg.vector_norm(each, dim=-1, dtype=torch.float64 if each.shape[-1] > LONG else None)
    return torch.linalg.vector_norm(rows.double().flatten(1), dim=1) if rows.ndim > 1 else rows.double()


def _whole(norms: Iterable[Tensor]) -> Tensor:
    """(B,) norms of the whole gradient from those of its tensors."""
    whole_B: Tensor = torch.linalg.vector_norm(torch.stack(list(norms)), dim=0)
    return whole_B


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
