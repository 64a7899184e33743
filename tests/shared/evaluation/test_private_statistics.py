import math
from dataclasses import replace

import numpy as np
import pytest

from shared.errors import InputError
from shared.evaluation.feature_statistics import FeatureSpace
from shared.evaluation.frechet import frechet_distance
from shared.evaluation.private_statistics import (
    check_projection,
    load_projection,
    make_projection,
    private_distance,
    private_statistics,
    repaired,
    save_projection,
    simulated,
)

SPACE = FeatureSpace("x", "", "ab")


def features(n, seed, shift=0.0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, 24)) * np.linspace(2, 0.1, 24) + shift


@pytest.fixture(scope="module")
def projection():
    return make_projection(features(500, 0), SPACE, 8)


def test_projection_keeps_the_largest_public_directions_and_clips_to_the_median(projection):
    public = features(500, 0)
    z = projection(public)
    norms = np.linalg.norm(z, axis=1)
    assert z.shape == (500, 8) and norms.max() <= projection.radius * (1 + 1e-12)
    assert np.isclose(norms, projection.radius).mean() == pytest.approx(0.5, abs=0.01)
    unclipped = (public - public.mean(0)) @ projection.basis_DP
    largest = np.sort(np.linalg.eigvalsh(np.cov(public, rowvar=False)))[::-1][:8]
    np.testing.assert_allclose(np.sort(np.var(unclipped, axis=0, ddof=1))[::-1], largest, rtol=1e-9)


def test_one_image_more_moves_the_released_vector_by_at_most_the_sensitivity(projection):
    radius, worst = projection.radius, 0.0
    base = projection.statistics(features(20, 1))
    for seed in range(50):
        more = projection.statistics(np.concatenate([features(20, 1), features(1, seed) * 10]))
        parts = [
            np.atleast_1d((more.n - base.n) * radius),
            more.total_D - base.total_D,
            ((more.outer_DD - base.outer_DD) / radius).ravel(),
        ]
        worst = max(worst, float(np.linalg.norm(np.concatenate(parts))))
    assert worst <= math.sqrt(3) * radius * (1 + 1e-9) and worst > 1.7 * radius


@pytest.mark.parametrize("hostile", [np.nan, np.inf, -np.inf, 1e308, 1e-310, 0.0])
def test_one_hostile_row_moves_the_released_vector_by_at_most_the_sensitivity(projection, hostile):
    radius, ours = projection.radius, features(20, 1)
    base = projection.statistics(ours)
    more = projection.statistics(np.concatenate([ours, np.full((1, 24), hostile)]))
    parts = [
        np.atleast_1d(more.n - base.n),
        (more.total_D - base.total_D) / radius,
        ((more.outer_DD - base.outer_DD) / radius**2).ravel(),
    ]
    assert np.isfinite(more.outer_DD).all()
    assert np.linalg.norm(np.concatenate(parts)) <= math.sqrt(3) * (1 + 1e-9)


@pytest.mark.parametrize("scale", [1e-170, 1e-12, 0.5, 1.001, 1e300, np.nan])
def test_a_basis_that_is_not_orthonormal_is_refused(projection, scale):
    hostile = replace(projection, basis_DP=projection.basis_DP * scale)
    with pytest.raises(InputError, match="not orthonormal"):
        check_projection(hostile)
    with pytest.raises(InputError, match="not orthonormal"):
        private_statistics(hostile, features(20, 1), 1.0, simulated(np.random.default_rng(0)))


@pytest.mark.parametrize("radius", [0.0, -1.0, 1e-300, 1e300, np.nan, np.inf])
def test_a_radius_that_is_not_sane_is_refused(projection, radius):
    with pytest.raises(InputError, match="radius"):
        check_projection(replace(projection, radius=radius))


def test_a_mean_that_swallows_every_feature_is_refused(projection):
    for mean in (1e30, np.nan):
        with pytest.raises(InputError, match="mean"):
            check_projection(replace(projection, mean_D=np.full(24, mean)))


def test_noise_has_the_size_that_is_charged(projection):
    plain, radius, sigma = projection.statistics(features(300, 1)), projection.radius, 2.0
    rng = np.random.default_rng(0)
    noisy = [private_statistics(projection, features(300, 1), sigma, simulated(rng)) for _ in range(400)]
    deviation = sigma * math.sqrt(3) * radius
    assert np.std([each.n for each in noisy]) * radius == pytest.approx(deviation, rel=0.1)
    assert np.std([each.total_D - plain.total_D for each in noisy]) == pytest.approx(deviation, rel=0.05)
    outer = np.array([(each.outer_DD - plain.outer_DD) / radius for each in noisy])
    assert outer[:, 0, 0].std() == pytest.approx(deviation, rel=0.1)
    assert outer[:, 0, 1].std() == pytest.approx(deviation / math.sqrt(2), rel=0.1)
    assert (outer == outer.transpose(0, 2, 1)).all()


def test_large_sites_lose_little_and_resolution_says_when_they_lose_much(projection):
    generated = projection.statistics(features(3000, 5, shift=0.6))
    exact = frechet_distance(generated, projection.statistics(features(6000, 6)))
    rng = np.random.default_rng(1)
    good = private_distance(generated, private_statistics(projection, features(6000, 6), 1.1, simulated(rng)))
    assert good.distance == pytest.approx(exact, rel=0.2) and good.is_resolved and good.resolution < exact / 5
    bad = private_distance(generated, private_statistics(projection, features(40, 6), 1.1, simulated(rng)))
    assert bad.resolution > 10 * good.resolution


def test_bias_is_what_one_more_noise_does(projection):
    reference, generated = features(400, 6), projection.statistics(features(400, 5, shift=0.1))
    exact = frechet_distance(generated, projection.statistics(reference))
    found = [
        private_distance(
            generated, private_statistics(projection, reference, 2.0, simulated(np.random.default_rng(seed)))
        )
        for seed in range(10)
    ]
    true_bias = np.mean([each.distance for each in found]) - exact
    assert np.mean([each.bias for each in found]) == pytest.approx(true_bias, rel=0.6)


def test_repaired_statistics_have_a_covariance(projection):
    noisy = private_statistics(projection, features(50, 1), 3.0, simulated(np.random.default_rng(3)))
    assert np.linalg.eigvalsh(noisy.moments()[1]).min() < 0
    mean_D, covariance_DD = repaired(noisy).moments()
    assert np.linalg.eigvalsh(covariance_DD).min() > -1e-9
    np.testing.assert_allclose(mean_D, noisy.moments()[0])


def test_sites_add_up(projection):
    rng = np.random.default_rng(0)
    parts = [private_statistics(projection, features(2000, seed), 1.0, simulated(rng)) for seed in range(3)]
    pooled = parts[0] + parts[1] + parts[2]
    assert pooled.release == "dp" and pooled.images["parts"] == "3"
    union = projection.statistics(np.concatenate([features(2000, seed) for seed in range(3)]))
    assert private_distance(union, pooled).distance < 0.05


def test_projection_file_gives_the_same_space_and_is_checked(projection, tmp_path):
    save_projection(projection, tmp_path / "p.safetensors")
    again = load_projection(tmp_path / "p.safetensors")
    assert again.projected_space == projection.projected_space
    assert projection.projected_space.distance_name == "fd_x_pca8"
    (tmp_path / "bad.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="not a projection file"):
        load_projection(tmp_path / "bad.safetensors")


def test_bad_numbers_are_refused(projection):
    with pytest.raises(InputError, match="9999 dimensions"):
        make_projection(features(50, 0), SPACE, 9999)
    with pytest.raises(InputError, match="noise multiplier 0"):
        private_statistics(projection, features(50, 0), 0.0, simulated(np.random.default_rng()))
    with pytest.raises(InputError, match="after noise"):
        repaired(private_statistics(projection, features(2, 0), 1e-9, simulated(np.random.default_rng(0))).__class__(
            projection.projected_space, 0.5, np.zeros(8), np.zeros((8, 8))
        ))  # fmt: skip
