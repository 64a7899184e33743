"""One arm of a study as a resumable job: data, training, distances at given image counts, one `result.json`.

The folder of an arm holds `arm.json` (what was asked), `training` or `simulation`, `points/*.json` (distances that are
done) and, at the end, `result.json`. The same command after any interruption goes on with what is left; when the study
asks a central arm for more images than before, it goes on from its end.
"""

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from server.evaluation.drawing import pick_device
from server.report.pictures import stack
from server.studies.run.arm_distances import Measure, digests
from server.studies.run.arm_folders import (
    RESULT_FILE,
    claim,
    find_init,
    folder_of,
    stored_experiment,
    training_seconds,
)
from server.studies.run.arm_plan import plan
from server.studies.run.arm_points import Points
from server.studies.run.arm_settings import ArmSettings, open_extractors
from server.studies.run.arm_training import Trainer
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
from shared.evaluation.extractor import Extractor
from shared.experiment.config import Experiment, load_experiment
from shared.experiment.recipes import find_experiment
from shared.storage.chunks import rank_from_environment
from shared.storage.versions import git_commit, installed_versions
from shared.training.flops import hardware
from shared.training.precision import speed_up_float32

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
        self.points = Points(self.folder, self.experiment, arm_name, self._is_synthetic, settings.say)

    def run(self) -> Path | None:
        """Everything that is left; the stored result."""
        settings = self.settings
        speed_up_float32()
        device = pick_device(settings.device, rank_from_environment())
        extractors, at_end = open_extractors(settings, device)
        source, init = find_init(settings.root, self.study_name, self.study, self.scale, self.arm_name, settings.seed)
        sources = {"public": settings.public, "private": settings.private}
        size, num_synthetic = self.experiment.model.image_size, self.study.scales[self.scale].synthetic
        splits = Splits(self.study, sources, settings.root / "data", size, num_synthetic, settings.on_progress)
        parts = splits.of(self.arm)
        claim(self.folder, self._asked(parts, extractors, init))
        result = self.folder / RESULT_FILE
        if not self._is_done(result, at_end):
            measure = self._measure(parts, extractors, device)
            trainer = Trainer(self.experiment, self.plan, self.folder, parts["train"], source)
            points = self.points.all(trainer, measure if self.arm.test else None)
            if points is None:
                return None
            if at_end and self.arm.test:
                self.points.measure_end(self._end_measure(parts, at_end, device), trainer)
            training_images = measure.of_training_images() if self.arm.test else {}
            write_result(self._result(points, training_images, parts, extractors, init), result)
        return self._store(result)

    def _is_done(self, result: Path, at_end: list[Extractor]) -> bool:
        """Whether a result holds all that is asked for."""
        if not result.exists():
            return False
        found, wanted = read_result(result), [milestone.images for milestone in self.plan.milestones]
        is_ended = not at_end or not self.arm.test or self.points.has_end(digests(at_end), self.settings.end_images)
        return [point.images for point in found.curve] == wanted and is_ended

    def _store(self, result: Path) -> Path:
        """Copy a result to the others, with its pictures where no real face had a part in them."""
        results = self.settings.results / SYNTHETIC if self._is_synthetic else self.settings.results
        stored = result_file(results, self.study_name, self.scale, self.arm_name, self.settings.seed)
        write_result(read_result(result), stored)
        rows = [self.points.file(milestone).with_suffix(".png") for milestone in self.plan.milestones]
        if self._is_synthetic and self.arm.test:
            stack(rows, stored.with_suffix(".png"))
        return stored

    @property
    def _is_synthetic(self) -> bool:
        return not self.settings.public and not self.settings.private

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

    def _end_measure(self, parts: dict[str, Part], extractors: list[Extractor], device: torch.device) -> Measure:
        """Many images against the test split alone."""
        whole = self._measure({role: parts[role] for role in ("train", "test")}, extractors, device)
        return replace(whole, num_images=self.settings.end_images, tells_copies=False)

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
            end=self.points.end(),
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
        return digests(extractors) | ({} if self.experiment.data.wavelet else {HELD_OUT_LOSS: ""})

    def _asked(self, parts: dict[str, Part], extractors: list[Extractor], init: Init | None) -> dict[str, Any]:
        """What must be the same for the arm to go on; a central one may go on to more images or other milestones."""
        not_asked = {"init"} if self.arm.sites else {"init", "images", "at"}
        return {
            "arm": self.arm.model_dump(mode="json", exclude={"title", "scales", "init"}),
            "stage": self.stage.model_dump(mode="json", exclude=not_asked),
            "data": {role: part.facts for role, part in parts.items()},
            "extractors": digests(extractors) if self.arm.test else {},
            "generated": self.study.scales[self.scale].generated,
            "init": init.checkpoint if init else "",
        }
