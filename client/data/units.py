# ruff: noqa: N806
"""The units of privacy of a step as image batches, and the secret randomness that picks them.

Shapes: B units of a micro-batch, K draws per unit, C channels, H W pixels.
"""

import secrets
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.experiment.config import Experiment

Ids = NDArray[np.int64]


class Images(Protocol):
    """Where batches come from."""

    def batch(self, ids: Ids) -> Tensor:
        """uint8 (B, 3, H, W)."""


def secret_generator(device: str | torch.device) -> torch.Generator:
    """A generator whose seed comes from the operating system and is kept nowhere. Not cryptographic: see the README."""
    return torch.Generator(device).manual_seed(secrets.randbits(63))


def load_units(
    images: Images, units: Sequence[Ids], experiment: Experiment, generator: torch.Generator, device: torch.device
) -> Tensor:
    """Images of a micro-batch, uint8: (B, 3, H, W), or (B, K, 3, H, W) when the K draws take images of a person.

    A person with fewer than K images gives some of them more than once.
    """
    draws = experiment.privacy.draws
    is_person = experiment.privacy.unit == "person"
    per_unit = draws if is_person else 1
    ids = np.array([_pick(unit, per_unit, generator) for unit in units], np.int64).reshape(-1)
    x_BCHW = images.batch(ids).to(device, non_blocking=True)
    if experiment.data.horizontal_flip:
        flipped = torch.rand(len(x_BCHW), generator=generator) < 0.5
        x_BCHW = torch.where(flipped.to(device)[:, None, None, None], x_BCHW.flip(-1), x_BCHW)
    return x_BCHW.reshape(len(units), draws, *x_BCHW.shape[1:]) if is_person and draws > 1 else x_BCHW


def _pick(members: Ids, count: int, generator: torch.Generator) -> Ids:
    rounds = [torch.randperm(len(members), generator=generator).numpy() for _ in range(-(-count // len(members)))]
    picked: Ids = members[np.concatenate(rounds)[:count]]
    return picked
