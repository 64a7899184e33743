# ruff: noqa: N806 - shape suffixes
"""The masks of Eq. 3: which patches of each image the network sees.

A mask is a list of visible patch numbers, not a picture of zeros: hidden patches never enter the network. V, the
number of visible patches, is the same for all images of an experiment, so shapes are static, and sampling is one
batched operation on the device that waits for nothing. Only `crops` draw V anew for each batch, among three.

Shapes: B images, N = grid_size^2 patches in row-major order, V visible patches.
"""

import math

import torch
from torch import Tensor

from shared.errors import InputError
from shared.experiment.config import Experiment
from shared.experiment.sections import MaskConfig
from shared.random_numbers import Random, rand, randint


def sample_visible(mask: MaskConfig, grid_size: int, num_visible: int, batch: int, generator: Random) -> Tensor:
    """Draw the visible patches of a batch (the rows of S in Eq. 3).

    `patch`: V patches of the grid at random. `block`: random blocks of block_size^2 neighbouring patches on a fixed
    raster. `crop`, `crops`: one square at a uniform position. `none`: every patch.

    Args:
        mask: the kind of mask and its block size; its ratio is already in `num_visible`.
        grid_size: patches per image side.
        num_visible: V in 1..grid_size^2, normally from `draw_num_visible`.
        batch: B, may be 0.
        generator: source of randomness; its device is the device of the result.

    Returns:
        ids_BV: (B, V) int64 patch numbers without repetition; ascending for `patch`, `crop` and `none`, for `block`
        block by block with the blocks ascending and row-major inside each.

    Raises:
        InputError: no patch would be visible, or V does not fit the kind of mask and the grid.
    """
    _check(mask, grid_size, num_visible)
    match mask.kind:
        case "none":
            return torch.arange(grid_size**2, device=generator.device).expand(batch, -1)
        case "patch":
            return choose_subsets(grid_size**2, num_visible, batch, generator)
        case "block":
            return _blocks(grid_size, num_visible, mask.block_size, batch, generator)
        case "crop" | "crops":
            return _crop(grid_size, math.isqrt(num_visible), batch, generator)


def draw_num_visible(experiment: Experiment, random: Random) -> int:
    """V of a batch: the experiment's, or for `crops` one of three squares, for which the device is waited for."""
    if experiment.mask.kind != "crops":
        return experiment.num_visible
    place, sides = float(rand(random, 1)), experiment.mask.crop_sides
    for divisor, probability in sides.items():
        place -= probability
        if place < 0:
            return (experiment.grid_size // divisor) ** 2
    return (experiment.grid_size // max(sides)) ** 2


def choose_subsets(population: int, count: int, batch: int, generator: Random) -> Tensor:
    """(B, count) int64 ascending numbers below `population`, each subset equally likely."""
    # The places of the smallest of independent scores.
    scores_BN = rand(generator, batch, population)
    return scores_BN.topk(count, dim=1, largest=False).indices.sort(dim=1).values


def _blocks(grid_size: int, num_visible: int, block_size: int, batch: int, generator: Random) -> Tensor:
    side = grid_size // block_size
    chosen = choose_subsets(side**2, num_visible // block_size**2, batch, generator)[..., None, None]
    inside = torch.arange(block_size, device=generator.device)
    row = chosen // side * block_size + inside[:, None]
    column = chosen % side * block_size + inside
    return (row * grid_size + column).flatten(1)


def _crop(grid_size: int, side: int, batch: int, generator: Random) -> Tensor:
    corner = randint(generator, grid_size - side + 1, 2, batch, 1, 1)
    inside = torch.arange(side, device=generator.device)
    return ((corner[0] + inside[:, None]) * grid_size + corner[1] + inside).flatten(1)


def _check(mask: MaskConfig, grid_size: int, num_visible: int) -> None:
    num_patches = grid_size**2
    if not 1 <= num_visible <= num_patches:
        raise InputError(
            f"a {mask.kind!r} mask of ratio {mask.ratio} leaves {num_visible} of {num_patches} patches visible: "
            "give a ratio that leaves at least 1"
        )
    fits = {
        "none": num_visible == num_patches,
        "patch": True,
        "block": grid_size % mask.block_size == 0 and num_visible % mask.block_size**2 == 0,
        "crop": math.isqrt(num_visible) ** 2 == num_visible,
        "crops": math.isqrt(num_visible) ** 2 == num_visible,
    }
    if not fits[mask.kind]:
        raise InputError(
            f"{num_visible} visible patches of a {grid_size} x {grid_size} grid cannot be a {mask.kind!r} mask with "
            f"block_size {mask.block_size}: take Experiment.num_visible"
        )
