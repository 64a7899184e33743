"""Averaging of updates: checked, then folded into an int64 fixed-point sum, one reply at a time.

Integer addition is associative, so the mean is bitwise the same in whatever order replies arrive, and one sum of 8
bytes per element is all the memory that any number of replies needs.

Constants: an element is at most 4 in magnitude, scaled by 2^36 and multiplied by an integer weight; the weights of a
round add up to at most 2^20. So |sum| <= 2^(2 + 36 + 20) = 2^58, far inside int64, and the rounding error of an element
is at most 2^-37 = 7.3e-12, below float32's own for elements above 1.2e-4.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import InputError
from shared.experiment.federation import FederationConfig
from shared.messages.packing import Manifest, MessageError, decode
from shared.updates.fixed_point import CHUNK_ELEMENTS, MAX_ELEMENT, SCALE_BITS, clipping, to_fixed_point
from shared.updates.wire_sizes import WireDtype, wire_length

MAX_TOTAL_WEIGHT = 2**20

Noise = Callable[[int], NDArray[np.int64]]
"""The next so many elements of a noise vector, in units of the fixed-point grid."""


class UpdateError(ValueError):
    """A reply that must not touch the sum; `code` is for programs, the text for people."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def site_weight(num_examples: int, config: FederationConfig) -> int:
    """Integer weight of a reply: 1, or its images in units of the public grid, rounded up, at most `max_weight`.

    Raises:
        UpdateError: no images at all, although they are the weight.
    """
    if config.weighting == "equal":
        return 1
    if num_examples < 1:
        raise UpdateError("weight", f"num_examples is {num_examples}, at least 1 is needed when examples weigh")
    return min(config.max_weight, math.ceil(min(num_examples, config.max_examples) / config.examples_grid))


def check_total_weight(num_sites: int, config: FederationConfig) -> None:
    """Refuse a federation whose weights could pass what the sum holds.

    Raises:
        InputError: names the numbers and what to change.
    """
    largest = 1 if config.weighting == "equal" else site_weight(config.max_examples, config)
    if num_sites * largest > MAX_TOTAL_WEIGHT:
        raise InputError(
            f"{num_sites} sites of weight {largest} are above {MAX_TOTAL_WEIGHT}: lower federation.max_weight, "
            "or raise federation.examples_grid"
        )


def check_update(wire: NDArray[Any], dtype: WireDtype, manifest: Manifest) -> float:
    """L2 norm of an update in wire form, after checking length, dtype, finiteness and size of every element.

    The length is the server's own manifest's, whatever the reply says about itself.

    Raises:
        UpdateError: `dtype`, `length`, `not_finite` or `too_large`; the last two name the tensor.
    """
    length = wire_length(manifest.num_elements, dtype)
    if wire.shape != (length,):
        raise UpdateError("length", f"update has shape {wire.shape}, agreed was ({length},)")
    square = 0.0
    for start, chunk in _chunks(wire, dtype):
        values = chunk.astype(np.float64)
        largest = float(np.max(np.abs(values), initial=0.0))
        if not math.isfinite(largest):
            index = start + int(np.argmin(np.isfinite(values)))
            raise UpdateError("not_finite", f"update is not finite in tensor {_tensor_at(manifest, index)}")
        if largest > MAX_ELEMENT:
            index = start + int(np.argmax(np.abs(values)))
            raise UpdateError(
                "too_large",
                f"update has element {largest:.3g} in tensor {_tensor_at(manifest, index)}, at most 4 is allowed",
            )
        square += float(np.sum(np.square(values)))
    return math.sqrt(square)


def clip_factor(norm: float, bound: float, config: FederationConfig) -> float:
    """What an update is multiplied by: 1, or less where `update_norm_action` is `clip` and the norm is above the bound.

    Args:
        norm: of the update.
        bound: of `norm_bound`; 0: none.
        config: says what becomes of an update beyond it.

    Raises:
        UpdateError: above the bound, and the action is `reject`.
    """
    if config.update_norm_action == "clip":
        return clipping(norm, bound)
    if bound and norm > bound:
        raise UpdateError("norm", f"update norm {norm:.6g} is above federation.max_update_norm {bound:g}")
    return 1.0


class FixedPointSum:
    """The weighted sum of a round's updates; 8 bytes per element, whatever the number of replies."""

    def __init__(self, num_elements: int, scale_bits: int = SCALE_BITS) -> None:
        self._sum = np.zeros(num_elements, np.int64)
        self.scale_bits = scale_bits
        """How finely the updates were rounded before they were added up; the sum itself counts 2^-36."""
        self.total_weight = 0
        self.count = 0

    @classmethod
    def of(cls, total: NDArray[np.int64], count: int, scale_bits: int) -> "FixedPointSum":
        """The sum of `count` updates of weight 1 that was added up elsewhere, in steps of 2^-36; not copied."""
        made = cls(0, scale_bits)
        made._sum, made.total_weight, made.count = total, count, count
        return made

    def fold(self, wire: NDArray[Any], dtype: WireDtype, weight: int, factor: float = 1.0) -> None:
        """Add `weight * factor * update`; the update has passed `check_update`.

        Raises:
            UpdateError: the weights of the round would pass 2^20.
        """
        if weight < 1 or self.total_weight + weight > MAX_TOTAL_WEIGHT:
            raise UpdateError("weight", f"weight {weight} takes the round's total outside 1..{MAX_TOTAL_WEIGHT}")
        self._add(wire, dtype, weight, factor)
        self.total_weight += weight
        self.count += 1

    def take_out(self, wire: NDArray[Any], dtype: WireDtype, weight: int, factor: float = 1.0) -> None:
        """Undo `fold` with the same arguments, exactly: integers leave nothing behind."""
        self._add(wire, dtype, -weight, factor)
        self.total_weight -= weight
        self.count -= 1

    def _add(self, wire: NDArray[Any], dtype: WireDtype, weight: int, factor: float) -> None:
        for start, chunk in _chunks(wire, dtype):
            self._sum[start : start + len(chunk)] += to_fixed_point(chunk, factor, SCALE_BITS) * weight

    def clear(self) -> None:
        """Free the sum's memory; the counts stay."""
        self._sum = np.zeros(0, np.int64)

    @property
    def num_elements(self) -> int:
        """Elements of the sum."""
        return len(self._sum)

    def mean(self, denominator: int, noise: Noise | None = None) -> NDArray[np.float32]:
        """(Sum + noise) / `denominator`, float32 (num_elements,); noise joins the integers, floats come after it."""
        mean = np.empty(len(self._sum), np.float32)
        for start in range(0, len(mean), CHUNK_ELEMENTS):
            total = self._sum[start : start + CHUNK_ELEMENTS]
            if noise is not None:
                total = total + noise(len(total))
            mean[start : start + CHUNK_ELEMENTS] = total / float(2**SCALE_BITS) / float(denominator)
        return mean


def _chunks(wire: NDArray[Any], dtype: WireDtype) -> Iterator[tuple[int, NDArray[np.float32]]]:
    start, size = 0, wire_length(CHUNK_ELEMENTS, dtype)
    for begin in range(0, len(wire), size):
        try:
            chunk = decode(wire[begin : begin + size], dtype)
        except MessageError as error:
            raise UpdateError("dtype", str(error)) from error
        yield start, chunk
        start += len(chunk)


def _tensor_at(manifest: Manifest, index: int) -> str:
    for tensor in manifest.tensors:
        index -= tensor.num_elements
        if index < 0:
            return tensor.name
    return "?"
