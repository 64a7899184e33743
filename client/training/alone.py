# ruff: noqa: N803, N806 - shape suffixes
"""What a site gains by a federation: the federated model beside one that is trained here alone.

Both are measured by their denoising loss on the images that this site has held out, at the same time steps and with the
same noise. Nothing is charged, written or sent: the model that is trained here is gone when the command ends.

Shapes: R rounds of draws, B held-out images.
"""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from client.data.dataset import Dataset
from client.home import Home
from client.records.data_key import read_data_key
from shared.diffusion.losses import Draw, draw_noise, per_image_loss
from shared.diffusion.schedule import make_schedule
from shared.errors import InputError
from shared.evaluation.generate import load_model
from shared.experiment.config import Experiment
from shared.messages.audit import check_reference
from shared.seeding import Streams
from shared.storage.checkpoint import resolve_checkpoint
from shared.training.engine import Engine, run_training

LEAST_DRAWS, BATCH = 1024, 128
"""Evaluations of the loss, spread evenly over the time steps; images of one pass."""
STANDARD_ERRORS = 1.96


@dataclass(frozen=True)
class Gain:
    """Held-out losses of both models.

    Attributes:
        federated: of the federated model's averaged weights.
        alone: of the model trained here, the better of its last and its averaged weights.
        error: standard error of the difference, over the images.
        num_images: held out here.
        steps: that the model was trained here.
    """

    federated: float
    alone: float
    error: float
    num_images: int
    steps: int

    def in_words(self) -> str:
        """One line for the operator."""
        gain, half = self.alone - self.federated, STANDARD_ERRORS * self.error
        told = "they do not differ by more than chance"
        if abs(gain) > half:
            told = "the federation helps" if gain > 0 else "this site is better off alone"
        return (
            f"loss on {self.num_images} held-out images: federated {self.federated:.5f}, alone after {self.steps} "
            f"steps {self.alone:.5f}, alone - federated {gain:+.5f} [{gain - half:+.5f}, {gain + half:+.5f}]: {told}"
        )


def compare_alone(
    home: Home,
    data: Dataset,
    checkpoint: Path,
    start: Path,
    *,
    device: torch.device,
    steps: int = 0,
) -> Gain:
    """Train alone from `start`, as long as a site did in the rounds of `checkpoint`, and measure both.

    It trains without DP whatever the run did, for it stays here.

    Args:
        home: the site's; its key seeds the training.
        data: the images that the site trains on, and those that it holds out.
        checkpoint: of the federated run.
        start: checkpoint that the run started from.
        device: of the training.
        steps: of the training; 0: those of the run so far.

    Raises:
        InputError: nothing is held out, a checkpoint is no model of a run, or both are not of one kind.
    """
    if not len(data.held_out):
        raise InputError("no images are held out: raise held_out_ratio in site.toml, then `maskfed-client data scan`")
    loaded = load_model(resolve_checkpoint(checkpoint), device=device)
    begin = load_model(resolve_checkpoint(start), device=device)
    check_reference(start, loaded.experiment, begin.experiment)
    experiment, rounds = as_alone(loaded.experiment), loaded.meta.round
    if not steps and not rounds:
        raise InputError(f"checkpoint {checkpoint} is of no federated round: give --steps, or the run's checkpoint")
    steps = steps or (rounds or 0) * experiment.federation.local_steps
    streams = Streams(read_data_key(home), ("alone", loaded.meta.digest))
    draws = list(held_out_draws(experiment, len(data.held_out), streams.child("held-out")))

    def losses(model: nn.Module) -> Tensor:
        return held_out_losses(model, experiment, data, draws, device)

    engine = Engine(
        experiment,
        deepcopy(begin.model).requires_grad_(True),
        streams,
        trainable=experiment.federation.trainable,
    )
    run_training(engine, data.images.select(data.train), steps=steps)
    last_B = losses(engine.model)
    engine.ema.copy_to(engine.model)
    alone_B, federated_B = (
        min(last_B, losses(engine.model), key=lambda loss_B: float(loss_B.mean())),
        losses(loaded.model),
    )
    error = float((alone_B - federated_B).std()) / len(alone_B) ** 0.5 if len(alone_B) > 1 else float("inf")
    return Gain(float(federated_B.mean()), float(alone_B.mean()), error, len(alone_B), steps)


def as_alone(experiment: Experiment) -> Experiment:
    """The experiment of a training that stays here: without DP, on batches of the plan's size."""
    if experiment.privacy.mechanism == "none":
        return experiment
    train = experiment.train.model_copy(update={"batch": experiment.privacy.expected_batch, "accumulation": 1})
    return experiment.model_copy(update={"train": train})


def held_out_draws(experiment: Experiment, count: int, streams: Streams) -> list[Draw]:
    """Noise for each image as often as makes `LEAST_DRAWS` in all, with time steps spread evenly over each pass."""
    found = []
    for number in range(-(-LEAST_DRAWS // count)):
        random = streams.generator(number)
        draw = draw_noise(experiment, count, random)
        places_B = (torch.randperm(count, generator=random) + torch.rand(count, generator=random)) / count
        found.append(draw._replace(t_B=(places_B * experiment.diffusion.timesteps).long()))
    return found


@torch.no_grad()
def held_out_losses(
    model: nn.Module, experiment: Experiment, data: Dataset, draws: list[Draw], device: torch.device
) -> Tensor:
    """Mean loss of each held-out image over its draws, (B,) float64."""
    schedule = make_schedule(experiment.diffusion.schedule, experiment.diffusion.timesteps).to(device)
    model.eval()
    found = []
    for begin in range(0, len(data.held_out), BATCH):
        part = slice(begin, begin + BATCH)
        images = data.images.batch(data.held_out[part]).to(device)
        losses_RB = [
            per_image_loss(model, schedule, experiment, images, *(field[part].to(device) for field in draw))
            for draw in draws
        ]
        found.append(torch.stack(losses_RB).double().mean(0).cpu())
    return torch.cat(found)
