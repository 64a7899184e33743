# ruff: noqa: N803, N806 - shape suffixes
"""Denoising loss of a checkpoint on images it has not seen, with fixed noise: models compare image by image.

Shapes: N images, B of them at once, C channels, H W pixels, V visible patches of P values, L numbers of patches.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shared.data.image_cache import open_images
from shared.diffusion.losses import Draw, draw_noise, per_image_loss
from shared.diffusion.schedule import Prediction, Schedule, at, make_schedule, predict_x_0
from shared.errors import InputError
from shared.evaluation.generate import load_model
from shared.seeding import Streams
from shared.storage.checkpoint import resolve_checkpoint

NUM_IMAGES, BATCH, PARTS = 512, 64, 4
NORMAL_QUANTILE = 1.96


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean loss on whole images, without masks, of the averaged weights."""

    mean: float
    parts: tuple[float, ...]
    """Of the quarters of the time steps, from little noise to much."""
    error: float
    """Standard error of the mean over images."""
    num_images: int
    losses: NDArray[np.float32] = field(compare=False, repr=False)
    """Of each image, in the order of the set."""


def interval_of_difference(one: HeldOutLoss, other: HeldOutLoss) -> tuple[float, float]:
    """95 percent interval of `one`'s mean loss less `other`'s, image by image on the same images and noise.

    What images have in common with each other, as those of one person, is not counted.
    """
    differences = one.losses.astype(np.float64) - other.losses
    half = NORMAL_QUANTILE * float(differences.std(ddof=1)) / len(differences) ** 0.5
    return float(differences.mean()) - half, float(differences.mean()) + half


@torch.no_grad()
def held_out_loss(
    path: Path, data: str, num_images: int = NUM_IMAGES, seed: int = 0, *, in_v: bool = False
) -> HeldOutLoss:
    """Eq. 1 of the paper with one time step per image, spread evenly over all of them.

    Args:
        path: checkpoint folder or run directory.
        data: whatever `open_images` takes.
        num_images: at most so many, spread evenly over the set.
        seed: of the noise.
        in_v: the loss of v, whatever the network predicts, with the clean image that it stands for clipped to its range
            as samplers do: so networks that predict different things compare.

    Raises:
        InputError: bad checkpoint or images; `in_v` of a network on wavelet bands.
    """
    loaded = load_model(resolve_checkpoint(path), overrides=("train.objective=dsm", "mask.kind=none", "mask.ratio=0.0"))
    experiment, model = loaded.experiment, loaded.model
    if in_v and experiment.data.wavelet:
        raise InputError(
            f"held-out loss of v: {path} is on wavelet bands, whose range is not that of pixels: give a model of pixels"
        )
    images = open_images(data, experiment.model.image_size)
    rows = np.unique(np.linspace(0, len(images) - 1, min(num_images, len(images))).astype(np.int64))
    timesteps = experiment.diffusion.timesteps
    schedule = make_schedule(experiment.diffusion.schedule, timesteps)
    network = InV(model, schedule, experiment.diffusion.prediction) if in_v else model
    kind: Prediction = "v" if in_v else experiment.diffusion.prediction
    experiment = experiment.model_copy(
        update={"diffusion": experiment.diffusion.model_copy(update={"prediction": kind})}
    )
    draw = draw_noise(experiment, len(rows), Streams(seed, ("held-out-loss",)).generator("noise"))
    # Neighbours in the set show one person: their time steps lie far apart.
    places = torch.randperm(len(rows), generator=Streams(seed, ("held-out-loss",)).generator("places"))
    draw = Draw(((places + 0.5) * timesteps / len(rows)).long(), draw.eps_BVP, draw.ids_BL)
    losses = torch.cat(
        [
            per_image_loss(network, schedule, experiment, images.batch(rows[part]), *(each[part] for each in draw))
            for part in (slice(start, start + BATCH) for start in range(0, len(rows), BATCH))
        ]
    )
    by_time = losses[places.argsort()]
    parts = tuple(float(part.mean()) for part in by_time.chunk(PARTS))
    error = float(losses.std()) / len(rows) ** 0.5 if len(rows) > 1 else 0.0
    return HeldOutLoss(float(losses.mean()), parts, error, len(rows), losses.numpy())


class InV(nn.Module):
    """A network that predicts v by way of the clean image that another one stands for, clipped to [-1, 1]."""

    def __init__(self, model: nn.Module, schedule: Schedule, prediction: Prediction) -> None:
        super().__init__()
        self.model, self.schedule, self.prediction = model, schedule, prediction

    def forward(self, x_t_BVP: Tensor, t_B: Tensor, ids_BL: Tensor) -> Tensor:
        """(B, V, P): v = (sqrt(alpha_bar) x_t - x_0) / sqrt(1 - alpha_bar), of arXiv 2202.00512, appendix D."""
        output_BVP = self.model(x_t_BVP, t_B, ids_BL).float()
        x_0_BVP = predict_x_0(self.schedule, self.prediction, output_BVP, x_t_BVP, t_B).clamp(-1, 1)
        signal, noise = (at(table, t_B, x_t_BVP) for table in (self.schedule.signal, self.schedule.noise))
        return (signal * x_t_BVP - x_0_BVP) / noise
