"""Blocks of 8-bit integers: against arithmetic in Python, and hostile bytes."""

import struct
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest

from shared.updates.int8_blocks import (
    BLOCK,
    LARGEST,
    ROUNDED,
    from_blocks,
    num_bytes,
    num_elements,
    rounded_with_feedback,
    to_blocks,
)

SIZES = (0, 1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7)


def numbers(count: int, size: float = 1.0) -> np.ndarray:
    return (size * np.random.default_rng(count).standard_cauchy(count)).astype(np.float32)


def read(wire: bytes, count: int) -> list[Fraction]:
    """What the bytes say, in exact arithmetic."""
    found: list[Fraction] = []
    while len(found) < count:
        (scale,), wire = struct.unpack("<f", wire[:4]), wire[4:]
        here = min(BLOCK, count - len(found))
        found += [Fraction(scale) * integer for integer in struct.unpack(f"{here}b", wire[:here])]
        wire = wire[here:]
    assert wire == b""
    return found


@pytest.mark.parametrize("count", SIZES)
def test_bytes_are_scale_and_integers_and_each_number_is_within_half_a_scale(count):
    flat = numbers(count)
    wire = to_blocks(flat)
    assert wire.dtype == np.uint8 and len(wire) == num_bytes(count) == count + 4 * -(-count // BLOCK)
    arrived = from_blocks(wire)
    assert [Fraction(float(value)) for value in arrived] == read(wire.tobytes(), count), "products are exact"
    for start in range(0, count, BLOCK):
        block = flat[start : start + BLOCK].astype(np.float64)
        half = np.abs(block).max() / LARGEST / 2
        assert np.abs(arrived[start : start + BLOCK] - block).max() <= half * ROUNDED
        assert np.abs(arrived[start : start + BLOCK]).max() <= np.abs(block).max() * ROUNDED


def test_many_blocks_are_the_blocks_one_after_another():
    flat = numbers(4096 * BLOCK + 2 * BLOCK + 3)
    parts = [to_blocks(flat[start : start + BLOCK]) for start in range(0, len(flat), BLOCK)]
    assert np.array_equal(to_blocks(flat), np.concatenate(parts))
    assert np.array_equal(from_blocks(to_blocks(flat)), np.concatenate([from_blocks(part) for part in parts]))


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e-30, 1e30])
def test_what_has_been_rounded_is_not_changed_a_second_time(size):
    wire = to_blocks(numbers(3 * BLOCK + 7, size))
    assert np.array_equal(to_blocks(from_blocks(wire)), wire)


def test_zeros_and_the_smallest_numbers_do_not_fail():
    assert from_blocks(to_blocks(np.zeros(300, np.float32))).tolist() == [0.0] * 300
    least = np.array([1e-45, -1e-45, 0.0], np.float32)
    assert np.abs(from_blocks(to_blocks(least))).max() <= 1e-42


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_has_no_scale(bad):
    flat = numbers(2 * BLOCK)
    flat[BLOCK + 1] = bad
    with pytest.raises(ValueError, match="not finite"):
        to_blocks(flat)


def test_lengths_that_no_array_of_blocks_has_are_refused():
    lengths = {num_bytes(count) for count in range(600)}
    for length in range(600):
        if length in lengths:
            assert num_bytes(num_elements(length)) == length
        else:
            assert num_elements(length) == -1
            with pytest.raises(ValueError, match="no whole blocks"):
                from_blocks(np.zeros(length, np.uint8))


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, 3e38])
def test_a_hostile_scale_gives_numbers_that_are_not_finite(scale):
    wire = to_blocks(np.full(5, 2.0, np.float32))
    wire[:4] = np.frombuffer(struct.pack("<f", scale), np.uint8)
    assert not np.isfinite(from_blocks(wire)).any()


def test_what_is_lost_of_one_array_is_told_by_the_next_ones():
    """Each of these is far below half a scale: without feedback nothing of it would ever arrive."""
    update = np.full(BLOCK, 1e-4, np.float32)
    update[0] = 1.0
    assert from_blocks(to_blocks(update))[1] == 0.0
    lost, total = None, np.zeros(BLOCK, np.float64)
    for count in range(1, 200):
        arrives, lost = rounded_with_feedback(update, lost)
        assert np.array_equal(from_blocks(to_blocks(arrives)), arrives)
        total += arrives
        np.testing.assert_allclose(total + lost, count * update.astype(np.float64), rtol=1e-4)
    assert total[1] == pytest.approx(199e-4, abs=1 / LARGEST)


def test_temporaries_do_not_grow_with_the_array():
    flat = numbers(16 * 4096 * BLOCK)
    tracemalloc.start()
    try:
        to_blocks(flat)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < num_bytes(len(flat)) + 0.75 * flat.nbytes
