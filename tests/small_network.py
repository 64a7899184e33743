"""The same code in a fraction of the time: 3 blocks of width 48 where a user's T has 7 of width 192, small images."""

from functools import partial

import pytest

SMALL = {"width": 48, "num_blocks": 3, "num_heads": 3}
SEEN_SIDE = 64
"""Pixels that the random Inception looks at; a user has 128."""


def install(patch: pytest.MonkeyPatch | None = None) -> None:
    """Make `model.size = "T"` and `random-inception` the small networks in this process, until `patch` is undone."""
    from shared.diffusion import uvit
    from shared.evaluation import random_inception

    small = partial(uvit.UViT, **SMALL)
    if patch is None:
        uvit.SIZES["T"] = small
    else:
        patch.setitem(uvit.SIZES, "T", small)
        patch.setattr(random_inception, "RANDOM_SIDE", SEEN_SIDE)
