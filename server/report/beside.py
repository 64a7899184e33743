"""Models that were measured beside a run's own, to say what it was worth: a file in the run, a table on its page."""

import json
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from shared.errors import InputError
from shared.experiment.config import Section
from shared.messages.text import Line
from shared.storage.files import write_atomically

BESIDE_FILE = "beside.json"
Interval = tuple[float, float]
"""Both ends of a 95 percent interval."""
Verdict = Literal["better", "worse", "not told apart"]


class Model(Section):
    """One model's figures on the same held-out images; less is better."""

    name: Line
    loss: float = Field(allow_inf_nan=False)
    loss_difference: Interval | None = None
    """Its loss less the run's own model's, image by image; None for the run's own."""
    distance: float = Field(allow_inf_nan=False)
    distance_interval: Interval | None = None
    distance_difference: Interval | None = None
    """Its distance less the run's own model's, by images of the same seeds; None for the run's own, and where those
    differ."""


class Beside(Section):
    """All models, the run's own first."""

    metric: Line
    """Name of the distance."""
    num_loss_images: int = Field(ge=2)
    num_images: int = Field(ge=1)
    """Generated for each distance."""
    models: tuple[Model, ...] = Field(min_length=1)

    def loss_verdict(self, other: Model) -> Verdict:
        """Whether the run's own model has less loss than another: only when the interval of the difference says so."""
        return "not told apart" if other.loss_difference is None else _verdict(other.loss_difference)

    def distance_verdict(self, other: Model) -> Verdict:
        """Whether the run's own model is nearer to the images than another, as `loss_verdict`.

        Where no interval of the difference is known: only when the two intervals do not overlap.
        """
        if other.distance_difference is not None:
            return _verdict(other.distance_difference)
        own, others = self.models[0].distance_interval, other.distance_interval
        return "not told apart" if own is None or others is None else _verdict((others[0] - own[1], others[1] - own[0]))


def _verdict(difference: Interval) -> Verdict:
    """Of the run's own model, by the interval of what another one has more than it."""
    if difference[0] <= 0 <= difference[1]:
        return "not told apart"
    return "better" if difference[0] > 0 else "worse"


def write_beside(run: Path, beside: Beside) -> None:
    """Keep the figures in the run directory."""
    write_atomically(run / BESIDE_FILE, beside.model_dump_json(indent=2) + "\n")


def read_beside(run: Path) -> Beside | None:
    """The figures of a run directory; None where nothing was measured beside it.

    Raises:
        InputError: a damaged file.
    """
    file = run / BESIDE_FILE
    if not file.exists():
        return None
    try:
        return Beside.model_validate(json.loads(file.read_bytes()))
    except (ValueError, ValidationError) as error:
        raise InputError(f"{file} is damaged: remove it, or restore it from a copy") from error
