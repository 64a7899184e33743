import pytest
import torch
from torch import nn

from shared.diffusion.sampling import denoiser, draw_start, noise_of_each, sample
from shared.diffusion.schedule import make_schedule
from shared.experiment.config import Experiment


class TokenModel(nn.Module):
    """A small network of tokens, times and positions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(12, 12)

    def forward(self, tokens_BVP, t_B, ids_BV):
        return self.layer(tokens_BVP).tanh() + 0.001 * t_B[:, None, None] + 0.01 * ids_BV[..., None]


def experiment_with(**evaluation):
    return Experiment.model_validate(
        {"model": {"image_size": 8, "patch_size": 2}, "evaluation": {"steps": 6} | evaluation}
    )


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_image_k_depends_on_seed_k_only(sampler):
    experiment, schedule, model = (
        experiment_with(sampler=sampler, clip_x_0=False),
        make_schedule("cosine", 1000),
        TokenModel(),
    )

    def images(*seeds):
        streams = generators(*seeds)
        return sample(model, schedule, experiment, draw_start(experiment, streams), streams)

    together, alone, other = images(4, 5, 6), images(5), images(9, 5)
    torch.testing.assert_close(together[1], alone[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together[1], other[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[0], together[1])


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_clipping_keeps_x_0_in_range_and_no_clipping_does_not(sampler):
    schedule, model = make_schedule("linear", 1000), TokenModel()
    ranges = {}
    for clip in (True, False):
        experiment = experiment_with(sampler=sampler, clip_x_0=clip)
        streams = generators(1, 2)
        ranges[clip] = sample(model, schedule, experiment, draw_start(experiment, streams), streams).abs().max()
    assert ranges[True] <= 1
    assert ranges[False] > 1


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_each_band_of_two_sequences_is_clipped_to_its_own_range(sampler):
    experiment = Experiment.model_validate(
        {
            "model": {"image_size": 16, "patch_size": 2},
            "data": {"wavelet": "haar", "wavelet_tokens": "split"},
            "evaluation": {"steps": 6, "sampler": sampler},
        }
    )

    def wild(tokens_BVP, t_B, ids_BL):
        assert ids_BL.tolist() == [[*range(16), *range(16)]] * 2
        return -9 * tokens_BVP

    streams = generators(1, 2)
    x_0 = sample(wild, make_schedule("linear", 1000), experiment, draw_start(experiment, streams), streams)
    assert x_0.min() == -1
    assert x_0[:, :3].max() == 3
    assert x_0[:, 3:].max() == 1


@pytest.mark.parametrize("change", [{"rederive_eps": False}, {"ddim_grid": "truncated"}])
def test_variants_of_ddim_change_the_samples(change):
    schedule, model, found = make_schedule("linear", 1000), TokenModel(), []
    for options in ({}, change):
        experiment, streams = experiment_with(sampler="ddim", **options), generators(1)
        found.append(sample(model, schedule, experiment, draw_start(experiment, streams), streams))
    assert not torch.allclose(*found)


def test_eta_changes_the_samples_of_ddim():
    schedule, model = make_schedule("linear", 1000), TokenModel()
    results = []
    for eta in (0.0, 1.0):
        experiment = experiment_with(sampler="ddim", eta=eta)
        streams = generators(1)
        results.append(sample(model, schedule, experiment, draw_start(experiment, streams), streams))
    assert not torch.allclose(*results)


def test_the_network_sees_every_patch_and_its_output_returns_in_place():
    experiment = experiment_with()

    class Identity(nn.Module):
        def forward(self, tokens_BVP, t_B, ids_BV):
            assert ids_BV.tolist() == [list(range(16))] * 2
            assert t_B.tolist() == [17, 17]
            return tokens_BVP

    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(denoiser(Identity(), experiment)(x, 17), x)


def test_noise_rows_follow_their_generators_past_the_look_ahead():
    together, alone = noise_of_each(generators(1, 2), (3,)), noise_of_each(generators(2), (3,))
    for _ in range(20):
        assert torch.equal(next(together)[1], next(alone)[0])


def test_start_has_the_shape_of_the_network_input():
    experiment = Experiment.model_validate({"model": {"image_size": 16, "patch_size": 2}, "data": {"wavelet": "haar"}})
    assert draw_start(experiment, generators(1, 2)).shape == (2, 12, 8, 8)
