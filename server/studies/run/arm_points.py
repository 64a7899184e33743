"""The measured points of an arm, a file each: what is done stays done. One more may follow its end, of many images."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from server.studies.run.arm_distances import SHOWN_IMAGES, Measure, Measurement, digests
from server.studies.run.arm_folders import END_FILE, POINTS_FOLDER
from server.studies.run.arm_plan import ArmPlan, Milestone
from server.studies.stored_results import CurvePoint, EndPoint
from shared.evaluation.generate import save_grid
from shared.experiment.config import Experiment
from shared.storage.files import write_atomically
from shared.storage.synthetic_mark import SyntheticMark, seed_range
from shared.training.flops import training_flops


class Training(Protocol):
    """What brings an arm from point to point."""

    @property
    def plan(self) -> ArmPlan:
        """The arm's milestones."""

    def advance(self, milestone: Milestone) -> Path | None:
        """The checkpoint of a milestone, or None when the training did not get there."""

    def end(self) -> Path:
        """The checkpoint of the last one."""


class Points:
    """Those of one arm."""

    def __init__(
        self, folder: Path, experiment: Experiment, arm_name: str, is_synthetic: bool, say: Callable[[str], None]
    ) -> None:
        """`is_synthetic`: no real face had a part in the arm, so pictures are kept."""
        self._folder, self._experiment = folder / POINTS_FOLDER, experiment
        self._arm_name, self._is_synthetic, self._say = arm_name, is_synthetic, say

    def file(self, milestone: Milestone) -> Path:
        """Where a point lies."""
        return self._folder / f"{milestone.images:010d}.json"

    def all(self, trainer: Training, measure: Measure | None) -> list[dict[str, Any]] | None:
        """Train from point to point and measure at each; None when the training stopped before its end."""
        points = []
        for milestone in trainer.plan.milestones:
            file = self.file(milestone)
            if not file.exists():
                checkpoint = trainer.advance(milestone)
                if checkpoint is None:
                    return None
                started, found = time.monotonic(), measure(checkpoint) if measure else Measurement()
                self._keep(milestone, found, started)
            points.append(json.loads(file.read_text(encoding="utf-8")))
        return points

    def measure_end(self, measure: Measure, trainer: Training) -> None:
        """Measure the end once more, unless that is done.

        Raises:
            InputError: the last checkpoint is gone.
        """
        named = digests(measure.extractors)
        if self.has_end(named, measure.num_images):
            return
        started, found = time.monotonic(), measure(trainer.end())
        end = EndPoint(
            num_images=measure.num_images,
            metrics=found.metrics["test"],
            extractors=named,
            seconds=round(time.monotonic() - started, 1),
        )
        self._say(f"{self._arm_name}: end, {_distances(found.metrics['test'])}")
        write_atomically(self._folder / END_FILE, json.dumps(end.model_dump(mode="json"), indent=1) + "\n")

    def end(self) -> EndPoint | None:
        """What `measure_end` found, whenever that was."""
        file = self._folder / END_FILE
        return EndPoint.model_validate(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None

    def has_end(self, named: dict[str, str], num_images: int) -> bool:
        """Whether it was measured with these networks (digests by distance name) on so many images."""
        end = self.end()
        return end is not None and (end.extractors, end.num_images) == (named, num_images)

    def _keep(self, milestone: Milestone, found: Measurement, started: float) -> None:
        point = CurvePoint(
            images=milestone.images,
            steps=milestone.steps,
            flops=milestone.images * training_flops(self._experiment),
            metrics=found.metrics,
            copied=found.copied,
        )
        seconds = round(time.monotonic() - started, 2)
        shown = _distances(point.metrics.get("test", {}))
        self._say(f"{self._arm_name}: {point.images:,} images: {shown or 'trained'}")
        file = self.file(milestone)
        file.parent.mkdir(parents=True, exist_ok=True)
        if found.images is not None and self._is_synthetic:
            mark = SyntheticMark(found.facts["checkpoint"], seed_range(found.facts["seed"], len(found.images)))
            save_grid(found.images, file.with_suffix(".png"), SHOWN_IMAGES, mark)
        tree = {"point": point.model_dump(mode="json"), "measured": found.facts, "seconds": seconds}
        write_atomically(file, json.dumps(tree, indent=1) + "\n")


def _distances(metrics: dict[str, dict[str, float]]) -> str:
    return ", ".join(f"{name} {values['distance']:.4g}" for name, values in metrics.items())
