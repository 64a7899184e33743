"""Whose update made the held-out loss jump: the round is repeated without each site in turn.

Where no single site explains the jump (several that act together do not), the one without whom the loss is lowest is
left out for good and the others are tried again, as long as the sites left out are a minority.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from server.federation.acceptance.bound import Losses, worst_rise
from server.federation.acceptance.kept_replies import Reply, StoredReplies
from server.federation.updates.aggregation import FixedPointSum

Flat = NDArray[np.float32]


def find_suspects(
    kept: StoredReplies,
    num_elements: int,
    losses_after: Callable[[FixedPointSum], Losses],
    before: Losses,
    bound: float,
) -> list[str]:
    """Sites without whom the rise is within the bound, the heaviest first; none where nobody explains it.

    Args:
        kept: the round's updates.
        num_elements: of each.
        losses_after: held-out losses of the weights that a sum of updates leads to.
        before: losses of the round before.
        bound: largest relative rise.
    """
    total, left = kept.total(num_elements), list(kept.replies)
    suspects: list[str] = []
    while len(suspects) < max(1, (len(kept.replies) - 1) // 2) and len(left) > 1:
        rises = {}
        for reply in left:
            with kept.without(total, reply):
                rises[reply] = worst_rise(before, losses_after(total)).ratio
        worst: Reply = min(left, key=lambda reply: rises[reply])
        left.remove(worst)
        suspects.append(worst.site)
        if rises[worst] <= bound:
            return suspects
        kept.take_out(total, worst)
    return []
