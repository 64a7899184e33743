"""Client-level DP by the coordinator: whoever sees the checkpoints learns little about whether one SITE took part.

Mechanism: each update is clipped to norm C (`max_update_norm`), the clipped updates are added with equal weights,
Gaussian noise of standard deviation z C (`central_noise_multiplier` z) is added to the sum, and the sum is divided by
the public number `sites_per_round`, however many replied: also when nobody did. Neighbouring runs differ in one site,
added or removed with all its replies, and no other site is asked more or less for it. Sites trust the coordinator with
their raw updates here; DP-SGD at the sites does not ask for that.

No amplification by sampling is claimed: the coordinator knows whom it asks, and every round counts in full.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

KEY_BYTES = 32


def central_epsilon(noise_multipliers: Iterable[float], delta: float) -> float:
    """Smallest epsilon at `delta` after these releases: exact, so also the limit of numerical (PRV) accountants.

    Without subsampling, Gaussian mechanisms of multipliers z_i compose to one with mu^2 = sum 1 / z_i^2 (adaptively,
    too: Dong, Roth and Su 2019, arXiv 1905.02383, Corollary 3.3), whose privacy curve is known in closed form (Balle
    and Wang 2018, arXiv 1805.06530, Theorem 8): delta(eps) = Phi(mu / 2 - eps / mu) - e^eps Phi(-mu / 2 - eps / mu).

    Args:
        noise_multipliers: z of each release, above 0.
        delta: in (0, 1).
    """
    mu = math.sqrt(math.fsum(1 / z**2 for z in noise_multipliers))
    if mu == 0:
        return 0.0
    low, high = 0.0, 1.0
    while _delta(high, mu) > delta:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _delta(middle, mu) > delta else (low, middle)
    return high


def sensitivity(bound: float, num_elements: int, scale_bits: int, margin: float) -> float:
    """Largest L2 norm of what one site adds to the sum, as it is computed.

    Args:
        bound: C.
        num_elements: d; rounding to the grid moves each element by at most half a step.
        scale_bits: the grid's step is 2^-scale_bits.
        margin: updates are clipped to `margin` C, so that the rounding usually fits below C.
    """
    return max(bound, bound * margin + math.sqrt(num_elements) * 2.0 ** -(scale_bits + 1))


def grid_noise(key: bytes, deviation: float, scale_bits: int) -> Callable[[int], NDArray[np.int64]]:
    """Gaussian noise, rounded to the grid of a fixed-point sum.

    The sum lies on the grid, so round(sum + noise) = sum + round(noise): what is released is post-processing of the
    Gaussian mechanism, and no low bit of a float tells of the sum. Values come from a ChaCha20 keystream by Box and
    Muller's transform with 53-bit uniforms; what that cuts off lies beyond 8.5 deviations (probability 2e-17).

    Args:
        key: 32 secret bytes, used for one release only.
        deviation: z times the sensitivity.
        scale_bits: the grid's step is 2^-scale_bits.

    Returns:
        Draws the next so many elements, in units of the grid.
    """
    stream = Cipher(ChaCha20(key, bytes(16)), None).encryptor()
    steps = deviation * 2.0**scale_bits

    def draw(count: int) -> NDArray[np.int64]:
        pairs = (count + 1) // 2
        words = np.frombuffer(stream.update(bytes(16 * pairs)), np.dtype("<u8")) >> np.uint64(11)
        uniform_2P = words.astype(np.float64).reshape(2, pairs) * 2.0**-53  # noqa: N806  # shape suffix
        radius_P = steps * np.sqrt(-2 * np.log(uniform_2P[0] + 2.0**-53))  # noqa: N806
        angle_P = 2 * math.pi * uniform_2P[1]  # noqa: N806
        values = np.concatenate([radius_P * np.cos(angle_P), radius_P * np.sin(angle_P)])[:count]
        noise: NDArray[np.int64] = np.rint(values).astype(np.int64)
        return noise

    return draw


def _delta(epsilon: float, mu: float) -> float:
    second = epsilon + _log_phi(-mu / 2 - epsilon / mu)
    return _phi(mu / 2 - epsilon / mu) - math.exp(second)


def _phi(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def _log_phi(x: float) -> float:
    """Log Phi(x), also where Phi underflows."""
    if x > -30:
        return math.log(_phi(x))
    return -x * x / 2 - math.log(-x) - math.log(2 * math.pi) / 2 - 1 / (x * x)
