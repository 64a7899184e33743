"""One-run audit of DP-SGD with white-box gradient canaries (Steinke, Nasr and Jagielski, arXiv 2305.08846).

1,000 canaries are in or out of a throw-away training by a fair coin. Each has its own coordinate of a linear model and
a gradient of norm far above C there, so they are independent; the auditor sees every noised gradient and guesses "in"
where the likelihood of what is at a canary's coordinate is larger with it than without. The training runs the whole of
`train_private` at a plan's own constants: sampling, micro-batches, clipping, noise. No private image is in it, so it
costs nothing.

The bound is by f-DP (as in Mahloujifar, Melis and Chaudhuri, arXiv 2410.22235): the assumption is that the training is
some Poisson-subsampled Gaussian mechanism of the plan's rate and number of steps, and of unknown noise. Each noise
allows guesses to be right with a known probability at most; the bound is the epsilon of the largest noise that the
guesses refute.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import bdtrc, betaincinv
from torch import Tensor, nn

from client.privacy.accounting import epsilon, guess_success
from client.privacy.dp_sgd import train_private
from client.records.spending import Spending
from shared.errors import InputError
from shared.experiment.config import Experiment

CANARIES, CONFIDENCE = 1000, 0.95
ALARM = 0.001
"""A training whose guesses are as good as they are with less than this probability is called unsound."""
NO_NOISE = 1e-9
SIDE, HEIGHT = 8, 50.0
"""Pixels of a canary's image, and the norm of its gradient before clipping."""
LEAST_NOISE, FACTOR = 0.3, 8.0
"""The noise is sought from 1/8 to 8 times the plan's, and not below this: epsilons are in the hundreds there."""
BISECTIONS = 10


@dataclass(frozen=True)
class CanaryResult:
    """What the auditor of one training found."""

    bound: float
    """Epsilon is at least this, with 95 percent confidence; 0 when the guesses tell nothing."""
    guesses: int
    correct: int
    epsilon: float
    """What the ledger charges for the same plan."""
    p_value: float = 1.0
    """Probability of so many correct guesses, at most, where the plan's noise is there."""
    promise_p_value: float = 1.0
    """The same where the ledger's epsilon holds, whatever the mechanism."""

    @property
    def is_sound(self) -> bool:
        """Whether noise and accounting survive: such guesses are next to impossible under neither."""
        return min(self.p_value, self.promise_p_value) >= ALARM


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
    scores = train_and_score(plan, np.flatnonzero(is_in), torch.device(device), precision)
    correct = int(((scores > 0) == is_in).sum())
    privacy = plan.privacy
    spent = Spending(privacy.noise_multiplier, privacy.sample_rate, plan.federation.local_steps)
    chance = guess_success(spent) if spent.noise_multiplier >= LEAST_NOISE else 1.0
    promised = epsilon([spent], delta)
    return CanaryResult(
        lower_bound(correct, spent, delta),
        CANARIES,
        correct,
        promised,
        tail(correct, chance),
        promise_p_value(correct, promised, delta),
    )


def train_and_score(
    plan: Experiment, present: NDArray[np.int64], device: torch.device, precision: str
) -> NDArray[np.float64]:
    """Logarithm of how much likelier the noised gradients are with a canary than without it, (CANARIES,)."""
    privacy = plan.privacy
    log_out = math.log1p(-privacy.sample_rate) if privacy.sample_rate < 1 else -math.inf
    model = nn.Sequential(nn.Linear(CANARIES, 1, bias=False)).to(device)
    scores = torch.zeros(CANARIES, dtype=torch.float64)

    def collect() -> None:
        gradient = model[0].weight.grad
        assert isinstance(gradient, Tensor)
        y = -gradient[0].double().cpu() * (privacy.expected_batch / privacy.max_grad_norm)
        log_in = math.log(privacy.sample_rate) + (2 * y - 1) / (2 * privacy.noise_multiplier**2)
        scores.add_(torch.logaddexp(log_in, torch.tensor(log_out, dtype=torch.float64)))

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


def lower_bound(correct: int, plan: Spending, delta: float) -> float:
    """Epsilon of the largest noise that so many correct ones of all guesses refute; 0 if they refute none.

    Args:
        correct: number of right guesses.
        plan: whose rate and number of steps the training had.
        delta: of the epsilon.
    """
    surely = lower_success(correct)
    low, high = (max(plan.noise_multiplier, LEAST_NOISE) * factor for factor in (1 / FACTOR, FACTOR))
    low = max(low, LEAST_NOISE)
    if guess_success(plan._replace(noise_multiplier=high)) >= surely:
        return 0.0
    for _ in range(BISECTIONS):
        middle = math.sqrt(low * high)
        is_refuted = guess_success(plan._replace(noise_multiplier=middle)) < surely
        low, high = (low, middle) if is_refuted else (middle, high)
    return epsilon([plan._replace(noise_multiplier=high)], delta)


def lower_success(correct: int) -> float:
    """Lower confidence bound of the probability to guess right (Clopper and Pearson, one-sided)."""
    return float(betaincinv(correct, CANARIES - correct + 1, 1 - CONFIDENCE)) if correct else 0.0


def tail(correct: int, chance: float) -> float:
    """Probability of at least so many right guesses, each right with probability `chance`."""
    return float(bdtrc(correct - 1, CANARIES, chance)) if correct else 1.0


def promise_p_value(correct: int, promised: float, delta: float) -> float:
    """Probability of at least so many right guesses under (promised, delta)-DP, at most: needs no accountant.

    Steinke, Nasr and Jagielski (arXiv 2305.08846, theorem 5.2, fair coins, a guess on every canary).
    """
    chance = 1 / (1 + math.exp(-promised))
    pmf = np.array([math.comb(CANARIES, k) * chance**k * (1 - chance) ** (CANARIES - k) for k in range(CANARIES + 1)])
    alpha = (np.cumsum(pmf[:correct][::-1]) / np.arange(1, correct + 1)).max(initial=0.0)
    return float(min(1.0, pmf[correct:].sum() + 2 * CANARIES * delta * alpha))
