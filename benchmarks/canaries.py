# ruff: noqa: N806
"""One-run audit of DP-SGD with white-box gradient canaries (Steinke, Nasr and Jagielski, arXiv 2305.08846).

1,000 canaries are in or out of a throw-away training by a fair coin. Each has its own coordinate of a linear model and
a gradient of norm far above C there; the auditor sees every noised gradient, scores a canary by the sum at its
coordinate, and guesses the 100 highest "in" and the 100 lowest "out". The trainings run the whole of `train_private`:
sampling, micro-batches, clipping, noise. With the noise off the lower bound must be at least 3: the audit has teeth.
With noise it must stay at or below the ledger's epsilon.
"""

import math
import sys
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.measure import verdict
from client import privacy
from client.privacy import epsilon, train_private
from client.spending import Spending
from shared.config import Experiment

SEED = 0
ROUNDS = 1
CANARIES, GUESSES, DELTA, CONFIDENCE = 1000, 200, 1e-5, 0.95
NEEDED_WITHOUT_NOISE = 3.0
PLANS = [(1.0, 0.5, 10), (2.0, 1.0, 4), (0.7, 0.1, 40)]
"""Noise multiplier, sampling rate, steps."""


class Numbered:
    """One image per unit whose first pixels spell the unit's number."""

    def __init__(self, present: NDArray[np.int64]) -> None:
        self.present = present

    def batch(self, ids: NDArray[np.int64]) -> Tensor:
        """uint8 (B, 3, 8, 8)."""
        x_BCHW = torch.zeros(len(ids), 3, 8, 8, dtype=torch.uint8)
        numbers = torch.as_tensor(self.present[ids])
        x_BCHW[:, 0, 0, 0], x_BCHW[:, 0, 0, 1] = (numbers // 256).byte(), (numbers % 256).byte()
        return x_BCHW


def main() -> int:
    """Print the bound with the noise off, and for each plan beside its epsilon; 0 when all is as it must be."""
    rng = np.random.default_rng(SEED)
    without = audit(1e-9, 0.5, 10, rng)
    print(f"noise off: epsilon is at least {without:.2f} (needs {NEEDED_WITHOUT_NOISE:g})")
    texts, is_sound = [], True
    for sigma, rate, steps in PLANS:
        bound, spent = audit(sigma, rate, steps, rng), epsilon([Spending(sigma, rate, steps)], DELTA)
        print(f"sigma {sigma}, q {rate}, {steps} steps: at least {bound:.2f}, the ledger says {spent:.2f}")
        texts.append(f"{bound:.2f} of {spent:.2f}")
        is_sound &= bound <= spent
    text = f"noise off {without:.2f} (needs {NEEDED_WITHOUT_NOISE:g}); with noise {', '.join(texts)} (bound of epsilon)"
    return verdict("canary audit", text, reached=without >= NEEDED_WITHOUT_NOISE and is_sound)


def audit(sigma: float, rate: float, steps: int, rng: np.random.Generator, clipping: str = "fast") -> float:
    """Lower bound of epsilon from one training."""
    is_in = rng.random(CANARIES) < 0.5
    scores = train_and_score(np.flatnonzero(is_in), sigma, rate, steps, clipping)
    order = np.argsort(scores)
    right = int(is_in[order[-GUESSES // 2 :]].sum() + (~is_in[order[: GUESSES // 2]]).sum())
    return lower_bound(CANARIES, GUESSES, right)


def train_and_score(
    present: NDArray[np.int64], sigma: float, rate: float, steps: int, clipping: str
) -> NDArray[np.float64]:
    """Sum over the steps of the noised gradient at each canary's coordinate."""
    sections = {
        "model": {"image_size": 8},
        "data": {"horizontal_flip": False},
        "federation": {"local_steps": steps},
        "privacy": {
            "mechanism": "dp-sgd",
            "noise_multiplier": sigma,
            "sample_rate": rate,
            "expected_batch": 100,
            "micro_batch": 64,
            "clipping": clipping,
        },
    }
    model = nn.Sequential(nn.Linear(CANARIES, 1, bias=False))
    scores = torch.zeros(CANARIES, dtype=torch.float64)

    def collect() -> None:
        gradient = model[0].weight.grad
        assert isinstance(gradient, Tensor)
        scores.sub_(gradient[0].double())

    with mock.patch.object(privacy, "per_image_loss", canary_loss):
        train_private(
            model,
            Experiment.model_validate(sections),
            Numbered(present),
            list(np.arange(len(present)).reshape(-1, 1)),
            device=torch.device("cpu"),
            after_noise=collect,
        )
    return scores.numpy()


def canary_loss(model: nn.Module, _schedule: object, _experiment: Experiment, images: Tensor, *_draw: Tensor) -> Tensor:
    """(B,) losses whose gradient is -50 at the canary's own coordinate, 0 elsewhere: clipped to C by the training."""
    numbers = images[:, 0, 0, 0].long() * 256 + images[:, 0, 0, 1].long()
    x_B1D = 50 * nn.functional.one_hot(numbers, CANARIES).float()[:, None]
    return -model(x_B1D)[:, 0, 0]  # type: ignore[no-any-return]


def lower_bound(canaries: int, guesses: int, right: int) -> float:
    """Largest epsilon that `right` of `guesses` correct guesses refute at the confidence, by bisection; 0 if none."""
    low, high = 0.0, 20.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(canaries, guesses, right, middle) < 1 - CONFIDENCE else (low, middle)
    return low


def p_value(canaries: int, guesses: int, right: int, candidate: float) -> float:
    """Probability of so many correct guesses under (candidate, delta) (theorem 5.2 of the paper, fair coins)."""
    q = 1 / (1 + math.exp(-candidate))
    # Binomial probabilities of 0 to `guesses` correct ones.
    pmf = np.array([math.comb(guesses, k) * q**k * (1 - q) ** (guesses - k) for k in range(guesses + 1)])
    alpha = (np.cumsum(pmf[:right][::-1]) / np.arange(1, right + 1)).max(initial=0.0)
    return float(min(1.0, pmf[right:].sum() + 2 * canaries * DELTA * alpha))


if __name__ == "__main__":
    sys.exit(main())
