"""An image out of an update: gradient matching (arXiv 2003.14053) by a server that knows time, noise and mask.

A site's noise is secret in the product, so this attacker is stronger than any there is. Hidden patches have no part in
a gradient: what a mask hides it cannot give away; of the visible ones fewer share it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from shared.diffusion.losses import Draw, draw_noise, per_image_loss, to_model_range
from shared.diffusion.patches import patchify
from shared.diffusion.schedule import Schedule, make_schedule
from shared.experiment.config import Experiment
from shared.seeding import Streams

ITERATIONS, LR, SMOOTHNESS, TIME = 150, 0.05, 1e-3, 200


@dataclass(frozen=True)
class Inversion:
    """Mean squared errors of pixels in [-1, 1], means over images."""

    visible: float
    """Of patches that the update was made from ..."""
    all: float
    """... and of the whole image."""
    guess: float
    """Of the whole image, where the mean of other faces is guessed."""


def invert(model: nn.Module, plan: Experiment, images: Tensor, public: Tensor, seed: int) -> Inversion:
    """Recover each image (N, 3, H, W) uint8 from the gradient of its own loss; `public` are other faces."""
    guess = to_model_range(public).mean(0, keepdim=True)
    found = [
        _one(model, plan, to_model_range(image[None]), guess, seed + number) for number, image in enumerate(images)
    ]
    visible, everything, mean = (sum(values) / len(values) for values in zip(*found, strict=True))
    return Inversion(visible, everything, mean)


def _one(model: nn.Module, plan: Experiment, image: Tensor, guess: Tensor, seed: int) -> tuple[float, float, float]:
    """Errors on visible patches and on the whole image, and that of the guess."""
    schedule = make_schedule(plan.diffusion.schedule, plan.diffusion.timesteps)
    draw = draw_noise(plan, 1, Streams(seed, ("inversion",)).generator("noise"))
    draw = draw._replace(t_B=torch.full_like(draw.t_B, TIME))
    model = model.requires_grad_(True)
    with sdpa_kernel(SDPBackend.MATH):
        wanted = [each.detach() for each in gradient(model, schedule, plan, image, draw)]
        recovered = _matched(model, schedule, plan, guess, draw, wanted)
    model.requires_grad_(False)
    errors = (patchify(recovered, plan.model.patch_size) - patchify(image, plan.model.patch_size)).square().mean(-1)[0]
    return float(errors[draw.ids_BL[0]].mean()), float(errors.mean()), float((guess - image).square().mean())


def gradient(
    model: nn.Module, schedule: Schedule, plan: Experiment, image: Tensor, draw: Draw, *, keeps_graph: bool = False
) -> tuple[Tensor, ...]:
    """Of the loss of one image by all weights."""
    loss = per_image_loss(model, schedule, plan, image, *draw).sum()
    return torch.autograd.grad(loss, list(model.parameters()), create_graph=keeps_graph)


def _matched(
    model: nn.Module, schedule: Schedule, plan: Experiment, guess: Tensor, draw: Draw, wanted: list[Tensor]
) -> Tensor:
    """The image whose gradient has the direction that is wanted, by Adam from the guess."""
    image = guess.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([image], LR)
    for _ in range(ITERATIONS):
        own = gradient(model, schedule, plan, image, draw, keeps_graph=True)
        inner = sum((a * b).sum() for a, b in zip(own, wanted, strict=True))
        lengths = [sum(each.square().sum() for each in group) ** 0.5 for group in (own, wanted)]
        rough = (image.diff(dim=-1).abs().mean() + image.diff(dim=-2).abs().mean()) * SMOOTHNESS
        (image.grad,) = torch.autograd.grad(1 - inner / (lengths[0] * lengths[1]) + rough, [image])
        optimizer.step()
        with torch.no_grad():
            image.clamp_(-1, 1)
    return image.detach()
