"""Golden curves: the losses of 20 steps with fixed seeds. They move when mathematics, streams or defaults move.

The tolerance covers other processors' matrix products, no change of the computation. A wanted change is recorded by
printing `curve(...)` anew, in the commit that explains it.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.data.image_set import ImageCache
from shared.experiment.config import parse_experiment
from shared.seeding import Streams
from shared.training.engine import Engine, run_training
from shared.training.weights import new_model

pytestmark = pytest.mark.full_size

GOLDEN = json.loads((Path(__file__).parent / "curves.json").read_text(encoding="utf-8"))
STEPS = 20
# Smooth pictures from integer arithmetic: the same bytes everywhere, whatever other modules do.
ROWS, COLUMNS = np.mgrid[0:16, 0:16]
PIXELS = np.stack(
    [[(ROWS * (3 + n) + COLUMNS * (5 + 7 * c) + 11 * n * c) % 256 for c in range(3)] for n in range(24)]
).astype(np.uint8)
IMAGES = ImageCache(lambda: PIXELS, len(PIXELS), 16)
TOML = """
[train]
batch = 8
precision = "float32"
[model]
image_size = 16
patch_size = 4
[optim]
lr = 1e-3
"""
STAGES = {
    "dsm": [],
    "msm-block": ["train.objective=msm", "mask.kind=block", "mask.ratio=0.75", "mask.block_size=2"],
    "msm-patch-v-linear": [
        "train.objective=msm",
        "mask.kind=patch",
        "mask.ratio=0.5",
        "diffusion.prediction=v",
        "diffusion.schedule=linear",
    ],
    "dsm-haar-x_0": ["data.wavelet=haar", "diffusion.prediction=x_0"],
}


def curve(stage: str) -> list[float]:
    """Losses of the first steps."""
    experiment, streams = parse_experiment(TOML, STAGES[stage]), Streams(0)
    losses: list[float] = []
    engine = Engine(experiment, new_model(experiment, streams), streams)
    run_training(engine, IMAGES, steps=STEPS, on_step=lambda step, result: losses.append(result.loss))
    return losses


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_those_on_record(stage):
    assert curve(stage) == pytest.approx(GOLDEN[stage], rel=2e-4)


def test_every_stage_learns():
    for losses in GOLDEN.values():
        assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
