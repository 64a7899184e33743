"""The learning rate over time. No torch: who bounds an update needs it, too."""

import math
from collections.abc import Callable

from shared.experiment.config import Experiment
from shared.experiment.sections import OptimConfig


def lr_at(step: int, config: OptimConfig, steps: int) -> float:
    """Learning rate of 0-based `step` of a training of `steps` steps.

    A linear ramp that reaches `lr` after `warmup_steps`; where `decay` says so times half a cosine, which ends in 0.
    """
    ramp = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    match config.decay:
        case "none":
            return config.lr * ramp
        case "cosine":
            return config.lr * ramp * (1 + math.cos(math.pi * min(1.0, step / max(steps, 1)))) / 2


def central_lr(experiment: Experiment) -> Callable[[int], float]:
    """Of each 0-based step of a central training."""
    return lambda step: lr_at(step, experiment.optim, experiment.train.steps)


def round_lr(experiment: Experiment, server_round: int) -> Callable[[int], float]:
    """Of each 0-based step of a site's round, from 1: as if its round were the whole, or a part of the run.

    A site needs no memory for it: the request carries the round's number, and the plan the number of rounds.
    """
    federation, optim = experiment.federation, experiment.optim
    if federation.schedule == "round":
        return lambda step: lr_at(step, optim, federation.local_steps)
    before, steps = (server_round - 1) * federation.local_steps, federation.rounds * federation.local_steps
    return lambda step: lr_at(before + step, optim, steps)
