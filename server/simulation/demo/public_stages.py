"""How long the public stages of the private demo are: what is left of the budget beside stages of a fixed price."""

from dataclasses import dataclass

from server.simulation.demo_budget import END_SECONDS, FORWARD_SPEEDUP, Budget
from shared.experiment.config import Experiment
from shared.planning.workload import DP_SLOWDOWN

FIRST_STEPS = 40
"""Steps of the public training after which the speed of this machine is known; the fewest of the first stage."""
LEAST_ALIGNED = 120
"""Fewer steps on aligned images show nothing: the round of DP-SGD computes as much as 72 steps."""
SET_UP_SECONDS = 240.0
"""On two idle cores: sites and coordinator come up, mean images, offers, a round's messages, canaries, release."""
START_SHARE = 0.25
"""Of the images that there is time for; the rest is halved: aligned, and public alone for comparison."""
EVALUATIONS = 4
"""Models whose images are measured: the start, public alone, before and after the round."""


@dataclass(frozen=True)
class PublicStages:
    """Steps of each public stage."""

    start: int
    aligned: int
    alone: int
    """With what the round of DP-SGD computes on top, so that public images alone get the same compute."""
    is_over: bool
    """The time does not suffice even for the shortest stages."""


def plan_stages(budget: Budget, rate: float, public: Experiment, private: Experiment, num_sites: int) -> PublicStages:
    """Divide what is left of the budget.

    Args:
        budget: of everything; the public training has begun.
        rate: images per second of public training on all cores.
        public: recipe of the public stages; its `train.steps` is the most that a stage gets.
        private: recipe of the private stages, whose length is fixed, since their price is.
        num_sites: sites on this machine.
    """
    federation, evaluation, batch = private.federation, private.evaluation, public.train.batch
    images = federation.rounds * federation.local_steps * num_sites
    dp_images = DP_SLOWDOWN * images * private.privacy.expected_batch * private.privacy.draws
    measured = EVALUATIONS * evaluation.num_images * (evaluation.steps / FORWARD_SPEEDUP + 1)
    left = (budget.left() - SET_UP_SECONDS - END_SECONDS) * rate - 2 * dp_images - measured
    start = _limited(START_SHARE * left / batch, FIRST_STEPS, public.train.steps)
    each = _limited((1 - START_SHARE) / 2 * left / batch, LEAST_ALIGNED, public.train.steps)
    return PublicStages(start, each, each + round(dp_images / batch), left < (FIRST_STEPS + 2 * LEAST_ALIGNED) * batch)


def _limited(steps: float, least: int, most: int) -> int:
    return min(most, max(least, int(steps)))
