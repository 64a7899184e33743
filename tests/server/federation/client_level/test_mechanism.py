import math

import numpy as np
import pytest

from server.federation.client_level.mechanism import central_epsilon, grid_noise, sensitivity
from server.federation.updates.aggregation import FixedPointSum
from shared.errors import InputError
from shared.experiment.config import parse_experiment
from shared.updates.fixed_point import CLIP_MARGIN, SCALE_BITS
from tests.server.fake_federation import make_experiment

CENTRAL = {"central_noise_multiplier": 1.0, "max_update_norm": 1.0, "update_norm_action": "clip", "sites_per_round": 3}


@pytest.mark.parametrize(
    "noise_multipliers",
    [[z] * releases for z in (0.5, 1.0, 4.0, 20.0) for releases in (1, 10, 300 if z > 1 else 40)]
    + [[10.0] * 20 + [0.7, 3.0]],
)
def test_epsilon_is_that_of_googles_accountant(noise_multipliers):
    accounting = pytest.importorskip("dp_accounting")
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=1e-3)
    for z in sorted(set(noise_multipliers)):
        event = accounting.GaussianDpEvent(z)
        accountant.compose(accounting.SelfComposedDpEvent(event, noise_multipliers.count(z)))
    expected = accountant.get_epsilon(1e-5)
    assert central_epsilon(noise_multipliers, 1e-5) == pytest.approx(expected, rel=3e-3, abs=2e-3)


def test_nothing_released_costs_nothing_and_more_rounds_cost_more():
    assert central_epsilon([], 1e-5) == 0
    assert central_epsilon([1.0], 1e-5) < central_epsilon([1.0] * 2, 1e-5) < central_epsilon([0.5] * 2, 1e-5)
    assert math.isfinite(central_epsilon([0.05] * 1000, 1e-5))


def test_noise_is_on_the_sum_has_deviation_z_c_and_the_denominator_is_fixed():
    z, bound = 0.7, 3.0
    total = FixedPointSum(200_000)
    total.fold(np.full(200_000, 0.5, np.float32), "float32", 1)
    noise = grid_noise(b"k" * 32, z * sensitivity(bound, 200_000, SCALE_BITS, CLIP_MARGIN), SCALE_BITS)
    mean = total.mean(3, noise)
    assert mean.mean() == pytest.approx(0.5 / 3, abs=4 * 0.7 / math.sqrt(200_000))
    assert mean.std() == pytest.approx(0.7 * 3.0 / 3, rel=0.01)


def test_noise_is_gaussian_on_the_grid_and_follows_its_key_alone():
    draws = grid_noise(b"a" * 32, 2.0, 20)(400_001).astype(np.float64) / 2**20 / 2.0
    assert draws.mean() == pytest.approx(0, abs=0.01)
    assert [np.mean(draws**power) for power in (2, 4, 6)] == pytest.approx([1, 3, 15], rel=0.03)
    for limit in (1.0, 2.0, 3.0, 4.0):
        expected = math.erfc(limit / math.sqrt(2)) * len(draws)
        assert np.count_nonzero(np.abs(draws) > limit) == pytest.approx(expected, abs=5 * math.sqrt(expected) + 1)
    assert np.corrcoef(draws[:-1], draws[1:])[0, 1] == pytest.approx(0, abs=0.01)
    assert np.corrcoef(draws[:200_000], draws[200_001:])[0, 1] == pytest.approx(0, abs=0.01)
    again, other = grid_noise(b"a" * 32, 2.0, 20), grid_noise(b"a" * 31 + b"b", 2.0, 20)
    assert np.array_equal(again(400_001) / 2**20 / 2.0, draws)
    assert np.mean(other(1000) == grid_noise(b"a" * 32, 2.0, 20)(1000)) < 0.01


def test_pieces_of_a_stream_do_not_repeat():
    noise = grid_noise(b"a" * 32, 2.0, 20)
    assert np.mean(noise(1000) == noise(1000)) < 0.01


def test_the_released_sum_is_the_exact_sum_plus_noise_on_the_grid():
    total = FixedPointSum(3)
    total.fold(np.array([0.5, -0.25, 2.0**-36], np.float32), "float32", 1)
    mean = total.mean(1, lambda count: np.arange(count, dtype=np.int64) * 2**36)
    assert mean.tolist() == [0.5, 0.75, np.float32(2 + 2.0**-36)]


@pytest.mark.parametrize(("bound", "num_elements"), [(1.0, 1000), (1e-3, 3_400_000), (1e-9, 100)])
def test_no_update_adds_more_to_the_sum_than_the_sensitivity(bound, num_elements):
    update = np.random.default_rng(0).normal(size=num_elements)
    update *= 5 * bound / np.linalg.norm(update)
    norm = float(np.linalg.norm(update.astype(np.float32).astype(np.float64)))
    total = FixedPointSum(num_elements)
    total.fold(update.astype(np.float32), "float32", 1, bound * CLIP_MARGIN / norm)
    added = np.linalg.norm(total._sum.astype(np.float64)) / 2**SCALE_BITS
    limit = sensitivity(bound, num_elements, SCALE_BITS, CLIP_MARGIN)
    assert added <= limit
    assert limit >= bound


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("max_update_norm=0.0", "needs a bound"),
        ("update_norm_action='reject'", "use clip"),
        ("weighting='examples'", "must not weigh more"),
        ("sites_per_round=0", "public number"),
        ("max_update_norm=1e9", "more than the sum holds"),
        ("quorum=2", "must not decide"),
        ("max_norm_ratio=1.5", "would be told without noise"),
        ("max_persistence=0.2", "would be told without noise"),
    ],
)
def test_combinations_that_cannot_work_are_refused_with_the_reason(change, words):
    text = make_experiment(**CENTRAL).to_toml()
    with pytest.raises(InputError, match=words):
        parse_experiment(text, [f"federation.{change}"])


def test_counts_do_not_weigh_under_dp_sgd():
    with pytest.raises(InputError, match="weighting"):
        parse_experiment("", ["privacy.mechanism='dp-sgd'", "federation.weighting='examples'"])
