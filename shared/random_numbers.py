"""Where the random numbers of a loss come from: torch's generators, or any other source with three methods.

Sites with differential privacy draw from a cryptographic generator, which torch does not have.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class RandomSource(Protocol):
    """A source of random tensors on its device, each independent of all before."""

    @property
    def device(self) -> torch.device:
        """Where the numbers appear."""

    def rand(self, shape: Sequence[int]) -> Tensor:
        """float32, uniform in [0, 1)."""

    def randn(self, shape: Sequence[int]) -> Tensor:
        """float32, standard normal."""

    def randint(self, high: int, shape: Sequence[int]) -> Tensor:
        """int64, uniform in 0..high - 1."""


Random = torch.Generator | RandomSource


def rand(random: Random, *shape: int) -> Tensor:
    """float32, uniform in [0, 1), on the source's device."""
    if isinstance(random, torch.Generator):
        return torch.rand(shape, generator=random, device=random.device)
    return random.rand(shape)


def randn(random: Random, *shape: int) -> Tensor:
    """float32, standard normal, on the source's device."""
    if isinstance(random, torch.Generator):
        return torch.randn(shape, generator=random, device=random.device)
    return random.randn(shape)


def randint(random: Random, high: int, *shape: int) -> Tensor:
    """int64, uniform in 0..high - 1, on the source's device."""
    if isinstance(random, torch.Generator):
        return torch.randint(high, shape, generator=random, device=random.device)
    return random.randint(high, shape)
