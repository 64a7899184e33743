"""Shamir's secret sharing (CACM 22, 1979) of 32-byte seeds over a prime field.

PyCryptodome's works on 16 bytes in GF(2^128) and would bring a second library of cryptography; this needs a polynomial
and Lagrange's formula, and is held against a linear solver in tests.
"""

import secrets
from collections.abc import Mapping

PRIME = 2**256 + 297
"""The smallest prime above 2^256, so that every seed is an element of the field."""
SECRET_BYTES, SHARE_BYTES = 32, 33


class ShareError(ValueError):
    """Shares that cannot be those of one seed."""


def split(secret: bytes, count: int, threshold: int) -> list[bytes]:
    """`count` shares of a seed: any `threshold` of them give it, fewer say nothing of it.

    Args:
        secret: 32 bytes.
        count: share number i is the polynomial's value at i + 1.
        threshold: in 1..count; the polynomial has this many random coefficients less one.
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= count:
        raise ValueError(f"{len(secret)} bytes in {count} shares, {threshold} needed: not a sharing")
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return [_value(coefficients, number + 1).to_bytes(SHARE_BYTES, "big") for number in range(count)]


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The seed whose shares these are, by number from 0; as many as the threshold, more do not matter.

    Raises:
        ShareError: no share, one that is no element of the field, or shares of no seed.
    """
    if not shares:
        raise ShareError("no share")
    points = {number + 1: element(share) for number, share in shares.items()}
    secret = sum(value * _weight(x, points) for x, value in points.items()) % PRIME
    if secret >= 2**256:
        raise ShareError("the shares are those of no seed")
    return secret.to_bytes(SECRET_BYTES, "big")


def element(share: bytes) -> int:
    """The number that a share is.

    Raises:
        ShareError: another length, or not below the prime.
    """
    number = int.from_bytes(share, "big")
    if len(share) != SHARE_BYTES or number >= PRIME:
        raise ShareError("a share that is no element of the field")
    return number


def _value(coefficients: list[int], x: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % PRIME
    return value


def _weight(x: int, points: Mapping[int, int]) -> int:
    """Lagrange's weight of the point `x` at 0: the product of x' / (x' - x) over all others."""
    above = below = 1
    for other in points:
        if other != x:
            above, below = above * other % PRIME, below * (other - x) % PRIME
    return above * pow(below, -1, PRIME) % PRIME
