"""The held-out loss: the formula by hand, the same for the same seed, whole images for every experiment."""

from pathlib import Path

import numpy as np
import pytest
import torch

from server.evaluation.measures.held_out_loss import held_out_loss
from shared.data.image_cache import open_images
from shared.diffusion.schedule import make_schedule
from shared.diffusion.uvit import build_model
from shared.experiment.config import Experiment
from shared.storage.checkpoint import save_checkpoint

DATA, SIZE = "synthetic:heldout:30", 16


def checkpoint(folder: Path, **sections: dict[str, object]) -> Path:
    """A network whose output is always zero: its loss is that of the target alone."""
    model = {"image_size": SIZE, "patch_size": 8}
    experiment = Experiment.model_validate({"model": model, **sections})
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
