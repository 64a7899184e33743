import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from shared.errors import InputError
from shared.evaluation.feature_statistics import (
    INCEPTION_2015_SHA256,
    FeatureSpace,
    Statistics,
    accumulate,
    load_statistics,
    parse_statistics,
    save_statistics,
    statistics_bytes,
    statistics_of,
)

SPACE = FeatureSpace("random_inception", "192", "ab" * 32)
OTHER = FeatureSpace("onnx:other", "", "cd" * 32)


def features(n, d=5, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)) + np.arange(d)


@settings(max_examples=25)
@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=8), seed=st.integers(0, 1000))
def test_statistics_of_parts_add_up_to_those_of_the_union(sizes, seed):
    parts = [features(n, seed=seed + k) for k, n in enumerate(sizes)]
    pooled = statistics_of(parts[0], SPACE)
    for part in parts[1:]:
        pooled = pooled + statistics_of(part, SPACE)
    union = np.concatenate(parts)
    assert pooled.n == len(union)
    if len(union) >= 2:
        mean_D, covariance_DD = pooled.moments()
        np.testing.assert_allclose(mean_D, union.mean(0), rtol=1e-12)
        np.testing.assert_allclose(covariance_DD, np.cov(union, rowvar=False), rtol=1e-9, atol=1e-10)


def test_a_stream_of_batches_gives_the_statistics_of_all_images():
    x = features(50).astype(np.float32)
    streamed = accumulate((x[i : i + 7] for i in range(0, 50, 7)), SPACE)
    whole = statistics_of(x, SPACE)
    assert streamed.n == 50
    np.testing.assert_allclose(streamed.outer_DD, whole.outer_DD, rtol=1e-12)


def test_a_file_gives_back_every_number_and_fact(tmp_path):
    written = Statistics(
        SPACE,
        12.5,
        np.arange(3.0),
        np.eye(3),
        site="north",
        release="dp",
        epsilon=4.0,
        delta=1e-5,
        images={"size": "64"},
    )
    save_statistics(written, tmp_path / "deep" / "s.safetensors")
    read = load_statistics(tmp_path / "deep" / "s.safetensors")
    assert (read.space, read.n, read.site, read.release) == (SPACE, 12.5, "north", "dp")
    assert (read.epsilon, read.delta, read.images) == (4.0, 1e-5, {"size": "64"})
    assert (read.total_D == written.total_D).all() and (read.outer_DD == written.outer_DD).all()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["s.safetensors"]


def test_different_extractors_are_refused_with_both_digests():
    with pytest.raises(InputError, match=r"abababab.*cdcdcdcd"):
        statistics_of(features(3), SPACE) + statistics_of(features(3), OTHER)


def test_one_image_has_no_covariance():
    with pytest.raises(InputError, match="at least 2"):
        statistics_of(features(1), SPACE).moments()


def test_nan_features_are_refused_and_counted():
    x = features(4)
    x[2, 1] = np.nan
    with pytest.raises(InputError, match="1 of 4 images"):
        statistics_of(x, SPACE)


def test_no_images_are_refused():
    with pytest.raises(InputError, match="0 images"):
        accumulate(iter([]), SPACE)


def test_a_file_of_another_schema_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "s.safetensors"
    monkeypatch.setattr("shared.evaluation.feature_statistics.SCHEMA_VERSION", 99)
    save_statistics(statistics_of(features(3), SPACE), path)
    monkeypatch.undo()
    with pytest.raises(InputError, match="schema 99"):
        load_statistics(path)


def test_a_file_that_is_something_else_is_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    path.write_bytes(b"not tensors")
    with pytest.raises(InputError, match="not a feature statistics file"):
        load_statistics(path)
    with pytest.raises(InputError, match="not a feature statistics file"):
        load_statistics(tmp_path / "absent")


def test_only_the_inception_2015_weights_are_called_fid():
    assert FeatureSpace("inception-v3-compat", "2048", INCEPTION_2015_SHA256).distance_name == "fid"
    assert (
        FeatureSpace("inception-v3-compat", "768", INCEPTION_2015_SHA256).distance_name == "fd_inception-v3-compat_768"
    )
    assert FeatureSpace("inception-v3-compat", "2048", "00" * 32).distance_name == "fd_inception-v3-compat_2048"
    assert SPACE.distance_name == "fd_random_inception_192"
    assert OTHER.distance_name == "fd_onnx:other"


def test_a_file_with_a_number_that_is_not_finite_is_named(tmp_path):
    data = statistics_bytes(statistics_of(np.ones((3, 2)), SPACE))
    size = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + size])["__metadata__"]
    broken = {"total": np.array([1.0, np.nan]), "outer": np.eye(2)}
    with pytest.raises(InputError, match=r"site\.safetensors: feature statistics: a value is not finite"):
        parse_statistics(save(broken, metadata), "site.safetensors")


def test_a_union_has_the_larger_epsilon_and_none_where_a_part_has_none():
    def part(release, epsilon=None):
        plain = statistics_of(features(9), SPACE)
        return replace(plain, release=release, epsilon=epsilon, delta=None if epsilon is None else epsilon / 1000)

    both = part("dp", 0.7) + part("dp", 3.0)
    assert (both.release, both.epsilon, both.delta) == ("dp", 3.0, 0.003)
    for mixed in (part("dp", 0.7) + part("exact"), part("exact") + part("dp", 0.7)):
        assert (mixed.release, mixed.epsilon, mixed.delta) == ("exact", None, None)
    assert (part("own") + part("own")).release == "own"
    assert (part("own") + part("dp", 0.7)).release == "dp"
