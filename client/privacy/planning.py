"""How far a budget reaches: how often a plan fits under the cap, and which noise would let all of it fit."""

import math
from collections.abc import Sequence

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

    def fits(sigma: float) -> bool:
        return epsilon([*history, Spending(sigma, sample_rate, steps)], delta) <= cap

    if not fits(MOST_NOISE):
        return math.inf
    low, high = LEAST_NOISE, 2 * LEAST_NOISE
    while not fits(high):
        low, high = high, min(2 * high, MOST_NOISE)
    if low == LEAST_NOISE and fits(low):
        return low
    while high > 1.002 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
