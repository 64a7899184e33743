import pytest
import torch
from torch import nn

from shared.diffusion.dwt import dwt, to_network
from shared.diffusion.losses import draw_noise, per_image_loss, per_unit_loss
from shared.diffusion.patches import patchify
from shared.diffusion.schedule import make_schedule, q_sample, training_target
from shared.experiment.config import Experiment


def experiment_of(kind="none", ratio=0.0, prediction="eps", wavelet="", image_size=16, tokens="joint"):
    return Experiment.model_validate(
        {
            "train": {"objective": "dsm" if kind == "none" else "msm"},
            "model": {"image_size": image_size, "patch_size": 2},
            "mask": {"kind": kind, "ratio": ratio, "block_size": 2},
            "diffusion": {"prediction": prediction},
            "data": {"wavelet": wavelet, "wavelet_tokens": tokens},
        }
    )


class TokenModel(nn.Module):
    """A linear network of token, time and position; attends to nothing."""

    def __init__(self, patch_values=12, num_patches=256):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.positions = nn.Linear(patch_values, patch_values), nn.Embedding(num_patches, patch_values)

    def forward(self, tokens_BVP, t_B, ids_BV):
        per_token = t_B[:, None] if t_B.ndim == 1 else t_B.repeat_interleave(ids_BV.shape[1] // t_B.shape[1], 1)
        return self.layer(tokens_BVP) + self.positions(ids_BV) + 0.001 * per_token[..., None]


def images_of(batch, size=16, seed=0):
    return torch.randint(
        0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def unit_loss_of(experiment, images, draw, model=None):
    return per_unit_loss(model or TokenModel(), make_schedule("cosine", 1000), experiment, images, *draw)


def loss_of(experiment, images, draw, model=None):
    return per_image_loss(model or TokenModel(), make_schedule("cosine", 1000), experiment, images, *draw)


@pytest.mark.parametrize("prediction", ["eps", "v", "x_0"])
def test_dsm_is_equation_1_written_on_whole_images(prediction):
    experiment, schedule, model = experiment_of(prediction=prediction), make_schedule("cosine", 1000), TokenModel()
    images = images_of(5)
    draw = draw_noise(experiment, 5, torch.Generator().manual_seed(1))
    x_0 = images.float() / 127.5 - 1
    for k in range(5):
        tokens, t, eps = patchify(x_0[k : k + 1], 2), draw.t_B[k : k + 1], draw.eps_BVP[k : k + 1]
        output = model(q_sample(schedule, tokens, t, eps), t, torch.arange(64)[None])
        expected = (training_target(schedule, prediction, tokens, t, eps) - output).square().mean()
        torch.testing.assert_close(loss_of(experiment, images, draw, model)[k], expected)


@pytest.mark.parametrize("kind", ["patch", "block", "crop"])
def test_msm_noises_whole_images_and_then_selects(kind):
    experiment, schedule, model = experiment_of(kind, 0.5), make_schedule("cosine", 1000), TokenModel()
    images, draw = images_of(4), draw_noise(experiment_of(kind, 0.5), 4, torch.Generator().manual_seed(2))
    x_0, eps = patchify(images.float() / 127.5 - 1, 2), torch.randn(4, 64, 12)
    index = draw.ids_BL[..., None].expand(-1, -1, 12)
    eps = eps.scatter(1, index, draw.eps_BVP)
    x_t = q_sample(schedule, x_0, draw.t_B, eps)
    output = model(x_t.gather(1, index), draw.t_B, draw.ids_BL)
    expected = (eps.gather(1, index) - output).square().mean((1, 2))
    torch.testing.assert_close(loss_of(experiment, images, draw, model), expected)


def test_hidden_patches_touch_neither_loss_nor_gradient():
    experiment, model = experiment_of("patch", 0.9), TokenModel()
    images, draw = images_of(1), draw_noise(experiment, 1, torch.Generator().manual_seed(0))
    before = loss_of(experiment, images, draw, model)
    before.sum().backward()
    used = model.positions.weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert used == sorted(draw.ids_BL[0].tolist())
    hidden = next(n for n in range(64) if n not in draw.ids_BL[0].tolist())
    images[:, :, hidden // 8 * 2, hidden % 8 * 2] ^= 255
    assert torch.equal(loss_of(experiment, images, draw, model), before)
    shown = int(draw.ids_BL[0, 0])
    images[:, :, shown // 8 * 2, shown % 8 * 2] ^= 255
    assert not torch.equal(loss_of(experiment, images, draw, model), before)


@pytest.mark.parametrize("wavelet", ["", "haar"])
def test_loss_of_a_unit_is_the_mean_over_its_draws_each_with_an_image_of_its_own(wavelet):
    experiment = experiment_of("patch", 0.5, wavelet=wavelet)
    model = TokenModel(48) if wavelet else TokenModel()
    images = images_of(6).view(2, 3, 3, 16, 16)
    draw = draw_noise(experiment, 6, torch.Generator().manual_seed(5))
    singles = loss_of(experiment, images.flatten(0, 1), draw, model)
    torch.testing.assert_close(unit_loss_of(experiment, images, draw, model), singles.view(2, 3).mean(1))


def test_network_sees_the_draws_of_a_unit_as_one_row():
    experiment, seen = experiment_of("block", 0.75), []

    def model(tokens, t, ids):
        seen.extend([tokens.shape, t.shape, ids.shape])
        return tokens

    draw = draw_noise(experiment, 6, torch.Generator().manual_seed(5))
    unit_loss_of(experiment, images_of(6).view(2, 3, 3, 16, 16), draw, model)
    visible = experiment.num_visible
    assert seen == [(2, 3 * visible, 12), (2, 3), (2, 3 * visible)]


def test_wavelet_bands_enter_the_network_instead_of_pixels():
    experiment, model = experiment_of(wavelet="haar"), TokenModel(48)
    images = images_of(2)
    draw = draw_noise(experiment, 2, torch.Generator().manual_seed(0))
    bands = patchify(dwt(images.float() / 127.5 - 1, "haar"), 2)
    output = model(q_sample(make_schedule("cosine", 1000), bands, draw.t_B, draw.eps_BVP), draw.t_B, draw.ids_BL)
    expected = (output - draw.eps_BVP).square().mean((1, 2))
    torch.testing.assert_close(loss_of(experiment, images, draw, model), expected)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize(("kind", "ratio"), [("block", 0.7), ("patch", 0.7), ("none", 0.0)])
def test_two_sequences_have_places_of_their_own_and_a_sum_of_two_means(kind, ratio, prediction):
    experiment = experiment_of(kind, ratio, prediction, wavelet="haar", tokens="split")
    schedule, images, visible = make_schedule("cosine", 1000), images_of(3), experiment.num_visible
    draw = draw_noise(experiment, 3, torch.Generator().manual_seed(1))
    assert draw.eps_BVP.shape == (3, visible, 48)
    assert draw.ids_BL.shape == (3, 2 * visible)
    bands = to_network(images.float() / 127.5 - 1, experiment.data)
    # Whole grids of tokens first, places second: the other way round than in the code.
    sequences = patchify(bands[:, :3], 2), patchify(bands[:, 3:], 2)
    noises, places = draw.eps_BVP.split([12, 36], -1), draw.ids_BL.chunk(2, 1)
    expected = torch.zeros(3)
    for k in range(3):
        for x_0, eps, ids in zip(sequences, noises, places, strict=True):
            shown, t = x_0[k, ids[k]][None], draw.t_B[k : k + 1]
            target = training_target(schedule, prediction, shown, t, eps[k : k + 1])
            x_t = q_sample(schedule, shown, t, eps[k : k + 1])
            expected[k] += (0.5 * x_t - target).square().mean()
    found = loss_of(experiment, images, draw, lambda x_t, _t, _ids: 0.5 * x_t)
    torch.testing.assert_close(found, expected)


def test_masks_of_two_sequences_are_independent():
    experiment = experiment_of("block", 0.7, wavelet="haar", tokens="split")
    ids = draw_noise(experiment, 4000, torch.Generator().manual_seed(0)).ids_BL
    first, second = (torch.zeros(4000, 16).scatter_(1, part, 1.0) for part in ids.chunk(2, 1))
    share = experiment.num_visible / 16
    both = first.T @ second / 4000
    # Six standard deviations of a share of 4000 draws.
    assert (both - share**2).abs().max() < 6 * (share**2 * (1 - share**2) / 4000) ** 0.5


def test_draws_of_a_unit_of_two_sequences_stay_apart():
    from shared.diffusion.uvit import build_model

    experiment = experiment_of("block", 0.7, wavelet="haar", tokens="split")
    torch.manual_seed(0)
    model, images = build_model(experiment), images_of(6).view(2, 3, 3, 16, 16)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    draw = draw_noise(experiment, 6, torch.Generator().manual_seed(5))
    singles = loss_of(experiment, images.flatten(0, 1), draw, model)
    torch.testing.assert_close(unit_loss_of(experiment, images, draw, model), singles.view(2, 3).mean(1))
    empty = draw_noise(experiment, 0, torch.Generator())
    assert unit_loss_of(experiment, images_of(0).view(0, 3, 3, 16, 16), empty, model).shape == (0,)


def test_bytes_and_floats_in_range_give_the_same_loss():
    experiment, images = experiment_of("patch", 0.5), images_of(3)
    draw = draw_noise(experiment, 3, torch.Generator().manual_seed(0))
    from_floats = loss_of(experiment, images.float() * (2 / 255) - 1, draw)
    torch.testing.assert_close(loss_of(experiment, images, draw), from_floats)


@pytest.mark.parametrize("draws", [1, 3])
def test_an_empty_batch_has_an_empty_loss(draws):
    experiment = experiment_of("block", 0.5)
    draw = draw_noise(experiment, 0, torch.Generator())
    assert loss_of(experiment, images_of(0), draw).shape == (0,)
    assert unit_loss_of(experiment, images_of(0).view(0, draws, 3, 16, 16), draw).shape == (0,)


def test_loss_is_float32_when_the_network_answers_in_bfloat16():
    experiment = experiment_of()
    draw = draw_noise(experiment, 2, torch.Generator().manual_seed(0))

    class Low(TokenModel):
        def forward(self, tokens_BVP, t_B, ids_BV):
            return super().forward(tokens_BVP, t_B, ids_BV).bfloat16()

    low, full = loss_of(experiment, images_of(2), draw, Low()), loss_of(experiment, images_of(2), draw)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, full, rtol=0.02, atol=0.02)


def test_times_are_uniform_over_all_steps():
    t = draw_noise(experiment_of("crop", 0.9), 100_000, torch.Generator().manual_seed(0)).t_B
    assert t.min() == 0
    assert t.max() == 999
    assert (t.bincount(minlength=1000) - 100).abs().max() < 60


def test_a_draw_repeats_with_its_seed():
    first, second = (draw_noise(experiment_of("block", 0.5), 3, torch.Generator().manual_seed(8)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("draws", [1, 2])
def test_loss_runs_on_the_real_network(draws):
    from shared.diffusion.uvit import build_model

    experiment = experiment_of("block", 0.75)
    model = build_model(experiment)
    draw = draw_noise(experiment, 2 * draws, torch.Generator().manual_seed(0))
    loss = unit_loss_of(experiment, images_of(2 * draws).view(2, draws, 3, 16, 16), draw, model)
    loss.sum().backward()
    assert loss.shape == (2,)
    assert all(parameter.grad is not None for parameter in model.parameters())
