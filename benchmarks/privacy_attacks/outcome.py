"""What an attack on a privacy promise achieved, and whether the promise allows it.

An attack guesses one fair bit per trial, for instance whether a face is among a site's images. Whoever sees only
outputs that are (epsilon, delta)-DP guesses right with probability at most e^epsilon / (1 + e^epsilon), up to delta
(Kairouz, Oh and Viswanath, arXiv 1311.0776, theorem 2.1). The promise is broken where even the lower confidence bound
of what was reached lies above.
"""

import math
from dataclasses import dataclass

CONFIDENCE = 0.95
DIGITS = 40
"""Bisections of [0, 1]: the bound is exact to 1e-12."""


@dataclass(frozen=True)
class Outcome:
    """One attack, repeated."""

    name: str
    trials: int
    """Guesses of a fair bit."""
    correct: int
    """Of them right."""
    epsilon: float
    """What the ledger charged for all that one guess was made from; 0 where it charged nothing."""
    remark: str = ""
    """What a reader needs to know of the attack beside its figures."""

    @property
    def lowest_success(self) -> float:
        """Lower 95 percent bound of the probability to guess right (Clopper and Pearson, one-sided)."""
        low, high = 0.0, 1.0
        for _ in range(DIGITS):
            middle = (low + high) / 2
            is_refuted = self._tail(middle) < 1 - CONFIDENCE
            low, high = (middle, high) if is_refuted else (low, middle)
        return low

    @property
    def allowed_success(self) -> float:
        """e^epsilon / (1 + e^epsilon): the best that epsilon permits."""
        return 1 / (1 + math.exp(-self.epsilon))

    @property
    def is_held(self) -> bool:
        """Whether the promise survives the attack."""
        return self.lowest_success <= self.allowed_success

    def _tail(self, success: float) -> float:
        """Probability of at least so many right guesses."""
        counts = range(self.correct, self.trials + 1)
        return math.fsum(math.comb(self.trials, k) * success**k * (1 - success) ** (self.trials - k) for k in counts)
