"""Masks cancel in the sum of all and hide every single one; any drop-out leaves what seeds take away, bit by bit."""

import itertools
import os
import tracemalloc

import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from shared.secure_aggregation import additive_masks as masks_module
from shared.secure_aggregation.additive_masks import Mask, MaskStream, add_masks, masked, pairwise_mask
from shared.secure_aggregation.ring import Ring

RINGS = (Ring(64, 36, 4.0), Ring(32, 25, 4.0))
LENGTH = 37


def seeds(count):
    """Own seeds, and the symmetric ones between pairs."""
    own = [os.urandom(32) for _ in range(count)]
    pairs = {pair: os.urandom(32) for pair in itertools.combinations(range(count), 2)}
    return own, pairs


def masks_of(number, count, own, pairs):
    towards = (pairwise_mask(number, other, pairs[min(number, other), max(number, other)])
               for other in range(count) if other != number)  # fmt: skip
    return [Mask(1, own[number]), *towards]


@pytest.mark.parametrize("ring", RINGS, ids=["64", "32"])
def test_a_keystream_is_aes_in_counter_mode_whatever_the_pieces(ring):
    seed = b"\x07" * 32
    key = HKDF(hashes.SHA256(), 16, None, b"maskfed mask 1").derive(seed)
    raw = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(LENGTH * ring.dtype.itemsize))
    stream = MaskStream(seed, ring)
    pieces = [stream.next(count).copy() for count in (1, 20, 0, 16)]
    assert np.concatenate(pieces).tobytes() == raw


@pytest.mark.parametrize("ring", RINGS, ids=["64", "32"])
def test_every_drop_out_pattern_of_five_sites_gives_the_open_sum_bit_by_bit(ring, monkeypatch):
    monkeypatch.setattr(masks_module, "PIECE_ELEMENTS", 16)
    updates = np.random.default_rng(1).normal(0, 0.5, (5, LENGTH)).astype(np.float32)
    own, pairs = seeds(5)
    sent = [masked(updates[number].copy(), 1.0, ring, masks_of(number, 5, own, pairs)) for number in range(5)]
    for there in (set(each) for count in range(1, 6) for each in itertools.combinations(range(5), count)):
        total = np.zeros(LENGTH, ring.dtype)
        for number in sorted(there, reverse=True):
            total += sent[number]
        removed = [Mask(-1, own[number]) for number in there]
        for number, other in itertools.product(there, set(range(5)) - there):
            added = pairwise_mask(number, other, pairs[min(number, other), max(number, other)])
            removed.append(Mask(-added.sign, added.seed))
        add_masks(total, ring, removed)
        expected = sum(ring.decode(ring.encode(updates[number], 1.0)) for number in there)
        assert ring.decode(total).tobytes() == np.asarray(expected).tobytes()


@pytest.mark.parametrize("ring", RINGS, ids=["64", "32"])
def test_a_masked_update_lacking_any_one_seed_is_uniform(ring):
    """Of 4000 zeros, each bit is 1 half of the time (within 6 deviations), and no element repeats the update."""
    own, pairs = seeds(3)
    every = masks_of(0, 3, own, pairs)
    zeros = np.zeros(4000, np.float32)
    for missing in range(len(every)):
        seen = masked(zeros.copy(), 1.0, ring, every)
        known = [Mask(-mask.sign, mask.seed) for number, mask in enumerate(every) if number != missing]
        add_masks(seen, ring, known)
        bits = np.unpackbits(seen.view(np.uint8).reshape(len(seen), -1), axis=1).mean(axis=0)
        assert (np.abs(bits - 0.5) < 7 * 0.5 / 4000**0.5).all()


def test_an_update_is_replaced_only_where_what_leaves_is_as_wide(monkeypatch):
    monkeypatch.setattr(masks_module, "PIECE_ELEMENTS", 16)
    wide, narrow = RINGS
    update = np.ones(LENGTH, np.float32)
    masked(update, 0.5, wide, [Mask(1, bytes(32))])
    assert (update == 1).all()
    apart = update.copy()
    apart.flags.writeable = False
    expected = masked(apart, 0.5, narrow, [Mask(1, bytes(32))])
    assert (apart == 1).all()
    sent = masked(update, 0.5, narrow, [Mask(1, bytes(32))])
    assert np.shares_memory(sent, update) and sent.tobytes() == expected.tobytes()


@pytest.mark.parametrize(("ring", "is_in_place"), [(RINGS[0], False), (RINGS[1], True)], ids=["64", "32"])
def test_masking_holds_less_than_a_chunk_beside_what_leaves(ring, is_in_place):
    values = np.ones(5 * 2**18, np.float32)
    tracemalloc.start()
    sent = masked(values, 1.0, ring, [Mask(1, bytes(32)), Mask(-1, b"s" * 32)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak - (0 if is_in_place else sent.nbytes) < 8 * 2**20
