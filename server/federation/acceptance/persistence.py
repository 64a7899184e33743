"""Whether what sets a site's updates apart from the others' is the same in every round. Pure functions.

A site that implants something pushes the same way again and again, as gently as it likes. What sets honest sites apart
is for the most part the noise of their batches, new in every round. With d_ir = u_ir minus the mean of the other sites'
updates of round r, the persistence of site i is the mean cosine between its rounds,

    P_i = sum_{r != s} w_r w_s <d_ir, d_is> / sum_{r != s} w_r w_s |d_ir| |d_is|,

in [-1, 1], where weights w fall by `FORGETTING` a round: what a site did long ago must not excuse what it does now.
That only its history shows an attacker who stays within the spread of a round is from Karimireddy, He and Jaggi (arXiv
2012.10333); there sites send momenta, here the coordinator remembers.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from server.federation.acceptance.sketches import Sketch

FORGETTING = 0.9
"""What a round counts in the next one: about the last ten rounds decide."""
LEAST_ROUNDS = 4
"""Of a site before it is judged: six pairs, so that chance is well below the bound."""
LEAST_SITES = 5
"""Sites in a round: of fewer nobody can say who it is that differs."""


@dataclass(frozen=True)
class Course:
    """What is remembered of one site's rounds, weighted: the sums that persistence is made of.

    Attributes:
        total: sum of w d, a sketch.
        square: sum of (w |d|)^2.
        length: sum of w |d|.
        rounds: that it took part in.
    """

    total: Sketch
    square: float = 0.0
    length: float = 0.0
    rounds: int = 0

    def after(self, deviation: Sketch) -> "Course":
        """With one more round."""
        norm = float(np.linalg.norm(deviation))
        return Course(
            FORGETTING * self.total + deviation,
            FORGETTING**2 * self.square + norm**2,
            FORGETTING * self.length + norm,
            self.rounds + 1,
        )

    @property
    def persistence(self) -> float:
        """P; 0 where there are no two rounds with a deviation."""
        pairs = self.length**2 - self.square
        return (float(self.total @ self.total) - self.square) / pairs if pairs > 0 else 0.0


def deviations(sketches: Mapping[str, Sketch]) -> dict[str, Sketch]:
    """Of each site in one round, u_i - mean of u_j over the others; at least two sites."""
    order = sorted(sketches)  # floats are added up in one order, whoever came first
    total = np.sum([sketches[site] for site in order], axis=0)
    return {site: sketches[site] - (total - sketches[site]) / (len(order) - 1) for site in order}


@dataclass(frozen=True)
class Comparison:
    """The persistence of a round's sites that are known for long enough; of nobody where they are too few."""

    persistence: dict[str, float]

    def shares(self, bound: float) -> dict[str, float]:
        """Sites whose persistence is more than `bound` above the median of all, and what they count from now.

        What a site has moved the model its own way after many rounds is about sqrt(P) times the length of its path, so
        an excess E over the median is shortened by sqrt(bound / E), to what a site at the bound could have moved it.
        Fewer than half of the sites can be above, and a minority moves the median within the others' range only.
        """
        excess = {site: value - self._middle for site, value in self.persistence.items()}
        return {site: math.sqrt(bound / each) for site, each in excess.items() if bound and each > bound}

    def as_json(self) -> dict[str, Any]:
        """What a round's record says: the median, and the largest with its site."""
        site = max(self.persistence, key=lambda each: self.persistence[each])
        return {"median": self._middle, "largest": self.persistence[site], "site": site}

    @property
    def _middle(self) -> float:
        return median(self.persistence.values()) if self.persistence else 0.0


def compare(courses: Mapping[str, Course], here: Iterable[str]) -> Comparison:
    """The sites of a round, `here`, with one another."""
    known = {site: courses[site].persistence for site in sorted(here) if courses[site].rounds >= LEAST_ROUNDS}
    return Comparison(known if len(known) >= LEAST_SITES else {})
