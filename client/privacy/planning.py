"""How far a budget reaches: how often a plan fits under the cap, and which noise would let all of it fit."""

import math
from collections.abc import Callable, Sequence

from client.privacy.accounting import epsilon
from client.records.spending import Spending

LEAST_NOISE, MOST_NOISE = 0.5, 1e3
"""Range of noise multipliers that are planned with; less is no protection worth planning."""


def num_that_fit(history: Sequence[Spending], part: Spending, delta: float, cap: float, limit: int) -> int:
    """How many times `part` (a step, or a round of steps) still fits under `cap`, at most `limit`; by bisection."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        fits = epsilon([*history, part._replace(steps=middle * part.steps)], delta) <= cap
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def noise_that_fits(history: Sequence[Spending], sample_rate: float, steps: int, delta: float, cap: float) -> float:
    """Smallest noise multiplier from LEAST_NOISE on, to 0.2 percent, at which `steps` steps fit; infinity if none."""

    def excess(sigma: float) -> float:
        spent = epsilon([*history, Spending(sigma, sample_rate, steps)], delta)
        return math.log(spent / cap) if math.isfinite(spent) else math.inf

    if excess(MOST_NOISE) > 0:
        return math.inf
    low, high = LEAST_NOISE, 2 * LEAST_NOISE
    too_much, enough = math.inf, excess(high)
    while enough > 0:
        low, high, too_much = high, min(2 * high, MOST_NOISE), enough
        enough = excess(high)
    if math.isinf(too_much):
        too_much = excess(low)
    return low if too_much <= 0 else _crossing(excess, low, high, too_much, enough)


def _crossing(excess: Callable[[float], float], low: float, high: float, above: float, below: float) -> float:
    """Where `excess` crosses 0 between `low` (`above` 0) and `high` (`below` or at 0), to 0.2 percent from above.

    Epsilon is close to a power of the noise multiplier, so a chord in logarithms aims well; its aim is moved by 0.05
    percent to the far side in turn, and an end that stays twice counts half (the Illinois rule), so that both ends
    close in. Where no number can be put on epsilon the interval is halved.
    """
    nudge, moved = 1.0005, ""
    while high > 1.002 * low:
        chord = above / (above - below) if math.isfinite(above) else 0.5
        middle = min(max(low * (high / low) ** chord / nudge, low * 1.0005), high / 1.0005)
        nudge = 1 / nudge
        value = excess(middle)
        if value > 0:
            low, above, below, moved = middle, value, below / (2 if moved == "low" else 1), "low"
        else:
            high, below, above, moved = middle, value, above / (2 if moved == "high" else 1), "high"
    return high
