import numpy as np
import pytest

from server.federation.updates import aggregation
from server.federation.updates.aggregation import (
    MAX_TOTAL_WEIGHT,
    FixedPointSum,
    UpdateError,
    check_total_weight,
    check_update,
    clip_factor,
    site_weight,
)
from shared.errors import InputError
from shared.experiment.federation import FederationConfig
from shared.messages.packing import Manifest, TensorSpec, decode, encode
from shared.updates.fixed_point import update_norm
from tests.server.fake_federation import permutations_of

MANIFEST = Manifest(tensors=(TensorSpec(name="first", shape=(3,)), TensorSpec(name="second", shape=(2, 2))))


def random_updates(count, size=1000, seed=0):
    return np.random.default_rng(seed).normal(scale=0.3, size=(count, size)).astype(np.float32).clip(-4, 4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_all_orders_of_five_replies_give_the_same_bits(dtype):
    updates = [encode(update, dtype) for update in random_updates(5)]
    weights = (1, 70, 3, 1000, 12)
    results = set()
    for order in permutations_of(5):
        total = FixedPointSum(1000)
        for index in order:
            total.fold(updates[index], dtype, weights[index])
        results.add(total.mean(total.total_weight).tobytes())
    assert len(results) == 1


def test_the_mean_is_that_of_float64():
    updates, weights = random_updates(7), np.array([1, 2, 3, 4, 5, 6, 7])
    total = FixedPointSum(1000)
    for update, weight in zip(updates, weights, strict=True):
        total.fold(update, "float32", int(weight))
    expected = (updates.astype(np.float64) * weights[:, None]).sum(0) / weights.sum()
    assert np.abs(total.mean(total.total_weight) - expected).max() < 2**-37 + np.abs(expected).max() * 2**-24


def test_the_extremes_do_not_overflow():
    total = FixedPointSum(2)
    total.fold(np.array([4.0, -4.0], np.float32), "float32", MAX_TOTAL_WEIGHT)
    assert total.mean(total.total_weight).tolist() == [4.0, -4.0]
    with pytest.raises(UpdateError, match="total"):
        total.fold(np.zeros(2, np.float32), "float32", 1)


def test_the_smallest_updates_are_rounded_to_the_grid_of_the_sum():
    total, step = FixedPointSum(5), 2.0**-36
    total.fold(np.array([1, 0.25, -0.75, 0.75, -0.25], np.float32) * np.float32(step), "float32", 1)
    assert total.mean(total.total_weight).tolist() == [step, 0.0, -step, step, 0.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_rejected_by_the_name_of_its_tensor(bad):
    update = np.zeros(7, np.float32)
    update[4] = bad
    with pytest.raises(UpdateError, match="second") as caught:
        check_update(update, "float32", MANIFEST)
    assert caught.value.code == "not_finite"


def test_an_element_beyond_four_is_rejected_by_the_name_of_its_tensor():
    update = np.zeros(7, np.float32)
    update[2] = -4.001
    with pytest.raises(UpdateError, match="first") as caught:
        check_update(update, "float32", MANIFEST)
    assert caught.value.code == "too_large"
    update[2] = -4.0
    assert check_update(update, "float32", MANIFEST) == 4.0


@pytest.mark.parametrize(
    ("wire", "dtype", "code"),
    [
        (np.zeros(6, np.float32), "float32", "length"),
        (np.zeros((7, 1), np.float32), "float32", "length"),
        (np.zeros(7, np.float64), "float32", "dtype"),
        (np.zeros(7, np.float32), "bfloat16", "dtype"),
        (np.zeros(7, np.uint8), "int8", "length"),
        (np.zeros(12, np.uint8), "int8", "length"),
        (np.zeros(11, np.int8), "int8", "dtype"),
        (np.zeros(11, np.float32), "int8", "dtype"),
    ],
)
def test_the_servers_own_manifest_decides_length_and_dtype(wire, dtype, code):
    with pytest.raises(UpdateError) as caught:
        check_update(wire, dtype, MANIFEST)
    assert caught.value.code == code


def test_the_norm_does_not_depend_on_the_wire_and_spans_all_pieces():
    update = random_updates(1, size=2**20 + 17)[0]
    manifest = Manifest(tensors=(TensorSpec(name="all", shape=update.shape),))
    expected = float(np.linalg.norm(update.astype(np.float64)))
    assert check_update(update, "float32", manifest) == pytest.approx(expected, rel=1e-12)
    assert update_norm(update) == pytest.approx(expected, rel=1e-12)


def test_blocks_of_8_bits_are_added_up_as_the_numbers_that_they_say():
    """Over the pieces that a sum is made in, which hold whole blocks."""
    updates = random_updates(2, size=aggregation.CHUNK_ELEMENTS + 1000)
    wires = [encode(update, "int8") for update in updates]
    total, expected = FixedPointSum(updates.shape[1]), FixedPointSum(updates.shape[1])
    manifest = Manifest(tensors=(TensorSpec(name="all", shape=updates[0].shape),))
    for wire in wires:
        said = decode(wire, "int8")
        assert check_update(wire, "int8", manifest) == check_update(said, "float32", manifest)
        total.fold(wire, "int8", 3, 0.7)
        expected.fold(said, "float32", 3, 0.7)
    assert total.mean(6).tobytes() == expected.mean(6).tobytes()
    assert np.abs(total.mean(6) - 0.7 * updates.mean(0)).max() < 0.7 * np.abs(updates).max() / 127


@pytest.mark.parametrize(
    ("scale", "code"),
    [(np.nan, "not_finite"), (np.inf, "not_finite"), (3e38, "not_finite"), (1.0, "too_large"), (-1.0, "too_large")],
)
def test_a_hostile_scale_is_rejected_by_the_name_of_its_tensor(scale, code):
    wire = encode(np.array([1, 2, 3, 4, 4, 4, 4], np.float32), "int8")
    wire[:4] = np.array([scale], "<f4").view(np.uint8)
    with pytest.raises(UpdateError, match="first" if code == "not_finite" else "second") as caught:
        check_update(wire, "int8", MANIFEST)
    assert caught.value.code == code


def test_weights_are_clamped_and_rounded_up_to_the_public_grid():
    by_examples = FederationConfig(weighting="examples", max_examples=1000, examples_grid=100, max_weight=50)
    assert [site_weight(count, by_examples) for count in (1, 100, 101, 999, 10**12)] == [1, 1, 2, 10, 10]
    assert site_weight(10**12, FederationConfig()) == 1
    bounded = by_examples.model_copy(update={"max_weight": 7})
    assert [site_weight(count, bounded) for count in (1, 699, 701, 10**12)] == [1, 7, 7, 7]
    unchanged = FederationConfig(weighting="examples")
    assert [site_weight(count, unchanged) for count in (1, 250, 2**53)] == [1, 3, 4]
    with pytest.raises(UpdateError, match="num_examples"):
        site_weight(0, by_examples)


def test_a_federation_whose_weights_could_overflow_is_refused():
    with pytest.raises(InputError, match=r"lower federation\.max_weight"):
        check_total_weight(2000, FederationConfig(weighting="examples", examples_grid=100, max_weight=1000))
    check_total_weight(2000, FederationConfig(weighting="examples", examples_grid=100))
    check_total_weight(2000, FederationConfig())


def test_work_in_pieces_names_the_right_tensor_and_noises_every_element(monkeypatch):
    monkeypatch.setattr(aggregation, "CHUNK_ELEMENTS", 2)
    manifest = Manifest.of({name: np.zeros(3, np.float32) for name in "ab"})
    for value, code in ((5.0, "too_large"), (np.nan, "not_finite")):
        update = np.zeros(6, np.float32)
        update[4] = value
        with pytest.raises(UpdateError, match="in tensor b") as caught:
            check_update(update, "float32", manifest)
        assert caught.value.code == code
    total, drawn = FixedPointSum(5), iter(range(1, 6))
    steps = total.mean(1, lambda count: np.array([next(drawn) for _ in range(count)], np.int64)) * 2.0**36
    assert steps.tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("weight", [0, -1])
def test_an_update_weighs_at_least_one(weight):
    with pytest.raises(UpdateError, match="outside 1"):
        FixedPointSum(2).fold(np.ones(2, np.float32), "float32", weight)


def test_a_norm_above_the_bound_is_clipped_or_rejected_as_configured():
    clips, rejects = FederationConfig(update_norm_action="clip"), FederationConfig()
    assert clip_factor(8.0, 2.0, clips) == pytest.approx(0.25, rel=1e-5)
    assert 8.0 * clip_factor(8.0, 2.0, clips) < 2.0
    assert clip_factor(1.0, 2.0, clips) == clip_factor(0.0, 2.0, clips) == 1.0
    assert clip_factor(2.0, 2.0, rejects) == 1.0
    with pytest.raises(UpdateError, match=r"norm 8 is above federation\.max_update_norm 2"):
        clip_factor(8.0, 2.0, rejects)
    assert clip_factor(1e9, 0.0, rejects) == 1.0
    total = FixedPointSum(1)
    total.fold(np.array([4.0], np.float32), "float32", 1, 0.25)
    assert total.mean(total.total_weight).tolist() == [1.0]
