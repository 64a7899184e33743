"""How long the public stages of the private demo are: what is left of the budget beside stages of a fixed price."""

from dataclasses import dataclass

from server.simulation.demo_budget import END_SECONDS, FORWARD_SPEEDUP, Budget
from shared.experiment.config import Experiment
from shared.planning.workload import DP_SLOWDOWN

FIRST_STEPS = 40
"""Steps of the public training after which the speed of this machine is known; the fewest of the first stage."""
LEAST_ALIGNED = 100
"""Fewer steps on aligned images show nothing: the round of DP-SGD computes as much as 72 steps."""
SET_UP_SECONDS = 130.0
"""On two idle cores: sites and coordinator come up, approve, answer offers and release mean images."""
AFTER_SECONDS = 110.0
"""On two idle cores: messages of the round, one offer more, held-out loss, canaries, release."""
START_SHARE = 0.25
"""Of the images that there is time for; the rest is halved: aligned, and public alone for comparison."""
MODELS = 3
"""Whose images are measured: the start, public alone, private."""
FEWEST_MEASURED, MOST_MEASURED = 150, 400
"""Images of each model."""


@dataclass(frozen=True)
class Stages:
    """Steps of each public stage."""

    start: int
    aligned: int
    alone: int
    """With what the round of DP-SGD computes on top, so that public images alone get the same compute."""
    is_over: bool
    """The time does not suffice even for the shortest stages."""


@dataclass(frozen=True)
class Plan:
    """What the demo's time is divided by.

    Attributes:
        rate: images per second of public training on all cores.
        public: recipe of the public stages; its `train.steps` is the most that a stage gets.
        private: recipe of the private stages, whose length is fixed, since their price is.
        num_sites: sites on this machine.
        num_references: held-out images that generated ones are compared with.
    """

    rate: float
    public: Experiment
    private: Experiment
    num_sites: int
    num_references: int

    def stages(self, budget: Budget) -> Stages:
        """All public stages, when the first one has begun."""
        left = (budget.left() - SET_UP_SECONDS - AFTER_SECONDS - END_SECONDS) * self.rate - self._fixed_images()
        batch = self.public.train.batch
        start = _limited(START_SHARE * left / batch, FIRST_STEPS, self.public.train.steps)
        aligned, alone = self._further((1 - START_SHARE) * left)
        return Stages(start, aligned, alone, left < (FIRST_STEPS + 2 * LEAST_ALIGNED) * batch)

    def further_stages(self, budget: Budget, set_up_seconds: float) -> tuple[int, int]:
        """Steps on aligned images, and on public ones alone, by the time that is left before them.

        Args:
            budget: of everything.
            set_up_seconds: what the set-up has really taken: where it took longer, so will what comes after.
        """
        after = AFTER_SECONDS * max(1.0, set_up_seconds / SET_UP_SECONDS)
        return self._further((budget.left() - after - END_SECONDS) * self.rate - self._fixed_images())

    def num_measured(self, budget: Budget, end_seconds: float) -> int:
        """Images of each model, by the time that is left before them, without the `end_seconds` of what follows."""
        left = (budget.left() - end_seconds - END_SECONDS) * self.rate - self.num_references
        return min(MOST_MEASURED, max(FEWEST_MEASURED, int(left / MODELS / self._worth())))

    def _further(self, images: float) -> tuple[int, int]:
        """Steps of the two stages that `images` are for."""
        batch = self.public.train.batch
        each = _limited(images / 2 / batch, LEAST_ALIGNED, self.public.train.steps)
        return each, each + round(self._dp_images() / batch)

    def _fixed_images(self) -> float:
        """Images that could be trained on while the round, as much on public images alone, and the distances take."""
        return 2 * self._dp_images() + MODELS * self.private.evaluation.num_images * self._worth() + self.num_references

    def _dp_images(self) -> float:
        federation, privacy = self.private.federation, self.private.privacy
        images = federation.rounds * federation.local_steps * self.num_sites
        return DP_SLOWDOWN * images * privacy.expected_batch * privacy.draws

    def _worth(self) -> float:
        """Of one generated image and its features."""
        return self.private.evaluation.steps / FORWARD_SPEEDUP + 1


def _limited(steps: float, least: int, most: int) -> int:
    return min(most, max(least, int(steps)))
