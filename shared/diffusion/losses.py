# ruff: noqa: N803, N806, N815 - shape suffixes
"""Denoising score matching (Eq. 1) and masked score matching (Eq. 4), per image, as pure functions of their noise.

DSM is MSM with every patch visible, so there is one loss. Hidden patches are dropped before anything is computed on
them: the visible ones are gathered as bytes, then cast, noised and shown to the network.

Shapes: B images (or units of privacy), K noise draws per unit, C channels, H W pixels, N patches, V visible patches,
P = patch_size^2 * C values per patch.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from shared.diffusion.dwt import dwt
from shared.diffusion.masks import sample_visible
from shared.diffusion.patches import gather_patches, patchify
from shared.diffusion.schedule import Schedule, q_sample, training_target
from shared.experiment.config import Experiment


class Draw(NamedTuple):
    """The randomness of one evaluation of the loss."""

    t_B: Tensor
    """(B,) int64 time indices in 0..T-1; (B, K) for K > 1 draws."""
    eps_BVP: Tensor
    """(B, K * V, P) float32 standard normal noise of the visible patches, draw after draw."""
    ids_BV: Tensor
    """(B, K * V) int64 numbers of the visible patches, draw after draw."""


def draw_noise(experiment: Experiment, batch: int, generator: torch.Generator, draws: int = 1) -> Draw:
    """Draw t uniformly, eps normally and the visible patches by the experiment's mask, in this order.

    Args:
        experiment: gives T, the mask and the shape of a patch.
        batch: B, may be 0 (Poisson sampling yields empty batches).
        generator: source of randomness; its device is the device of the result.
        draws: K independent draws per unit, folded into the token axis.
    """
    device, num_visible = generator.device, experiment.num_visible
    patch_values = experiment.model.patch_size**2 * experiment.in_channels
    t_BK = torch.randint(experiment.diffusion.timesteps, (batch, draws), generator=generator, device=device)
    eps_BVP = torch.randn(batch, draws * num_visible, patch_values, generator=generator, device=device)
    ids = sample_visible(experiment.mask, experiment.grid_size, num_visible, batch * draws, generator)
    return Draw(t_BK if draws > 1 else t_BK[:, 0], eps_BVP, ids.reshape(batch, draws * num_visible))


def per_image_loss(
    model: nn.Module,
    schedule: Schedule,
    experiment: Experiment,
    images: Tensor,
    t_B: Tensor,
    eps_BVP: Tensor,
    ids_BV: Tensor,
) -> Tensor:
    """Mean squared error over the visible patches: Eq. 4 of the paper, and Eq. 1 when all are visible.

    loss = mean || S eps - eps_theta(S x_t, S p, t) ||^2, with another target when `diffusion.prediction` is v or x_0.
    The last three arguments are the fields of a `Draw`: `per_image_loss(model, schedule, experiment, images, *draw)`.

    Args:
        model: tokens (B, K * V, P), t, ids -> (B, K * V, P).
        schedule: the forward process.
        experiment: gives patch size, wavelet and prediction.
        images: (B, 3, H, W) on the model's device, uint8 or float in [-1, 1]; (B, K, 3, H, W) when each of the K draws
            takes an image of its own.
        t_B: see `Draw`.
        eps_BVP: see `Draw`.
        ids_BV: see `Draw`.

    Returns:
        (B,) float32 losses, the mean over the K draws of each unit.
    """
    x_0_BVP = visible_x_0(experiment, images, ids_BV)
    # With K draws per unit, t has a draw axis, and so has the view of the tokens that meets it.
    view = (*t_B.shape, ids_BV.shape[1] // t_B.shape[1], x_0_BVP.shape[2]) if t_B.ndim == 2 else x_0_BVP.shape
    x_0, eps = x_0_BVP.reshape(view), eps_BVP.reshape(view)
    x_t = q_sample(schedule, x_0, t_B, eps)
    target = training_target(schedule, experiment.diffusion.prediction, x_0, t_B, eps)
    output_BVP: Tensor = model(x_t.reshape(x_0_BVP.shape), t_B, ids_BV)
    loss_B = (output_BVP.float() - target.reshape(x_0_BVP.shape)).square().mean(dim=(1, 2))
    assert loss_B.shape == (len(images),)
    return loss_B


def visible_x_0(experiment: Experiment, images: Tensor, ids_BV: Tensor) -> Tensor:
    """S x_0: the visible patches of the images in the network's range.

    Args:
        experiment: gives patch size and wavelet.
        images: (B, 3, H, W) or (B, K, 3, H, W), uint8 or float in [-1, 1].
        ids_BV: (B, K * V) visible patches, draw after draw.

    Returns:
        (B, K * V, P) float32.
    """
    per_unit = images.shape[1] if images.ndim == 5 else 1
    x_BCHW = images.flatten(0, 1) if images.ndim == 5 else images
    if experiment.data.wavelet:
        x_BCHW = dwt(to_model_range(x_BCHW), experiment.data.wavelet)
    tokens_BNP = patchify(x_BCHW, experiment.model.patch_size)
    # With an image for each draw the tokens split over the images; one image is read by all draws.
    ids = ids_BV.reshape(len(x_BCHW), ids_BV.shape[1] // per_unit)
    return to_model_range(gather_patches(tokens_BNP, ids)).reshape(*ids_BV.shape, tokens_BNP.shape[2])


def to_model_range(x: Tensor) -> Tensor:
    """Bytes 0..255 to float32 in [-1, 1]; floats pass unchanged, they are in the range already."""
    return x.float() * (2 / 255) - 1 if x.dtype == torch.uint8 else x.float()
