"""Sketches keep inner products, whatever the updates look like to somebody who does not know the secret."""

import numpy as np
import pytest

from server.federation.acceptance.sketches import KEY_BYTES, SKETCH_SIZE, sketch
from shared.messages.packing import decode, encode

KEY = bytes(range(KEY_BYTES))
TOLERANCE = 5 * (2 / SKETCH_SIZE) ** 0.5
"""Of an inner product, in both lengths: five deviations. The key is fixed, so a test that passes always does."""


def vectors(kind, count=3, size=3 * SKETCH_SIZE + 17):
    random = np.random.default_rng(5)
    made = random.normal(size=(count, size)).astype(np.float32)
    if kind == "one place of every row":
        made[:, np.arange(size) % SKETCH_SIZE != 7] = 0
    if kind == "one row":
        made[:, SKETCH_SIZE:] = 0
    if kind == "one element":
        made[:, 1:] = 0
    return made


@pytest.mark.parametrize("kind", ["dense", "one place of every row", "one row", "one element"])
def test_inner_products_are_kept(kind):
    made = vectors(kind, size=40 * SKETCH_SIZE + 17) if kind == "one place of every row" else vectors(kind)
    sketches = np.stack([sketch(KEY, each, "float32") for each in made])
    exact = made.astype(np.float64) @ made.T.astype(np.float64)
    lengths = np.sqrt(np.diag(exact))
    assert np.abs(sketches @ sketches.T - exact).max() <= TOLERANCE * np.outer(lengths, lengths).max()


def test_an_update_made_to_vanish_under_one_secret_shows_under_another():
    blind, counted = np.zeros((2, 2 * SKETCH_SIZE), np.float32)
    blind[3], counted[SKETCH_SIZE:] = 1, 1 + np.arange(SKETCH_SIZE)
    (place,) = np.flatnonzero(sketch(KEY, blind, "float32"))
    there = sketch(KEY, counted, "float32")[place]  # which element of the second row lands there, and its sign
    blind[SKETCH_SIZE + round(abs(there)) - 1] = -np.sign(there) * sketch(KEY, blind, "float32")[place]
    assert np.count_nonzero(blind) == 2 and not sketch(KEY, blind, "float32").any()
    assert np.linalg.norm(sketch(b"\x01" * KEY_BYTES, blind, "float32")) == pytest.approx(2**0.5)


def test_a_sketch_is_linear_and_of_what_travelled():
    first, second, _ = vectors("dense")
    together = sketch(KEY, first, "float32") + sketch(KEY, second, "float32")
    assert np.allclose(sketch(KEY, first + second, "float32"), together, atol=1e-4)
    assert np.allclose(sketch(KEY, first, "float32", 0.25), 0.25 * sketch(KEY, first, "float32"), rtol=1e-12)
    wire = encode(first, "bfloat16")
    assert np.array_equal(sketch(KEY, wire, "bfloat16"), sketch(KEY, decode(wire, "bfloat16"), "float32"))


def test_pieces_of_a_long_update_are_one_sketch():
    size = 256 * SKETCH_SIZE + 5
    long = np.zeros(size, np.float32)
    long[[3, size - 1]] = 2.0, -3.0
    found = sketch(KEY, long, "float32")
    assert sorted(np.abs(found[found != 0])) in ([2.0, 3.0], [1.0], [5.0])
