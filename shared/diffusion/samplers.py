# ruff: noqa: N803 - shape suffixes
"""From noise to x_0: DDPM ancestral sampling, DDIM and DPM-Solver++(2M), as pure functions.

A solver is given the network as a function of (x_t, t), the start x_T and an iterator of noise; it keeps its state in
the dtype of x_T (float32), whatever the network computes in. Sampling uses no mask. Its coefficients are Python floats
from the schedule's float64 tables.

Time indices are 0..T-1 as in `schedule`; after the last one comes x_0 itself, whose signal is 1 and noise 0.

Shapes: B images, C channels, H W pixels (or coefficients) of the network's input.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from shared.diffusion.schedule import Prediction, Schedule, solve_x_0
from shared.errors import InputError

Sampler = Literal["ddpm", "ddim", "dpm++"]
Denoise = Callable[[Tensor, int], Tensor]
"""(x_t of shape (B, C, H, W), t) to the network's output of the same shape: eps, v or x_0."""

HALF_LOG_SNR_FLOOR = -5.1
"""Where the log-SNR grid starts at the earliest: linear ends at -5.06, but cosine at -9.9, and an unfloored grid would
spend its first steps there, several of them on one index."""


def time_grid(schedule: Schedule, sampler: Sampler, num_steps: int, *, is_truncated: bool = False) -> list[int]:
    """Falling time indices at which the sampler evaluates the network; their number is the NFE.

    DDPM and DDIM: evenly spaced in t from T - 1 (T = 1000 in 250 steps: 999, 995, ..., 3), to the nearest index.
    Truncated, DDIM's are the authors' where `num_steps` does not divide T: theirs are cut off, in float32.
    DPM-Solver++: evenly spaced in log-SNR from the floor to t = 0; indices that coincide are visited once.

    Raises:
        InputError: `num_steps` is not in 1..T.
    """
    timesteps = schedule.timesteps
    if not 1 <= num_steps <= timesteps:
        raise InputError(
            f"evaluation.steps {num_steps} is not in 1..{timesteps}: at most diffusion.timesteps {timesteps}"
        )
    if sampler == "ddim" and is_truncated:
        return torch.linspace(-1, timesteps - 1, num_steps + 1)[1:].int().flip(0).tolist()
    if sampler != "dpm++":
        return [round(timesteps - step * timesteps / num_steps) - 1 for step in range(num_steps)]
    half_log_snr = schedule.half_log_snr.cpu()
    start, end = max(HALF_LOG_SNR_FLOOR, float(half_log_snr[-1])), float(half_log_snr[0])
    targets = torch.linspace(start, end, num_steps, dtype=torch.float64)
    nearest = (half_log_snr[:, None] - targets).abs().argmin(0)
    return sorted(set(nearest.tolist()), reverse=True)


def ddpm(
    denoise: Denoise,
    schedule: Schedule,
    x_T: Tensor,
    noise: Iterator[Tensor],
    *,
    num_steps: int,
    prediction: Prediction,
    clip_x_0: bool,
    highest: Tensor | float = 1.0,
) -> Tensor:
    """Ancestral sampling, Eq. 2 of the paper, written through x_0 so that it can be clipped (DDPM, Eq. 7).

    x_{t-1} = (sqrt(ab') beta x_0 + sqrt(alpha) (1 - ab') x_t) / (1 - ab) + sigma z, with ab and ab' the alpha_bar at t
    and at the next index of the grid, alpha = ab / ab', beta = 1 - alpha, sigma^2 = beta (1 - ab') / (1 - ab). With
    num_steps = T and without clipping this is Eq. 2 to rounding.

    Args:
        denoise: the network.
        schedule: the forward process.
        x_T: (B, C, H, W) start.
        noise: the z of each step but the last.
        num_steps: evaluations, at most T.
        prediction: what `denoise` returns.
        clip_x_0: clamp each predicted x_0 to [-1, `highest`].
        highest: one number, or (C, 1, 1) of the channels.

    Returns:
        x_0 in the shape and dtype of `x_T`.
    """
    x = x_T
    for t, alpha_bar, after in _steps(schedule, time_grid(schedule, "ddpm", num_steps)):
        x_0 = _x_0(denoise(x, t), x, alpha_bar, prediction, clip_x_0, highest)
        alpha = alpha_bar / after
        beta = 1 - alpha
        mean = (math.sqrt(after) * beta * x_0 + math.sqrt(alpha) * (1 - after) * x) / (1 - alpha_bar)
        sigma = math.sqrt(beta * (1 - after) / (1 - alpha_bar))
        x = mean + sigma * next(noise) if sigma else mean
    return x


def ddim(
    denoise: Denoise,
    schedule: Schedule,
    x_T: Tensor,
    noise: Iterator[Tensor],
    *,
    num_steps: int,
    eta: float,
    prediction: Prediction,
    clip_x_0: bool,
    highest: Tensor | float = 1.0,
    rederive_eps: bool = True,
    is_truncated: bool = False,
) -> Tensor:
    """DDIM (arXiv 2010.02502, Eq. 12 and 16): eta = 0 is deterministic, eta = 1 has the variance of DDPM.

    x' = sqrt(ab') x_0 + sqrt(1 - ab' - sigma^2) eps + sigma z, with ab and ab' as in `ddpm` and
    sigma = eta sqrt((1 - ab') / (1 - ab)) sqrt(1 - ab / ab').
    eps is derived from the (clipped) x_0, so that x_t, x_0 and eps agree with each other. Without `rederive_eps` a
    network that predicts eps keeps its own, as in the authors' code, where they disagree once x_0 is clipped.

    Args:
        denoise: the network.
        schedule: the forward process.
        x_T: (B, C, H, W) start.
        noise: the z of each step but the last; not read when eta is 0.
        num_steps: evaluations, at most T.
        eta: share of DDPM's noise, in [0, 1].
        prediction: what `denoise` returns.
        clip_x_0: clamp each predicted x_0 to [-1, `highest`].
        highest: one number, or (C, 1, 1) of the channels.
        rederive_eps: take eps from the clipped x_0; else keep it, where the network predicts eps.
        is_truncated: see `time_grid`.

    Returns:
        x_0 in the shape and dtype of `x_T`.
    """
    x = x_T
    keeps_eps = prediction == "eps" and not rederive_eps
    for t, alpha_bar, after in _steps(schedule, time_grid(schedule, "ddim", num_steps, is_truncated=is_truncated)):
        output = denoise(x, t)
        x_0 = _x_0(output, x, alpha_bar, prediction, clip_x_0, highest)
        eps = output.to(x.dtype) if keeps_eps else (x - math.sqrt(alpha_bar) * x_0) / math.sqrt(1 - alpha_bar)
        sigma = eta * math.sqrt((1 - after) / (1 - alpha_bar) * (1 - alpha_bar / after))
        x = math.sqrt(after) * x_0 + math.sqrt(max(0.0, 1 - after - sigma**2)) * eps
        x = x + sigma * next(noise) if sigma else x
    return x


def dpm_solver_pp_2m(
    denoise: Denoise,
    schedule: Schedule,
    x_T: Tensor,
    *,
    num_steps: int,
    prediction: Prediction,
    clip_x_0: bool,
    highest: Tensor | float = 1.0,
) -> Tensor:
    """DPM-Solver++(2M), arXiv 2211.01095, Algorithm 2, on a grid uniform in log-SNR; deterministic.

    The first step and the last one, down to x_0, are of first order.

    Args:
        denoise: the network.
        schedule: the forward process.
        x_T: (B, C, H, W) start.
        num_steps: evaluations asked for, at most T; `time_grid` tells how many remain when indices coincide.
        prediction: what `denoise` returns.
        clip_x_0: clamp each predicted x_0 to [-1, `highest`].
        highest: one number, or (C, 1, 1) of the channels.

    Returns:
        x_0 in the shape and dtype of `x_T`.
    """
    grid = time_grid(schedule, "dpm++", num_steps)
    signal, noise, half_log_snr = (table.tolist() for table in (schedule.signal, schedule.noise, schedule.half_log_snr))
    x, x_0_before, h_before = x_T, x_T, 0.0
    for t, after in pairwise(grid):
        x_0 = _x_0(denoise(x, t), x, signal[t] ** 2, prediction, clip_x_0, highest)
        h = half_log_snr[after] - half_log_snr[t]
        direction = x_0 + h / (2 * h_before) * (x_0 - x_0_before) if h_before else x_0
        x = noise[after] / noise[t] * x - signal[after] * math.expm1(-h) * direction
        x_0_before, h_before = x_0, h
    return _x_0(denoise(x, grid[-1]), x, signal[grid[-1]] ** 2, prediction, clip_x_0, highest)


def _steps(schedule: Schedule, grid: list[int]) -> Iterator[tuple[int, float, float]]:
    """(t, alpha_bar at t, alpha_bar at the next index), the last one 1."""
    alpha_bar = schedule.alpha_bar.tolist()
    after = [*(alpha_bar[t] for t in grid[1:]), 1.0]
    return zip(grid, (alpha_bar[t] for t in grid), after, strict=True)


def _x_0(
    output: Tensor, x_t: Tensor, alpha_bar: float, prediction: Prediction, clip_x_0: bool, highest: Tensor | float
) -> Tensor:
    x_0 = solve_x_0(prediction, output.to(x_t.dtype), x_t, math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar))
    if not clip_x_0:
        return x_0
    return x_0.clamp(-1, highest) if isinstance(highest, float) else x_0.clamp(min=-1).minimum(highest)
