"""ChaCha20 (RFC 8439) as a stream of random bits: OpenSSL on a CPU, int32 tensor operations on a GPU, the same bits.

A key is used for one stream only, so the nonce is zero. A stream ends after 2^32 blocks of 64 bytes.
"""

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

BLOCK_WORDS = 8
"""64-bit words of a block."""
MOST_BLOCKS = 2**32
GPU_BLOCKS = 2**20
"""Blocks that are computed at once on a GPU: 64 MB, and about as much again in between, four times."""
FEW_BLOCKS = 2**16
"""Up to so many, OpenSSL and a copy take less time than the GPU's hundreds of small operations (4 MB)."""


class Keystream:
    """Random bits on a device under one key."""

    def __init__(self, key: bytes, device: torch.device | str = "cpu") -> None:
        """Begin the stream.

        Args:
            key: 32 bytes that no other stream uses.
            device: where the bits appear.
        """
        self.device = torch.device(device)
        self._key, self._counter = key, 0

    def bits(self, count: int) -> Tensor:
        """The next `count` words of 64 bits, int64 (count,); the rest of the last block is dropped."""
        blocks = -(-count // BLOCK_WORDS)
        self._counter += blocks
        assert self._counter <= MOST_BLOCKS, "a stream of 256 GB is over"
        first = self._counter - blocks
        if self.device.type == "cpu" or blocks <= FEW_BLOCKS:
            return self._openssl(first, blocks)[:count].to(self.device)
        parts = [
            chacha20_blocks(self._key, start, min(GPU_BLOCKS, self._counter - start), device=self.device)
            for start in range(first, self._counter, GPU_BLOCKS)
        ]
        return torch.cat([part.flatten().view(torch.int64) for part in parts])[:count]

    def _openssl(self, first: int, blocks: int) -> Tensor:
        words = np.zeros(blocks * BLOCK_WORDS, np.int64)
        if blocks:
            # The first four bytes of OpenSSL's nonce are the block counter.
            nonce = first.to_bytes(4, "little") + bytes(12)
            cipher = Cipher(algorithms.ChaCha20(self._key, nonce), mode=None).encryptor()
            cipher.update_into(words.view(np.uint8).data, words.view(np.uint8).data)
        return torch.from_numpy(words)


def chacha20_blocks(
    key: bytes, counter: int, count: int, nonce: bytes = bytes(12), device: torch.device | str = "cpu"
) -> Tensor:
    """Blocks `counter`, `counter` + 1, ... of the key stream (RFC 8439, section 2.3), int32 (count, 16).

    The state of all blocks is four rows of four words, (4, count) each; a round works on whole rows.
    """
    fixed = torch.from_numpy(np.frombuffer(b"expand 32-byte k" + key, "<i4").copy()).to(device)
    places = (counter + torch.arange(count, device=device)).to(torch.int32)
    rest = torch.from_numpy(np.frombuffer(nonce, "<i4").copy()).to(device)[:, None].expand(3, count)
    rows = [each[:, None].expand(4, count) for each in torch.split(fixed, 4)]
    start = torch.cat([*rows, places[None], rest])
    a, b, c, d = torch.split(start, 4)
    for _ in range(10):
        a, b, c, d = _quarter_rounds(a, b, c, d)
        a, b, c, d = _quarter_rounds(a, b.roll(-1, 0), c.roll(-2, 0), d.roll(-3, 0))
        b, c, d = b.roll(1, 0), c.roll(2, 0), d.roll(3, 0)
    return (torch.cat([a, b, c, d]) + start).T.contiguous()


def _quarter_rounds(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One quarter round in each column (RFC 8439, section 2.1)."""
    for first, second in ((16, 12), (8, 7)):
        a = a + b
        d = _rotated(d ^ a, first)
        c = c + d
        b = _rotated(b ^ c, second)
    return a, b, c, d


def _rotated(x: Tensor, by: int) -> Tensor:
    # The right shift of int32 copies the sign, which the mask takes off.
    return (x << by) | ((x >> (32 - by)) & ((1 << by) - 1))
