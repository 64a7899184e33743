"""One-run audit of DP-SGD with white-box gradient canaries, as `maskfed-client audit canaries` runs it.

With the noise off the lower bound must be at least 3: the audit has teeth. With noise it must be sound, and at least
60 % of the ledger's epsilon where that is at most 8. The bound assumes a Poisson-subsampled Gaussian mechanism.
"""

import sys

import numpy as np

from benchmarks.measure import verdict, without_options
from client.privacy.canaries import NO_NOISE, audit_canaries
from shared.experiment.config import Experiment

SEED = 0
ROUNDS = 1
DELTA = 1e-5
NEEDED_WITHOUT_NOISE, NEEDED_SHARE, UP_TO = 3.0, 0.6, 8.0
PLANS = [(2.0, 1.0, 4), (1.5, 0.5, 10), (0.8, 0.1, 40), (1.0, 0.02, 400), (1.0, 0.5, 10)]
"""Noise multiplier, sampling rate, steps."""


def main() -> int:
    """Print the bound with the noise off, and for each plan beside its epsilon; 0 when all is as it must be."""
    rng = np.random.default_rng(SEED)
    without = audit_canaries(plan(NO_NOISE, 0.5, 10), DELTA, rng).bound
    print(f"noise off: epsilon is at least {without:.2f} (needs {NEEDED_WITHOUT_NOISE:g})")
    texts, is_reached = [], without >= NEEDED_WITHOUT_NOISE
    for sigma, rate, steps in PLANS:
        found = audit_canaries(plan(sigma, rate, steps), DELTA, rng)
        print(
            f"sigma {sigma}, q {rate}, {steps} steps: at least {found.bound:.2f} ({found.correct} of {found.guesses} "
            f"right), the ledger says {found.epsilon:.2f}"
        )
        texts.append(f"{found.bound:.2f} of {found.epsilon:.2f}")
        is_reached &= found.is_sound and (found.epsilon > UP_TO or found.bound >= NEEDED_SHARE * found.epsilon)
    text = (
        f"noise off {without:.2f} (needs {NEEDED_WITHOUT_NOISE:g}); with noise {', '.join(texts)} (needs "
        f"{NEEDED_SHARE:.0%} up to {UP_TO:g}), if the mechanism is a subsampled Gaussian"
    )
    return verdict("canary audit", text, reached=is_reached)


def plan(sigma: float, rate: float, steps: int) -> Experiment:
    """A training of the canaries."""
    privacy = {"mechanism": "dp-sgd", "noise_multiplier": sigma, "sample_rate": rate, "expected_batch": 100}
    return Experiment.model_validate(
        {
            "model": {"image_size": 8},
            "data": {"horizontal_flip": False},
            "federation": {"local_steps": steps},
            "privacy": {**privacy, "micro_batch": 64},
        }
    )


if __name__ == "__main__":
    sys.exit(without_options(main, __doc__))
