"""Updates as integers: rounded to the nearest, whatever the pieces, and clipped below a bound."""

import numpy as np
import pytest

from shared.updates.fixed_point import CLIP_MARGIN, clipping, to_fixed_point


def test_values_are_scaled_and_rounded_to_the_nearest_ties_to_even():
    values = np.array([0.25, -0.25, 0.375, 0.625, 3.9], np.float32)
    expected = [1, -1, 2, 2, round(float(np.float32(3.9)) * 4)]
    assert to_fixed_point(values, 1.0, 2).tolist() == expected
    assert to_fixed_point(values, 0.5, 3).tolist() == expected
    assert values[0] == 0.25


def test_clipping_leaves_short_updates_and_takes_long_ones_just_below_the_bound():
    assert clipping(1.0, 2.0) == clipping(0.0, 2.0) == clipping(1e9, 0.0) == 1.0
    assert clipping(8.0, 2.0) == pytest.approx(0.25 * CLIP_MARGIN)
    assert 8.0 * clipping(8.0, 2.0) < 2.0
