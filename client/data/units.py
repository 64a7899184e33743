# ruff: noqa: N806, N815
"""The units of privacy of a step as image batches: which images of a unit are shown, and reading them.

Shapes: B units of a micro-batch, K draws per unit, C channels, H W pixels.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.experiment.config import Experiment
from shared.random_numbers import Random, randint

Ids = NDArray[np.int64]


class ImageReader(Protocol):
    """Where the pixels of a step come from."""

    def batch(self, ids: Ids) -> Tensor:
        """Images `ids` as uint8 (B, 3, H, W)."""


class Shown(NamedTuple):
    """What some units show in one step."""

    ids_BK: Ids
    """Image numbers; one column where all draws take the unit's only image."""
    is_flipped_BK: Tensor
    """Whether an image is mirrored left to right."""

    def unit(self, number: int) -> "Shown":
        """What one of the units shows."""
        return Shown(self.ids_BK[number : number + 1], self.is_flipped_BK[number : number + 1])


def choose_images(units: Sequence[Ids], experiment: Experiment, random: Random) -> Shown:
    """Choose at random: for each draw an image of the person, or the image itself; half of them are mirrored.

    A person with fewer than K images shows some of them more than once.
    """
    per_unit = experiment.privacy.draws if experiment.privacy.unit == "person" else 1
    ids_BK = _pick(units, per_unit, random)
    coins_BK = randint(random, 2, len(units), per_unit).bool().cpu()
    return Shown(ids_BK, coins_BK if experiment.data.horizontal_flip else torch.zeros_like(coins_BK))


def read_images(images: ImageReader, shown: Shown, draws: int) -> Tensor:
    """uint8 (B, K, 3, H, W): an image for each of the K `draws` of a unit, on the CPU."""
    x_BCHW = images.batch(shown.ids_BK.reshape(-1))
    is_flipped = shown.is_flipped_BK.flatten()[:, None, None, None]
    x_BCHW = torch.where(is_flipped, x_BCHW.flip(-1), x_BCHW)
    return x_BCHW.view(*shown.ids_BK.shape, *x_BCHW.shape[1:]).expand(-1, draws, -1, -1, -1)


def _pick(units: Sequence[Ids], count: int, random: Random) -> Ids:
    """`count` images of each unit, (units, count): all of them in a random order, as often as it takes."""
    if not units:
        return np.empty((0, count), np.int64)
    rounds = [-(-count // len(members)) for members in units]
    lists = [members for members, times in zip(units, rounds, strict=True) for _ in range(times)]
    ids, sizes = np.concatenate(lists), [len(each) for each in lists]
    # One draw for all: a word for each image of each round, which decides its place there.
    words = randint(random, 2**62, len(ids)).cpu().numpy()
    order = np.lexsort((words, np.repeat(np.arange(len(lists)), sizes)))
    ends = np.cumsum([len(members) * times for members, times in zip(units, rounds, strict=True)])
    first = np.concatenate([[0], ends[:-1]])
    return np.asarray(ids[order][first[:, None] + np.arange(count)], np.int64)
