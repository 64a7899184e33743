"""Figure 2 as the page shows it: each toy at each budget, over seeds, both ways paired."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from server.studies.stored_toys import ToyResult
from shared.student import mean_interval


@dataclass(frozen=True)
class ToyRow:
    """One budget: means over seeds, and how both stages differ from training from scratch."""

    operations: int
    proxy: float
    two_stages: float
    scratch: float
    difference: tuple[float, float, float] | None
    """`two_stages` less `scratch`, seed by seed: mean and 95 percent interval; None of one seed."""
    independent: float
    """Mean over seeds of the distance of points with the data's marginals and independent coordinates."""

    @property
    def verdict(self) -> str:
        """Which way is nearer to the data, and whether either has learned how coordinates depend on each other."""
        if self.difference is None:
            return "one seed tells nothing"
        _, low, high = self.difference
        nearer = "both stages nearer" if high < 0 else "from scratch nearer" if low > 0 else "not told apart"
        is_too_short = min(self.two_stages, self.scratch) >= self.independent
        return f"{nearer}, both no nearer than independent coordinates: too short" if is_too_short else nearer


@dataclass(frozen=True)
class ToyTable:
    """One toy, and its picture as the page links it."""

    result: ToyResult
    picture: str
    rows: Sequence[ToyRow]
    floor: float
    """Mean over seeds of what two draws of the data differ by."""


def toy_table(result: ToyResult, picture: str) -> ToyTable:
    """The rows of one toy, a budget each."""
    rows = [_row(result, place, point.operations) for place, point in enumerate(result.runs[0].points)]
    return ToyTable(result, picture, rows, fmean(run.floor for run in result.runs))


def _row(result: ToyResult, place: int, operations: int) -> ToyRow:
    proxy, both, scratch = (result.values(what, place) for what in ("proxy", "two_stages", "scratch"))
    differences = [ours - theirs for ours, theirs in zip(both, scratch, strict=True)]
    difference = mean_interval(differences) if len(differences) > 1 else None
    independent = fmean(run.independent for run in result.runs)
    return ToyRow(operations, fmean(proxy), fmean(both), fmean(scratch), difference, independent)
