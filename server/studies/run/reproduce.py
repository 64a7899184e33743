"""One arm of a study as a resumable job: data, training, distances at given image counts, one `result.json`.

The folder of an arm holds `arm.json` (what was asked), `training` or `simulation`, `points/*.json` (distances that are
done) and, at the end, `result.json`. The same command after any interruption goes on with what is left; when the study
asks a central arm for more images than before, it goes on from its end.
"""

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from server.evaluation.drawing import pick_device
from server.report.pictures import stack
from server.studies.run.arm_distances import SHOWN_IMAGES, Measure, Measurement
from server.studies.run.arm_folders import (
    RESULT_FILE,
    claim,
    find_init,
    folder_of,
    stored_experiment,
    training_seconds,
)
from server.studies.run.arm_settings import ArmSettings
from server.studies.run.arm_training import Milestone, Trainer, plan
from server.studies.run.splits import Part, Splits
from server.studies.schema import Arm, Scale, Stage, Study
from server.studies.stored_results import (
    HELD_OUT_LOSS,
    SYNTHETIC,
    ArmResult,
    CurvePoint,
    Init,
    Metrics,
    read_result,
    result_file,
    write_result,
)
from server.studies.study_files import arm_at, load_study
from shared.errors import InputError
from shared.evaluation.extractor import Extractor
from shared.evaluation.generate import save_grid
from shared.evaluation.networks import INCEPTION, load_extractor
from shared.experiment.config import Experiment, load_experiment
from shared.experiment.recipes import find_experiment
from shared.storage.chunks import rank_from_environment
from shared.storage.files import write_atomically
from shared.storage.synthetic_mark import SyntheticMark, seed_range
from shared.storage.versions import git_commit, installed_versions
from shared.training.flops import hardware, training_flops
from shared.training.precision import speed_up_float32

POINTS_FOLDER = "points"
_SHOWN_SECTIONS = ("train", "model", "mask", "diffusion", "data", "optim", "federation", "evaluation")


def run_arm(study_name: str, arm_name: str, scale: str, settings: ArmSettings) -> Path | None:
    """Run what is left of one arm.

    Returns:
        The stored result; None when the training was stopped by a signal, or a federated run failed.

    Raises:
        InputError: unknown study, arm or scale, missing extractor, too few images, an arm it starts from that has not
            run, or a folder in which something else was started.
    """
    study = load_study(study_name)
    study_name = Path(study_name).stem
    arm, stage, known = arm_at(study, study_name, arm_name, scale)
    job = Job(study_name, study, arm_name, arm, stage, known, settings)
    return job.run()


class Job:
    """One arm at one scale."""

    def __init__(
        self, study_name: str, study: Study, arm_name: str, arm: Arm, stage: Stage, scale: Scale, settings: ArmSettings
    ) -> None:
        self.study_name, self.study, self.arm_name, self.arm = study_name, study, arm_name, arm
        self.stage, self.scale, self.settings = stage, scale, settings
        self.folder = folder_of(settings.root, study_name, scale, arm_name, settings.seed)
        overrides = [f"{key}={json.dumps(value)}" for key, value in stage.settings.items()]
        overrides += [f"train.seed={settings.seed}"]
        self.experiment = load_experiment(find_experiment(stage.recipe), overrides)
        self.plan = plan(self.experiment, arm, stage)

    def run(self) -> Path | None:
        """Everything that is left; the stored result."""
        settings = self.settings
        takes_weights = [spec.startswith(("inception", "clip")) for spec in settings.extractors]
        if settings.weights and not any(takes_weights):
            raise InputError(f"--weights {settings.weights}: no extractor takes it, give one such as {INCEPTION}")
        speed_up_float32()
        device = pick_device(settings.device, rank_from_environment())
        extractors = [
            load_extractor(
                spec,
                weights=settings.weights,
                weights_sha256=settings.weights_sha256 if is_taken else "",
                device=device,
            )
            for spec, is_taken in zip(settings.extractors, takes_weights, strict=True)
        ]
        source, init = find_init(settings.root, self.study_name, self.study, self.scale, self.arm_name, settings.seed)
        sources = {"public": settings.public, "private": settings.private}
        size, num_synthetic = self.experiment.model.image_size, self.study.scales[self.scale].synthetic
        splits = Splits(self.study, sources, settings.root / "data", size, num_synthetic, settings.on_progress)
        parts = splits.of(self.arm)
        claim(self.folder, self._asked(parts, extractors, init))
        result = self.folder / RESULT_FILE
        wanted = [milestone.images for milestone in self.plan.milestones]
        if not result.exists() or [point.images for point in read_result(result).curve] != wanted:
            measure = self._measure(parts, extractors, device)
            points = self._points(Trainer(self.experiment, self.plan, self.folder, parts["train"], source), measure)
            if points is None:
                return None
            training_images = measure.of_training_images() if self.arm.test else {}
            write_result(self._result(points, training_images, parts, extractors, init), result)
        return self._store(result)

    def _store(self, result: Path) -> Path:
        """Copy a result to the others, with its pictures where no real face had a part in them."""
        results = self.settings.results / SYNTHETIC if self._is_synthetic else self.settings.results
        stored = result_file(results, self.study_name, self.scale, self.arm_name, self.settings.seed)
        write_result(read_result(result), stored)
        rows = [self._point_file(milestone).with_suffix(".png") for milestone in self.plan.milestones]
        if self._is_synthetic and self.arm.test:
            stack(rows, stored.with_suffix(".png"))
        return stored

    @property
    def _is_synthetic(self) -> bool:
        return not self.settings.public and not self.settings.private

    def _point_file(self, milestone: Milestone) -> Path:
        return self.folder / POINTS_FOLDER / f"{milestone.images:010d}.json"

    def _points(self, trainer: Trainer, measure: Measure) -> list[dict[str, Any]] | None:
        """Train from point to point and measure at each; None when the training stopped before its end."""
        flops, points = training_flops(self.experiment), []
        for milestone in self.plan.milestones:
            file = self._point_file(milestone)
            if not file.exists():
                checkpoint = trainer.advance(milestone)
                if checkpoint is None:
                    return None
                started, found = time.monotonic(), measure(checkpoint) if self.arm.test else Measurement()
                point = CurvePoint(
                    images=milestone.images,
                    steps=milestone.steps,
                    flops=milestone.images * flops,
                    metrics=found.metrics,
                    copied=found.copied,
                )
                seconds = round(time.monotonic() - started, 2)
                self._say_point(point)
                file.parent.mkdir(parents=True, exist_ok=True)
                if found.images is not None and self._is_synthetic:
                    mark = SyntheticMark(found.facts["checkpoint"], seed_range(found.facts["seed"], len(found.images)))
                    save_grid(found.images, file.with_suffix(".png"), SHOWN_IMAGES, mark)
                tree = {"point": point.model_dump(mode="json"), "measured": found.facts, "seconds": seconds}
                write_atomically(file, json.dumps(tree, indent=1) + "\n")
            points.append(json.loads(file.read_text(encoding="utf-8")))
        return points

    def _measure(self, parts: dict[str, Part], extractors: list[Extractor], device: torch.device) -> Measure:
        return Measure(
            extractors=extractors,
            references={role: part.cache for role, part in parts.items() if role != "train"},
            training=parts["train"].cache,
            size=self.experiment.model.image_size,
            kept=self.settings.root / "references",
            num_images=self.study.scales[self.scale].generated,
            device=device,
            on_progress=self.settings.on_progress,
        )

    def _say_point(self, point: CurvePoint) -> None:
        shown = [f"{name} {values['distance']:.4g}" for name, values in point.metrics.get("test", {}).items()]
        self.settings.say(f"{self.arm_name}: {point.images:,} images: {', '.join(shown) or 'trained'}")

    def _result(
        self,
        points: list[dict[str, Any]],
        training_images: Metrics,
        parts: dict[str, Part],
        extractors: list[Extractor],
        init: Init | None,
    ) -> ArmResult:
        experiment: Experiment = stored_experiment(self.folder, self.arm.sites)
        sections = experiment.model_dump(mode="json", include=set(_SHOWN_SECTIONS))
        # The folder of the arm it starts from is a path of this machine; `init` says the same.
        sections["train"]["init"] = init.arm if init else ""
        sections["evaluation"]["extractor"] = ""
        if not self.arm.sites:
            del sections["federation"]
        return ArmResult(
            schema=1,
            study=self.study_name,
            arm=self.arm_name,
            scale=self.scale,
            curve=tuple(CurvePoint.model_validate(entry["point"]) for entry in points),
            init=init,
            sites=self.arm.sites,
            experiment=sections,
            data={role: part.facts for role, part in parts.items()},
            training_images=training_images,
            extractors=self._measures(extractors),
            measured={key: value for key, value in points[-1]["measured"].items() if key != "checkpoint"},
            training_seconds=round(training_seconds(self.folder, self.arm.sites), 1),
            measuring_seconds=round(sum(entry["seconds"] for entry in points), 1),
            threads=torch.get_num_threads(),
            hardware=hardware(),
            versions=installed_versions(),
            commit=git_commit(),
            command=self.settings.command(self.study_name, self.scale, self.arm_name),
            date=datetime.now(UTC).strftime("%Y-%m-%d"),
        )

    def _measures(self, extractors: list[Extractor]) -> dict[str, str]:
        """What the arm was measured by, the loss last: it never chooses among points."""
        if not self.arm.test:
            return {}
        return _digests(extractors) | ({} if self.experiment.data.wavelet else {HELD_OUT_LOSS: ""})

    def _asked(self, parts: dict[str, Part], extractors: list[Extractor], init: Init | None) -> dict[str, Any]:
        """What must be the same for the arm to go on; a central one may go on to more images or other milestones."""
        not_asked = {"init"} if self.arm.sites else {"init", "images", "at"}
        return {
            "arm": self.arm.model_dump(mode="json", exclude={"title", "scales", "init"}),
            "stage": self.stage.model_dump(mode="json", exclude=not_asked),
            "data": {role: part.facts for role, part in parts.items()},
            "extractors": _digests(extractors) if self.arm.test else {},
            "generated": self.study.scales[self.scale].generated,
            "init": init.checkpoint if init else "",
        }


def _digests(extractors: list[Extractor]) -> dict[str, str]:
    return {extractor.space.distance_name: extractor.space.sha256 for extractor in extractors}
