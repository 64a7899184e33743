"""The folder of an arm: what was asked for there, its training, and the finished arm that it starts from."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from server.runs.run_directory import RunDir
from server.simulation.simulation_folder import run_of as simulated_run
from server.studies.schema import Scale, Study
from server.studies.stored_results import Init, read_result, seeded
from server.studies.study_files import load_study
from shared.errors import InputError
from shared.experiment.config import Experiment
from shared.storage.checkpoint import load_meta, resolve_checkpoint
from shared.storage.files import write_atomically
from shared.storage.runlog import read_metrics

RESULT_FILE, ASKED_FILE = "result.json", "arm.json"
POINTS_FOLDER, END_FILE = "points", "end.json"


def folder_of(root: Path, study: str, scale: Scale, arm: str, seed: int = 0) -> Path:
    """The folder of an arm at a scale."""
    return root / f"{study}-{scale}" / seeded(arm, seed)


def simulation_of(folder: Path) -> Path:
    """The simulation that an arm with sites trains in."""
    return folder / "simulation"


def run_of(folder: Path, sites: int) -> RunDir:
    """The run of an arm: a training of its own, or the rounds of a simulation where it has sites."""
    return simulated_run(simulation_of(folder)) if sites else RunDir(folder / "training")


def newest_checkpoint(folder: Path) -> Path:
    """The newest checkpoint of an arm, which another arm starts from.

    Raises:
        InputError: it has not trained.
    """
    for run in (run_of(folder, 0), run_of(folder, 1)):
        if run.path.is_dir():
            return resolve_checkpoint(run.path).resolve()
    raise InputError(f"arm folder {folder} holds no training: run its arm again")


def stored_experiment(folder: Path, sites: int) -> Experiment:
    """What an arm's training resolved its experiment to."""
    return run_of(folder, sites).experiment


def training_seconds(folder: Path, sites: int) -> float:
    """Time spent in training, over all sessions of the arm; what a kill threw away counts as well."""
    run = run_of(folder, sites)
    events = read_metrics(run.metrics)
    if sites:
        return sum(float(event["seconds"]["total"]) for event in events if event["kind"] == "round")
    total, started, last = 0.0, 0.0, 0.0
    for event in events:
        now = datetime.fromisoformat(event["time"]).timestamp()
        if event["kind"] == "start":
            total += last - started
            started = now
        last = now
    return total + last - started


def find_init(
    root: Path, study_name: str, study: Study, scale: Scale, arm_name: str, seed: int = 0
) -> tuple[Path, Init] | tuple[None, None]:
    """The folder of the finished arm that this one starts from, and what it came to; nothing for a random start.

    It is of the same seed, so that the spread over seeds is that of the whole training.

    Raises:
        InputError: it has not run; or it belongs to another division of the images, which could leak.
    """
    arm = study.arms[arm_name]
    named = arm.scales[scale].init or arm.init
    if not named:
        return None, None
    other_name, _, other_arm = named.rpartition("/")
    other_name = other_name or study_name
    folder = folder_of(root, other_name, scale, other_arm, seed)
    if not (folder / RESULT_FILE).exists():
        raise InputError(
            f"arm {arm_name} of {study_name} starts from {other_name}/{other_arm}, which has not run: first "
            f"`maskfed-server reproduce {other_name} --scale {scale} --arm {other_arm}"
            f"{f' --seed {seed}' if seed else ''}` with the same images and --out"
        )
    other = study if other_name == study_name else load_study(other_name)
    if (other.seed, other.splits) != (study.seed, study.splits):
        raise InputError(f"study {other_name} divides the images otherwise than {study_name}: give both one division")
    result = read_result(folder / RESULT_FILE)
    before = result.init or Init(arm="", checkpoint="", images=0, steps=0, flops=0.0)
    return folder, Init(
        arm=f"{other_name}/{other_arm}",
        checkpoint=load_meta(newest_checkpoint(folder)).digest,
        images=result.last.images + before.images,
        steps=result.last.steps + before.steps,
        flops=result.last.flops + before.flops,
    )


def claim(folder: Path, asked: dict[str, Any]) -> None:
    """Note what is asked for; something else in the same folder is refused.

    Raises:
        InputError: names the first thing that differs.
    """
    file = folder / ASKED_FILE
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(asked, indent=1) + "\n")
        return
    stored = json.loads(file.read_text(encoding="utf-8"))
    for key, value in asked.items():
        if stored.get(key) != value:
            raise InputError(f"arm folder {folder} was started with another {key}: give another --out, or remove it")
