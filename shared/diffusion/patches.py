"""Images to patch tokens and back.

Shapes: B batch, C channels, H W pixels, N patches, V visible patches, P = patch_size^2 C values per patch.
"""
# ruff: noqa: N803 - shape suffixes

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from shared.errors import InputError


def patchify(x_BCHW: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches in row-major order; any dtype, so that uint8 can be gathered before it is cast.

    Returns:
        (B, N, P); inside a patch rows come first, then columns, then channels.

    Raises:
        InputError: the patch size does not divide height and width.
    """
    height, width = x_BCHW.shape[-2:]
    if height % patch_size or width % patch_size:
        raise InputError(f"images of {height} x {width} do not divide into patches of {patch_size}: resize them")
    return rearrange(x_BCHW, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(tokens_BNP: Tensor, patch_size: int, channels: int) -> Tensor:
    """The inverse of `patchify` for square images: (B, N, P) to (B, C, H, W)."""
    side = round(tokens_BNP.shape[1] ** 0.5)
    return rearrange(
        tokens_BNP, "b (h w) (p q c) -> b c (h p) (w q)", h=side, w=side, p=patch_size, q=patch_size, c=channels
    )


def gather_patches(tokens_BNP: Tensor, ids_BV: Tensor) -> Tensor:
    """The S of the paper's Eq. 4: keep the patches that `ids_BV` (long, in [0, N)) names; (B, V, P)."""
    return tokens_BNP.gather(1, ids_BV[..., None].expand(-1, -1, tokens_BNP.shape[-1]))


def patchify_groups(x_BCHW: Tensor, patch_size: int, groups: Sequence[int]) -> Tensor:
    """Like `patchify`, with the values of each group of channels side by side: (B, N, P)."""
    return torch.cat([patchify(part, patch_size) for part in torch.split(x_BCHW, list(groups), 1)], -1)


def unpatchify_groups(tokens_BNP: Tensor, patch_size: int, groups: Sequence[int]) -> Tensor:
    """The inverse of `patchify_groups`: (B, N, P) to (B, C, H, W)."""
    parts = torch.split(tokens_BNP, [patch_size**2 * channels for channels in groups], -1)
    return torch.cat([unpatchify(part, patch_size, c) for part, c in zip(parts, groups, strict=True)], 1)


def gather_groups(tokens_BNP: Tensor, ids_BL: Tensor, patch_size: int, groups: Sequence[int]) -> Tensor:
    """Like `gather_patches`, with patches of its own for each group: `ids_BL` names V for each, one after the other.

    Returns:
        (B, V, P); row k holds the k-th patch of every group, and these lie at different places.
    """
    parts = torch.split(tokens_BNP, [patch_size**2 * channels for channels in groups], -1)
    ids = ids_BL.chunk(len(groups), 1)
    return torch.cat([gather_patches(*pair) for pair in zip(parts, ids, strict=True)], -1)
