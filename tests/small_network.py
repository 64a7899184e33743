"""Tests train 3 blocks of width 48 where a user's T has 7 of width 192: the same code in a twentieth of the time."""

from functools import partial

import pytest

SMALL = {"width": 48, "num_blocks": 3, "num_heads": 3}


def install(patch: pytest.MonkeyPatch | None = None) -> None:
    """Make `model.size = "T"` the small network in this process, until `patch` is undone."""
    from shared.diffusion import uvit

    small = partial(uvit.UViT, **SMALL)
    if patch is None:
        uvit.SIZES["T"] = small
    else:
        patch.setitem(uvit.SIZES, "T", small)
