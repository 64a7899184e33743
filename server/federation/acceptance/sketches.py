"""Short sketches of updates, by a secret random projection, so that sites can be compared over rounds in little memory.

A count sketch (Charikar, Chen and Farach-Colton 2002) of `SKETCH_SIZE` numbers: element j goes, with a random sign, to
one of so many places. Inner products are kept on average, with a deviation of at most sqrt(2 / SKETCH_SIZE) times both
lengths. Rows of `SKETCH_SIZE` elements are shifted by random offsets: two elements of a row never meet, two of
different rows with probability 1 / SKETCH_SIZE, which is all that the bound asks for.

Signs and offsets come from a secret of the run: who knew them could send an update that its sketch does not show.
"""

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

from shared.messages.packing import WireDtype, decode

SKETCH_SIZE = 4096
KEY_BYTES = 32
Sketch = NDArray[np.float64]
_ROWS = 256
"""Rows that are worked on at once, 2^20 elements."""


def sketch(key: bytes, wire: NDArray[np.float32], dtype: WireDtype, factor: float = 1.0) -> Sketch:
    """The sketch (SKETCH_SIZE,) of `factor` times an update; the same on every machine, whatever the threads.

    Args:
        key: 32 secret bytes, the same for all updates that are compared.
        wire: (num_elements,) as it travelled, checked to be finite.
        dtype: of its numbers.
        factor: what the norm bound made of it.
    """
    stream = Cipher(ChaCha20(key, bytes(16)), None).encryptor()
    total = np.zeros(SKETCH_SIZE)
    for start in range(0, len(wire), _ROWS * SKETCH_SIZE):
        values = decode(wire[start : start + _ROWS * SKETCH_SIZE], dtype)
        values = np.pad(values, (0, -len(values) % SKETCH_SIZE))
        bits = np.unpackbits(np.frombuffer(stream.update(bytes(len(values) // 8)), np.uint8))
        signed = (values.view(np.uint32) ^ (bits.astype(np.uint32) << np.uint32(31))).view(np.float32)
        rows = signed.reshape(-1, SKETCH_SIZE)
        shifts = np.frombuffer(stream.update(bytes(2 * len(rows))), np.dtype("<u2")) % SKETCH_SIZE
        for row, shift in zip(rows, shifts, strict=True):
            total[: SKETCH_SIZE - shift] += row[shift:]
            total[SKETCH_SIZE - shift :] += row[:shift]
    return factor * total
