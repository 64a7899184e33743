"""Figures derived from stored results: equal-distance speed-ups, reductions, ratios; each with its goal."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from server.studies.schema import Figure, Scale, Study
from server.studies.stored_results import ArmResult, CurvePoint


@dataclass(frozen=True)
class Crossing:
    """Where a curve reaches a level."""

    images: float
    """Interpolated between measured points, linear in distance against the logarithm of the images."""
    is_bound: bool
    """The first measured point is there already: it took at most so many."""


@dataclass(frozen=True)
class Derived:
    """One figure by one extractor."""

    figure: Figure
    scale: Scale
    distance: str
    """Name of the distance."""
    value: float
    arm_value: float
    """What was divided: distances; for a speed-up images at equal distance."""
    baseline_value: float
    goal: float | None
    flop_value: float | None = None
    """Of a speed-up: the same in operations, with all stages before counted in."""
    equal_flops_value: float | None = None
    """Of a reduction: the same with the baseline where it has used as many operations as all stages of the
    arm, interpolated; None where its curve does not reach there."""
    level: float | None = None
    """Of a speed-up: the distance that both reach."""
    bound: Literal["", "at least", "at most"] = ""
    """Of a speed-up: what the value is where one curve is below the level from its first point on."""

    @property
    def is_as_claimed(self) -> bool:
        """Whether it goes the way that the paper reports, or within the goal where the paper reports nothing."""
        match self.figure.kind:
            case "speedup":
                return self.value > 1
            case "reduction":
                return self.value > 0
            case "ratio":
                return self.value <= max(self.figure.goal.values(), default=1.0)

    @property
    def is_reached(self) -> bool:
        """Whether the goal is; true without one."""
        if self.goal is None:
            return True
        return self.value <= self.goal if self.figure.kind == "ratio" else self.value >= self.goal


def derive(study: Study, name: str, results: Mapping[tuple[str, str, str], ArmResult], scale: Scale) -> list[Derived]:
    """All figures of a study at a scale whose two arms have run, by every extractor that both were measured with."""
    found = []
    for figure in study.figures:
        arm, baseline = results.get((name, scale, figure.arm)), results.get((name, scale, figure.baseline))
        if arm is None or baseline is None:
            continue
        for distance in arm.extractors:
            if distance in baseline.extractors:
                found.append(_derive(figure, scale, distance, arm, baseline))
    return found


def chosen_point(result: ArmResult) -> CurvePoint:
    """The point of the least validation distance by the first extractor: what is reported of an arm."""
    first = next(iter(result.extractors), None)
    if first is None:
        return result.last
    return min(result.curve, key=lambda point: point.metrics["validation"][first]["distance"])


def distance_to_test(point: CurvePoint, distance: str) -> float:
    """Distance of a point to the test split."""
    return point.metrics["test"][distance]["distance"]


def curve_to_test(result: ArmResult, distance: str) -> list[tuple[int, float]]:
    """Images and test distance of each point."""
    return [(point.images, distance_to_test(point, distance)) for point in result.curve]


def crossing(curve: list[tuple[int, float]], level: float) -> Crossing | None:
    """Where a curve first is at or below `level`; None when it never is."""
    before: tuple[int, float] | None = None
    for images, value in curve:
        if value <= level:
            if before is None:
                return Crossing(images, is_bound=value < level)
            share = (before[1] - level) / (before[1] - value)
            logs = math.log(before[0]), math.log(images)
            return Crossing(math.exp(logs[0] + share * (logs[1] - logs[0])), is_bound=False)
        before = (images, value)
    return None


def _derive(figure: Figure, scale: Scale, distance: str, arm: ArmResult, baseline: ArmResult) -> Derived:
    goal = figure.goal.get(scale)
    if figure.kind == "speedup":
        return _speedup(figure, scale, distance, arm, baseline, goal)
    point = chosen_point(arm)
    ours, theirs = (distance_to_test(each, distance) for each in (point, chosen_point(baseline)))
    if figure.kind == "ratio":
        return Derived(figure, scale, distance, ours / theirs, ours, theirs, goal)
    equal = distance_at(baseline, distance, point.flops + flops_before(arm))
    equal_value = None if equal is None else 1 - ours / equal
    return Derived(figure, scale, distance, 1 - ours / theirs, ours, theirs, goal, equal_flops_value=equal_value)


def distance_at(result: ArmResult, distance: str, flops: float) -> float | None:
    """Test distance after so many operations in all stages, linear against the logarithm; None outside the curve."""
    before = flops_before(result)
    places = [(math.log(before + point.flops), distance_to_test(point, distance)) for point in result.curve]
    wanted = math.log(flops)
    for (left, above), (right, below) in pairwise(places):
        if left <= wanted <= right:
            return above + (wanted - left) / (right - left) * (below - above)
    return None


def flops_before(result: ArmResult) -> float:
    """Operations of the stages before an arm."""
    return result.init.flops if result.init else 0.0


def _speedup(
    figure: Figure, scale: Scale, distance: str, arm: ArmResult, baseline: ArmResult, goal: float | None
) -> Derived:
    """At the smallest distance that both curves reach."""
    curves = [curve_to_test(result, distance) for result in (arm, baseline)]
    level = max(min(value for _, value in curve) for curve in curves)
    ours, theirs = (crossing(curve, level) for curve in curves)
    assert ours is not None
    assert theirs is not None
    per_image = [result.last.flops / result.last.images for result in (arm, baseline)]
    before = [flops_before(result) for result in (arm, baseline)]
    flops = [start + cost * place.images for start, cost, place in zip(before, per_image, (ours, theirs), strict=True)]
    return Derived(
        figure=figure,
        scale=scale,
        distance=distance,
        value=theirs.images / ours.images,
        arm_value=ours.images,
        baseline_value=theirs.images,
        goal=goal,
        flop_value=flops[1] / flops[0],
        level=level,
        # The level is the best of one of the two, which therefore is no bound.
        bound="at least" if ours.is_bound else "at most" if theirs.is_bound else "",
    )
