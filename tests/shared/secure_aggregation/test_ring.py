"""Updates as elements of a ring: exact with 64 bits, within a stated error with 32, and never past the ring's half."""

import numpy as np
import pytest

from shared.experiment.config import Experiment
from shared.secure_aggregation.ring import Ring, largest_element, ring_of
from shared.updates.fixed_point import MAX_ELEMENT, SCALE_BITS


def experiment(**federation):
    return Experiment.model_validate(
        {"federation": {"secure": True, "update_norm_action": "clip", "min_replies": 3, **federation}}
    )


def test_sixty_four_bits_are_the_fixed_point_of_open_sums():
    ring = ring_of(experiment(), 5)
    assert (ring.bits, ring.scale_bits, ring.largest) == (64, SCALE_BITS, MAX_ELEMENT)
    values = np.array([0.1, -0.1, 3.75, -4.0, 9.0, 2.0**-38], np.float32)
    expected = [int(np.rint(float(value) * 0.5 * 2.0**36)) for value in values[:4]]
    assert ring.decode(ring.encode(values, 0.5))[:4].tolist() == expected
    assert ring.decode(ring.encode(values, 1.0))[4:].tolist() == [4 * 2**36, 0]


@pytest.mark.parametrize("num_sites", [3, 5, 64])
@pytest.mark.parametrize("bound", [0.0, 0.003, 1.5])
def test_with_thirty_two_bits_all_sites_together_stay_inside_half_of_the_ring(num_sites, bound):
    ring = ring_of(experiment(secure_bits=32, max_update_norm=bound), num_sites)
    extreme = ring.encode(np.array([1e9, -1e9], np.float32), 1.0)
    total = np.zeros(2, np.uint32)
    for _ in range(num_sites):
        total += extreme
    assert np.abs(total.view(np.int32).astype(np.int64)).max() <= 2**30
    step = 2 ** (SCALE_BITS - ring.scale_bits)
    high, low = ring.decode(total).tolist()
    assert high == -low and ring.largest_sum(num_sites) - num_sites * step <= high <= ring.largest_sum(num_sites)
    finer = Ring(32, ring.scale_bits + 1, ring.largest)
    assert ring.scale_bits == SCALE_BITS or finer.largest_sum(num_sites) >> (36 - finer.scale_bits) > 2**30


def test_the_rounding_error_is_half_a_step():
    ring = ring_of(experiment(secure_bits=32, max_update_norm=0.0), 5)
    assert ring.scale_bits == 25
    values = np.random.default_rng(3).uniform(-4, 4, 5000).astype(np.float32)
    error = np.abs(ring.decode(ring.encode(values, 1.0)) / 2.0**36 - values)
    assert 0.4 * 2.0**-25 < error.max() <= 0.5 * 2.0**-25


def test_the_largest_element_follows_from_the_bound_or_from_the_steps():
    assert largest_element(experiment(max_update_norm=0.25)) == 0.25
    assert largest_element(experiment(max_update_norm=0.0)) == largest_element(experiment(max_update_norm=77.0)) == 4.0
    steps = Experiment.model_validate(
        {"optim": {"lr": 0.01}, "federation": {**experiment().federation.model_dump(), "local_steps": 20}}
    )
    assert largest_element(steps) == pytest.approx(2 * 20 * 0.01)


def test_infinite_and_huge_values_are_cut_before_they_wrap():
    for bits in (64, 32):
        ring = ring_of(experiment(secure_bits=bits), 3)
        cut = ring.decode(ring.encode(np.array([3e38, -3e38], np.float32), 1.0)) / 2.0**36
        assert cut.tolist() == pytest.approx([ring.largest, -ring.largest], rel=1e-6)
