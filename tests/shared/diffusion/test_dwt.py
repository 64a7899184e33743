import numpy as np
import pytest
import pywt
import torch

from shared.diffusion.dwt import dwt, from_network, highest, idwt, to_network
from shared.diffusion.losses import draw_noise, visible_x_0
from shared.errors import InputError
from shared.evaluation.generate import sample_images
from shared.experiment.config import Experiment
from shared.experiment.sections import DataConfig
from shared.experiment.wavelet_filters import filters

WAVELETS = ["haar", "db2", "db4", "db8", "sym4", "coif1", "coif3"]


def by_pywt(x, wavelet):
    approximation, details = pywt.dwt2(x.numpy(), wavelet, mode="periodization")
    return torch.from_numpy(np.concatenate([approximation, *details], axis=1))


@pytest.mark.parametrize("wavelet", WAVELETS)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (8, 20), (2, 6)])
def test_bands_are_those_of_pywavelets_times_the_scale(wavelet, height, width):
    x = torch.rand(2, 3, height, width, dtype=torch.float64) * 2 - 1
    torch.testing.assert_close(dwt(x, wavelet), by_pywt(x, wavelet) * filters(wavelet).scale, rtol=0, atol=1e-12)
    torch.testing.assert_close(dwt(x.float(), wavelet).double(), dwt(x, wavelet), rtol=0, atol=1e-6)


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_inverse_is_that_of_pywavelets(wavelet):
    bands = torch.randn(2, 12, 16, 16)
    a, h, v, d = (bands.double() / filters(wavelet).scale).chunk(4, dim=1)
    reference = pywt.idwt2((a.numpy(), (h.numpy(), v.numpy(), d.numpy())), wavelet, mode="periodization")
    reference = torch.from_numpy(reference)
    torch.testing.assert_close(idwt(bands, wavelet).double(), reference, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(idwt(bands.double(), wavelet), reference, rtol=0, atol=1e-10)


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_round_trip_returns_the_image(wavelet):
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    torch.testing.assert_close(idwt(dwt(x, wavelet), wavelet), x, rtol=0, atol=2e-6)


def test_haar_round_trip_of_bytes_is_exact():
    x = torch.randint(0, 256, (2, 3, 32, 32)).float()
    assert torch.equal(idwt(dwt(x, "haar"), "haar"), x)


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_no_band_of_an_image_leaves_the_range_and_the_bound_is_reached(wavelet):
    low, high = (np.sign(taps) for taps in filters(wavelet))
    size, tap = 4 * len(low), len(low)
    for rows in (low, high):
        for columns in (low, high):
            x = torch.zeros(size, size, dtype=torch.float64)
            x[:tap, :tap] = torch.from_numpy(np.outer(rows, columns)[::-1, ::-1].copy())
            for shifted in (x, x.roll((1, 1), (0, 1)), x.roll(1, 0), x.roll(1, 1)):
                assert dwt(shifted[None, None], wavelet).abs().max() <= 1 + 1e-12
    peaks = [dwt(x.roll((i, j), (0, 1))[None, None], wavelet).abs().max() for i in (0, 1) for j in (0, 1)]
    assert max(peaks) > 1 - 1e-9


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_scaled_transform_keeps_distances_up_to_one_factor(wavelet):
    x, y = torch.randn(2, 1, 3, 16, 16, dtype=torch.float64)
    ratio = (dwt(x, wavelet) - dwt(y, wavelet)).norm() / (x - y).norm()
    assert abs(ratio / filters(wavelet).scale - 1) < 1e-9


def test_approximation_band_of_haar_is_the_mean_of_each_square():
    x = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(dwt(x, "haar")[:, :3], torch.nn.functional.avg_pool2d(x, 2))


@pytest.mark.parametrize("wavelet", ["bior2.2", "rbio3.1", "bior3.3", "dmey"])
def test_a_wavelet_that_is_not_orthogonal_is_refused(wavelet):
    with pytest.raises(InputError, match=f"'{wavelet}' is not orthogonal .* give haar"):
        dwt(torch.zeros(1, 3, 8, 8), wavelet)


@pytest.mark.parametrize("wavelet", ["mexh", "no-such"])
def test_an_unknown_wavelet_is_refused(wavelet):
    with pytest.raises(InputError, match=f"'{wavelet}' is no discrete wavelet"):
        idwt(torch.zeros(1, 12, 8, 8), wavelet)


def test_every_orthogonal_wavelet_of_pywavelets_but_dmey_is_accepted():
    for wavelet in pywt.wavelist(kind="discrete"):
        if pywt.Wavelet(wavelet).orthogonal and wavelet != "dmey":
            assert len(filters(wavelet).low) == pywt.Wavelet(wavelet).dec_len


def test_an_odd_side_is_refused():
    with pytest.raises(InputError, match="7 x 8 have an odd side"):
        dwt(torch.zeros(1, 3, 7, 8), "haar")


def test_empty_batch_passes():
    assert idwt(dwt(torch.zeros(0, 3, 8, 8), "db2"), "db2").shape == (0, 3, 8, 8)


@pytest.mark.parametrize("wavelet", ["haar", "db2"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_the_whole_path_from_bytes_through_bands_and_sampling_gives_the_bytes_back(sampler, wavelet):
    experiment = Experiment.model_validate(
        {
            "model": {"image_size": 16, "patch_size": 2},
            "diffusion": {"prediction": "x_0"},
            "data": {"wavelet": wavelet},
            "evaluation": {"sampler": sampler, "steps": 5},
        }
    )
    image = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokens = visible_x_0(experiment, image, draw_noise(experiment, 1, torch.Generator()).ids_BL)

    class Oracle(torch.nn.Module):
        def forward(self, x_t_BVP, t_B, ids_BV):
            return tokens.expand_as(x_t_BVP)

    assert torch.equal(sample_images(Oracle(), experiment, [1, 2], 2), image.expand(2, -1, -1, -1))


def test_split_bands_have_the_authors_ranges_and_come_back():
    image = torch.rand(2, 3, 8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # Theirs: the orthonormal transform of an image in [0, 1], then 2 cA - 1 for the approximation alone.
    approximation, details = pywt.dwt2(image.numpy(), "haar")
    expected = torch.from_numpy(np.concatenate([2 * approximation - 1, *details], 1))
    data = DataConfig(wavelet="haar", wavelet_tokens="split")
    bands = to_network(2 * image - 1, data)
    torch.testing.assert_close(bands, expected)
    torch.testing.assert_close(from_network(bands, data), 2 * image - 1)
    white, black = (to_network(torch.full((1, 3, 4, 4), value), data) for value in (1.0, -1.0))
    assert white[:, :3].eq(3).all() and black[:, :3].eq(-1).all()
    assert white[:, 3:].eq(0).all()
    assert highest(data).flatten().tolist() == [3.0] * 3 + [1.0] * 9


def test_pixels_and_joint_bands_enter_the_network_as_before():
    image = torch.rand(2, 3, 8, 6) * 2 - 1
    assert to_network(image, DataConfig()) is image
    torch.testing.assert_close(to_network(image, DataConfig(wavelet="haar")), dwt(image, "haar"))
    torch.testing.assert_close(from_network(dwt(image, "db2"), DataConfig(wavelet="db2")), image)
