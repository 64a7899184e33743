# ruff: noqa: N803 - shape suffixes
"""Noise schedules and the forward process: q(x_t | x_0) and the three ways to parameterise what a network predicts.

Time: the paper counts t in 1..T; code counts the index t in 0..T-1, so index t is the paper's t + 1. `alpha_bar[t]` is
the product of the first t + 1 alphas.

Shapes: B images; trailing dimensions are free, so the same functions serve images (B, C, H, W) and tokens (B, V, P).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shared.errors import InputError

Prediction = Literal["eps", "v", "x_0"]

_COSINE_OFFSET = 0.008
_COSINE_BETA_MAX = 0.999
_LINEAR_BETA_FIRST, _LINEAR_BETA_LAST = 1e-4, 0.02


@dataclass(frozen=True)
class Schedule:
    """Tables of one forward process, each of shape (T,) in float64; derived from the configuration, never stored."""

    beta: Tensor
    """Variance added at each step, in (0, 1)."""
    alpha: Tensor
    """1 - beta."""
    alpha_bar: Tensor
    """Product of the alphas up to and including t: the share of signal variance left in x_t."""
    signal: Tensor
    """sqrt(alpha_bar), the factor of x_0 in x_t."""
    noise: Tensor
    """sqrt(1 - alpha_bar), the factor of eps in x_t."""
    posterior_sigma: Tensor
    """Standard deviation of q(x_{t-1} | x_t, x_0), the sigma_t of Eq. 2 (DDPM, arXiv 2006.11239, Eq. 7); 0 at t = 0."""

    @property
    def timesteps(self) -> int:
        """T."""
        return len(self.beta)

    @property
    def half_log_snr(self) -> Tensor:
        """lambda_t = log(signal / noise), (T,) float64, falling in t (DPM-Solver, arXiv 2206.00927, section 3)."""
        return self.signal.log() - self.noise.log()

    def to(self, device: torch.device | str) -> "Schedule":
        """The same tables on `device`, so that a training step copies nothing to it."""
        return Schedule(**{name: table.to(device) for name, table in vars(self).items()})


def make_schedule(kind: Literal["linear", "cosine"], timesteps: int) -> Schedule:
    """Tables of the `linear` (beta from 1e-4 to 0.02; DDPM, section 4) or `cosine` schedule (arXiv 2102.09672, Eq. 17).

    Args:
        kind: which betas.
        timesteps: T, at least 2.

    Raises:
        InputError: T is below 2.
    """
    if timesteps < 2:
        raise InputError(
            f"diffusion.timesteps {timesteps} is below 2: a schedule needs a first and a last step, give 1000"
        )
    match kind:
        case "linear":
            beta = torch.linspace(_LINEAR_BETA_FIRST, _LINEAR_BETA_LAST, timesteps, dtype=torch.float64)
        case "cosine":
            beta = _cosine_beta(timesteps)
    return _from_beta(beta)


def q_sample(schedule: Schedule, x_0: Tensor, t_B: Tensor, eps: Tensor) -> Tensor:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, the noising inside Eq. 1 and 4 (DDPM, Eq. 4).

    Args:
        schedule: the forward process.
        x_0: (B, ...) clean data in [-1, 1].
        t_B: (B,) or (B, K) time indices in 0..T-1; a second dimension must match the second one of `x_0`.
        eps: standard normal noise, shape of `x_0`.

    Returns:
        x_t with the shape and dtype of `x_0`.
    """
    return at(schedule.signal, t_B, x_0) * x_0 + at(schedule.noise, t_B, x_0) * eps


def training_target(schedule: Schedule, prediction: Prediction, x_0: Tensor, t_B: Tensor, eps: Tensor) -> Tensor:
    """What the network's output is compared with: eps (Eq. 1), x_0 or v.

    v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (arXiv 2202.00512, appendix D). Shapes as in `q_sample`.
    """
    match prediction:
        case "eps":
            return eps
        case "x_0":
            return x_0
        case "v":
            return at(schedule.signal, t_B, x_0) * eps - at(schedule.noise, t_B, x_0) * x_0


def predict_x_0(schedule: Schedule, prediction: Prediction, output: Tensor, x_t: Tensor, t_B: Tensor) -> Tensor:
    """The x_0 that a network output stands for, given x_t; inverse of `training_target`. Shapes as in `q_sample`."""
    return solve_x_0(prediction, output, x_t, at(schedule.signal, t_B, x_t), at(schedule.noise, t_B, x_t))


def solve_x_0(
    prediction: Prediction, output: Tensor, x_t: Tensor, signal: Tensor | float, noise: Tensor | float
) -> Tensor:
    """`predict_x_0` for given sqrt(alpha_bar) and sqrt(1 - alpha_bar), numbers or tensors that broadcast."""
    match prediction:
        case "eps":
            return (x_t - noise * output) / signal
        case "x_0":
            return output
        case "v":
            return signal * x_t - noise * output


def at(table: Tensor, t_B: Tensor, like: Tensor) -> Tensor:
    """Entries `table[t_B]` in the dtype of `like`, with trailing ones so that they broadcast against it."""
    picked = table.to(t_B.device)[t_B].to(like.dtype)
    return picked.reshape(*t_B.shape, *(1,) * (like.ndim - t_B.ndim))


def _cosine_beta(timesteps: int) -> Tensor:
    time = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    alpha_bar = ((time + _COSINE_OFFSET) / (1 + _COSINE_OFFSET) * (math.pi / 2)).cos().square()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=_COSINE_BETA_MAX)


def _from_beta(beta: Tensor) -> Schedule:
    alpha = 1 - beta
    alpha_bar = alpha.cumprod(0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    variance = beta * (1 - before) / (1 - alpha_bar)
    return Schedule(beta, alpha, alpha_bar, alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), variance.sqrt())
