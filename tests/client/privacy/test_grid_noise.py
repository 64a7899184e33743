"""Noise on a grid: exact rounding, the right deviation, and the bounds it is made for."""

import math
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpmath import mp
from scipy.stats import kstest, norm

from client.privacy import grid_noise
from client.privacy.grid_noise import (
    MARGIN,
    add_noise,
    clipping_bound,
    error_bound,
    grid_exponent,
    noised,
    rounded_pairs,
)
from client.privacy.randomness.keystream import Keystream
from client.privacy.randomness.secret_random import POSITIVE, box_muller
from shared.errors import InputError
from shared.experiment.sections import PrivacyConfig


def words(pairs: int, key: int = 0):
    return Keystream(key.to_bytes(32, "big")).bits(2 * pairs).view(2, -1)


def exact(k_1: int, k_2: int):
    """The two numbers of a pair of words to 60 digits."""
    with mp.workdps(60):
        r, phi = mp.sqrt(-2 * mp.log(mp.mpf(k_1 & POSITIVE) / 2**63)), mp.pi * mp.mpf(k_2) / 2**63
        return r * mp.cos(phi), r * mp.sin(phi)


def test_float64_is_never_further_off_than_its_bound():
    k_1, k_2 = words(3000)
    k_1[:20] = torch.tensor([2**e for e in range(4, 24)])  # far tails
    k_1[20:40] = POSITIVE - torch.tensor([2**e for e in range(20, 40)])  # near zero
    normal, u, r = box_muller(k_1, k_2)
    bound = error_bound(u, r)
    for place in range(3000):
        for number, true in zip(normal[:, place].tolist(), exact(int(k_1[place]), int(k_2[place])), strict=True):
            assert abs(true - number) <= float(bound[place])


def test_numbers_are_rounded_to_the_nearest_integer_also_where_float64_cannot_tell(monkeypatch):
    k_1, k_2 = words(20_000)
    unsure = []
    compute = grid_noise._exact_pair
    monkeypatch.setattr(grid_noise, "_exact_pair", lambda *a: (unsure.append(a), compute(*a))[1])
    # On so fine a grid every twentieth number is unsure.
    deviation = 2.0**42
    found = rounded_pairs(k_1, k_2, deviation)
    assert 100 < len(unsure) < 10_000
    for k_one, k_two, *_ in unsure[:50]:
        place = int(((k_1 & POSITIVE) == k_one).nonzero()[0])
        for number, true in zip(found[:, place].tolist(), exact(k_one, k_two), strict=True):
            # Further bits of the words may move it by as much as they are worth.
            assert abs(number - float(true * deviation)) <= 0.5 + 1e-2


def test_word_of_zeros_is_the_far_tail_and_not_infinite():
    found = rounded_pairs(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 2.0**30)
    assert 9.3 < float(found[0]) / 2**30 < 25 and abs(float(found[1])) / 2**30 < 1e-6


@pytest.mark.parametrize("count", [1, 2, 65_537, 300_001])
def test_noise_is_added_to_every_number(count):
    total = torch.full((count,), 5.0, dtype=torch.float64)
    add_noise(total, 2.0**30, Keystream(bytes(32)))
    assert torch.equal(total, total.round())
    assert (total != 5).all()
    if count > 10_000:
        assert float(total.std()) / 2**30 == pytest.approx(1, abs=5 / math.sqrt(2 * count))
        assert len(torch.unique(total)) > 0.999 * count


def test_coarse_noise_has_the_probabilities_of_the_rounded_gaussian():
    total, deviation, count = torch.zeros(400_000, dtype=torch.float64), 1.3, 400_000
    add_noise(total, deviation, Keystream(bytes(32)))
    for value in range(-4, 5):
        expected = count * (norm.cdf((value + 0.5) / deviation) - norm.cdf((value - 0.5) / deviation))
        assert abs(int((total == value).sum()) - expected) < 5 * math.sqrt(expected)


def test_noise_of_two_streams_is_not_correlated():
    parts = [torch.zeros(500_000, dtype=torch.float64) for _ in range(2)]
    for number, part in enumerate(parts):
        add_noise(part, 2.0**30, Keystream(number.to_bytes(32, "big")))
    assert abs(float(torch.corrcoef(torch.stack(parts))[0, 1])) < 5 / math.sqrt(500_000)


def test_bound_leaves_room_for_the_grid_and_for_float32():
    privacy = PrivacyConfig(max_grad_norm=2.0, noise_multiplier=1.0)
    assert clipping_bound(privacy, 10**8) == pytest.approx(2 * (0.999 - 1e4 * 2.0**-30), rel=1e-12)
    assert [grid_exponent(sigma) for sigma in (1e-9, 1.0, 8.0, 9.0, 100.0)] == [30, 30, 30, 29, 26]
    for field, value in (("noise_multiplier", 1e6), ("max_grad_norm", 1.4e-45), ("max_grad_norm", 1e30)):
        with pytest.raises(InputError, match=field):
            clipping_bound(privacy.model_copy(update={field: value}), 10)


@given(
    values=st.lists(st.floats(-1e5, 1e5), min_size=1, max_size=30),
    deviation=st.floats(1e-3, 1e4),
    key=st.integers(0, 2**64),
)
def test_any_sum_gets_the_noise_of_a_dp_step_on_the_same_grid(values, deviation, key):
    larger = deviation / MARGIN
    steps = 2.0 ** grid_exponent(larger)
    with mock.patch.object(grid_noise.secrets, "token_bytes", lambda _: key.to_bytes(32, "big")):
        found = noised(np.array(values), deviation)
    assert (found * steps == np.rint(found * steps)).all()
    total = torch.zeros(len(values), dtype=torch.float64)
    add_noise(total, larger * steps, Keystream(key.to_bytes(32, "big")))
    np.testing.assert_allclose(found - total.numpy() / steps, values, atol=0.5 / steps, rtol=1e-15)


def test_noise_on_sums_is_gaussian_of_its_size_and_new_every_time():
    drawn = noised(np.zeros(20_000), 3.0) * MARGIN / 3.0
    assert kstest(drawn, "norm").pvalue > 1e-4
    assert (noised(np.zeros(5), 1.0) != noised(np.zeros(5), 1.0)).all()


def test_sums_beyond_what_the_grid_holds_are_cut_and_still_noised():
    found = noised(np.array([1e300, -1e300]), 1.0)
    assert abs(found[0] + found[1]) < 20
    assert np.isfinite(found).all() and found[0] > 1e6
