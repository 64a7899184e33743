"""The ring that masked updates live in: integers modulo 2^64 or 2^32, and how updates become its elements.

With 64 bits the fixed point is that of open sums, so an unmasked sum equals the open one bit by bit. With 32 bits the
scale is the finest at which all sites together stay inside half of the ring: every element is off by at most
2^-(scale_bits + 1), and so is the mean. The other half of the ring shows wrong masks, whose sums fall anywhere.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shared.experiment.config import Experiment
from shared.updates.fixed_point import MAX_ELEMENT, SCALE_BITS, to_fixed_point
from shared.updates.norm_bound import longest_path

DECAY_MARGIN = 2.0
"""For the pull of weight decay on single weights; what is longer still is cut off."""


@dataclass(frozen=True)
class Ring:
    """Integers modulo 2^bits.

    Attributes:
        bits: 64 or 32.
        scale_bits: an integer counts 2^-scale_bits.
        largest: magnitude that an element of one update is cut to.
        unit_bits: opened sums count 2^-unit_bits, by default as those of open updates do.
    """

    bits: Literal[32, 64]
    scale_bits: int
    largest: float
    unit_bits: int = SCALE_BITS

    @property
    def dtype(self) -> np.dtype[Any]:
        """Little-endian, as it travels."""
        return np.dtype(f"<u{self.bits // 8}")

    def encode(self, values: NDArray[np.float32] | NDArray[np.float64], factor: float) -> NDArray[Any]:
        """Elements (n,) of the ring for `factor * values`, cut to the largest magnitude.

        Args:
            values: (n,), finite.
            factor: what clipping makes of the update.
        """
        scaled = values.astype(np.float64) * factor
        cut = np.clip(scaled, -self.largest, self.largest, out=scaled)
        return to_fixed_point(cut, 1.0, self.scale_bits).astype(f"<i{self.bits // 8}").view(self.dtype)

    def decode(self, elements: NDArray[Any]) -> NDArray[np.int64]:
        """Signed sums (n,) in steps of 2^-unit_bits, exact."""
        signed = elements.view(f"<i{self.bits // 8}").astype(np.int64)
        return signed << np.int64(self.unit_bits - self.scale_bits)

    def largest_sum(self, count: int) -> int:
        """Largest magnitude of the sum of `count` updates, in steps of 2^-unit_bits."""
        return count * _integers(self.largest, self.scale_bits) << (self.unit_bits - self.scale_bits)


def ring_of(experiment: Experiment, num_sites: int) -> Ring:
    """The ring of an experiment whose roster has `num_sites` sites; all of them derive the same."""
    if experiment.federation.secure_bits == 64:
        return Ring(64, SCALE_BITS, MAX_ELEMENT)
    largest, scale_bits = largest_element(experiment), SCALE_BITS
    while num_sites * _integers(largest, scale_bits) > 2**30:
        scale_bits -= 1
    return Ring(32, scale_bits, largest)


def largest_element(experiment: Experiment) -> float:
    """Largest magnitude that one element of an update can have, from the bound on its norm or from AdamW's steps.

    Muon bounds the length of a matrix's step and not its elements.
    """
    bound = experiment.federation.max_update_norm
    if bound == "auto" and experiment.optim.optimizer == "muon":
        return MAX_ELEMENT
    if bound == "auto":
        bound = DECAY_MARGIN * longest_path(experiment)
    return min(MAX_ELEMENT, bound) if bound else MAX_ELEMENT


def _integers(largest: float, scale_bits: int) -> int:
    """What the largest element becomes, rounded up."""
    return math.ceil(largest * 2.0**scale_bits)
