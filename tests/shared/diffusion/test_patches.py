"""Patches: layout, inverse, selection, errors."""

import pytest
import torch

from shared.diffusion.patches import gather_patches, patchify, unpatchify
from shared.errors import InputError


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
def test_unpatchify_inverts_patchify(dtype, patch_size):
    x = torch.randint(256, (2, 3, 8, 8)).to(dtype)
    tokens = patchify(x, patch_size)
    assert tokens.dtype == dtype
    assert tokens.shape == (2, (8 // patch_size) ** 2, 3 * patch_size**2)
    assert torch.equal(unpatchify(tokens, patch_size, 3), x)


def test_patches_are_row_major_with_channels_last_inside():
    x = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    tokens = patchify(x, 2)
    for row in range(2):
        for column in range(3):
            patch = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.equal(tokens[:, 3 * row + column], patch.permute(0, 2, 3, 1).flatten(1))


def test_gather_keeps_the_named_patches_of_each_image():
    tokens = torch.randn(3, 9, 5)
    ids = torch.stack([torch.randperm(9)[:4] for _ in range(3)])
    assert torch.equal(gather_patches(tokens, ids), torch.stack([tokens[b, ids[b]] for b in range(3)]))


def test_empty_batch():
    assert unpatchify(patchify(torch.zeros(0, 3, 8, 8), 4), 4, 3).shape == (0, 3, 8, 8)
    assert gather_patches(torch.zeros(0, 4, 48), torch.zeros(0, 2, dtype=torch.long)).shape == (0, 2, 48)


def test_indivisible_size_names_value_and_remedy():
    with pytest.raises(InputError, match="10 x 8 do not divide into patches of 4: resize"):
        patchify(torch.zeros(1, 3, 10, 8), 4)
