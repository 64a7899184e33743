"""Arithmetic of the accountant's Fourier transforms."""

import math

import numpy as np
from numpy.typing import NDArray


def fast_length(size: int) -> int:
    """Smallest even number from `size` on without prime factors above 5."""
    odd = [3**a * 5**b for a in range(8) for b in range(6)]
    return min(int(factor * 2 ** max(1, math.ceil(math.log2(size / factor)))) for factor in odd)


def power(base: NDArray[np.complex128], exponent: int) -> NDArray[np.complex128]:
    """`base` to a positive integer power by squaring; much faster than the complex power function."""
    result = np.ones_like(base)
    while exponent:
        if exponent % 2:
            result *= base
        exponent //= 2
        base = base * base if exponent else base
    return result
