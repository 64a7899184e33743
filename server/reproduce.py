"""One arm of a study as a resumable job: data, training, distances at given image counts, one `result.json`.

The folder of an arm holds `arm.json` (what was asked), `training` or `simulation`, `points/*.json` (distances that are
done) and, at the end, `result.json`. The same command after any interruption goes on with what is left; when the study
asks a central arm for more images than before, it goes on from its end.
"""

import json
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from server import arms
from server.distances import Measure, Measurement
from server.drawing import pick_device
from server.recipes import find_experiment
from server.results import ArmResult, Init, Metrics, Point, read_result, result_file, write_result
from server.splits import Part, Splits
from server.studies import Arm, Scale, Stage, Study, arm_at, load_study
from shared.chunks import rank_from_environment
from shared.compute import hardware, train_flops
from shared.config import Experiment, load_experiment
from shared.errors import InputError
from shared.extractor import Extractor
from shared.features import INCEPTION, load_extractor
from shared.files import write_atomically
from shared.precision import speed_up_float32
from shared.versions import git_commit, installed_versions

RESULT_FILE, ASKED_FILE, POINTS_FOLDER = "result.json", "arm.json", "points"
_SHOWN_SECTIONS = ("train", "model", "mask", "diffusion", "data", "optim", "federation", "evaluation")


@dataclass(frozen=True)
class Settings:
    """Where images and extractors come from, and where everything goes.

    Attributes:
        public: folder or zip; empty: synthetic faces.
        private: the same, a folder per person where persons are known.
        extractors: as of `shared.features.load_extractor`; the first one chooses among points.
        weights: file of the Inception weights, for the extractors that take one.
        root: folder of all runs.
        results: folder that a finished result is copied to.
        device: for sampling and features; empty: a GPU where there is one.
        say: told what happens.
        on_progress: told items done and in all.
    """

    public: str
    private: str
    extractors: tuple[str, ...]
    weights: Path | None
    root: Path
    results: Path
    device: str = ""
    say: Callable[[str], None] = field(default=lambda _line: None, compare=False)
    on_progress: Callable[[int, int], None] = field(default=lambda _done, _total: None, compare=False)


def run_arm(study_name: str, arm_name: str, scale: str, settings: Settings) -> Path | None:
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
        self, study_name: str, study: Study, arm_name: str, arm: Arm, stage: Stage, scale: Scale, settings: Settings
    ) -> None:
        self.study_name, self.study, self.arm_name, self.arm = study_name, study, arm_name, arm
        self.stage, self.scale, self.settings = stage, scale, settings
        self.folder = self._folder_of(study_name, arm_name)
        overrides = [f"{key}={json.dumps(value)}" for key, value in stage.settings.items()]
        self.experiment = load_experiment(find_experiment(stage.recipe), overrides)
        self.plan = arms.plan(self.experiment, arm, stage)

    def run(self) -> Path | None:
        """Everything that is left; the stored result."""
        settings, stored = self.settings, result_file(self.settings.results, self.study_name, self.scale, self.arm_name)
        if settings.weights and not any(spec.startswith(("inception", "clip")) for spec in settings.extractors):
            raise InputError(f"--weights {settings.weights}: no extractor takes it, give one such as {INCEPTION}")
        speed_up_float32()
        device = pick_device(settings.device, rank_from_environment())
        extractors = [load_extractor(spec, weights=settings.weights, device=device) for spec in settings.extractors]
        init = self._find_init()
        sources = {"public": settings.public, "private": settings.private}
        size, num_synthetic = self.experiment.model.image_size, self.study.scales[self.scale].synthetic
        splits = Splits(self.study, sources, settings.root / "data", size, num_synthetic, settings.on_progress)
        parts = splits.of(self.arm)
        self._claim_folder(parts, extractors, init)
        result = self.folder / RESULT_FILE
        wanted = [place.images for place in self.plan.places]
        if not result.exists() or [point.images for point in read_result(result).curve] != wanted:
            points = self._points(parts, extractors, init, device)
            if points is None:
                return None
            training_images = self._measure(parts, extractors, device).of_training_images() if self.arm.test else {}
            write_result(self._result(points, training_images, parts, extractors, init), result)
        write_result(read_result(result), stored)
        return stored

    def _points(
        self, parts: dict[str, Part], extractors: list[Extractor], init: Init | None, device: torch.device
    ) -> list[dict[str, Any]] | None:
        """Train from point to point and measure at each; None when the training stopped before its end."""
        measure = self._measure(parts, extractors, device)
        source = self._folder_of(*self._init_names()) if init else None
        trainer = arms.Trainer(self.experiment, self.plan, self.folder, parts["train"], source)
        flops, points = train_flops(self.experiment), []
        for place in self.plan.places:
            file = self.folder / POINTS_FOLDER / f"{place.images:010d}.json"
            if not file.exists():
                checkpoint = trainer.advance(place)
                if checkpoint is None:
                    return None
                started, found = time.monotonic(), measure(checkpoint) if self.arm.test else Measurement({}, {}, {})
                point = Point(
                    images=place.images,
                    steps=place.steps,
                    flops=place.images * flops,
                    metrics=found.metrics,
                    copied=found.copied,
                )
                seconds = round(time.monotonic() - started, 2)
                self._say_point(point)
                file.parent.mkdir(parents=True, exist_ok=True)
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

    def _say_point(self, point: Point) -> None:
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
        experiment: Experiment = arms.stored_experiment(self.folder, self.plan)
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
            curve=tuple(Point.model_validate(entry["point"]) for entry in points),
            init=init,
            sites=self.arm.sites,
            experiment=sections,
            data={role: part.facts for role, part in parts.items()},
            training_images=training_images,
            extractors=_digests(extractors) if self.arm.test else {},
            measured={key: value for key, value in points[-1]["measured"].items() if key != "checkpoint"},
            training_seconds=round(arms.training_seconds(self.folder, self.plan), 1),
            measuring_seconds=round(sum(entry["seconds"] for entry in points), 1),
            threads=torch.get_num_threads(),
            hardware=hardware(),
            versions=installed_versions(),
            commit=git_commit(),
            command=self.command,
            date=datetime.now(UTC).strftime("%Y-%m-%d"),
        )

    @property
    def command(self) -> str:
        """What to type, with the names of files only."""
        settings = self.settings
        words = ["maskfed-server", "reproduce", self.study_name, "--scale", self.scale, "--arm", self.arm_name]
        for option, value in (("--public", settings.public), ("--private", settings.private)):
            words += [option, Path(value).name] if value else []
        for spec in settings.extractors:
            kind, is_file, file = spec.partition("onnx:")
            words += ["--extractor", f"{is_file}{Path(file).name}" if is_file else kind]
        return shlex.join([*words, *(["--weights", settings.weights.name] if settings.weights else [])])

    def _folder_of(self, study: str, arm: str) -> Path:
        return self.settings.root / f"{study}-{self.scale}" / arm

    def _init_names(self) -> tuple[str, str]:
        study, _, arm = (self.stage.init or self.arm.init).rpartition("/")
        return study or self.study_name, arm

    def _find_init(self) -> Init | None:
        """The finished arm that this one starts from.

        Raises:
            InputError: it has not run; or it belongs to another division of the images, which could leak.
        """
        if not (self.stage.init or self.arm.init):
            return None
        study, arm = self._init_names()
        file = self._folder_of(study, arm) / RESULT_FILE
        if not file.exists():
            raise InputError(
                f"arm {self.arm_name} of {self.study_name} starts from {study}/{arm}, which has not run: first "
                f"`maskfed-server reproduce {study} --scale {self.scale} --arm {arm}` with the same images and --out"
            )
        other = self.study if study == self.study_name else load_study(study)
        if (other.seed, other.splits) != (self.study.seed, self.study.splits):
            raise InputError(
                f"study {study} divides the images otherwise than {self.study_name}: give both one division"
            )
        result = read_result(file)
        before = result.init or Init(arm="", checkpoint="", images=0, steps=0, flops=0.0)
        return Init(
            arm=f"{study}/{arm}",
            checkpoint=arms.digest_of(self._folder_of(study, arm)),
            images=result.last.images + before.images,
            steps=result.last.steps + before.steps,
            flops=result.last.flops + before.flops,
        )

    def _claim_folder(self, parts: dict[str, Part], extractors: list[Extractor], init: Init | None) -> None:
        """Note what is asked; another question in the same folder is refused.

        A central arm may be asked for more images, or for other places to measure at: nothing that is done changes.

        Raises:
            InputError: names the first thing that differs.
        """
        not_asked = {"init"} if self.arm.sites else {"init", "images", "at"}
        asked: dict[str, Any] = {
            "arm": self.arm.model_dump(mode="json", exclude={"title", "scales", "init"}),
            "stage": self.stage.model_dump(mode="json", exclude=not_asked),
            "data": {role: part.facts for role, part in parts.items()},
            "extractors": _digests(extractors) if self.arm.test else {},
            "generated": self.study.scales[self.scale].generated,
            "init": init.checkpoint if init else "",
        }
        file = self.folder / ASKED_FILE
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(asked, indent=1) + "\n")
            return
        stored = json.loads(file.read_text(encoding="utf-8"))
        for key, value in asked.items():
            if stored.get(key) != value:
                raise InputError(
                    f"arm folder {self.folder} was started with another {key}: give another --out, or remove it"
                )


def _digests(extractors: list[Extractor]) -> dict[str, str]:
    return {extractor.space.distance_name: extractor.space.sha256 for extractor in extractors}
