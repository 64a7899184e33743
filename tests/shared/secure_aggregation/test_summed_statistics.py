"""Statistics in the ring: what comes out is what went in, to half a step; what would not fit does not go in."""

import numpy as np
import pytest

from shared.secure_aggregation.roster import MAX_SITES
from shared.secure_aggregation.summed_statistics import (
    LARGEST,
    RING,
    num_elements,
    opened_statistics,
    smallest_sum,
    statistics_values,
)

WIDTH = 5


def made(seed, count):
    features = np.random.default_rng(seed).normal(3.0, 2.0, (count, WIDTH))
    return count, features.sum(axis=0), features.T @ features


@pytest.mark.parametrize("radius", [1.0, 7.25])
def test_a_sum_of_elements_is_the_sum_of_statistics_to_half_a_step_a_site(radius):
    parts = [made(seed, 10 + seed) for seed in range(3)]
    elements = np.zeros(num_elements(WIDTH), RING.dtype)
    for n, total, outer in parts:
        elements += RING.encode(statistics_values(n, total, outer, radius), 1.0)
    n, total, outer = opened_statistics(RING.decode(elements), WIDTH, radius)
    assert n == 33
    step = 3 * 2.0**-23
    assert 0 < np.abs(total - sum(part[1] for part in parts)).max() <= radius * step * 1.001
    assert 0 < np.abs(outer - sum(part[2] for part in parts)).max() <= radius**2 * step * 1.001
    assert (outer == outer.T).all()


def test_all_sites_that_a_roster_can_have_stay_inside_half_of_the_ring():
    extreme = RING.encode(np.array([LARGEST, -LARGEST]), 1.0)
    total = np.zeros(2, RING.dtype)
    for _ in range(MAX_SITES):
        total += extreme
    assert RING.decode(total).tolist() == [2**62, -(2**62)]
    assert RING.largest_sum(MAX_SITES) == 2**62


@pytest.mark.parametrize("value", [LARGEST * 1.001, -LARGEST * 1.001, np.inf, np.nan])
def test_a_number_that_the_sum_does_not_hold_is_not_cut_but_refused(value):
    n, total, outer = made(0, 4)
    with pytest.raises(ValueError, match="more than a masked sum holds"):
        statistics_values(n, np.where(np.arange(WIDTH) == 2, value, total), outer, 1.0)
    assert statistics_values(n, total, outer, 1.0).shape == (1 + 5 + 15,)


def test_exact_sums_are_of_the_whole_roster():
    assert (smallest_sum("exact", 6), smallest_sum("dp", 6)) == (6, 0)
