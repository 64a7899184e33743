"""Gaussian noise on a grid, without an error: what is added is round(N), N an exact Gaussian number.

The clipped sum x of a step is rounded to multiples of g, and so is the noise, so that no low bit of a float says which
number was noised (Mironov, CCS 2012). On the grid round(x + N) = x + round(N) holds, so the result is the rounding,
a post-processing, of the Gaussian mechanism that is accounted. Rounding x moves it by at most g sqrt(d) / 2 between
two of its values; `clipping_bound` takes g sqrt(d) off the bound on a unit's gradient, so the sensitivity stays C.

Exactness: float64 gives N to a known error. Where a border between two grid points lies closer than that (about once in
50,000 numbers), the number is computed anew in interval arithmetic, with more and more random bits behind those that
were drawn, until its grid point is certain: the lazy reading of uniform numbers with infinitely many bits. Nothing is
left of the rounding of float64, so it adds nothing to delta. That the key stream is as good as random is assumed.
"""

import math
import secrets
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.privacy.randomness.keystream import Keystream
from client.privacy.randomness.secret_random import POSITIVE, box_muller
from shared.errors import InputError
from shared.experiment.sections import PrivacyConfig

FINEST, SCALED_NOISE = 30, 33
"""The grid is C 2^-30, coarser where the noise's deviation would be more than 2^33 of it."""
MARGIN = 0.999
"""Share of C that gradients are clipped to: what float32 sums may be wrong by."""
LARGEST_NOISE, SMALLEST_NORM, LARGEST_NORM = 2.0**16, 1e-15, 1e15
PAIRS = {"cpu": 2**15, "cuda": 2**22}
"""Pairs of numbers at once: on a CPU what its cache holds."""
ULP = 2.0**-52
LARGEST_SUM = 2.0**51
"""In steps of the grid; noise of at most 9.4 deviations still fits into float64 beside it."""


class _Interval(Protocol):
    """An interval of mpmath: sign, mantissa, exponent and number of bits of each end."""

    _mpi_: tuple[tuple[int, int, int, int], tuple[int, int, int, int]]


def grid_exponent(noise_multiplier: float) -> int:
    """e: the grid of a plan is C 2^-e."""
    return min(FINEST, SCALED_NOISE - math.ceil(math.log2(max(noise_multiplier, 1.0))))


def clipping_bound(privacy: PrivacyConfig, num_values: int) -> float:
    """Largest norm of a unit's gradient for which the rounded sum of `num_values` numbers has sensitivity C.

    Raises:
        InputError: constants for which the arithmetic is not exact; they are public.
    """
    sigma, norm = privacy.noise_multiplier, privacy.max_grad_norm
    if not sigma <= LARGEST_NOISE:
        raise InputError(f"privacy.noise_multiplier {sigma:g} is above {LARGEST_NOISE:g}: give less noise")
    if not SMALLEST_NORM <= norm <= LARGEST_NORM:
        raise InputError(
            f"privacy.max_grad_norm {norm:g} is not in {SMALLEST_NORM:g} to {LARGEST_NORM:g}: give about 1"
        )
    return norm * (MARGIN - 2.0 ** -grid_exponent(sigma) * math.sqrt(num_values))


def add_noise(total: Tensor, deviation: float, stream: Keystream) -> None:
    """Add to each of the integers `total` a Gaussian number of this deviation, rounded to an integer.

    Args:
        total: float64 (d,) of integers below 2^52, changed in place.
        deviation: sigma C over the grid, at most 2^33.
        stream: key stream on the device of `total`, used for this alone.
    """
    step = 2 * PAIRS[total.device.type]
    for part in torch.split(total, step):
        words = stream.bits(2 * -(-len(part) // 2)).view(2, -1)
        part.add_(rounded_pairs(words[0], words[1], deviation).flatten()[: len(part)])


def noised(values: NDArray[np.float64], deviation: float) -> NDArray[np.float64]:
    """Any sums with secret Gaussian noise, by the argument of a DP step: counts of an audit, statistics of features.

    The values are rounded to a grid, and so is the noise. What float64 sums and that rounding may move a sum by lies in
    the margin by which the noise is larger than asked for.

    Args:
        values: (d,), finite.
        deviation: of the noise on each; noise multiplier times sensitivity.

    Returns:
        (d,) multiples of the grid.
    """
    steps = 2.0 ** grid_exponent(deviation / MARGIN)
    # Cutting off what float64 could not hold exactly moves two sums no further apart.
    total = torch.from_numpy(np.rint(values.clip(-LARGEST_SUM / steps, LARGEST_SUM / steps) * steps))
    add_noise(total, deviation / MARGIN * steps, Keystream(secrets.token_bytes(32)))
    found: NDArray[np.float64] = total.numpy() / steps
    return found


def rounded_pairs(k_1: Tensor, k_2: Tensor, deviation: float) -> Tensor:
    """round(deviation N) for the two numbers N of each pair of words, float64 (2, pairs)."""
    normal, u, r = box_muller(k_1, k_2)
    scaled = normal.mul_(deviation)
    nearest = scaled.round()
    # At 1/2 two grid points are equally near. An infinite or undefined number is never certain.
    is_certain = 0.5 - scaled.sub_(nearest).abs_() > error_bound(u, r).mul_(deviation)
    # In one transfer each: a GPU is slow at single numbers.
    places = (~is_certain.all(0)).nonzero()[:, 0]
    wanted = (~is_certain[:, places]).T.tolist()
    pairs = zip(k_1[places].tolist(), k_2[places].tolist(), wanted, nearest[:, places].T.tolist(), strict=True)
    exact = [_exact_pair(one & POSITIVE, two, deviation, each, known) for one, two, each, known in pairs]
    nearest[:, places] = torch.tensor(exact, dtype=nearest.dtype, device=nearest.device).view(-1, 2).T
    return nearest


def error_bound(u: Tensor, r: Tensor) -> Tensor:
    """Bound on |N - N_exact| of `box_muller`, over all bits that may follow those of its words.

    With e = 2^-52 and functions good to 2 ulp (SLEEF, the C library and CUDA state at most that): u is off by e/2 of
    itself from rounding and 2^-63 from the bits to come, so ln u by e/2 + 2^-63 / u, and r by that over r
    plus 1.5 e r. The angle, at most pi, is off by 1.5 pi e, its cosine by as much plus e; two products add e/2 each.
    Together below 9 e r + (e/2 + 2^-63 / u) / r; the bound is twice as much.
    """
    return (18 * ULP) * r + (ULP + 2.0**-62 / u) / r


def _exact_pair(k_1: int, k_2: int, deviation: float, wanted: Sequence[bool], known: Sequence[float]) -> list[float]:
    """round(deviation N) of a pair by interval arithmetic; fresh bits are put behind both words as long as needed.

    Only the `wanted` ones are computed; the others are certain already, whatever bits follow, and `known`.
    """
    from mpmath import iv

    bits = 63
    while True:
        iv.prec = bits + 64
        if k_1:
            u, v = (iv.mpf([k, k + 1]) / 2**bits for k in (k_1, k_2))
            r = deviation * iv.sqrt(-2 * iv.log(u))
            turns = zip((iv.cos, iv.sin), wanted, known, strict=True)
            found = [_nearest(r * turn(iv.pi * v)) if is_wanted else value for turn, is_wanted, value in turns]
            if None not in found:
                return [float(value) for value in found if value is not None]
        k_1, k_2, bits = k_1 << 64 | secrets.randbits(64), k_2 << 64 | secrets.randbits(64), bits + 64


def _nearest(interval: _Interval) -> int | None:
    """The integer nearest to every number of an interval, if it is one and the same; in exact arithmetic."""
    low, high = (
        math.floor((-1) ** sign * Fraction(mantissa) * Fraction(2) ** exponent + Fraction(1, 2))
        for sign, mantissa, exponent, _ in interval._mpi_
    )
    return low if low == high else None
