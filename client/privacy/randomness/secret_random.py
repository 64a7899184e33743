"""Random numbers of a private round, from keyed ChaCha20 streams; the key comes from the system and is kept nowhere.

Each purpose and step has a stream of its own: who learned one of them, for instance from what a model makes of its
noise, would know nothing of the others.
"""

import math
import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from client.privacy.randomness.keystream import Keystream
from shared.seeding import Streams

POSITIVE = 2**63 - 1
"""Mask that leaves 63 bits of a word."""


def secret_streams() -> Streams:
    """A new root of streams from the system's generator."""
    return Streams(secrets.token_bytes(32))


class SecretRandom:
    """A source of random tensors, as `shared.random_numbers.RandomSource` says."""

    def __init__(self, key: bytes, device: torch.device | str = "cpu") -> None:
        self._stream = Keystream(key, device)

    @property
    def device(self) -> torch.device:
        """Where the numbers appear."""
        return self._stream.device

    def rand(self, shape: Sequence[int]) -> Tensor:
        """float32, uniform on the multiples of 2^-24 in [0, 1)."""
        return ((self._stream.bits(math.prod(shape)) >> 40 & 0xFFFFFF).float() * 2.0**-24).view(tuple(shape))

    def randn(self, shape: Sequence[int]) -> Tensor:
        """float32, standard normal."""
        count = math.prod(shape)
        pairs = self._stream.bits(2 * -(-count // 2)).view(2, -1)
        return box_muller(*pairs)[0].flatten()[:count].float().view(tuple(shape))

    def randint(self, high: int, shape: Sequence[int]) -> Tensor:
        """int64 in 0..high - 1; no value is likelier than another by more than high / 2^63."""
        return (self._stream.bits(math.prod(shape)) & POSITIVE).remainder(high).view(tuple(shape))

    def sample(self, count: int, rate: float) -> Tensor:
        """Numbers below `count`, each taken with probability `rate`, rounded down to a multiple of 2^-63.

        Rounding down: no unit is taken more often than it was charged for.
        """
        words = self._stream.bits(count) & POSITIVE
        taken = words < math.floor(rate * 2**63) if rate < 1 else torch.ones_like(words, dtype=torch.bool)
        return taken.nonzero()[:, 0]

    def shuffled(self, x: Tensor) -> Tensor:
        """`x` in a random order; words of 64 bits decide, of which two are the same once in 2^64 pairs."""
        return x[self._stream.bits(len(x)).argsort()]


def box_muller(k_1: Tensor, k_2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two independent standard normal numbers from two words (Box and Muller 1958), in float64.

    N = r cos(phi) and r sin(phi), with r = sqrt(-2 ln u) and phi = pi v, where u in (0, 1) and v in [-1, 1) are the
    words as fractions. The largest r is 9.35.

    Args:
        k_1: int64; its lower 63 bits give u.
        k_2: int64, all 64 bits give v.

    Returns:
        (2, ...) both numbers, u and r.
    """
    u = (k_1 & POSITIVE).double().mul_(2.0**-63)
    r = u.log().mul_(-2.0).sqrt_()
    phi = k_2.double().mul_(math.pi * 2.0**-63)
    return torch.stack([phi.cos(), phi.sin()]).mul_(r), u, r
