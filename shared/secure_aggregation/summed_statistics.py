# ruff: noqa: N803, N806 (shape suffixes are part of the names)
"""Feature statistics as elements of the ring: what is added up, and how exactly. Shapes: D feature width.

A site's statistics are (n, sum f, sum f f^T), of which the last is symmetric; private ones are counted in the radius R
of their projection. Each number is rounded to 2^-22, so that a sum over m sites is off by at most m 2^-23 per entry;
where they are private by R or R^2 times that. n of exact ones is exact.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shared.secure_aggregation.ring import Ring
from shared.secure_aggregation.roster import MAX_SITES

SCALE_BITS = 22
LARGEST = 2.0**34
"""Magnitude of one number of one site: features of up to 400 of 100,000 images. 64 sites fit into half of the ring."""
RING = Ring(64, SCALE_BITS, LARGEST, unit_bits=SCALE_BITS)
STATISTICS_ROUND = 1
"""The one round of the run that a question for statistics is."""
assert MAX_SITES * LARGEST * 2**SCALE_BITS <= 2**62


def num_elements(width: int) -> int:
    """Numbers in the statistics of features of `width`: 1 + D + D (D + 1) / 2."""
    return 1 + width + width * (width + 1) // 2


def statistics_values(
    n: float, total_D: NDArray[np.float64], outer_DD: NDArray[np.float64], radius: float
) -> NDArray[np.float64]:
    """What a site adds to the sum, (1 + D + D (D + 1) / 2,).

    Args:
        n: images.
        total_D: sum of features.
        outer_DD: sum of their outer products; the lower triangle is taken.
        radius: R that both are counted in; 1 for exact ones.

    Raises:
        ValueError: a number that the sum does not hold: cut off it would spoil the sum, and nobody would see it.
    """
    lower = outer_DD[np.tril_indices(len(total_D))] / radius**2
    values = np.concatenate([np.array([n]), total_D / radius, lower])
    if not (np.abs(values) <= LARGEST).all():
        raise ValueError(f"statistics with a number beyond {LARGEST:g}, more than a masked sum holds")
    return values


def opened_statistics(
    sums: NDArray[np.int64], width: int, radius: float
) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """n, total (D,) and outer (D, D) of all sites together, from the open sum in steps of 2^-22."""
    values = sums / 2.0**SCALE_BITS
    outer_DD = np.empty((width, width))
    rows, columns = np.tril_indices(width)
    outer_DD[rows, columns] = outer_DD[columns, rows] = values[1 + width :] * radius**2
    return float(values[0]), values[1 : 1 + width] * radius, outer_DD


def smallest_sum(kind: Literal["own", "exact", "dp"], num_sites: int) -> int:
    """Sites whose statistics have to be in a sum beside what the threshold asks for: for exact ones the whole roster.

    Two sums of the same images over two sets of sites differ by what single sites have.
    """
    return num_sites if kind == "exact" else 0
