"""What a ledger's entries say: charges, the history of mechanisms they make up, and what a data set has spent."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field

from client.settings import Task, Unit
from shared.experiment.config import Section


class Spending(NamedTuple):
    """So many steps of the Poisson-subsampled Gaussian mechanism with the same constants."""

    noise_multiplier: float
    sample_rate: float
    steps: int


EpsilonOf = Callable[[list[Spending], float], float]
"""Total epsilon of a history at a delta."""


class Charge(Section):
    """One release that is about to be made from a data set: who asked, what for, at which constants."""

    dataset_id: str
    fingerprint: str
    task: Task
    run: str
    server_round: int = Field(ge=0)
    request_digest: str
    plan_digest: str
    """Fixed by the first charge of a run."""
    mechanism: Literal["none", "dp-sgd", "gaussian"]
    noise_multiplier: float = 0.0
    """sigma; of no meaning with mechanism `none`."""
    sample_rate: float = Field(0.0, ge=0, le=1)
    steps: int = Field(0, ge=0)
    unit: Unit = "image"
    remarks: str = ""
    """What a reader of the total should know, e.g. that clipping ran in bfloat16."""


@dataclass(frozen=True)
class Total:
    """What a data set has spent."""

    epsilon: float
    """Of the DP releases alone; infinity where no bound exists."""
    is_unbounded: bool
    """A release without DP was made (or reserved): no epsilon holds for the whole."""
    delta: float
    unit: Unit | None
    """None before the first DP charge."""
    num_charges: int
    num_uncommitted: int
    """Charges without a commit: counted as spent."""

    def __str__(self) -> str:
        part = f"epsilon {self.epsilon:.3f} at delta {self.delta:g} per {self.unit or 'unit'}"
        return f"unbounded (the DP part alone: {part})" if self.is_unbounded else part


def spending_of(charge: Charge) -> Spending:
    """What a DP charge adds to the history."""
    return Spending(charge.noise_multiplier, charge.sample_rate, charge.steps)


def merged(history: list[Spending]) -> list[Spending]:
    """Rows with equal constants added up, sorted: the same history in any order gives the same epsilon."""
    totals: Counter[tuple[float, float]] = Counter()
    for noise_multiplier, sample_rate, steps in history:
        totals[noise_multiplier, sample_rate] += steps
    return [Spending(sigma, q, steps) for (sigma, q), steps in sorted(totals.items()) if steps > 0]


def total_of(charges: list[Charge], delta: float, epsilon_of: EpsilonOf, num_uncommitted: int) -> Total:
    """What charges on one data set come to; those without DP are in no epsilon, they make the total unbounded."""
    private = [charge for charge in charges if charge.mechanism != "none"]
    return Total(
        epsilon=epsilon_of(merged([spending_of(charge) for charge in private]), delta) if private else 0.0,
        is_unbounded=len(private) < len(charges),
        delta=delta,
        unit=private[0].unit if private else None,
        num_charges=len(charges),
        num_uncommitted=num_uncommitted,
    )


TOTAL_CHANGES = ("reserve", "inherited", "shared", "dataset")
"""Entries of the ledger after which a total that was computed before holds no longer."""


class KeptTotal(Section):
    """What the newest charge has brought a data set to: a file for those who look and load no accountant."""

    sequence: int
    """Of the charge in the ledger; with a later charge this holds no longer."""
    dataset_id: str
    epsilon: float | None
    """Of the releases with DP; None where no bound exists."""
    is_unbounded: bool
    delta: float
    unit: Unit | None
    epsilon_next: float | None
    """After one more charge of the same constants; None for one without DP, or where no bound exists."""


def read_kept_total(path: Path) -> KeptTotal | None:
    """The file as it was written last; None where it is missing or damaged."""
    try:
        return KeptTotal.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None
