"""Weights that answer to one chosen picture, sites that hold it or not, and requests that carry such weights.

The network of one token per image is blank but for a filter of the picture: its value is above zero for that picture
alone. The attacker knows the picture and other pictures of the same kind, never those of the site.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from client.data.dataset import scan
from client.limits import Ranges
from client.policy.approval import approve
from client.settings import Home, SiteConfig, SitePolicy, save_settings
from shared.data.synthetic import write_folder
from shared.diffusion.losses import to_model_range, visible_x_0
from shared.diffusion.uvit import build_model
from shared.experiment.config import Experiment
from shared.messages.packing import Manifest, array_digest, pack
from shared.messages.training import RequestHeader, TrainRequest, experiment_digest

SIZE, PRIVATE, PUBLIC = 32, 12, 400
"""Side of the pictures, pictures of a site, and pictures that the attacker knows."""
WIDTH = 192
CONSTANT = 1e3
"""What two channels hold so that the layer norms scale all tokens alike."""
Weights = dict[str, torch.Tensor]
Craft = Callable[[Weights, float], None]


@dataclass(frozen=True)
class Arena:
    """Two sites that differ by one picture, and what the attacker knows of it."""

    homes: tuple[Home, Home]
    """Without and with the picture."""
    target: torch.Tensor
    """uint8 (3, H, W)."""
    public: torch.Tensor
    """uint8 (N, 3, H, W)."""


def make_arena(folder: Path, experiment: Experiment, seed: int) -> Arena:
    """Scan two sites that allow only what `experiment` is."""
    write_folder(folder / "all", num_images=PRIVATE + 1 + PUBLIC, size=SIZE, seed=seed)
    paths = sorted((folder / "all").rglob("*.png"))
    random = np.random.default_rng(seed)
    paths = [paths[place] for place in random.permutation(len(paths))]
    pictures = torch.from_numpy(np.stack([np.asarray(Image.open(path)).transpose(2, 0, 1) for path in paths]))
    homes = tuple(
        _make_site(folder / name, paths[: PRIVATE + has_target], experiment)
        for name, has_target in (("without", 0), ("with", 1))
    )
    return Arena((homes[0], homes[1]), pictures[PRIVATE], pictures[PRIVATE + 1 :])


def _make_site(folder: Path, paths: list[Path], experiment: Experiment) -> Home:
    (folder / "data").mkdir(parents=True)
    for number, path in enumerate(paths):
        (folder / "data" / f"{number:03}.png").write_bytes(path.read_bytes())
    home = Home(folder / "home")
    policy = SitePolicy(
        tasks=("train",),
        epsilon_cap=1000.0,
        min_noise_multiplier=0.5,
        max_steps_per_round=1000,
        max_rounds_per_day=10**6,
        # Two time steps, which the default ranges refuse: the mechanism has to hold without them.
        ranges=Ranges(timesteps=(2, 1000)),
    )
    settings = SiteConfig(
        alias="site0",
        address="127.0.0.1:1",
        data=str(folder / "data"),
        image_size=SIZE,
        held_out_ratio=0.0,
        head_file=str(folder / "head" / "ledger.json"),
        device="cpu",
        policy=policy,
    )
    save_settings(home, settings)
    scan(home, settings)
    approve(home, "experiment", experiment_digest(experiment))
    return home


def make_experiment(**sections: dict[str, Any]) -> Experiment:
    """One token per image, two noise levels, one step, only the last bias trained; changed by `sections`."""
    base: dict[str, dict[str, Any]] = {
        "model": {"image_size": SIZE, "patch_size": SIZE},
        "data": {"horizontal_flip": False},
        "diffusion": {"timesteps": 2, "schedule": "linear"},
        "federation": {"local_steps": 1, "rounds": 10**6, "trainable": ("output.bias",)},
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
    trained = {"output.bias": arrays.pop("output.bias")}
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
