"""How fast this machine trains a model, from a probe that is limited in seconds."""

import time

import torch

from shared.diffusion.losses import draw_noise, per_image_loss
from shared.diffusion.schedule import make_schedule
from shared.diffusion.uvit import build_model
from shared.experiment.config import Experiment
from shared.seeding import generator
from shared.updates.trainable import select_trainable

PROBE_BATCH = 8
"""Images a step of the probe: small enough for a slow machine to do one in the time."""


def images_per_second(experiment: Experiment, seconds: float) -> float:
    """Images a second through forward and backward of the experiment's model, without optimizer, on random images.

    Runs one step to warm up, then steps until `seconds` have passed, at least one; on a GPU where there is one.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    random = generator(experiment.train.seed, device)
    model = build_model(experiment).to(device).train()
    schedule = make_schedule(experiment.diffusion.schedule, experiment.diffusion.timesteps).to(device)
    side = experiment.model.image_size
    images = torch.randint(256, (PROBE_BATCH, 3, side, side), generator=random, device=device, dtype=torch.uint8)

    def step() -> None:
        loss = per_image_loss(model, schedule, experiment, images, *draw_noise(experiment, PROBE_BATCH, random))
        torch.autograd.backward(loss.mean())
        if device.type == "cuda":
            torch.cuda.synchronize()

    step()
    start, done = time.perf_counter(), 0
    while done == 0 or time.perf_counter() - start < seconds:
        step()
        done += PROBE_BATCH
    return done / (time.perf_counter() - start)


def num_values(experiment: Experiment) -> tuple[int, int]:
    """Values in all tensors of the experiment's model, and in those that its federation trains; nothing is allocated.

    Raises:
        InputError: a pattern of `federation.trainable` matches no tensor.
    """
    with torch.device("meta"):
        sizes = {name: tensor.numel() for name, tensor in build_model(experiment).named_parameters()}
    return sum(sizes.values()), sum(sizes[name] for name in select_trainable(sizes, experiment.federation.trainable))
