"""Where an arm is measured: image counts as steps and rounds."""

import math
from dataclasses import dataclass

from server.studies.schema import Arm, Stage
from shared.experiment.config import Experiment


@dataclass(frozen=True)
class Milestone:
    """Where an arm is measured."""

    images: int
    """Seen so far, over all sites."""
    steps: int
    """Optimizer steps, of one site where there are several."""
    rounds: int = 0


@dataclass(frozen=True)
class ArmPlan:
    """The milestones of an arm in order; the last is its end."""

    milestones: tuple[Milestone, ...]
    sites: int


def plan(experiment: Experiment, arm: Arm, stage: Stage) -> ArmPlan:
    """Image counts as steps and rounds, rounded up to whole ones.

    Raises:
        InputError: the recipe says no length.
    """
    batch = experiment.train.batch
    if not arm.sites:
        total = stage.images or experiment.train.steps * batch
        steps = sorted({math.ceil(images / batch) for images in (*stage.at, total)})
        return ArmPlan(tuple(Milestone(count * batch, count) for count in steps), 0)
    local_steps = experiment.federation.local_steps
    per_round = arm.sites * local_steps * batch
    total = stage.images or experiment.federation.rounds * per_round
    rounds = sorted({math.ceil(images / per_round) for images in (*stage.at, total)})
    return ArmPlan(tuple(Milestone(count * per_round, count * local_steps, count) for count in rounds), arm.sites)
