"""How an arm trains: centrally, from point to point, or through the real rounds with virtual sites."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from server.runs.run_directory import RunDir
from server.simulation.simulate import Simulate, simulate
from server.simulation.simulation_folder import ASKED_FILE, is_complete
from server.studies.run.arm_folders import newest_checkpoint, run_of, simulation_of
from server.studies.run.arm_plan import ArmPlan, Milestone
from server.studies.run.splits import Part
from server.training.train import train
from shared.errors import InputError
from shared.experiment.config import Experiment, parse_experiment
from shared.storage.checkpoint import load_meta


@dataclass(frozen=True)
class Trainer:
    """Brings an arm to its next milestone."""

    experiment: Experiment
    plan: ArmPlan
    folder: Path
    data: Part
    init: Path | None
    """Folder of the arm it starts from."""

    def advance(self, milestone: Milestone) -> Path | None:
        """The checkpoint of a milestone, trained where there is none yet; None when the training did not get there."""
        return self._round(milestone) if self.plan.sites else self._train(milestone)

    def end(self) -> Path:
        """The checkpoint of the last milestone, which `advance` has reached.

        Raises:
            InputError: it is gone.
        """
        last, run = self.plan.milestones[-1], run_of(self.folder, self.plan.sites)
        return run.round_checkpoint(last.rounds) if self.plan.sites else _kept(run, last)

    def _train(self, milestone: Milestone) -> Path | None:
        run = run_of(self.folder, 0)
        if _is_past(run, milestone.steps):
            return _kept(run, milestone)
        steps = self.experiment.train.model_copy(update={"steps": milestone.steps})
        init = newest_checkpoint(self.init) if self.init else None
        train(self.experiment.model_copy(update={"train": steps}), self.data.cache, run.path, init)
        newest = run.latest
        return newest if newest is not None and load_meta(newest).step == milestone.steps else None

    def _round(self, milestone: Milestone) -> Path | None:
        """All rounds at once, or those that are left."""
        out, run = simulation_of(self.folder), run_of(self.folder, self.plan.sites)
        if not is_complete(out):
            if not (out / ASKED_FILE).exists():
                shutil.rmtree(out, ignore_errors=True)
            assert self.init is not None
            code = simulate(self._simulation(newest_checkpoint(self.init), out), Console(stderr=True))
            if code:
                return None
        return run.round_checkpoint(milestone.rounds)

    def _simulation(self, init: Path, out: Path) -> Simulate:
        sites = self.plan.sites
        file = self.folder / "rounds.toml"
        overrides = {
            "federation.rounds": self.plan.milestones[-1].rounds,
            "federation.min_available": sites,
            "federation.min_replies": sites,
            "evaluation.every_rounds": 0,
            "train.keep_every": 1,
        }
        experiment = parse_experiment(
            self.experiment.to_toml(), [f"{key}={value}" for key, value in overrides.items()], file.name
        )
        file.write_text(experiment.to_toml(), encoding="utf-8")
        return Simulate(
            experiment=str(file),
            overrides=(),
            init=str(init),
            num_sites=sites,
            data=str(self.data.folder),
            skew="person",
            alpha=1.0,
            out=out,
            num_cpus=0,
            cpus_per_site=1,
            gpus_per_site=_gpu_share(sites),
        )


def _is_past(run: RunDir, steps: int) -> bool:
    """Whether a training has gone beyond `steps`."""
    newest = run.latest
    return newest is not None and (load_meta(newest).step or 0) > steps


def _kept(run: RunDir, milestone: Milestone) -> Path:
    checkpoint = run.step_checkpoint(milestone.steps)
    if not checkpoint.exists():
        raise InputError(
            f"training {run.path} has gone beyond {milestone.images} images and kept no checkpoint of them: leave that "
            "number out of the study, or give another --out"
        )
    return checkpoint


def _gpu_share(sites: int) -> float:
    """Share of the one GPU for each site, rounded down to what adds up; 0 without a GPU."""
    import torch

    return math.floor(100 / sites) / 100 if torch.cuda.is_available() else 0.0
