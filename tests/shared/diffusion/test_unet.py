"""The U-Net on crops: token interface, place of the crop, refusals."""

import sys
from importlib.util import find_spec

import pytest
import torch

from shared.diffusion.losses import draw_noise, per_image_loss
from shared.diffusion.patches import patchify, unpatchify
from shared.diffusion.sampling import sample
from shared.diffusion.schedule import make_schedule
from shared.diffusion.unet import WIDTHS, CoordinateUNet, pixel_coordinates
from shared.diffusion.uvit import build_model
from shared.errors import InputError
from shared.experiment.config import parse_experiment

pytestmark = pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers is not installed")


def tiny() -> CoordinateUNet:
    torch.manual_seed(0)
    return CoordinateUNet(in_channels=3, grid_size=4, patch_size=4, widths=(32, 32, 32))


def crop(batch: int = 2, corner: int = 5):
    torch.manual_seed(1)
    ids = torch.tensor([corner, corner + 1, corner + 4, corner + 5]).expand(batch, -1)
    return torch.randn(batch, 4, 48), torch.randint(1000, (batch,)), ids


def test_only_the_crop_enters_the_network(monkeypatch):
    model = tiny()
    seen = []
    model.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tokens, t, ids = crop()
    assert model(tokens, t, ids).shape == tokens.shape
    assert seen[0].shape == (2, 3 + 2, 8, 8)
    assert torch.equal(seen[0][:, :3], unpatchify(tokens, 4, 3))


def test_output_is_the_network_output_in_patches():
    model = tiny()
    tokens, t, ids = crop()
    image = torch.cat([unpatchify(tokens, 4, 3), unpatchify(pixel_coordinates(ids, 4, 4), 4, 2)], 1)
    assert torch.equal(model(tokens, t, ids), patchify(model.network(image, t).sample, 4))


def test_coordinates_of_a_crop_are_those_of_the_whole_image():
    whole = unpatchify(pixel_coordinates(torch.arange(16)[None], 4, 4), 4, 2)
    part = unpatchify(pixel_coordinates(torch.tensor([[5, 6, 9, 10]]), 4, 4), 4, 2)
    assert torch.equal(part, whole[:, :, 4:12, 4:12])
    line = (torch.arange(16) + 0.5) / 8 - 1
    assert torch.equal(whole[0, 0], line[:, None].expand(16, 16))
    assert torch.equal(whole[0, 1], line.expand(16, 16))


def test_place_of_the_crop_changes_the_prediction():
    model = tiny()
    tokens, t, ids = crop()
    assert not torch.allclose(model(tokens, t, ids), model(tokens, t, ids - 5))


def test_whole_image_goes_through_the_same_network():
    assert tiny()(torch.randn(1, 16, 48), torch.zeros(1), torch.arange(16)[None]).shape == (1, 16, 48)


def test_empty_batch_runs_every_layer_with_zero_gradient():
    model = tiny()
    out = model(*crop(batch=0))
    assert out.shape == (0, 4, 48)
    out.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_crop_training_reduces_the_loss():
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    tokens, t, ids = crop()
    losses = []
    for _ in range(4):
        loss = (model(tokens, t, ids) - tokens).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_experiment_builds_it():
    text = '[model]\nbackbone = "unet"\n[mask]\nkind = "crop"\nratio = 0.75\n[train]\nobjective = "msm"\n'
    model = build_model(parse_experiment(text))
    assert isinstance(model, CoordinateUNet)
    assert tuple(model.network.config.block_out_channels) == WIDTHS["T"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[mask]\nkind = "block"\nratio = 0.75\n[train]\nobjective = "msm"', "mask.kind 'block' does not go with"),
        ('[privacy]\nmechanism = "dp-sgd"\ndraws = 4', "privacy.draws 4 does not go with"),
    ],
)
def test_settings_a_convolution_cannot_take_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_experiment(text + '\n[model]\nbackbone = "unet"\n')


def test_draws_and_scattered_patches_are_refused():
    model = tiny()
    tokens, _, ids = crop()
    with pytest.raises(InputError, match="2 draws per image"):
        model(tokens, torch.zeros(2, 2), ids)
    with pytest.raises(InputError, match="3 visible patches are no square"):
        model(tokens[:, :3], torch.zeros(2), ids[:, :3])


def test_indivisible_patch_size_is_refused():
    with pytest.raises(InputError, match=r"model\.patch_size 2 with backbone unet: give a multiple of 4"):
        CoordinateUNet(in_channels=3, grid_size=4, patch_size=2, widths=(32, 32, 32))


def test_missing_diffusers_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(InputError, match=r"pip install 'maskfed\[unet\]'"):
        tiny()


def test_masked_loss_and_sampler_need_no_special_case():
    text = (
        '[model]\nbackbone = "unet"\nimage_size = 16\n[mask]\nkind = "crop"\nratio = 0.7\n[train]\nobjective = "msm"\n'
        '[evaluation]\nsampler = "ddim"\nsteps = 2\n'
    )
    experiment, random = parse_experiment(text), torch.Generator().manual_seed(0)
    assert experiment.num_visible == 4
    model = tiny()
    schedule = make_schedule("cosine", 1000)
    images = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8, generator=random)
    loss = per_image_loss(model, schedule, experiment, images, *draw_noise(experiment, 3, random))
    loss.mean().backward()
    assert loss.shape == (3,)
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        samples = sample(model, schedule, experiment, torch.randn(2, 3, 16, 16), [random, random])
    assert samples.shape == (2, 3, 16, 16)
    assert samples.abs().max() <= 1
