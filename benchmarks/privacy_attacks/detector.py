"""Weights that answer to one chosen picture, sites that hold it or not, and requests that carry such weights.

The network of one token per image is blank but for a filter of the picture: its value is above zero for that picture
alone. The attacker knows the picture and other pictures of the same kind, never those of the site.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.privacy_attacks.question_site import make_site
from client.home import Home
from client.limits import Ranges
from client.policy.approval import approve
from client.settings import SitePolicy
from shared.data.synthetic import generate
from shared.diffusion.losses import to_model_range, visible_x_0
from shared.diffusion.uvit import build_model
from shared.experiment.config import Experiment
from shared.messages.packing import Manifest, array_digest, pack
from shared.messages.training import RequestHeader, TrainRequest, experiment_digest

SIZE, PRIVATE, PUBLIC = 16, 12, 200
"""Side of the pictures, pictures of a site, and pictures that the attacker knows."""
WIDTH = 192
CONSTANT = 1e3
"""What two channels hold so that the layer norms scale all tokens alike."""
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Arena:
    """Two sites that differ by one picture, and what the attacker knows of it."""

    homes: tuple[Home, Home]
    """Without and with the picture."""
    target: torch.Tensor
    """uint8 (3, H, W)."""
    public: torch.Tensor
    """uint8 (N, 3, H, W)."""


POLICY = SitePolicy(
    tasks=("train",),
    epsilon_cap=1000.0,
    min_noise_multiplier=0.5,
    max_rounds_per_day=1,
    max_steps_per_round=1,
    # Two time steps, which the default ranges refuse: the mechanism has to hold without them.
    ranges=Ranges(timesteps=(2, 1000)),
)


def make_arena(folder: Path, experiment: Experiment, seed: int) -> Arena:
    """Scan two sites that allow only what `experiment` is."""
    pictures, _ = generate(PRIVATE + 1 + PUBLIC, SIZE, seed, images_per_person=1)
    homes = []
    for name, count in (("without", PRIVATE), ("with", PRIVATE + 1)):
        homes.append(make_site(folder / name, pictures[:count], POLICY))
        approve(homes[-1], "experiment", experiment_digest(experiment))
    public = torch.from_numpy(pictures[PRIVATE + 1 :])
    return Arena((homes[0], homes[1]), torch.from_numpy(pictures[PRIVATE]), public)


@contextmanager
def without_noise() -> Iterator[None]:
    """The best case for the attacker: two time steps that leave pictures as they are, a schedule that is refused."""
    with mock.patch("shared.experiment.sections._linear_alpha_bar_end", lambda _: 0.0):
        yield


def make_experiment(**sections: dict[str, Any]) -> Experiment:
    """One token per image, two noise levels, one step, only the last bias trained; changed by `sections`."""
    base: dict[str, dict[str, Any]] = {
        "model": {"image_size": SIZE, "patch_size": SIZE},
        "data": {"horizontal_flip": False},
        "diffusion": {"timesteps": 2, "schedule": "linear"},
        "federation": {"local_steps": 1, "rounds": 1, "trainable": ("output.bias",)},
        "evaluation": {"steps": 2},
        "optim": {"warmup_steps": 0, "weight_decay": 0.0, "lr": 1e-3},
    }
    return Experiment.model_validate(
        {name: {**base.get(name, {}), **sections.get(name, {})} for name in base | sections}
    )


def detector(arena: Arena, experiment: Experiment) -> tuple[Weights, float]:
    """Blank weights with a filter in channel 0, and what the filter gives for the target, above zero for it alone.

    The filter is the target's difference from the public mean, without the directions in which pictures differ much.
    """
    ids = torch.zeros(len(arena.public) + 1, 1, dtype=torch.int64)
    pictures = torch.cat([arena.target[None], arena.public])
    x = visible_x_0(experiment, to_model_range(pictures), ids)[:, 0].double()
    mean = x[1:].mean(0)
    _, spread, directions = torch.linalg.svd(x[1:] - mean, full_matrices=False)
    d = x[0] - mean
    w = d - directions.T @ ((1 - 3 / (3 + spread**2)) * (directions @ d))
    w /= w.norm()
    threshold = w @ mean + 0.6 * (w @ x[0] - w @ mean)
    weights = blank(experiment)
    weights["embedding.weight"][0], weights["embedding.bias"][0] = w.float(), -threshold.float()
    weights["embedding.bias"][1], weights["embedding.bias"][2] = CONSTANT, -CONSTANT
    weights["positions.weight"][0, 0] = -1e6  # the time token never fires
    return weights, float(w @ x[0] - threshold)


def blank(experiment: Experiment) -> Weights:
    """All zero, but norms and skip connections pass their input on."""
    weights = {name: torch.zeros_like(tensor) for name, tensor in build_model(experiment).state_dict().items()}
    for name, tensor in weights.items():
        if "norm" in name and name.endswith("weight"):
            tensor.fill_(1.0)
        if name.endswith("skip.weight"):
            tensor[:, :WIDTH] = torch.eye(WIDTH)
    return weights


def make_request(experiment: Experiment, weights: Weights, run: str) -> TrainRequest:
    """A round of a run; what is not trained travels as the frozen base."""
    arrays: dict[str, NDArray[np.float32]] = {name: tensor.numpy() for name, tensor in weights.items()}
    trained = {name: arrays.pop(name) for name in experiment.federation.trainable}
    manifest, base_manifest = Manifest.of(trained), Manifest.of(arrays)
    base = pack(arrays, base_manifest)
    header = RequestHeader(
        run=run,
        server_round=1,
        experiment=experiment,
        precision="float32",
        manifest=manifest,
        base_manifest=base_manifest,
        base_digest=array_digest(base),
    )
    return TrainRequest(header, pack(trained, manifest), base)
