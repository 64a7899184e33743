"""The alignment of public images: each part against an independent computation, and the fit against known moves."""

import numpy as np
import pytest
from scipy import ndimage

from server.alignment.fit import fit, move, smooth
from shared.data.synthetic import generate

SIZE = 32


@pytest.fixture(scope="module")
def public() -> np.ndarray:
    return generate(40, SIZE, 0)[0]


@pytest.fixture(scope="module")
def mean(public: np.ndarray) -> np.ndarray:
    return (public / 127.5 - 1).mean(0)


def test_smoothing_is_scipys(mean: np.ndarray):
    expected = ndimage.gaussian_filter(mean, (0, 2.0, 2.0), mode="reflect", truncate=4.0)
    np.testing.assert_allclose(smooth(mean, 2 / SIZE), expected, atol=1e-6)


@pytest.mark.parametrize("move_by", [(0.75, 0.0, 0.0), (1.0, 3 / SIZE, -2 / SIZE), (1.2, -4 / SIZE, 1 / SIZE)])
def test_moving_is_scipys(mean: np.ndarray, move_by: tuple[float, float, float]):
    scale, down, right = move_by
    centre = (SIZE - 1) / 2
    offset = [centre - (centre + shift * SIZE) / scale for shift in (down, right)]
    expected = [ndimage.affine_transform(c, [1 / scale] * 2, offset, order=1, mode="reflect") for c in mean]
    np.testing.assert_allclose(move(mean, *move_by), np.stack(expected), atol=1e-9)


def test_moving_keeps_the_mean_of_images(public: np.ndarray, mean: np.ndarray):
    moved = move(public / 127.5 - 1, 0.8, 0.1, -0.05)
    np.testing.assert_allclose(moved.mean(0), move(mean, 0.8, 0.1, -0.05), atol=1e-12)


def test_a_known_move_is_found_under_noise_and_another_colour(mean: np.ndarray):
    deviation = 0.1
    colour = np.array([0.1, -0.2, 0.05])[:, None, None]
    noise = np.random.default_rng(1).normal(0, deviation, mean.shape)
    found = fit(mean, move(mean, 0.75, 5 / SIZE, -1 / SIZE) + colour + noise, deviation)
    assert found.scale == pytest.approx(0.75, abs=0.051)
    assert (found.down * SIZE, found.right * SIZE) == pytest.approx((5, -1), abs=1.01)
    assert np.abs(found.difference.mean(axis=(1, 2)) - colour[:, 0, 0]).max() < 0.05


def test_images_that_lie_alike_are_not_moved(mean: np.ndarray):
    noise = np.random.default_rng(2).normal(0, 0.1, mean.shape)
    found = fit(mean, mean + noise, 0.1)
    assert (found.scale, found.down, found.right) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("deviation", [0.02, 0.1, 0.4])
def test_smoothing_is_chosen_near_the_best(mean: np.ndarray, deviation: float):
    """The width is chosen without the truth; the one that the truth would choose is at most a little better."""
    truth = np.linspace(-0.3, 0.3, SIZE)[None, :, None] * np.ones((3, 1, SIZE)) + 0.1 * mean
    noisy = truth + np.random.default_rng(3).normal(0, deviation, mean.shape)
    found = fit(mean * 0, noisy, deviation)
    errors = [np.square(smooth(noisy, width) - truth).mean() for width in np.linspace(0, 0.4, 41)]
    assert np.square(found.difference - truth).mean() < 1.5 * min(errors) < deviation**2


def test_aligned_images_are_bytes_with_the_sites_mean(public: np.ndarray, mean: np.ndarray):
    target = move(mean, 0.9, 2 / SIZE, 0.0) * 0.5 + 0.05
    aligned = fit(mean, target, 1e-6)(public)
    assert aligned.dtype == np.uint8 and aligned.shape == public.shape
    # Brightness beyond white and black is cut off.
    assert np.abs((aligned / 127.5 - 1).mean(0) - target).mean() < 0.05


def test_large_images_are_fitted_on_small_means():
    large = np.kron(generate(4, 40, 1)[0].mean(0) / 127.5 - 1, np.ones((1, 3, 3)))
    found = fit(large, move(large, 1.0, 0.125, 0.0), 1e-3)
    assert found.down == pytest.approx(0.125, abs=0.03) and found.difference.shape == (3, 120, 120)
