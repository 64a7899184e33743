"""When a held-out loss has jumped: group by group against the round before. Pure functions, no torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

MAX_ROLL_BACKS = 2
"""Rounds of a run that may be rolled back; the last of them stops it."""
Losses = Mapping[str, float]
"""Mean loss by group: `all`, ranges of t as `t 0-249`, labels as `label NAME`. Not a number counts as infinite."""


@dataclass(frozen=True)
class Rise:
    """The largest relative rise of a held-out loss over all groups."""

    group: str
    ratio: float
    """Loss over that of the round before, minus 1; infinite where the loss is not finite."""


def worst_rise(before: Losses, now: Losses) -> Rise:
    """The group whose loss rose most, of those that both rounds have."""
    rises = [Rise(group, _ratio(before[group], now[group])) for group in sorted(before.keys() & now.keys())]
    return max(rises, key=lambda rise: rise.ratio, default=Rise("all", 0.0))


def _ratio(before: float, now: float) -> float:
    if not math.isfinite(now):
        return math.inf
    return now / before - 1 if math.isfinite(before) and before > 0 else 0.0
