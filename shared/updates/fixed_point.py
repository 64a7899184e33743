"""Updates as integers: one fixed point for open sums and for masked ones, so that both are the same bit by bit."""

import math

import numpy as np
from numpy.typing import NDArray

SCALE_BITS = 36
"""The grid of sums: an integer counts 2^-36."""
MAX_ELEMENT = 4.0
"""Largest magnitude of one element of an update."""
CLIP_MARGIN = 1 - 2**-20
"""Clipping stays this much below the bound, so that rounding to fixed point cannot exceed it: DP relies on it."""
CHUNK_ELEMENTS = 2**20
"""Work is done in pieces, so that temporaries cost megabytes, not models. Fixed, because norms depend on it."""


def to_fixed_point(
    values: NDArray[np.float32] | NDArray[np.float64], factor: float, scale_bits: int
) -> NDArray[np.int64]:
    """`factor * values` in steps of 2^-scale_bits, rounded to the nearest, ties to even.

    Args:
        values: (n,), finite.
        factor: 1, or what clipping makes of the update.
        scale_bits: the products stay below 2^(63 - scale_bits).
    """
    scaled = values.astype(np.float64)
    scaled *= factor
    scaled *= float(2**scale_bits)
    integers: NDArray[np.int64] = np.rint(scaled, out=scaled).astype(np.int64)
    return integers


def update_norm(flat: NDArray[np.float32]) -> float:
    """L2 norm in float64, summed in fixed pieces, so that it does not depend on threads."""
    chunks = (flat[start : start + CHUNK_ELEMENTS] for start in range(0, len(flat), CHUNK_ELEMENTS))
    return math.sqrt(sum(float(np.sum(np.square(chunk.astype(np.float64)))) for chunk in chunks))


def clipping(norm: float, bound: float) -> float:
    """What an update of this norm is multiplied by so that it is below `bound`; 1 where it is already, or none is set.

    Args:
        norm: L2.
        bound: 0: none.
    """
    return min(1.0, bound * CLIP_MARGIN / norm) if bound and norm else 1.0
