"""The held-out loss: the formula by hand, the same for the same seed, whole images for every experiment."""

from pathlib import Path

import numpy as np
import pytest
import torch

from server.evaluation.measures.held_out_loss import InV, held_out_loss
from shared.data.image_cache import open_images
from shared.diffusion.schedule import make_schedule
from shared.diffusion.uvit import build_model
from shared.errors import InputError
from shared.experiment.config import Experiment
from shared.storage.checkpoint import save_checkpoint

DATA, SIZE = "synthetic:heldout:30", 16


def checkpoint(folder: Path, **sections: dict[str, object]) -> Path:
    """A network whose output is always zero: its loss is that of the target alone."""
    sections = {"model": {"image_size": SIZE, "patch_size": 8}, **sections}
    experiment = Experiment.model_validate(sections)
    network = build_model(experiment)
    zeros = {name: np.zeros(tuple(each.shape), np.float32) for name, each in network.named_parameters()}
    save_checkpoint(folder, {"ema": zeros}, {"experiment": experiment, "step": 0})
    return folder


def test_loss_of_nothing_is_the_size_of_the_target(tmp_path: Path):
    noise = held_out_loss(checkpoint(tmp_path / "eps", diffusion={"prediction": "eps"}), DATA)
    assert noise.mean == pytest.approx(1.0, abs=0.02) and noise.num_images == 30
    # v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0: its square from the images themselves.
    found = held_out_loss(checkpoint(tmp_path / "v", diffusion={"prediction": "v"}), DATA)
    power = float(
        (open_images(DATA, SIZE).images / 127.5 - 1).var() + (open_images(DATA, SIZE).images / 127.5 - 1).mean() ** 2
    )
    alpha_bar = make_schedule("cosine", 1000).alpha_bar.double()
    quarters = alpha_bar.reshape(4, 250).mean(1)
    expected = [float(each + (1 - each) * power) for each in quarters]
    assert found.parts == pytest.approx(expected, rel=0.15)
    assert found.mean == pytest.approx(np.mean(found.parts), rel=0.05) and 0 < found.error < found.mean


def test_same_noise_for_every_model_and_another_for_another_seed(tmp_path: Path):
    folder = checkpoint(tmp_path / "model")
    first = held_out_loss(folder, DATA, num_images=8)
    torch.manual_seed(5)
    assert held_out_loss(folder, DATA, num_images=8) == first
    assert held_out_loss(folder, DATA, num_images=8, seed=1) != first and first.num_images == 8


def test_a_masked_models_loss_is_on_whole_images(tmp_path: Path):
    masked = {"kind": "patch", "ratio": 0.5}
    found = held_out_loss(checkpoint(tmp_path / "masked", train={"objective": "msm"}, mask=masked), DATA, num_images=6)
    assert found == held_out_loss(checkpoint(tmp_path / "whole"), DATA, num_images=6)


def power() -> float:
    """Mean square of the pixels."""
    return float(((open_images(DATA, SIZE).images / 127.5 - 1) ** 2).mean())


def test_loss_of_v_is_told_of_any_network(tmp_path: Path):
    # An image that is 0 everywhere, whatever x_t: v is off by x_0 / sqrt(1 - alpha_bar).
    folder = checkpoint(tmp_path / "x_0", diffusion={"prediction": "x_0"})
    found = held_out_loss(folder, DATA, in_v=True)
    shares = (1 / (1 - make_schedule("cosine", 1000).alpha_bar.double())).reshape(4, 250).mean(1)
    assert found.parts[2:] == pytest.approx([float(each) * power() for each in shares[2:]], rel=0.2)
    assert held_out_loss(folder, DATA).mean == pytest.approx(power(), rel=0.05)


@pytest.mark.parametrize("kind", ["eps", "v", "x_0"])
def test_a_network_that_knows_the_answer_has_no_loss_of_v(kind):
    schedule, t_B = make_schedule("cosine", 1000), torch.tensor([0, 400, 999])
    x_0, eps = torch.rand(3, 4, 12) * 1.8 - 0.9, torch.randn(3, 4, 12)
    alpha_bar = schedule.alpha_bar[t_B].float()[:, None, None]
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    v = signal * eps - noise * x_0
    known = {"eps": eps, "v": v, "x_0": x_0}[kind]
    found = InV(lambda *_: known, schedule, kind)(signal * x_0 + noise * eps, t_B, torch.zeros(3, 4))
    torch.testing.assert_close(found[:2], v[:2], rtol=1e-3, atol=1e-3)
    # At the end of the schedule eps tells nothing of x_0 in float32; clipping keeps what follows within bounds.
    assert (found[2] - v[2]).abs().max() < 2.1


def test_wavelet_bands_have_no_loss_of_v(tmp_path: Path):
    folder = checkpoint(tmp_path / "bands", model={"image_size": SIZE, "patch_size": 4}, data={"wavelet": "haar"})
    with pytest.raises(InputError, match="wavelet bands"):
        held_out_loss(folder, DATA, in_v=True)
