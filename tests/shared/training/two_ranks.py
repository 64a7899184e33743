"""Started by torchrun from `test_engine.py`: trains 7 steps, and 4 + 3 with a new engine, and saves both."""

import sys
from pathlib import Path

import numpy as np

from shared.data.image_set import ImageCache
from shared.experiment.config import parse_experiment
from shared.seeding import Streams
from shared.training.engine import Engine, run_training
from shared.training.processes import joined_world
from shared.training.weights import new_model

sys.path.append(str(Path(__file__).parents[2]))
from small_network import install

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


def main(folder: Path) -> None:
    install()
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


if __name__ == "__main__":
    main(Path(sys.argv[1]))
