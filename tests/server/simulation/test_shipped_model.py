"""The checkpoint that ships with the project: small, intact, of known origin, and what the demo's recipes expect."""

import math
from pathlib import Path

import numpy as np
import torch

import server
from shared.data.synthetic import generate
from shared.diffusion.losses import draw_noise, per_image_loss
from shared.diffusion.schedule import make_schedule
from shared.evaluation.generate import load_model
from shared.experiment.config import load_experiment
from shared.storage.checkpoint import load_group, load_meta

HERE = Path(server.__file__).parent
MODEL = HERE / "models" / "synthetic32-T-msm"
MEBIBYTE = 2**20


def test_it_holds_the_averaged_weights_alone_in_at_most_16_mebibytes() -> None:
    assert sorted(path.name for path in MODEL.iterdir()) == ["ema.safetensors", "meta.json"]
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 16 * MEBIBYTE
    weights = load_group(MODEL, "ema")
    assert all(tensor.dtype == np.float32 and np.isfinite(tensor).all() for tensor in weights.values())


def test_its_meta_tells_command_data_and_hardware_and_names_no_machine_path() -> None:
    meta = load_meta(MODEL)
    assert (
        meta.provenance["command"].count("maskfed-server train server/experiments/synthetic32-T-msm-block75.toml") == 1
    )
    assert meta.provenance["data"].startswith("synthetic:public")
    assert {"date", "hardware", "precision", "threads", "images_seen"} <= set(meta.provenance)
    assert meta.commit
    assert "/tmp" not in (MODEL / "meta.json").read_text()


def test_it_was_trained_by_the_recipe_of_its_name() -> None:
    recipe = load_experiment(HERE / "experiments" / "synthetic32-T-msm-block75.toml")
    trained = load_meta(MODEL).experiment
    for section in ("model", "mask", "diffusion", "data", "optim"):
        assert getattr(trained, section) == getattr(recipe, section)


def test_the_demo_recipes_fit_it() -> None:
    trained = load_meta(MODEL).experiment
    for name in ("demo-synthetic32-T-msm", "demo-synthetic32-T", "demo-faces32-T-msm", "demo-faces32-T"):
        recipe = load_experiment(HERE / "experiments" / f"{name}.toml")
        for section in ("model", "diffusion"):
            assert getattr(trained, section) == getattr(recipe, section), (name, section)


def test_it_denoises_faces_far_better_than_an_untrained_network() -> None:
    loaded = load_model(MODEL)
    experiment = loaded.experiment
    schedule = make_schedule(experiment.diffusion.schedule, experiment.diffusion.timesteps)
    images = torch.from_numpy(generate(64, 32, 7)[0])
    draw = draw_noise(experiment, 64, torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = float(per_image_loss(loaded.model, schedule, experiment, images, *draw).mean())
    # An output of zero costs about 0.6 here.
    assert math.isfinite(loss)
    assert loss < 0.15
