"""How the demo spends its time: what the machine can do decides how many steps each stage gets.

Of what is left after set-up, real faces give 55 percent to the masked pre-training, synthetic ones a short stretch,
because they start from a model that ships with the project. Each round costs some seconds besides training (processes
start anew for each message), and evaluations run beside the rounds. A recipe's own numbers are the upper limits.
"""

import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from shared.errors import InputError
from shared.experiment.config import Experiment
from shared.storage.runlog import read_metrics

PRETRAINING_SHARE = 0.55
SHORT_PRETRAINING_SHARE = 0.1
ROUND_OVERHEAD_SECONDS = 14.0
START_SECONDS = 30.0
END_SECONDS = 20.0
FORWARD_SPEEDUP = 3.5
"""A forward pass alone against a training step, per image; an image's features cost about as much as a step."""
LEAST_STEPS = 5
_UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Speed:
    """Images per second of this machine, all cores: masked training, and training on whole images."""

    masked: float
    whole: float


@dataclass(frozen=True)
class RoundPlan:
    """Steps of each site per round, and rounds between evaluations."""

    local_steps: int
    evaluate_every: int


@dataclass
class Budget:
    """Seconds for everything, counted from the creation of this object."""

    seconds: float
    _begun: float = field(default_factory=time.monotonic)

    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._begun

    def left(self) -> float:
        """Seconds left; negative when it is used up."""
        return self.seconds - self.elapsed()

    def pretraining_steps(self, speed: Speed, experiment: Experiment, *, is_short: bool) -> int:
        """Steps of the masked pre-training."""
        share = SHORT_PRETRAINING_SHARE if is_short else PRETRAINING_SHARE
        seconds = share * (self.left() - START_SECONDS - END_SECONDS)
        return _limited(seconds * speed.masked / experiment.train.batch, experiment.train.steps)

    def rounds(self, speed: Speed, experiment: Experiment, rounds: int, num_sites: int) -> RoundPlan:
        """Steps per site and round such that rounds and evaluations fit; few evaluations when time is short."""
        evaluation = experiment.evaluation
        steps_worth = evaluation.num_images * (evaluation.steps / FORWARD_SPEEDUP + 1)
        evaluation_seconds = steps_worth / speed.whole
        seconds = self.left() - END_SECONDS - rounds * ROUND_OVERHEAD_SECONDS
        # The last round is always measured, so only divisors of the number of rounds come into question.
        divisors = (every for every in range(1, rounds) if rounds % every == 0)
        affordable = (every for every in divisors if (rounds // every + 1) * evaluation_seconds < 0.55 * seconds)
        every = next(affordable, rounds)
        training = seconds - (rounds // every + 1) * evaluation_seconds
        steps = training * speed.whole / num_sites / experiment.train.batch / rounds
        return RoundPlan(_limited(steps, experiment.federation.local_steps), every)


def parse_budget(text: str) -> Budget:
    """A time such as `90s`, `8m` or `1h`.

    Raises:
        InputError: something else, or less than a minute.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    seconds = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if seconds < 60:
        raise InputError(f"budget {text!r}: give at least 60s, for example 90s, 8m or 1h")
    return Budget(seconds)


def read_speed(run: Path) -> float:
    """Images per second of a short training, from the end of its log, where it is warm."""
    rates = [event["images_per_second"] for event in read_metrics(run / "metrics.jsonl") if event["kind"] == "train"]
    return float(max(rates[-2:]))


def _limited(steps: float, most: int) -> int:
    return max(LEAST_STEPS, min(most, int(steps)))
