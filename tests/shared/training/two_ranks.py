"""Two processes of `test_engine.py`, as torchrun starts them: 7 steps, and 4 + 3 with a new engine, both saved."""

import os
from pathlib import Path

import numpy as np

from shared.data.image_set import ImageCache
from shared.experiment.config import parse_experiment
from shared.seeding import Streams
from shared.training.engine import Engine, run_training
from shared.training.processes import joined_world
from shared.training.weights import new_model
from tests.small_network import install

EXPERIMENT = parse_experiment(
    """
    [train]
    batch = 8
    accumulation = 2
    precision = "float32"
    [model]
    image_size = 16
    """
)
IMAGES = ImageCache(lambda: np.random.default_rng(0).integers(0, 256, (20, 3, 16, 16), np.uint8), 20, 16)


def main(rank: int, port: int, folder: Path) -> None:
    """One of the two, in torchrun's environment."""
    install()
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    streams = Streams(1)
    with joined_world() as world:
        engines = [Engine(EXPERIMENT, new_model(EXPERIMENT, streams), streams, world) for _ in range(3)]
        whole, first, second = engines
        run_training(whole, IMAGES, steps=7)
        run_training(first, IMAGES, steps=4)
        second.load_groups(first.groups())
        run_training(second, IMAGES, steps=7)
        for name, engine in (("whole", whole), ("resumed", second)):
            arrays = {f"{g}|{n}": array for g, group in engine.groups().items() for n, array in group.items()}
            np.savez(folder / f"{name}-{world.rank}.npz", **arrays)
