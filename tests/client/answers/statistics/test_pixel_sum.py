"""The noisy pixel sum: exact against numpy, bounded whatever one unit is, noise of the charged size."""

import math

import numpy as np
import pytest
import torch

from client.answers.statistics.pixel_sum import PixelSummation
from client.privacy.grid_noise import grid_exponent
from shared.data.image_set import ImageCache
from shared.data.synthetic import generate
from shared.errors import InputError
from shared.messages.statistics import COUNT_SHARE

SIZE, SIGMA, NORM = 8, 3.0, 0.5


def cache(pixels: np.ndarray) -> ImageCache:
    return ImageCache(lambda: pixels, len(pixels), SIZE)


@pytest.fixture(scope="module")
def images() -> ImageCache:
    pixels, _ = generate(12, SIZE, 3)
    extremes = np.stack([np.zeros_like(pixels[0]), np.full_like(pixels[0], 255), pixels[0] // 64 * 85])
    return cache(np.concatenate([pixels, extremes]))


UNITS = {
    "images": [np.array([number]) for number in range(15)],
    "persons": [np.arange(0, 5), np.arange(5, 6), np.arange(6, 15)],
    "nobody": [],
}


@pytest.mark.parametrize("units", UNITS.values(), ids=UNITS)
def test_without_noise_it_is_the_sum_of_shortened_means(images: ImageCache, units: list[np.ndarray]):
    found = PixelSummation(SIGMA, NORM, SIZE).exact(images, units) / 2.0 ** grid_exponent(SIGMA)
    expected = np.zeros(3 * SIZE * SIZE)
    for unit in units:
        x = (images.images[unit].astype(np.float64) / 127.5 - 1).mean(0).ravel()
        expected += x / max(1.0, math.sqrt(np.mean(x**2)) / NORM)
    scale = 0.999 * math.sqrt(1 - COUNT_SHARE**2) / (NORM * math.sqrt(x.size if units else 1))
    np.testing.assert_allclose(found[:-1], expected * scale, rtol=1e-6, atol=1e-8)
    assert found[-1] == pytest.approx(len(units) * COUNT_SHARE * 0.999, rel=1e-6)


@pytest.mark.parametrize("pixels", [0, 255, 127, "noise"])
@pytest.mark.parametrize("sigma", [0.5, 3.0, 1e4])
def test_no_unit_changes_the_sum_by_more_than_one(pixels: int | str, sigma: float):
    shape = (4, 3, SIZE, SIZE)
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2, shape) * 255 if pixels == "noise" else np.full(shape, pixels)
    one = PixelSummation(sigma, NORM, SIZE).exact(cache(values.astype(np.uint8)), [np.arange(4)])
    assert 0 < np.linalg.norm(one) <= 2.0 ** grid_exponent(sigma)
    assert (one == np.rint(one)).all()


def test_a_persons_hundred_copies_weigh_as_one(images: ImageCache):
    summation = PixelSummation(SIGMA, NORM, SIZE)
    many = summation.exact(images, [np.full(700, 3)])
    np.testing.assert_array_equal(many, summation.exact(images, [np.array([3])]))


def test_noise_has_the_deviation_that_is_charged_and_is_new_each_time(images: ImageCache):
    summation = PixelSummation(SIGMA, NORM, SIZE)
    exact = summation.exact(images, UNITS["images"])
    runs = [summation.run(images, UNITS["images"]) for _ in range(40)]
    steps = 2.0 ** grid_exponent(SIGMA)
    pixel_scale = 0.999 * math.sqrt(1 - COUNT_SHARE**2) / (NORM * math.sqrt(3 * SIZE * SIZE))
    noise = np.stack([run.pixels_D for run in runs]) * pixel_scale - exact[:-1] / steps
    # 7,680 numbers: the deviation is known to 1 percent.
    assert noise.std() == pytest.approx(SIGMA, rel=0.05) and abs(noise.mean()) < 0.15
    counts = [run.num_units for run in runs]
    assert np.std(counts) == pytest.approx(SIGMA / COUNT_SHARE, rel=0.5) and len(set(counts)) == 40
    assert abs(np.corrcoef(noise[0], noise[1])[0, 1]) < 0.3


def test_mean_of_one_person_cannot_be_told_from_nobodys(images: ImageCache):
    """The distance of both outcomes' means is 1 in units of sensitivity: sigma says how far they can be told apart."""
    summation = PixelSummation(SIGMA, NORM, SIZE)
    one, nobody = (summation.exact(images, units) for units in ([np.arange(5)], []))
    assert np.linalg.norm(one - nobody) / (SIGMA * 2.0 ** grid_exponent(SIGMA)) <= 1 / SIGMA


def test_noise_beyond_exact_arithmetic_is_refused():
    with pytest.raises(InputError, match="noise_multiplier"):
        PixelSummation(1e6, NORM, SIZE)


def test_images_are_read_as_bytes_so_nothing_is_infinite():
    odd = cache(np.full((1, 3, SIZE, SIZE), 255, np.uint8))
    assert odd.batch(np.array([0])).dtype == torch.uint8
    assert np.isfinite(PixelSummation(SIGMA, NORM, SIZE).run(odd, [np.array([0])]).pixels_D).all()
