"""The learning rate over time. No torch: who bounds an update needs it, too."""

from collections.abc import Callable

from shared.experiment.config import Experiment
from shared.experiment.sections import OptimConfig


def lr_at(step: int, config: OptimConfig) -> float:
    """Learning rate of 0-based `step`: a linear ramp over `warmup_steps` that ends at `lr`, then constant.

    It begins with lr / warmup_steps, or, where `warmup_from_zero` is set, one step later with 0, as the authors'.
    """
    done = step if config.warmup_from_zero else step + 1
    return config.lr * min(1.0, done / config.warmup_steps) if config.warmup_steps else config.lr


def round_lr(experiment: Experiment, server_round: int) -> Callable[[int], float]:
    """Of each 0-based step of a site's round, from 1, which begins the warm-up anew or goes on with the run's.

    A site needs no memory for it: the request carries the round's number.
    """
    federation = experiment.federation
    before = (server_round - 1) * federation.local_steps if federation.warmup == "run" else 0
    return lambda step: lr_at(before + step, experiment.optim)
