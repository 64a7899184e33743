"""Whose update made the held-out loss jump: the round is repeated without each site in turn.

Sites that act together each take away a part of the jump only, so all whose absence helps about as much as that of the
worst one are named. Then the round without all of them must be within the bound, or nobody is named.
"""

import math
from collections.abc import Callable

from server.federation.acceptance.bound import Losses, worst_rise
from server.federation.acceptance.kept_replies import Reply, StoredReplies
from server.federation.updates.aggregation import FixedPointSum

ALIKE = 0.5
"""A site is named when its absence takes away this share of what the worst one's does."""
HIGHEST = 1e9
"""Stands for a loss that is not finite, so that differences are numbers."""


def find_suspects(
    kept: StoredReplies,
    num_elements: int,
    losses_after: Callable[[FixedPointSum], Losses],
    before: Losses,
    bound: float,
) -> list[str]:
    """A minority of the sites without whom the rise is within the bound, the heaviest first; else none.

    Args:
        kept: the round's updates.
        num_elements: of each.
        losses_after: held-out losses of the weights that a sum of updates leads to.
        before: losses of the round before.
        bound: largest relative rise.
    """

    def rise(total: FixedPointSum) -> float:
        return min(HIGHEST, worst_rise(before, losses_after(total)).ratio)

    if len(kept.replies) < 2:  # nobody would be left
        return []
    total = kept.total(num_elements)
    whole, relief = rise(total), {}
    for reply in kept.replies:
        with kept.without(total, reply):
            relief[reply] = whole - rise(total)
    order = sorted(kept.replies, key=lambda reply: (-relief[reply], reply.site))
    named = _named(order, relief)
    for reply in named:
        kept.take_out(total, reply)
    return [reply.site for reply in named] if rise(total) <= bound else []


def _named(order: list[Reply], relief: dict[Reply, float]) -> list[Reply]:
    most = max(1, math.ceil(len(order) / 2) - 1)
    return [reply for reply in order[:most] if relief[reply] >= ALIKE * relief[order[0]]]
