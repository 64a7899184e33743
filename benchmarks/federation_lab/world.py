"""Images, starts and random numbers of one seed, the same for every arm.

Splits by person: 45 % pre-train, 35 % are the sites', 20 % measure. Of images only starts are kept, in `--work`.
"""
# ruff: noqa: N806 - shape suffixes

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.federation_lab.arms import WARMUP, Arm
from shared.data.image_cache import open_images
from shared.data.image_set import DataOrder, ImageCache
from shared.diffusion import uvit
from shared.diffusion.losses import Draw, draw_noise
from shared.experiment.config import Experiment
from shared.seeding import Streams, derive_seed
from shared.storage.checkpoint import load_group, save_checkpoint
from shared.storage.files import locked
from shared.training.engine import Engine, flip_half, run_training
from shared.training.weights import new_model

SIZE = 16
PRETRAIN, SITES = 0.45, 0.35
NUM_HELD_OUT = 1024
SIZES = (20, 200, 200)
"""Images of the smaller sites of an uneven world; the last one has the rest, about 1,700."""
EMA_DECAY = 0.983
"""Of the rounds: a round leaves as much of the average as 500 steps at 0.995 do in the study."""
NETWORK = partial(uvit.UViT, width=48, num_blocks=3, num_heads=3)


def install() -> None:
    """Make the laboratory's network that of size T, in this process."""
    uvit.SIZES["T"] = NETWORK


def experiment(arm: Arm | None, seed: int) -> Experiment:
    """What the product's engine would be told; without an arm the masked pre-training."""
    shared = {
        "train": {"batch": arm.batch if arm else 64, "seed": seed, "precision": "float32", "compile": "never"},
        "model": {"size": "T", "image_size": SIZE, "patch_size": 4},
        "diffusion": {"schedule": "cosine", "prediction": "v"},
    }
    if arm is None:
        shared["train"]["objective"] = "msm"
        optim = {"lr": 1e-3, "warmup_steps": 50, "ema_decay": 0.99}
        return Experiment.model_validate(shared | {"mask": {"kind": "patch", "ratio": 0.875}, "optim": optim})
    optim = {"lr": arm.lr, "betas": arm.betas, "ema_decay": EMA_DECAY, "warmup_steps": WARMUP}
    return Experiment.model_validate(shared | {"optim": optim, "federation": {"local_steps": arm.local_steps}})


@dataclass
class World:
    """One seed.

    Attributes:
        seed: of division, start and every draw.
        images: all, with persons.
        work: where starts are kept.
    """

    seed: int
    images: ImageCache
    work: Path

    @cached_property
    def _places(self) -> NDArray[np.float64]:
        """Place of each image's person in [0, 1)."""
        assert self.images.persons is not None, "the laboratory divides by person: give images in folders by person"
        persons = sorted(set(self.images.persons.tolist()), key=lambda person: derive_seed(self.seed, "lab", person))
        place = {person: number / len(persons) for number, person in enumerate(persons)}
        return np.array([place[person] for person in self.images.persons.tolist()])

    def _between(self, low: float, high: float) -> NDArray[np.int64]:
        return np.flatnonzero((low <= self._places) & (self._places < high))

    def sites(self, arm: Arm) -> list[ImageCache]:
        """Images of each site of an arm."""
        low, high, parts = PRETRAIN, PRETRAIN + SITES, arm.num_sites
        if arm.division == "random":
            pool = np.random.default_rng(self.seed).permutation(self._between(low, high))
            return [self.images.select(np.sort(pool[part::parts])) for part in range(parts)]
        if arm.uneven == "sizes":
            pool = self._between(low, high)
            pool = pool[np.argsort(self._places[pool], kind="stable")]
            return [self.images.select(np.sort(part)) for part in np.split(pool, np.cumsum(SIZES))]
        edges = np.linspace(low, high, parts + 1)
        return [self.images.select(self._between(edges[part], edges[part + 1])) for part in range(parts)]

    @cached_property
    def held_out(self) -> tuple[Tensor, Draw]:
        """Images that no training saw, with stratified time steps and noise that never change."""
        rows = self._between(PRETRAIN + SITES, 1.0)
        random = Streams(self.seed, ("lab", "held-out")).generator("noise")
        chosen = rows[torch.randperm(len(rows), generator=random)[:NUM_HELD_OUT].numpy()]
        setting = experiment(Arm("any"), self.seed)
        draw = draw_noise(setting, len(chosen), random)
        places = (torch.arange(len(chosen)) + torch.rand(len(chosen), generator=random)) / len(chosen)
        return self.images.batch(chosen), draw._replace(t_B=(places * setting.diffusion.timesteps).long())

    def start(self, thousands: int) -> dict[str, Tensor]:
        """Weights after so many thousand steps of masked pre-training; trained once."""
        folder = self.work / f"start-{self.seed}-{thousands}"
        self.work.mkdir(parents=True, exist_ok=True)
        with locked(self.work / f"start-{self.seed}.lock"):
            if not folder.exists():
                self._pretrain(1000 * thousands, folder)
        return {name: torch.from_numpy(array.copy()) for name, array in load_group(folder, "model").items()}

    def _pretrain(self, steps: int, folder: Path) -> None:
        setting, streams = experiment(None, self.seed), Streams(self.seed, ("lab", "start"))
        engine = Engine(setting, new_model(setting, streams), streams)
        run_training(engine, self.images.select(self._between(0, PRETRAIN)), steps=steps)
        save_checkpoint(folder, {"model": engine.groups()["ema"]}, {"experiment": setting, "step": steps})


class SiteDraws:
    """The batches of one site: those of the product's engine whose streams are `streams_of` the round."""

    def __init__(self, seed: int, site: str, images: ImageCache, arm: Arm, round_steps: int) -> None:
        self.images, self.experiment, self.round_steps = images, experiment(arm, seed), round_steps
        self.seed, self.site, self._order = seed, site, (-1, DataOrder(1, 1, Streams(0)))

    def batch(self, step: int) -> tuple[Tensor, Draw]:
        """Images (B, 3, H, W) and noise of 0-based `step` of the run; rounds of any length see the same."""
        number, inside = divmod(step, self.round_steps)
        streams = streams_of(self.seed, self.site, number)
        if self._order[0] != number:
            self._order = number, DataOrder(len(self.images), self.experiment.train.batch, streams)
        random = streams.generator("noise", inside, 0, 0)
        images_BCHW = flip_half(self.images.batch(self._order[1].ids(inside)), random)
        return images_BCHW, draw_noise(self.experiment, len(images_BCHW), random)


def streams_of(seed: int, site: str, number: int) -> Streams:
    """Streams of a site in the `number`-th block of steps."""
    return Streams(seed, ("lab", site, "round", number))


def open_faces(source: str) -> ImageCache:
    """The images, at the laboratory's size, read in place."""
    return open_images(source, SIZE)
