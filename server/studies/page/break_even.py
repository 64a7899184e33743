"""From which scale on an arm pays: its curve against the baseline's, at equal operations and at equal distance."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from server.report.formatting import format_number
from server.studies.page.derived import crossing, curve_to_test, distance_at, distance_to_test, flops_before
from server.studies.schema import Figure, Scale, Study
from server.studies.stored_results import ArmResult


@dataclass(frozen=True)
class ComparedPoint:
    """One measured point of the arm."""

    images: int
    """Seen in the arm's own stage."""
    flops: float
    """Of all its stages."""
    distance: float
    baseline: float | None
    """Distance of the baseline after as many operations, interpolated; None outside its curve."""
    needed: float | None
    """Images after which the baseline is as close, interpolated; None where it never is, or at its first point."""

    @property
    def is_ahead(self) -> bool:
        """Closer than the baseline."""
        return self.baseline is not None and self.distance < self.baseline

    @property
    def change(self) -> str:
        """Of the distance against the baseline's."""
        return f"{self.distance / self.baseline - 1:+.0%}" if self.baseline else "–"


def compared_points(arm: ArmResult, baseline: ArmResult, distance: str) -> list[ComparedPoint]:
    """Every point of the arm beside the baseline at equal operations."""
    found = []
    for point in arm.curve:
        flops = flops_before(arm) + point.flops
        ours, theirs = distance_to_test(point, distance), distance_at(baseline, distance, flops)
        reached = crossing(curve_to_test(baseline, distance), ours)
        needed = None if reached is None or reached.is_bound else reached.images
        found.append(ComparedPoint(point.images, flops, ours, theirs, needed))
    return found


def verdict(compared: Sequence[ComparedPoint]) -> str:
    """From which point on the arm is ahead, as far as both curves reach."""
    known = [place for place in compared if place.baseline is not None]
    if not known:
        return "the two curves have no number of operations in common"
    behind = [index for index, place in enumerate(known) if not place.is_ahead]
    if not behind:
        return f"ahead at every point that both curves reach, from {_at(known[0])} on"
    if behind[-1] == len(known) - 1:
        return f"behind at the last point that both curves reach, {_at(known[-1])}"
    return f"ahead from {_at(known[behind[-1] + 1])} on"


def head_start(compared: Sequence[ComparedPoint], arm: ArmResult, baseline: ArmResult) -> str:
    """How many images of the baseline the stages before the arm save, beside what they cost; empty where unknown."""
    saved = [place.needed - place.images for place in compared if place.needed]
    if not saved or arm.init is None:
        return ""
    typical = statistics.median(saved)
    worth, cost = typical * baseline.last.flops / baseline.last.images / 1e12, flops_before(arm) / 1e12
    if typical <= 0:
        return f"; the stages before saved no images (median {count(typical)})"
    return (
        f"; the stages before saved {count(min(saved))} to {count(max(saved))} images, median {count(typical)}, worth "
        f"{format_number(worth)} TFLOP, and cost {format_number(cost)}"
    )


@dataclass(frozen=True)
class BreakEven:
    """An arm beside a baseline that is trained otherwise, by one distance."""

    distance: str
    figure: Figure
    verdict: str
    points: list[ComparedPoint]


def equal_operations(
    study: Study, name: str, scale: Scale, stored: Mapping[tuple[str, str, str], ArmResult]
) -> list[BreakEven]:
    """All comparisons at equal operations whose arms have run."""
    found = []
    for figure in study.figures:
        arm, baseline = (stored.get((name, scale, each)) for each in (figure.arm, figure.baseline))
        if arm is None or baseline is None or figure.kind == "ratio":
            continue
        for distance in arm.extractors:
            if distance in baseline.extractors:
                points = compared_points(arm, baseline, distance)
                said = verdict(points) + head_start(points, arm, baseline)
                found.append(BreakEven(distance, figure, said, points))
    return found


def _at(place: ComparedPoint) -> str:
    return f"{format_number(place.flops / 1e12)} TFLOP ({place.images:,} images of its own stage)"


def count(images: float) -> str:
    """A number of images, rounded to hundreds."""
    return f"{round(images, -2):,.0f}" if images >= 1000 else f"{images:.0f}"
