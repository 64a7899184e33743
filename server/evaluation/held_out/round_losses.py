"""Denoising losses of public images with fixed time steps and noise, so that two rounds differ by their weights only.

The loss is the experiment's own (Eq. 1, or Eq. 4 with its mask). Each image gets one time step in each range of t, so
that damage to one level of noise is not hidden by the others.

Shapes: N images, B images of a batch, C channels, H W pixels.
"""
# ruff: noqa: N806

import itertools
from collections.abc import Callable
from pathlib import PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.data.image_set import ImageCache
from shared.diffusion.losses import Draw, draw_noise, per_image_loss
from shared.diffusion.schedule import make_schedule
from shared.experiment.config import Experiment
from shared.seeding import Streams

MAX_IMAGES = 256
"""More are not looked at: the check must cost a round little, and differences are paired."""
NUM_RANGES = 3
"""Ranges of t, of equal length. In shorter ones the noisiest, where little but the mean colour is left, goes up and
down by a tenth in honest rounds (`benchmarks.poison`)."""
MAX_LABELS, LEAST_LABELLED = 16, 16
"""Folders, or identities, of the images are labels where there are at most so many, of at least so many images."""
BATCH = 64
Network = Callable[..., Tensor]


class HeldOut:
    """Public images with everything that is random about their losses drawn once."""

    def __init__(self, experiment: Experiment, images: ImageCache, device: torch.device | str = "cpu") -> None:
        self.experiment, self.device = experiment, torch.device(device)
        rows = np.random.default_rng(0).permutation(len(images))[:MAX_IMAGES]
        self.images_NCHW = images.batch(rows)
        self.groups = {"all": np.arange(len(rows)), **_labels(images, rows)}
        self._schedule = make_schedule(experiment.diffusion.schedule, experiment.diffusion.timesteps).to(self.device)
        self.ranges = _ranges(experiment.diffusion.timesteps)
        self._draws = [self._draw(number, *limits) for number, limits in enumerate(self.ranges)]

    @torch.no_grad()
    def losses(self, model: Network) -> dict[str, float]:
        """Mean loss by group, float64 means of float32 losses.

        Args:
            model: the network, in evaluation mode on the device of this set.
        """
        losses_RN = torch.stack([self._losses(model, draw) for draw in self._draws]).double().cpu()
        found = {f"t {first}-{last - 1}": losses_RN[r].mean() for r, (first, last) in enumerate(self.ranges)}
        found |= {name: losses_RN[:, torch.from_numpy(rows)].mean() for name, rows in self.groups.items()}
        return {name: float(value) for name, value in found.items()}

    def _draw(self, number: int, first: int, last: int) -> Draw:
        random = Streams(0, ("held out", number)).generator("noise")
        t_N, eps_NVP, ids_NV = draw_noise(self.experiment, len(self.images_NCHW), random)
        return Draw(first + t_N * (last - first) // self.experiment.diffusion.timesteps, eps_NVP, ids_NV)

    def _losses(self, model: Network, draw: Draw) -> Tensor:
        parts = []
        for start in range(0, len(self.images_NCHW), BATCH):
            part = slice(start, start + BATCH)
            images_BCHW, *own = (each[part].to(self.device) for each in (self.images_NCHW, *draw))
            parts.append(per_image_loss(model, self._schedule, self.experiment, images_BCHW, *own))
        return torch.cat(parts)


def _ranges(timesteps: int) -> list[tuple[int, int]]:
    """First index of each range, and the index after its last."""
    borders = [timesteps * number // NUM_RANGES for number in range(NUM_RANGES + 1)]
    return [(first, last) for first, last in itertools.pairwise(borders) if last > first]


def _labels(images: ImageCache, rows: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Rows of each label; none where the folders are persons, too many or too small."""
    if images.persons is None or len(set(images.persons.tolist())) > MAX_LABELS:
        return {}
    codes = images.persons[rows]
    found = {code: np.flatnonzero(codes == code) for code in sorted(set(codes.tolist()))}
    return {f"label {_name(images, code)}": own for code, own in found.items() if len(own) >= LEAST_LABELLED}


def _name(images: ImageCache, code: int) -> str:
    """The folder that all images of a label lie in, else its number."""
    own = [images.names[row] for row in np.flatnonzero(images.persons == code)] if images.names else []
    folders = {PurePosixPath(name).parent.name for name in own}
    return folders.pop() if len(folders) == 1 and "" not in folders else str(code)
