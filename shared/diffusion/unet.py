"""A convolutional U-Net for `crop` masks: only the visible square enters it, its place as two more channels.

Shapes: B batch, C channels, H W pixels of the crop, V = side^2 visible patches, P = patch_size^2 C values per patch.
"""
# ruff: noqa: N803, N806 - shape suffixes

import math
from typing import Any

import torch
from torch import Tensor, nn

from shared.diffusion.patches import patchify, unpatchify
from shared.errors import InputError

WIDTHS = {"T": (32, 64, 96), "S": (96, 192, 288), "B": (160, 320, 480), "L": (256, 512, 768)}
"""Channels at full, half and quarter resolution."""
DOWNSAMPLING = 2 ** (len(WIDTHS["T"]) - 1)
"""Crop sides must be multiples of this many pixels; they are when the patch size is one."""


class CoordinateUNet(nn.Module):
    """diffusers' `UNet2DModel` behind the token interface of the U-ViT, so losses and samplers treat both alike.

    Initialised from torch's global generator: seed it for a fixed start.
    """

    def __init__(self, *, in_channels: int, grid_size: int, patch_size: int, widths: tuple[int, int, int]) -> None:
        """Build the network; `grid_size` is the number of patches per side of the whole image.

        Raises:
            InputError: diffusers is not installed, or the patch size is no multiple of `DOWNSAMPLING`.
        """
        super().__init__()
        if patch_size % DOWNSAMPLING:
            raise InputError(f"model.patch_size {patch_size} with backbone unet: give a multiple of {DOWNSAMPLING}")
        try:
            from diffusers import UNet2DModel
        except ImportError as error:
            raise InputError(
                "model.backbone 'unet' needs diffusers, which is not installed: `pip install 'maskfed[unet]'`"
            ) from error
        self.in_channels, self.grid_size, self.patch_size = in_channels, grid_size, patch_size
        self.network: Any = UNet2DModel(  # type: ignore[no-untyped-call]
            in_channels=in_channels + 2,
            out_channels=in_channels,
            block_out_channels=widths,
            layers_per_block=2,
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            attention_head_dim=32,
            norm_num_groups=16,
        )

    def forward(self, tokens_BVP: Tensor, t_B: Tensor, ids_BV: Tensor) -> Tensor:
        """Predict for each visible patch; positional arguments and shapes as in `shared.diffusion.uvit.UViT.forward`.

        Args:
            tokens_BVP: noised patches of one square crop per image, row-major.
            t_B: 0-based step index, (B,), or (B, 1).
            ids_BV: row-major index of each patch in the grid.

        Raises:
            InputError: several draws in the token axis (a convolution cannot keep them apart), or no square crop.
        """
        if t_B.ndim == 2 and t_B.shape[1] != 1:
            raise InputError(f"{t_B.shape[1]} draws per image with backbone unet: set privacy.draws to 1")
        if math.isqrt(tokens_BVP.shape[1]) ** 2 != tokens_BVP.shape[1]:
            raise InputError(f"{tokens_BVP.shape[1]} visible patches are no square: backbone unet takes crop masks")
        if not len(tokens_BVP):
            # The library cannot infer sizes of an empty batch: one blank image runs every layer, and none is kept.
            blank = (
                tokens_BVP.new_zeros(1, *tokens_BVP.shape[1:]),
                t_B.new_zeros(1),
                ids_BV.new_zeros(1, ids_BV.shape[1]),
            )
            return self(*blank)[:0]  # type: ignore[no-any-return]
        coordinates = pixel_coordinates(ids_BV, self.grid_size, self.patch_size)
        x_BCHW = unpatchify(tokens_BVP, self.patch_size, self.in_channels)
        x_BCHW = torch.cat([x_BCHW, unpatchify(coordinates, self.patch_size, 2)], 1).to(
            next(self.network.parameters()).dtype
        )
        out_BCHW = self.network(x_BCHW, t_B.flatten(), return_dict=False)[0]
        return patchify(out_BCHW, self.patch_size).to(tokens_BVP.dtype)


def pixel_coordinates(ids_BV: Tensor, grid_size: int, patch_size: int) -> Tensor:
    """Row and column of every pixel of the named patches as patch tokens of two channels, float32.

    Pixel centres of the whole image lie evenly in (-1, 1), so the same place has the same value in every crop.

    Returns:
        (B, V, 2 patch_size^2), in the layout of `shared.diffusion.patches.patchify`.
    """
    inside = torch.arange(patch_size, device=ids_BV.device)
    shape = (*ids_BV.shape, patch_size, patch_size)
    row = (ids_BV // grid_size * patch_size)[..., None, None] + inside[:, None]
    column = (ids_BV % grid_size * patch_size)[..., None, None] + inside
    pixels = torch.stack([row.expand(shape), column.expand(shape)], -1).flatten(2)
    return (pixels + 0.5) * (2 / (grid_size * patch_size)) - 1
