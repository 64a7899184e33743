"""Masks: keystreams over the ring, added chunk by chunk, so that no second copy of an update is ever held.

A site sends y_u = x_u + PRG(b_u) + sum_{u<v} PRG(s_uv) - sum_{u>v} PRG(s_uv) mod R (Bonawitz et al., CCS 2017,
section 4): b_u is its own seed of the round, s_uv the seed that it shares with site v, and the order is the roster's.
PRG is AES-128 in counter mode under a key that HKDF draws from the seed.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from shared.secure_aggregation.ring import Ring
from shared.updates.fixed_point import CHUNK_ELEMENTS

SEED_BYTES = 32
PIECE_ELEMENTS = CHUNK_ELEMENTS // 8
"""Of what is masked at a time: all temporaries together stay below one chunk of 8 MB."""
_KEY_BYTES, _BLOCK_BYTES = 16, 16


@dataclass(frozen=True)
class Mask:
    """One seed, and whether its keystream is added (1) or taken away (-1)."""

    sign: int
    seed: bytes


def pairwise_mask(own: int, other: int, seed: bytes) -> Mask:
    """The mask of the site at `own` in the roster towards the one at `other`: theirs has the other sign."""
    return Mask(1 if own < other else -1, seed)


class MaskStream:
    """Uniform elements of the ring from a seed, one piece after the other."""

    def __init__(self, seed: bytes, ring: Ring) -> None:
        self._dtype, self._buffer = ring.dtype, bytearray()
        key = HKDF(hashes.SHA256(), _KEY_BYTES, None, b"maskfed mask 1").derive(seed)
        # Each key has one keystream only, so that it begins at counter 0.
        self._stream = Cipher(AES(key), CTR(bytes(_BLOCK_BYTES))).encryptor()

    def next(self, count: int) -> NDArray[Any]:
        """The next `count` elements; they stand until the next call."""
        num_bytes = count * self._dtype.itemsize
        if len(self._buffer) < num_bytes + _BLOCK_BYTES:
            self._buffer = bytearray(num_bytes + _BLOCK_BYTES)
        self._stream.update_into(bytes(num_bytes), self._buffer)
        return np.frombuffer(self._buffer, self._dtype, count)


def add_masks(elements: NDArray[Any], ring: Ring, masks: Iterable[Mask]) -> None:
    """Add masks to elements (n,) of the ring, in place."""
    for mask in masks:
        stream = MaskStream(mask.seed, ring)
        for start in range(0, len(elements), PIECE_ELEMENTS):
            part = elements[start : start + PIECE_ELEMENTS]
            operation = np.add if mask.sign > 0 else np.subtract
            operation(part, stream.next(len(part)), out=part)


def masked(
    values: NDArray[np.float32] | NDArray[np.float64], factor: float, ring: Ring, masks: Iterable[Mask]
) -> NDArray[Any]:
    """What leaves a site in place of its update: (n,) of the ring, uniform for whoever lacks one of the seeds.

    Args:
        values: the update, (n,), finite. Where an element of the ring is as wide as one of them, they are replaced by
            what leaves, so that no second copy of the update is held; what they were is gone then.
        factor: what clipping makes of it.
        ring: of the round.
        masks: its own, and one towards every other site of the roster.
    """
    is_in_place = values.dtype.itemsize == ring.dtype.itemsize and values.flags.writeable and values.flags.c_contiguous
    elements = values.view(ring.dtype) if is_in_place else np.empty(len(values), ring.dtype)
    for start in range(0, len(values), PIECE_ELEMENTS):
        part = slice(start, start + PIECE_ELEMENTS)
        elements[part] = ring.encode(values[part], factor)
    add_masks(elements, ring, masks)
    return elements


def seed_digest(seed: bytes) -> str:
    """What a dealer says of a seed before it is revealed, hexadecimal; 256 random bits are not found from it."""
    return hashlib.sha256(b"maskfed seed 1" + seed).hexdigest()
