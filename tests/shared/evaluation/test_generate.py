import numpy as np
import pytest
import torch
from PIL import Image

from shared.diffusion.dwt import dwt
from shared.diffusion.uvit import build_model
from shared.errors import InputError
from shared.evaluation.generate import grid_png, load_model, sample_images, sample_x_0, save_grid, to_uint8
from shared.experiment.config import parse_experiment
from shared.storage.checkpoint import save_checkpoint
from shared.storage.synthetic_mark import SyntheticMark, read_mark

TOML = """
[model]
image_size = 16
patch_size = 4
[evaluation]
steps = 4
sampler = "ddim"
eta = 1.0
"""


@pytest.fixture(scope="module")
def experiment():
    return parse_experiment(TOML)


def network(experiment):
    torch.manual_seed(0)
    return build_model(experiment).eval()


@pytest.fixture(scope="module")
def model(experiment):
    return network(experiment)


def checkpoint(path, experiment, groups=("model", "ema")):
    tensors = {name: tensor.numpy() for name, tensor in network(experiment).state_dict().items()}
    save_checkpoint(path, dict.fromkeys(groups, tensors), {"experiment": experiment, "step": 3})
    return path


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_sample_k_does_not_depend_on_batch_size(sampler, model):
    experiment = parse_experiment(TOML, [f"evaluation.sampler={sampler}"])
    seeds = [5, 9, 2, 11, 4, 8, 1]
    together = sample_x_0(model, experiment, seeds)
    for size in (1, 3):
        parts = [sample_x_0(model, experiment, seeds[i : i + size]) for i in range(0, 7, size)]
        torch.testing.assert_close(torch.cat(parts), together, rtol=0, atol=1e-5)


def test_sample_k_depends_on_seed_k(experiment, model):
    one, other = sample_images(model, experiment, [1, 2], 2), sample_images(model, experiment, [1, 3], 2)
    assert torch.equal(one[0], other[0])
    assert not torch.equal(one[1], other[1])


def test_images_are_uint8_of_the_experiments_size(experiment, model):
    seen = []
    images = sample_images(model, experiment, range(5), 2, on_batch=seen.append)
    assert images.shape == (5, 3, 16, 16) and images.dtype == torch.uint8
    assert seen == [2, 2, 1]
    assert sample_images(model, experiment, [], 2).shape == (0, 3, 16, 16)


def test_wavelet_samples_are_turned_back_into_pixels(monkeypatch):
    experiment = parse_experiment(TOML, ["data.wavelet=haar"])
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    monkeypatch.setattr("shared.evaluation.generate.sample", lambda *_: dwt(pictures, "haar"))
    torch.testing.assert_close(sample_x_0(network(experiment), experiment, [0, 1]), pictures)


def test_bfloat16_stays_near_float32(experiment, model):
    exact = sample_x_0(model, experiment, [0, 1])
    near = sample_x_0(model, experiment, [0, 1], precision="bfloat16")
    assert near.dtype == torch.float32
    assert 0 < (near - exact).abs().mean() < 0.05


def test_rounding_covers_the_whole_range():
    assert to_uint8(torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0])).tolist() == [0, 0, 128, 255, 255]


def test_a_diverged_network_is_reported(experiment):
    broken = network(experiment)
    broken.output.bias.data.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"):
        sample_images(broken, experiment, [0], 1)


def test_checkpoint_gives_the_same_images_as_the_network_it_was_written_from(tmp_path, experiment, model):
    loaded = load_model(checkpoint(tmp_path / "step-000000003", experiment))
    assert loaded.weights == "ema" and loaded.meta.step == 3 and loaded.nfe == 4
    assert torch.equal(sample_images(loaded.model, loaded.experiment, [7], 1), sample_images(model, experiment, [7], 1))


def test_checkpoint_without_ema_is_refused_unless_raw_weights_are_asked_for(tmp_path, experiment):
    folder = checkpoint(tmp_path / "step-000000003", experiment, groups=("model",))
    with pytest.raises(InputError, match=r"no EMA weights.*--raw"):
        load_model(folder)
    assert load_model(folder, weights="model").weights == "model"


def test_overrides_change_the_sampler_and_are_checked(tmp_path, experiment):
    folder = checkpoint(tmp_path / "step-000000003", experiment)
    assert load_model(folder, overrides=["evaluation.steps=2"]).nfe == 2
    with pytest.raises(InputError, match=r"evaluation\.steps"):
        load_model(folder, overrides=["evaluation.steps=9999"])


def test_weights_of_another_size_are_refused(tmp_path, experiment):
    folder = checkpoint(tmp_path / "step-000000003", experiment)
    with pytest.raises(InputError, match="do not fit"):
        load_model(folder, overrides=["model.image_size=32"])


def test_grid_places_images_row_by_row(tmp_path):
    images = np.stack([np.full((3, 4, 4), value, np.uint8) for value in (10, 20, 30)])
    save_grid(images, tmp_path / "deep" / "grid.png", 2, SyntheticMark("ab" * 32, "4 to 6"))
    assert read_mark(tmp_path / "deep" / "grid.png") == SyntheticMark("ab" * 32, "4 to 6")
    picture = np.asarray(Image.open(tmp_path / "deep" / "grid.png"))
    assert picture.shape == (10, 10, 3)
    assert (picture[0, 0, 0], picture[0, 6, 0], picture[6, 0, 0], picture[6, 6, 0]) == (10, 20, 30, 255)
    with pytest.raises(InputError, match="0 images"):
        grid_png(images[:0], 2, SyntheticMark())
