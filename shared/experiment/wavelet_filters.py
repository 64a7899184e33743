"""Filters of orthogonal wavelets from PyWavelets, checked; without torch, so that a configuration can refuse early."""

from functools import cache
from typing import NamedTuple

from shared.errors import InputError

_TOLERANCE = 1e-6


class Filters(NamedTuple):
    """Decomposition filters of an orthogonal wavelet; its reconstruction is the transpose."""

    low: tuple[float, ...]
    """h, an even number of taps, of unit norm."""
    high: tuple[float, ...]
    """g, as many taps as h, orthogonal to h and to all its even shifts."""

    @property
    def scale(self) -> float:
        """1 / (sum |h|)^2: brings every band of images in [-1, 1] into [-1, 1]; 1/2 for Haar."""
        return 1 / sum(abs(tap) for tap in self.low) ** 2


@cache
def filters(wavelet: str) -> Filters:
    """Decomposition filters of `wavelet`.

    Orthogonality is measured, not believed: `dmey` calls itself orthogonal and is so to 2e-3 only.

    Raises:
        InputError: PyWavelets has no discrete wavelet of this name, or it is not orthogonal to 1e-6.
    """
    import pywt  # a third of a second with numpy, for those experiments only that have wavelets

    try:
        bank = pywt.Wavelet(wavelet)
    except ValueError as error:
        raise InputError(f"wavelet {wavelet!r} is no discrete wavelet of PyWavelets: give haar, db2 or sym4") from error
    found = Filters(tuple(bank.dec_lo), tuple(bank.dec_hi))
    deviation = _deviation(found)
    if deviation > _TOLERANCE:
        raise InputError(
            f"wavelet {wavelet!r} is not orthogonal (off by {deviation:.1e}, allowed is {_TOLERANCE:.0e}): "
            "give haar, or one of the db, sym and coif families"
        )
    return found


def _deviation(found: Filters) -> float:
    """Largest distance of the even shifts of both filters from an orthonormal set."""
    import numpy as np

    if len(found.low) != len(found.high):
        return float("inf")
    low, high = np.array(found.low), np.array(found.high)
    worst = 0.0
    for first, second, norm in ((low, low, 1.0), (high, high, 1.0), (low, high, 0.0)):
        products = np.correlate(first, second, "full")[(len(low) - 1) % 2 :: 2]
        products[len(products) // 2] -= norm
        worst = max(worst, float(np.abs(products).max()))
    return worst
