"""Numbers as 8-bit integers, 256 of them with one scale: a quarter of float32, 1.016 bytes a number. No torch.

A block is its scale (float32, little endian) and then its integers from -127 to 127; the last one may be shorter. The
largest number of a block becomes 127, each other one is rounded to the nearest, ties to even, so an error is at most
half a scale. A scale has 17 significant bits, so that its products with integers of 7 are exact: numbers that have been
rounded once are not changed a second time.
"""

import itertools
import math

import numpy as np
from numpy.typing import NDArray

BLOCK = 256
"""Numbers with one scale."""
SCALE_BYTES = 4
LARGEST = 127
ROUNDED = 1 + 2**-16
"""At most this times the largest number of a block over 127 is its scale, which is rounded up."""
_LOW_BITS = np.uint32(0x7F)
_SCALE = np.dtype("<f4")
_ENCODED = SCALE_BYTES + BLOCK
_AT_A_TIME = 4096
"""Blocks of one pass: temporaries cost megabytes, not models."""


def num_bytes(num_elements: int) -> int:
    """Of so many numbers as they travel."""
    return num_elements + SCALE_BYTES * math.ceil(num_elements / BLOCK)


def num_elements(length: int) -> int:
    """Numbers in so many bytes; -1: no array of whole blocks is as long."""
    full, rest = divmod(length, _ENCODED)
    if 0 < rest <= SCALE_BYTES:
        return -1
    return full * BLOCK + max(0, rest - SCALE_BYTES)


def to_blocks(flat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The blocks of `flat`, (num_bytes(n),).

    Raises:
        ValueError: a number is not finite, so that its block would have no scale.
    """
    wire = np.empty(num_bytes(len(flat)), np.uint8)
    for first, last in _parts(len(flat)):
        values = flat[first:last].astype(np.float32, copy=False)
        rows = values.reshape(-1, min(BLOCK, len(values)))
        scales = _scales(np.abs(rows).max(1, keepdims=True))
        integers = np.rint(np.divide(rows, scales, out=np.zeros_like(rows), where=scales > 0))
        blocks = _blocks(wire, first, last)
        blocks[:, :SCALE_BYTES] = scales.astype(_SCALE).view(np.uint8)
        blocks[:, SCALE_BYTES:] = integers.astype(np.int8).view(np.uint8)
    return wire


def from_blocks(wire: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The numbers, (n,): integers times scales; where a scale is not finite they are not, either.

    Raises:
        ValueError: the bytes are no whole blocks.
    """
    count = num_elements(len(wire))
    if count < 0:
        raise ValueError(f"{len(wire)} bytes are no whole blocks of {BLOCK} integers with their scales")
    flat = np.empty(count, np.float32)
    for first, last in _parts(count):
        blocks = _blocks(wire, first, last)
        scales = np.ascontiguousarray(blocks[:, :SCALE_BYTES]).view(_SCALE)
        integers = np.ascontiguousarray(blocks[:, SCALE_BYTES:]).view(np.int8)
        with np.errstate(over="ignore", invalid="ignore"):
            np.multiply(integers, scales, out=flat[first:last].reshape(integers.shape), dtype=np.float32)
    return flat


def rounded_with_feedback(
    update: NDArray[np.float32], lost: NDArray[np.float32] | None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What arrives of an update, and what is lost of it until the next one, both (n,).

    Error feedback (EF-SGD, arXiv 1901.09847, Algorithm 2): what earlier updates have not told joins this one, so that
    the sum of all that arrives is that of all updates, but for what the last one has lost.

    Raises:
        ValueError: a number is not finite.
    """
    wanted = update if lost is None else update + lost
    arrives = from_blocks(to_blocks(wanted))
    return arrives, wanted - arrives


def _scales(largest: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of blocks with these largest numbers, rounded up to 17 significant bits."""
    if not np.isfinite(largest).all():
        raise ValueError("a number is not finite: no scale of 8-bit integers holds it")
    bits = (largest / np.float32(LARGEST)).view(np.uint32)
    return ((bits + _LOW_BITS) & ~_LOW_BITS).view(np.float32)


def _parts(count: int) -> list[tuple[int, int]]:
    """Whole blocks, many at a time, and the shorter block at the end."""
    full = count // BLOCK * BLOCK
    edges = [*range(0, full, _AT_A_TIME * BLOCK), full, *([count] if count > full else [])]
    return list(itertools.pairwise(edges))


def _blocks(wire: NDArray[np.uint8], first: int, last: int) -> NDArray[np.uint8]:
    """View of the blocks of numbers [first, last), one a row."""
    begin, each = first // BLOCK * _ENCODED, SCALE_BYTES + min(BLOCK, last - first)
    return wire[begin : begin + num_bytes(last - first)].reshape(-1, each)
