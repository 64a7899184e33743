from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from shared.errors import InputError
from shared.evaluation.feature_statistics import FeatureSpace, statistics_of
from shared.evaluation.frechet import (
    bootstrap_interval,
    frechet,
    frechet_distance,
    jackknife_distances,
    jackknife_groups,
    jackknife_interval,
)

SPACE = FeatureSpace("x", "", "00")


def features(n, d, seed, shift=0.0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) / d**0.5 + shift


def torch_fidelity(one, other):
    statistics = [fid_features_to_statistics(torch.from_numpy(x)) for x in (one, other)]
    return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


def ours(one, other):
    return frechet_distance(statistics_of(one, SPACE), statistics_of(other, SPACE))


def test_distance_equals_torch_fidelity():
    one, other = features(300, 64, 1), features(500, 64, 2, shift=0.3)
    assert ours(one, other) == pytest.approx(torch_fidelity(one, other), rel=1e-9)


def test_distance_of_fewer_images_than_features_equals_torch_fidelity():
    one, other = features(40, 64, 1), features(50, 64, 2, shift=0.3)
    assert ours(one, other) == pytest.approx(torch_fidelity(one, other), rel=1e-6)


def test_pooled_distance_of_eight_unequal_sites_equals_the_centralised_one():
    parts = [features(n, 32, 7, shift=n / 100) for n in (5, 9, 20, 33, 50, 64, 80, 120)]
    generated = statistics_of(features(200, 32, 9), SPACE)
    pooled = statistics_of(parts[0], SPACE)
    for part in parts[1:]:
        pooled = pooled + statistics_of(part, SPACE)
    union = statistics_of(np.concatenate(parts), SPACE)
    assert frechet_distance(generated, pooled) == pytest.approx(frechet_distance(generated, union), rel=1e-10)


def test_distance_of_diagonal_gaussians_has_its_closed_form():
    mean_1, mean_2, var_1, var_2 = np.zeros(3), np.array([1.0, 2, 3]), np.array([1.0, 4, 9]), np.array([4.0, 4, 1])
    expected = 14 + np.square(np.sqrt(var_1) - np.sqrt(var_2)).sum()
    assert frechet(mean_1, np.diag(var_1), mean_2, np.diag(var_2)) == pytest.approx(expected, rel=1e-12)


def test_a_constant_feature_needs_no_special_care():
    one, other = features(100, 8, 1), features(100, 8, 2)
    one[:, 3] = other[:, 3] = 5.0
    assert ours(one, other) == pytest.approx(torch_fidelity(one, other), rel=1e-6)


@settings(max_examples=20)
@given(n=st.integers(2, 60), m=st.integers(2, 60), seed=st.integers(0, 100))
def test_distance_is_symmetric_not_negative_and_zero_to_itself(n, m, seed):
    one, other = features(n, 6, seed), features(m, 6, seed + 1)
    assert ours(one, other) == pytest.approx(ours(other, one), rel=1e-6, abs=1e-6)
    assert ours(one, other) > -1e-6
    assert ours(one, one) == pytest.approx(0, abs=1e-5)


def test_bootstrap_interval_holds_the_distance_and_narrows_with_more_images():
    reference = statistics_of(features(2000, 8, 3), SPACE)
    many = features(1600, 8, 4, shift=0.5)
    few = many[:100]
    low, high = bootstrap_interval(few, reference, resamples=100)
    narrow_low, narrow_high = bootstrap_interval(many, reference, resamples=100)
    assert low < frechet_distance(statistics_of(few, SPACE), reference) < high
    assert narrow_high - narrow_low < (high - low) / 2


def test_statistics_of_other_extractors_do_not_compare():
    with pytest.raises(InputError, match="do not compare"):
        frechet_distance(
            statistics_of(features(9, 4, 0), SPACE), statistics_of(features(9, 4, 0), FeatureSpace("y", "", ""))
        )


def test_bootstrap_interval_is_the_spread_of_the_draws_placed_around_the_distance():
    # Resampling few images of many features adds a large bias: uncentred draws would all lie above the distance.
    one, other = features(20, 8, 1), statistics_of(features(300, 8, 2, shift=0.5), SPACE)
    found = bootstrap_interval(one, other, resamples=40, level=0.8, seed=9)
    rng, drawn = np.random.default_rng(9), []
    for _ in range(40):
        rows = rng.integers(20, size=20)
        drawn.append(frechet_distance(statistics_of(one[rows], SPACE), other))
    estimate = frechet_distance(statistics_of(one, SPACE), other)
    assert np.mean(drawn) > estimate + 0.1
    expected = np.quantile(drawn, [0.1, 0.9]) + estimate - np.mean(drawn)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def jackknife(rows, reference):
    groups = [statistics_of(group, SPACE) for group in jackknife_groups(rows)]
    left_out = jackknife_distances(groups, lambda each: frechet_distance(each, reference))
    return jackknife_interval(frechet_distance(statistics_of(rows, SPACE), reference), left_out)


def test_jackknife_interval_is_that_of_the_distances_without_each_group():
    one, other = features(31, 5, 1), statistics_of(features(300, 5, 2, shift=0.5), SPACE)
    places = np.array_split(np.arange(31), 20)
    drawn = [frechet_distance(statistics_of(np.delete(one, rows, axis=0), SPACE), other) for rows in places]
    half = 2.093 * np.sqrt(19 / 20 * np.square(drawn - np.mean(drawn)).sum())
    estimate = frechet_distance(statistics_of(one, SPACE), other)
    np.testing.assert_allclose(jackknife(one, other), [estimate - half, estimate + half], rtol=1e-6)


def test_jackknife_interval_has_the_width_that_new_draws_show():
    other = statistics_of(features(4000, 4, 999, shift=0.6), SPACE)
    draws = np.random.default_rng(5).standard_normal((60, 200, 4))
    found = np.std([frechet_distance(statistics_of(draw, SPACE), other) for draw in draws], ddof=1)
    told = np.mean([np.diff(jackknife(draw, other)) / 2 / 2.093 for draw in draws])
    assert 0.7 < told / found < 1.4


def test_the_interval_of_a_difference_has_the_width_that_new_draws_of_common_seeds_show():
    """Two models that make nearly the same of each seed: their distances vary together."""
    other = statistics_of(features(4000, 4, 999, shift=0.6), SPACE)

    def left_out(rows):
        groups = [statistics_of(group, SPACE) for group in jackknife_groups(rows)]
        return np.array(jackknife_distances(groups, lambda each: frechet_distance(each, other)))

    noise, differences, widths = np.random.default_rng(5), [], []
    for _ in range(40):
        one = noise.standard_normal((200, 4))
        two = 1.1 * one + 0.1 + 0.02 * noise.standard_normal((200, 4))
        differences.append(np.subtract(*(frechet_distance(statistics_of(each, SPACE), other) for each in (one, two))))
        low, high = jackknife_interval(differences[-1], left_out(one) - left_out(two))
        widths.append((high - low) / 2 / 2.093)
    assert 0.7 < np.mean(widths) / np.std(differences, ddof=1) < 1.4
    assert np.diff(jackknife(one, other)) > 3 * (high - low)


def test_two_images_have_no_interval_and_three_have():
    other = statistics_of(features(50, 3, 2), SPACE)
    assert jackknife(features(2, 3, 1), other) is None
    low, high = jackknife(features(3, 3, 1), other)
    assert low < frechet_distance(statistics_of(features(3, 3, 1), SPACE), other) < high


@pytest.mark.parametrize("value", [1e200, 1e300])
def test_statistics_too_large_for_a_distance_are_one_line(value):
    huge = replace(statistics_of(features(9, 3, 1), SPACE), outer_DD=np.full((3, 3), value), total_D=np.full(3, value))
    with pytest.raises(InputError, match="distance is not finite"):
        frechet_distance(huge, statistics_of(features(9, 3, 2), SPACE))
