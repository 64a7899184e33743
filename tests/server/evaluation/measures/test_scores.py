import numpy as np
import pytest
import torch

from server.evaluation.measures.scores import kernel_distance, kernel_name, precision_recall, scores
from shared.evaluation.feature_statistics import INCEPTION_2015_SHA256, FeatureSpace, statistics_of
from shared.evaluation.frechet import frechet_distance

SPACE = FeatureSpace("random_inception", "192", "ab")


def features(n, seed, shift=0.0):
    return np.random.default_rng(seed).standard_normal((n, 12)) + shift


def test_all_metrics_come_out_where_reference_features_are_known():
    one, other = features(80, 0), features(90, 1)
    found = scores(one, statistics_of(one, SPACE), statistics_of(other, SPACE), other, bootstrap=5)
    distance = frechet_distance(statistics_of(one, SPACE), statistics_of(other, SPACE))
    assert found.metrics["fd_random_inception_192"] == distance
    low, high = found.intervals["fd_random_inception_192"]
    assert low < distance < high
    assert set(found.metrics) == {"fd_random_inception_192", "kd_random_inception_192", "precision", "recall"}
    assert all(isinstance(value, float) for value in found.metrics.values())


def test_statistics_alone_give_the_distance_and_its_interval():
    one, other = features(80, 0), features(90, 1)
    found = scores(one, statistics_of(one, SPACE), statistics_of(other, SPACE), None)
    low, high = found.intervals["fd_random_inception_192"]
    assert len(found.left_out) == 20
    assert found.left_out[0] == pytest.approx(
        frechet_distance(statistics_of(one[4:], SPACE), statistics_of(other, SPACE))
    )
    assert set(found.metrics) == {"fd_random_inception_192"} and low < found.metrics["fd_random_inception_192"] < high


def test_kernel_distance_is_near_that_of_all_images_and_zero_for_equal_distributions():
    one, other = features(300, 0, 0.5), features(300, 1)

    def kernel(x, y):
        return (x @ y.T / 12 + 1) ** 3

    from torch_fidelity.metric_kid import mmd2  # loads for seconds

    whole = mmd2(kernel(one, one), kernel(one, other), kernel(other, other))
    mean, (low, high) = kernel_distance(one, other)
    assert low < whole < high and mean == pytest.approx(whole, rel=0.1)
    _, (low, high) = kernel_distance(features(300, 2), other)
    assert low < 0 < high


def test_kernel_distance_is_called_kid_for_inception_alone():
    assert kernel_name(FeatureSpace("inception-v3-compat", "2048", INCEPTION_2015_SHA256)) == "kid"
    assert kernel_name(SPACE) == "kd_random_inception_192"


def test_precision_and_recall_tell_quality_from_coverage():
    reference = features(400, 0)
    narrow = features(200, 1) * 0.2
    found = precision_recall(narrow, reference)
    assert found["precision"] > 0.9 and found["recall"] < 0.3
    assert precision_recall(features(200, 1, shift=50), reference) == {"precision": 0.0, "recall": 0.0}


def test_seed_of_torch_does_not_matter():
    one, other = features(80, 0), features(90, 1)
    torch.manual_seed(1)
    first = kernel_distance(one, other)
    torch.manual_seed(2)
    assert kernel_distance(one, other) == first
