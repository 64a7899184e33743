"""The same code in a fraction of the time: 3 blocks of width 48 where a user's T has 7 of width 192, small images."""

from functools import cache, partial
from typing import Any

import pytest

SMALL = {"width": 48, "num_blocks": 3, "num_heads": 3}
SEEN_SIDE = 64
"""Pixels that the random Inception looks at; a user has 128."""
FEW_IMAGES = 8
"""Images that features for statistics are computed of at once, filled up where there are fewer; a user has 64."""


@cache
def small() -> Any:
    """The network, the same object each time: weights that tests keep are found again by it."""
    from shared.diffusion import uvit

    return partial(uvit.UViT, **SMALL)


def install(patch: pytest.MonkeyPatch | None = None) -> None:
    """Make `model.size = "T"` and `random-inception` the small networks in this process, until `patch` is undone."""
    from client.answers.statistics import site_statistics
    from shared.diffusion import uvit
    from shared.evaluation import random_inception

    if patch is None:
        uvit.SIZES["T"] = small()
    else:
        patch.setitem(uvit.SIZES, "T", small())
        patch.setattr(random_inception, "RANDOM_SIDE", SEEN_SIDE)
        patch.setattr(site_statistics, "BATCH", FEW_IMAGES)
