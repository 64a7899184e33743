# ruff: noqa: N803, N806, N815 - shape suffixes
"""Denoising score matching (Eq. 1) and masked score matching (Eq. 4), per image, as pure functions of their noise.

DSM is MSM with every patch visible, so there is one loss. Hidden patches are dropped before anything is computed on
them: the visible ones are gathered as bytes, then cast, noised and shown to the network.

Shapes: B images (or units of privacy), K draws per unit, C channels, H W pixels, N patches, V visible patches,
P = patch_size^2 * C values per patch, L = V numbers of visible patches. Where approximation and details of a wavelet
are two sequences, row k of V holds the k-th visible patch of each, and L = 2 V: the places of the first, then of the
second.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from shared.diffusion.dwt import to_network
from shared.diffusion.masks import draw_num_visible, sample_visible
from shared.diffusion.patches import gather_groups, gather_patches, patchify, patchify_groups
from shared.diffusion.schedule import Schedule, q_sample, training_target
from shared.experiment.config import Experiment
from shared.random_numbers import Random, randint, randn


class Draw(NamedTuple):
    """The randomness of one evaluation of the loss."""

    t_B: Tensor
    """(B,) int64 time indices in 0..T-1."""
    eps_BVP: Tensor
    """(B, V, P) float32 standard normal noise of the visible patches."""
    ids_BL: Tensor
    """(B, L) int64 numbers of the visible patches."""


def draw_noise(experiment: Experiment, batch: int, random: Random) -> Draw:
    """Draw t uniformly, V if it varies, eps normally and the visible patches by the experiment's mask, in this order.

    Args:
        experiment: gives T, the mask and the shape of a patch.
        batch: B, may be 0; B K for K draws of each unit.
        random: source of randomness; its device is the device of the result.
    """
    t_B, patch_values = randint(random, experiment.diffusion.timesteps, batch), sum(patch_sizes(experiment))
    num_visible = draw_num_visible(experiment, random)
    eps_BVP = randn(random, batch, num_visible, patch_values)
    ids = [
        sample_visible(experiment.mask, experiment.grid_size, num_visible, batch, random) for _ in experiment.sequences
    ]
    return Draw(t_B, eps_BVP, torch.cat(ids, 1))


def per_image_loss(
    model: Callable[..., Tensor],
    schedule: Schedule,
    experiment: Experiment,
    images_BCHW: Tensor,
    t_B: Tensor,
    eps_BVP: Tensor,
    ids_BL: Tensor,
) -> Tensor:
    """Mean squared error over the visible patches: Eq. 4 of the paper, and Eq. 1 when all are visible.

    loss = mean || S eps - eps_theta(S x_t, S p, t) ||^2, with another target when `diffusion.prediction` is v or x_0.
    Of two sequences it is the sum of two means, as the authors have it.
    The last three arguments are the fields of a `Draw`: `per_image_loss(model, schedule, experiment, images, *draw)`.

    Args:
        model: tokens (B, V, P), t, ids -> (B, V, P).
        schedule: the forward process.
        experiment: gives patch size, wavelet, its sequences and prediction.
        images_BCHW: (B, 3, H, W) on the model's device, uint8 or float in [-1, 1].
        t_B: see `Draw`.
        eps_BVP: see `Draw`.
        ids_BL: see `Draw`.

    Returns:
        (B,) float32 losses.
    """
    x_0_BVP = visible_x_0(experiment, images_BCHW, ids_BL)
    x_t_BVP = q_sample(schedule, x_0_BVP, t_B, eps_BVP)
    target_BVP = training_target(schedule, experiment.diffusion.prediction, x_0_BVP, t_B, eps_BVP)
    output_BVP = model(x_t_BVP, t_B, ids_BL)
    square_BVP = (output_BVP.float() - target_BVP).square()
    parts = torch.split(square_BVP, patch_sizes(experiment), -1)
    loss_B = sum((part.mean(dim=(1, 2)) for part in parts[1:]), parts[0].mean(dim=(1, 2)))
    assert loss_B.shape == (len(images_BCHW),)
    return loss_B


def patch_sizes(experiment: Experiment) -> list[int]:
    """Values of a patch in each sequence of tokens; P in all."""
    return [experiment.model.patch_size**2 * channels for channels in experiment.sequences]


def per_unit_loss(
    model: Callable[..., Tensor], schedule: Schedule, experiment: Experiment, images_BKCHW: Tensor, *draw: Tensor
) -> Tensor:
    """Mean of `per_image_loss` over the K draws of each unit, by one call of the network.

    The network gets the K draws of a unit as one row of K V tokens, so that a unit's gradient is that of the mean.

    Args:
        model: tokens (B, K V, P), t (B, K), ids (B, K L) -> (B, K V, P), draw after draw.
        schedule: see `per_image_loss`.
        experiment: see `per_image_loss`.
        images_BKCHW: (B, K, 3, H, W), an image for each draw.
        draw: fields of a `Draw` for B K images.

    Returns:
        (B,) float32 losses.
    """
    batch, draws = images_BKCHW.shape[:2]

    def folded(x_t_MVP: Tensor, t_M: Tensor, ids_ML: Tensor) -> Tensor:
        tokens, values, places = draws * x_t_MVP.shape[1], x_t_MVP.shape[2], draws * ids_ML.shape[1]
        rows = x_t_MVP.reshape(batch, tokens, values), t_M.reshape(batch, draws), ids_ML.reshape(batch, places)
        return model(*rows).reshape(x_t_MVP.shape)

    loss_M = per_image_loss(folded, schedule, experiment, images_BKCHW.flatten(0, 1), *draw)
    return loss_M.view(batch, draws).mean(1)


def visible_x_0(experiment: Experiment, images_BCHW: Tensor, ids_BL: Tensor) -> Tensor:
    """S x_0: the visible patches of the images in the network's range.

    Args:
        experiment: gives patch size, wavelet and its sequences.
        images_BCHW: (B, 3, H, W), uint8 or float in [-1, 1].
        ids_BL: (B, L) visible patches.

    Returns:
        (B, V, P) float32.
    """
    patch_size, groups = experiment.model.patch_size, experiment.sequences
    if experiment.data.wavelet:
        images_BCHW = to_network(to_model_range(images_BCHW), experiment.data)
    if len(groups) > 1:
        return gather_groups(patchify_groups(images_BCHW, patch_size, groups), ids_BL, patch_size, groups)
    return to_model_range(gather_patches(patchify(images_BCHW, patch_size), ids_BL))


def to_model_range(x: Tensor) -> Tensor:
    """Bytes 0..255 to float32 in [-1, 1]; floats pass unchanged, they are in the range already."""
    return x.float() * (2 / 255) - 1 if x.dtype == torch.uint8 else x.float()
