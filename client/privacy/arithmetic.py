# ruff: noqa: N803
"""Whether this machine's arithmetic treats every unit alike: the same bits in every place, and the same time.

What a network makes of a unit depends on the unit alone, in exact numbers. In float32 it may depend on the row of a
matrix that the unit is in, or on what is in the other rows: libraries choose by shape which sums are made in which
order. They do not look at the numbers, so a trial with random ones shows it, in the very shapes of a round.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shared.diffusion.losses import Draw

Rows = NDArray[np.floating]
DEVIATION = 0.05
"""Of the random weights."""
EVERY = 3
"""The trial's unit has all places but each third one, and then those."""


def is_place_alike(
    model: nn.Module, slots: int, gradients: Callable[[Draw], Iterable[Tensor]], one: Draw, *others: Draw
) -> bool:
    """Whether a unit's gradient has the same bits in every place of a micro-batch, beside different neighbours.

    Args:
        model: gets random weights for the trial, and its own back: those of a request may hide what the sums do.
        slots: places of a micro-batch.
        gradients: of units that differ in their draws only: (slots, *shape) for one trainable tensor after the other.
        one: draws of a micro-batch, of which the first unit's are taken.
        others: two more, for the neighbours.
    """
    place_B = torch.arange(slots, device=one.t_B.device) % EVERY  # noqa: N806
    first: list[Tensor] = []
    with _random_weights(model):
        for is_one_B, other in zip((place_B != 1, place_B == 1), others, strict=True):  # noqa: N806
            draw = Draw(*(_mixed(*each, is_one_B) for each in zip(one, other, strict=True)))
            for number, each in enumerate(gradients(draw)):
                rows = each.flatten(1)[is_one_B]
                if number == len(first):
                    first.append(rows[0].clone())
                if not bool((rows == first[number]).all()):
                    return False
    return True


def one_by_one(
    compute: Callable[[Tensor], Rows], batch: int, side: int, models: Iterable[nn.Module] = ()
) -> Callable[[Tensor], Rows]:
    """`compute` of any number of images, such that an image's row has the same bits whatever images come with it.

    Args:
        compute: rows (batch, ...) of uint8 images (batch, 3, side, side), always as many.
        batch: images of a call: fewer are filled up.
        side: pixels of an image's side.
        models: networks that `compute` calls, whose weights somebody else has chosen: they are random in the trial.

    Returns:
        Rows (N, ...) of images (N, 3, side, side), N at most `batch`: of one call, or where images change each other's
        rows, of one call for each.
    """
    with ExitStack() as random:
        for model in models:
            random.enter_context(_random_weights(model))
        is_alike = _is_row_alike(compute, batch, side)

    def rows(images: Tensor) -> Rows:
        if not is_alike:
            return np.concatenate([compute(each.expand(batch, -1, -1, -1))[:1] for each in torch.split(images, 1)])
        return compute(torch.cat([images, images[:1].expand(batch - len(images), -1, -1, -1)]))[: len(images)]

    return rows


def _is_row_alike(compute: Callable[[Tensor], Rows], batch: int, side: int) -> bool:
    """Whether a random image's row has the same bits in every place, beside different ones."""
    pictures = torch.randint(
        256, (3, batch, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    place_B, first = torch.arange(batch) % EVERY, None  # noqa: N806
    for is_one_B, others in zip((place_B != 1, place_B == 1), pictures[1:], strict=True):  # noqa: N806
        found = compute(torch.where(is_one_B[:, None, None, None], pictures[0, :1], others))[is_one_B.numpy()]
        first = found[0] if first is None else first
        if not np.array_equal(found, np.broadcast_to(first, found.shape)):
            return False
    return True


def _mixed(one: Tensor, other: Tensor, is_one_B: Tensor) -> Tensor:
    """The first unit's draws where `is_one_B`, else the others'; a unit has as many rows as draws."""
    units, others = (each.reshape(len(is_one_B), -1, *each.shape[1:]) for each in (one, other))
    return torch.where(is_one_B.view(-1, *[1] * one.ndim), units[:1], others).flatten(0, 1)


@contextmanager
def _random_weights(model: nn.Module) -> Iterator[None]:
    own, random = [parameter.detach().clone() for parameter in model.parameters()], torch.Generator().manual_seed(0)
    try:
        for parameter in model.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=random) * DEVIATION)
        yield
    finally:
        for parameter, weights in zip(model.parameters(), own, strict=True):
            parameter.data.copy_(weights)


@contextmanager
def tiny_as_zero() -> Iterator[None]:
    """Subnormal numbers count as zero: a CPU computes with them many times more slowly, which would show a unit."""
    was_on = not bool(torch.full((1,), 2.0**-140) * 1.0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(was_on)
