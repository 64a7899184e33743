"""Client-level DP by the coordinator: whoever sees the checkpoints learns little about whether one SITE took part.

Mechanism: each update is clipped to norm C (`max_update_norm`), the clipped updates are added with equal weights,
Gaussian noise of standard deviation z C (`central_noise_multiplier` z) is added to the sum, and the sum is divided by
the public number `sites_per_round`, however many replied. Neighbouring runs differ in one site, added or removed with
all its replies. Sites trust the coordinator with their raw updates here; DP-SGD at the sites does not ask for that.

No amplification by sampling is claimed: the coordinator knows whom it asks, and every round counts in full.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.experiment.sections import FederationConfig
from shared.seeding import derive_seed
from shared.storage.files import write_atomically

SECRET_FILE = "central.secret"
Noise = Callable[[int], NDArray[np.float64]]
"""The next so many elements of a noise vector."""


def central_epsilon(noise_multiplier: float, releases: int, delta: float) -> float:
    """Smallest epsilon at `delta` after `releases` rounds: exact, so also the limit of numerical (PRV) accountants.

    Without subsampling, T Gaussian mechanisms of multiplier z compose to one of multiplier z / sqrt(T), whose privacy
    curve is known in closed form (Balle and Wang 2018, arXiv 1805.06530, Theorem 8; mu = sqrt(T) / z):
    delta(eps) = Phi(mu / 2 - eps / mu) - e^eps Phi(-mu / 2 - eps / mu).

    Args:
        noise_multiplier: z, above 0.
        releases: T, rounds that changed the weights.
        delta: in (0, 1).
    """
    if releases == 0:
        return 0.0
    mu = math.sqrt(releases) / noise_multiplier
    low, high = 0.0, 1.0
    while _delta(high, mu) > delta:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _delta(middle, mu) > delta else (low, middle)
    return high


def central_noise(secret: bytes, run: str, server_round: int, config: FederationConfig) -> Noise | None:
    """Noise for a round's sum; None when the option is off.

    The stream derives from the coordinator's secret, the run and the round: a round that is repeated after a crash,
    whose result nobody has seen, repeats its noise, and a finished one never meets the same noise again.
    """
    if not config.central_noise_multiplier:
        return None
    key = [derive_seed(secret, "central", run, server_round, half) for half in ("low", "high")]
    random = np.random.Generator(np.random.Philox(key=np.array(key, np.uint64)))
    deviation = config.central_noise_multiplier * config.max_update_norm

    def draw(count: int) -> NDArray[np.float64]:
        return random.normal(0.0, deviation, count)

    return draw


def read_secret(home: Path) -> bytes:
    """The coordinator's secret for noise, made when it is first needed; mode 0600."""
    path = home / SECRET_FILE
    if not path.exists():
        write_atomically(path, os.urandom(32).hex() + "\n")
        path.chmod(0o600)
    return bytes.fromhex(path.read_text(encoding="ascii"))


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
