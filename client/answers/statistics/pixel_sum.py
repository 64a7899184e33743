# ruff: noqa: N806, N815
"""The noisy sum of all units' pixels: one step of the Gaussian mechanism, exactly rounded like DP-SGD's noise.

A unit is an image, or the mean of a person's images, with pixels x on the scale from -1 to 1, shortened to a root mean
square of at most `norm`. It contributes v = (sqrt(1 - b^2) x / |norm|, b) to the sum, b being what counts it, so one
unit more or less changes the sum by at most 1 in L2 norm, and noise of deviation sigma on each of its numbers is what
is charged. Contributions are rounded to the grid of `client.privacy.grid_noise` one by one: the sum is exact.

Shapes: S pixels of a side, d = 3 S^2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from client.data.units import Ids, ImageReader
from client.privacy.grid_noise import add_noise, clipping_bound, grid_exponent
from client.privacy.randomness.keystream import Keystream
from client.privacy.randomness.secret_random import secret_streams
from shared.experiment.sections import PrivacyConfig
from shared.messages.statistics import COUNT_SHARE

BLOCK = 256
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class PixelSum:
    """What a site releases, with noise."""

    pixels_D: Float64
    """Sum of the units' shortened pixels on the scale from -1 to 1, (3 S S,)."""
    num_units: float


class PixelSummation:
    """The sum made ready: constants that the arithmetic is not exact for are refused here, before the charge."""

    def __init__(self, noise_multiplier: float, norm: float, size: int) -> None:
        """Prepare.

        Args:
            noise_multiplier: sigma.
            norm: largest root mean square of a unit's pixels, in (0, 1].
            size: S.

        Raises:
            InputError: more noise than the arithmetic is exact for.
        """
        self.num_pixels = 3 * size * size
        unit_ball = PrivacyConfig(noise_multiplier=noise_multiplier, max_grad_norm=1.0)
        bound = clipping_bound(unit_ball, self.num_pixels + 1)
        scale = 2.0 ** grid_exponent(noise_multiplier)
        self._deviation = noise_multiplier * scale
        self._longest = norm * math.sqrt(self.num_pixels)
        self._pixel_steps = scale * bound * math.sqrt(1 - COUNT_SHARE**2) / self._longest
        self._count_steps = round(scale * bound * COUNT_SHARE)

    def run(self, images: ImageReader, units: Sequence[Ids]) -> PixelSum:
        """Sum over all units and add noise that nobody can repeat."""
        total = torch.from_numpy(self.exact(images, units))
        add_noise(total, self._deviation, Keystream(secret_streams().key("noise")))
        noisy_D = total.numpy()
        return PixelSum(noisy_D[:-1] / self._pixel_steps, float(noisy_D[-1]) / self._count_steps)

    def exact(self, images: ImageReader, units: Sequence[Ids]) -> Float64:
        """The sum without noise in steps of the grid, whole numbers (d + 1,): it must not leave the site."""
        total_D = np.zeros(self.num_pixels + 1)
        for unit in units:
            total_D[:-1] += self._contribution(images, unit)
            total_D[-1] += self._count_steps
        return total_D

    def _contribution(self, images: ImageReader, unit: Ids) -> Float64:
        parts = (unit[start : start + BLOCK] for start in range(0, len(unit), BLOCK))
        bytes_D = sum(images.batch(part).numpy().astype(np.float64).sum(0).ravel() for part in parts)
        x_D = np.asarray(bytes_D, np.float64) / len(unit) * (2 / 255) - 1
        length = float(np.linalg.norm(x_D))
        shortened: Float64 = x_D * (min(1.0, self._longest / length) if length else 0.0)
        return np.rint(shortened * self._pixel_steps)
