"""How fast this machine trains, in some seconds: `python -m server.simulation.demo_probe SECONDS RECIPE ...`.

A process of its own, for it loads torch. What counts is processor time, of which other work on the machine takes
little away, and the median step: so two runs agree, however busy the machine is. How busy it is shows in the stages
that follow (`demo_budget.Speed.at`).
"""

import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shared.experiment.config import Experiment, load_experiment
from shared.experiment.recipes import find_experiment
from shared.seeding import Streams

if TYPE_CHECKING:
    from shared.training.engine import Engine

WARM_UP_STEPS, LEAST_STEPS, MOST_STEPS = 2, 3, 40
RESERVE_SECONDS = 1.0
"""For the end of the process."""


def main(arguments: Sequence[str]) -> None:
    """Print images per second of each recipe as JSON, at most `SECONDS` after the start."""
    began = time.monotonic()
    seconds, recipes = float(arguments[0]), arguments[1:]
    engines = [make_engine(load_experiment(find_experiment(recipe))) for recipe in recipes]
    left = seconds - RESERVE_SECONDS - (time.monotonic() - began)
    print(json.dumps([images_per_second(engine, left / len(engines)) for engine in engines]))  # noqa: T201 - the answer


def make_engine(experiment: Experiment) -> "Engine":
    """A fresh network of a recipe, ready to train on this machine."""
    import torch

    from shared.diffusion.uvit import build_model
    from shared.training.engine import Engine

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Engine(experiment, build_model(experiment).to(device), Streams(0))


def images_per_second(engine: "Engine", seconds: float) -> float:
    """Of training on all cores, from the median step of those that fit into `seconds`, three at least.

    On a GPU wall clock counts, and each step is waited for.
    """
    import torch

    is_gpu = engine.device.type == "cuda"
    shape = (engine.images_per_step, 3, engine.experiment.model.image_size, engine.experiment.model.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=engine.device)
    end, steps = time.monotonic() + seconds, list[float]()
    while len(steps) < LEAST_STEPS or (time.monotonic() < end and len(steps) < MOST_STEPS):
        clock = time.monotonic if is_gpu else time.process_time
        start = clock()
        engine.step(images)
        if is_gpu:
            torch.cuda.synchronize()
        steps.append((clock() - start) / (1 if is_gpu else torch.get_num_threads()))
    warm = steps[WARM_UP_STEPS:] if len(steps) > WARM_UP_STEPS + LEAST_STEPS else steps[-1:]
    return len(images) / statistics.median(warm)


if __name__ == "__main__":
    main(sys.argv[1:])
