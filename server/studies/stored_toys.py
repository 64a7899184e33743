"""What the toys of Figure 2 came to, `server/results/toys/<name>.json`: numbers, and where they come from."""

import json
import statistics
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from shared.errors import InputError
from shared.experiment.base import Section
from shared.experiment.config import explain

ToyName = Literal["swiss-roll", "rose"]
TOYS = "toys"
"""Folder of them among the stored results. Their points are drawn from a formula, so they may have pictures."""


class ToyPoint(Section):
    """Both trainings at equal operations."""

    operations: int
    """In steps of denoising score matching on one batch."""
    masked_steps: int
    denoising_steps: int
    """After the masked ones."""
    proxy: float
    """Energy distance to fresh data after masked score matching alone ..."""
    two_stages: float
    """... after both ..."""
    scratch: float
    """... and after `operations` steps of denoising score matching from scratch."""


class ToyRun(Section):
    """What one seed gives."""

    seed: int
    points: tuple[ToyPoint, ...] = Field(min_length=1)
    floor: float
    """Distance of two draws of the data: 0 on average, and how far from it chance may be."""
    independent: float
    """Distance of points with the data's marginals and independent coordinates."""


class ToyResult(Section):
    """All seeds of one toy."""

    name: ToyName
    num_samples: int
    runs: tuple[ToyRun, ...] = Field(min_length=1)
    seconds: float
    threads: int
    hardware: str
    commit: str | None
    command: str
    date: str

    def values(self, what: str, place: int) -> list[float]:
        """`proxy`, `two_stages` or `scratch` of each seed at the budget of that place."""
        return [float(getattr(run.points[place], what)) for run in self.runs]

    def median(self, what: str, place: int) -> float:
        """Their median over the seeds."""
        return statistics.median(self.values(what, place))


def read_toys(folder: Path) -> list[ToyResult]:
    """All that are stored in a folder, by name.

    Raises:
        InputError: one is not readable, does not hold what a toy gives, or has another toy's name.
    """
    return [_read(path) for path in sorted(folder.glob("*.json"))]


def _read(path: Path) -> ToyResult:
    remedy = "restore it, or run `maskfed-server toy` again"
    try:
        found = ToyResult.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise InputError(f"toy {path.name}: {explain(error)}: {remedy}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"toy {path.name}: not readable JSON ({error}): {remedy}") from error
    if found.name != path.stem:
        raise InputError(f"toy {path.name} holds what belongs into {found.name}.json: give it that name")
    if len({tuple(point.operations for point in run.points) for run in found.runs}) > 1:
        raise InputError(f"toy {path.name}: its seeds have other budgets than each other: {remedy}")
    return found
