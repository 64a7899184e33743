"""Epsilon of a plan as the coordinator foresees it; what counts is what each site computes and charges.

The privacy loss of one step of the Poisson-subsampled Gaussian mechanism on a grid, composed by Fourier transform
(Koskela et al., arXiv 1906.03049), shifted so that the mean is exact (Gopi et al., arXiv 2106.02848). Written without
the sites' accountant: the coordinator needs neither Opacus nor torch for it, and a test compares the two.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.errors import InputError

MESH = 2e-3
"""Distance of two points of the grid, in units of loss."""
LARGEST_GRID = 2**22
DEVIATIONS = 9.0
"""How far the sum of all losses is followed, in its standard deviations."""
Floats = NDArray[np.float64]


class Steps(NamedTuple):
    """So many steps with the same constants."""

    noise_multiplier: float
    sample_rate: float
    steps: int


class _StepOutcomes(NamedTuple):
    """One step's outcomes x with their probabilities, with the unit and without, and the loss of each."""

    loss: Floats
    with_unit: Floats
    without: Floats


class _Losses(NamedTuple):
    """Losses of one step with their weights, and how many such steps there are."""

    loss: Floats
    weight: Floats
    steps: int

    @property
    def mean(self) -> float:
        """Of one step."""
        return float(self.weight @ self.loss)

    @property
    def variance(self) -> float:
        """Of one step."""
        return max(0.0, float(self.weight @ (self.loss - self.mean) ** 2))


def epsilon(parts: Sequence[Steps], delta: float) -> float:
    """Epsilon at `delta` of add/remove neighbours, to about 1 percent; infinity where the grid does not hold it.

    Args:
        parts: all steps of a plan, in any order.
        delta: in (0, 1).

    Raises:
        InputError: a constant out of range.
    """
    for sigma, rate, count in parts:
        if not (0 < sigma <= 1e4 and 0 < rate <= 1 and 0 <= count <= 10**8 and 0 < delta < 1):
            raise InputError(f"epsilon of sigma {sigma:g}, q {rate:g}, {count} steps at delta {delta:g}: out of range")
    taken = [(part.steps, _outcomes(part.noise_multiplier, part.sample_rate)) for part in parts if part.steps]
    if not taken:
        return 0.0
    removed = [_Losses(one.loss, one.with_unit, count) for count, one in taken]
    added = [_Losses(-one.loss, one.without, count) for count, one in taken]
    return max(_of_losses(removed, delta), _of_losses(added, delta))


def _outcomes(sigma: float, rate: float) -> _StepOutcomes:
    """Outcomes so fine that their losses are finer than the grid."""
    reach = 1 + 9 * sigma
    steepest = 1 / sigma**2
    num = min(2**22, max(20_001, math.ceil(2 * reach * steepest / (MESH / 4))))
    x = np.linspace(-reach, reach, num)
    zero, one = np.exp(-(x**2) / (2 * sigma**2)), np.exp(-((x - 1) ** 2) / (2 * sigma**2))
    without, with_unit = zero / zero.sum(), (1 - rate) * zero / zero.sum() + rate * one / one.sum()
    outside = math.log1p(-rate) if rate < 1 else -math.inf
    return _StepOutcomes(np.logaddexp(outside, math.log(rate) + (2 * x - 1) / (2 * sigma**2)), with_unit, without)


def _of_losses(parts: Sequence[_Losses], delta: float) -> float:
    count = sum(part.steps for part in parts)
    mean = sum(part.steps * part.mean for part in parts)
    spread = math.sqrt(sum(part.steps * part.variance for part in parts))
    widest = max(float(np.abs(part.loss[part.weight > delta * 1e-6]).max()) for part in parts)
    half = max(widest, abs(mean) + DEVIATIONS * spread) + 1
    size = 2 ** math.ceil(math.log2(2 * half / MESH))
    if size > LARGEST_GRID:
        return math.inf
    center = size // 2
    grid = (np.arange(size) - center) * MESH
    spectrum, shift = np.ones(size // 2 + 1, np.complex128), 0.0
    for part in parts:
        places = np.clip(np.rint(part.loss / MESH), -center, center - 1).astype(np.int64) + center
        one = np.bincount(places, part.weight, size)
        spectrum *= np.fft.rfft(one) ** part.steps
        shift += part.steps * (part.mean - float(one @ grid))
    # Losses add up modulo the length: n steps at places j_1, ..., j_n come to lie at their sum less (n - 1) centers.
    total = np.roll(np.fft.irfft(spectrum, size), -(count - 1) * center)
    return _solved(grid + shift, np.maximum(total, 0.0), delta)


def _solved(loss: Floats, weight: Floats, delta: float) -> float:
    """Smallest epsilon with sum over losses above it of p (1 - exp(epsilon - loss)) at most `delta`."""

    def excess(candidate: float) -> float:
        above = loss > candidate
        return float(weight[above] @ -np.expm1(candidate - loss[above]))

    low, high = 0.0, float(loss[-1])
    if excess(low) <= delta:
        return 0.0
    while high - low > 1e-4 * max(1.0, high):
        middle = (low + high) / 2
        low, high = (low, middle) if excess(middle) <= delta else (middle, high)
    return high
