"""How much a result depends on the seed: arms and figures that have run with several."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from server.studies.page.derived import chosen_point, derive, distance_to_test
from server.studies.schema import Figure, Scale, Study
from server.studies.stored_results import ArmResult
from shared.student import mean_interval

AllSeeds = Mapping[tuple[str, str, str], Sequence[ArmResult]]


@dataclass(frozen=True)
class Spread:
    """One number, seed by seed."""

    distance: str
    name: str
    """The arm, or what the figure divides."""
    values: tuple[float, ...]
    mean: float
    low: float
    """Of the 95 percent interval of the mean."""
    high: float

    @property
    def is_told_apart(self) -> bool:
        """Of a figure: whether its interval leaves out that nothing has changed."""
        return not self.low <= 1.0 <= self.high


@dataclass(frozen=True)
class SeedSpread:
    """What several seeds say of the arms and figures of a study at one scale."""

    arms: tuple[Spread, ...] = ()
    figures: tuple[Spread, ...] = ()


def spread_of(study: Study, name: str, scale: Scale, stored: AllSeeds) -> SeedSpread:
    """Distances of arms, and figures of pairs of arms with the same seed, that have run with at least two seeds.

    A figure is a factor: what the baseline needs over what the arm needs (speed-up), or the arm's distance over the
    baseline's (reduction, ratio); its mean is the geometric one.
    """
    arms = [
        _spread(distance, arm, [distance_to_test(chosen_point(each), distance) for each in results])
        for arm in study.arms
        for results in [stored.get((name, scale, arm), ())]
        if len(results) > 1
        for distance in results[0].extractors
    ]
    factors: dict[tuple[str, int], list[float]] = {}
    for results in _by_seed(stored).values():
        for each in derive(study, name, results, scale):
            factor = 1.0 - each.value if each.figure.kind == "reduction" else each.value
            factors.setdefault((each.distance, study.figures.index(each.figure)), []).append(factor)
    figures = [
        _spread_of_factor(distance, _words(study, study.figures[index]), values)
        for (distance, index), values in factors.items()
        if len(values) > 1
    ]
    return SeedSpread(tuple(arms), tuple(figures))


def _by_seed(stored: AllSeeds) -> dict[int, dict[tuple[str, str, str], ArmResult]]:
    found: dict[int, dict[tuple[str, str, str], ArmResult]] = {}
    for key, results in stored.items():
        for each in results:
            found.setdefault(each.seed, {})[key] = each
    return found


def _words(study: Study, figure: Figure) -> str:
    arm, baseline = study.arms[figure.arm].title, study.arms[figure.baseline].title
    return f"images of {baseline!r} over {arm!r}" if figure.kind == "speedup" else f"{arm!r} over {baseline!r}"


def _spread(distance: str, name: str, values: Sequence[float]) -> Spread:
    return Spread(distance, name, tuple(values), *mean_interval(values))


def _spread_of_factor(distance: str, name: str, values: Sequence[float]) -> Spread:
    mean, low, high = map(math.exp, mean_interval([math.log(value) for value in values]))
    return Spread(distance, name, tuple(values), mean, low, high)
