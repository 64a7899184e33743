"""One-run audit of DP-SGD with white-box gradient canaries (Steinke, Nasr and Jagielski, arXiv 2305.08846).

1,000 canaries are in or out of a throw-away training by a fair coin. Each has its own coordinate of a linear model and
a gradient of norm far above C there; the auditor sees every noised gradient, scores a canary by the sum at its
coordinate, and guesses the 100 highest "in" and the 100 lowest "out". The training runs the whole of `train_private`
at a plan's own constants: sampling, micro-batches, clipping, noise. No private image is in it, so it costs nothing.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.privacy.accounting import epsilon
from client.privacy.dp_sgd import train_private
from client.records.spending import Spending
from shared.errors import InputError
from shared.experiment.config import Experiment

CANARIES, GUESSES, CONFIDENCE = 1000, 200, 0.95
"""Fixed beforehand: a number of guesses chosen afterwards would overstate the bound."""
NO_NOISE = 1e-9
SIDE, HEIGHT = 8, 50.0
"""Pixels of a canary's image, and the norm of its gradient before clipping."""


@dataclass(frozen=True)
class CanaryResult:
    """What the auditor of one training found."""

    bound: float
    """Epsilon is at least this, with 95 percent confidence; 0 when the guesses tell nothing."""
    guesses: int
    correct: int
    epsilon: float
    """What the ledger charges for the same plan."""

    @property
    def is_sound(self) -> bool:
        """Whether the accounting survives: the bound does not pass it."""
        return self.bound <= self.epsilon


def canary_plan(experiment: Experiment, *, noise_multiplier: float | None = None) -> Experiment:
    """The training of the canaries at the constants of a plan, all of its rounds in one.

    Args:
        experiment: whose `[privacy]` and number of steps are taken.
        noise_multiplier: in place of the plan's.

    Raises:
        InputError: a plan without DP.
    """
    if experiment.privacy.mechanism == "none":
        raise InputError("the experiment trains without DP: canaries audit a plan with privacy.mechanism dp-sgd")
    privacy = experiment.privacy.model_dump()
    if noise_multiplier is not None:
        privacy["noise_multiplier"] = noise_multiplier
    steps = experiment.federation.local_steps * experiment.federation.rounds
    return Experiment.model_validate(
        {
            "model": {"image_size": SIDE},
            "data": {"horizontal_flip": False},
            "federation": {"local_steps": steps},
            "privacy": privacy,
        }
    )


def audit_canaries(
    plan: Experiment, delta: float, rng: np.random.Generator, *, device: torch.device | str = "cpu",
    precision: str = "float32",
) -> CanaryResult:  # fmt: skip
    """Train once and guess who was in.

    Args:
        plan: of `canary_plan`.
        delta: of the bound and of epsilon.
        rng: tosses the coins.
        device: where the training runs.
        precision: of its forward and backward pass.
    """
    is_in = rng.random(CANARIES) < 0.5
    order = np.argsort(train_and_score(plan, np.flatnonzero(is_in), torch.device(device), precision))
    correct = int(is_in[order[-GUESSES // 2 :]].sum() + (~is_in[order[: GUESSES // 2]]).sum())
    privacy = plan.privacy
    spent = Spending(privacy.noise_multiplier, privacy.sample_rate, plan.federation.local_steps)
    return CanaryResult(lower_bound(CANARIES, GUESSES, correct, delta), GUESSES, correct, epsilon([spent], delta))


def train_and_score(
    plan: Experiment, present: NDArray[np.int64], device: torch.device, precision: str
) -> NDArray[np.float64]:
    """Sum over the steps of the noised gradient at each canary's coordinate, (CANARIES,)."""
    model = nn.Sequential(nn.Linear(CANARIES, 1, bias=False)).to(device)
    scores = torch.zeros(CANARIES, dtype=torch.float64)

    def collect() -> None:
        gradient = model[0].weight.grad
        assert isinstance(gradient, Tensor)
        scores.sub_(gradient[0].double().cpu())

    train_private(
        model,
        plan,
        _Numbered(present),
        list(np.arange(len(present)).reshape(-1, 1)),
        device=device,
        precision=precision,
        loss=canary_loss,
        after_noise=collect,
    )
    return scores.numpy()


class _Numbered:
    """One image per unit whose first pixels spell the unit's number."""

    def __init__(self, present: NDArray[np.int64]) -> None:
        self.present = present

    def batch(self, ids: NDArray[np.int64]) -> Tensor:
        """uint8 (B, 3, SIDE, SIDE)."""
        x_BCHW = torch.zeros(len(ids), 3, SIDE, SIDE, dtype=torch.uint8)  # noqa: N806
        numbers = torch.as_tensor(self.present[ids])
        x_BCHW[:, 0, 0, 0], x_BCHW[:, 0, 0, 1] = (numbers // 256).byte(), (numbers % 256).byte()
        return x_BCHW


def canary_loss(model: nn.Module, _schedule: object, _experiment: Experiment, images: Tensor, *_draw: Tensor) -> Tensor:
    """(B,) losses whose gradient is -50 at the canary's own coordinate, 0 elsewhere: clipped to C by the training."""
    # A unit's draws are all the same image.
    pixels = images[:, 0, 0, 0].long()
    one_hot = nn.functional.one_hot(pixels[:, 0] * 256 + pixels[:, 1], CANARIES).float()
    return -model(HEIGHT * one_hot[:, None])[:, 0, 0]  # type: ignore[no-any-return]


def lower_bound(canaries: int, guesses: int, right: int, delta: float) -> float:
    """Largest epsilon that `right` of `guesses` correct guesses refute at the confidence, by bisection; 0 if none."""
    low, high = 0.0, 20.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        is_refuted = p_value(canaries, guesses, right, middle, delta) < 1 - CONFIDENCE
        low, high = (middle, high) if is_refuted else (low, middle)
    return low


def p_value(canaries: int, guesses: int, right: int, candidate: float, delta: float) -> float:
    """Probability of so many correct guesses under (candidate, delta) (theorem 5.2 of the paper, fair coins)."""
    q = 1 / (1 + math.exp(-candidate))
    # Binomial probabilities of 0 to `guesses` correct ones.
    pmf = np.array([math.comb(guesses, k) * q**k * (1 - q) ** (guesses - k) for k in range(guesses + 1)])
    alpha = (np.cumsum(pmf[:right][::-1]) / np.arange(1, right + 1)).max(initial=0.0)
    return float(min(1.0, pmf[right:].sum() + 2 * canaries * delta * alpha))
