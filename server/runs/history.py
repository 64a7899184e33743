"""What a run directory tells, for the report: metrics, evaluations, sample grids, audits, provenance. No torch."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from server.runs.run_directory import RunDir
from shared.errors import InputError
from shared.experiment.config import Experiment
from shared.storage.checkpoint import META_FILE, list_checkpoints, load_meta
from shared.storage.round_records import rounds_of
from shared.storage.runlog import RunLogReader, damage_text

AUDITS_FOLDER = "audits"


@dataclass(frozen=True)
class Evaluation:
    """One `result.json`."""

    place: int
    """Round, or step of a central training."""
    distance_name: str
    value: float
    result: dict[str, Any]

    @property
    def interval(self) -> list[float] | None:
        """95 percent interval of the distance; None in results of older versions."""
        found: list[float] | None = self.result.get("intervals", {}).get(self.distance_name)
        return found

    @property
    def group(self) -> tuple[str, ...]:
        """What must agree for two distances to compare: metric, reference, network, and how the images were made.

        A Frechet distance falls with the number of images, and with the sampler's evaluations.
        """
        result = self.result
        network, making = result.get("extractor", {}), ("weights", "num_images", "sampler", "nfe", "eta")
        # Results of older versions name no variants of DDIM: there was one.
        ddim = result.get("rederive_eps", True), result.get("ddim_grid", "rounded")
        parts = (result["reference"]["name"], network.get("sha256"), *(result.get(name) for name in making), *ddim)
        return self.distance_name, *map(str, parts)


def spent_text(reply: Mapping[str, Any]) -> str:
    """Epsilon of a site, from its record in a round; where it is `unbounded`, that of the DP part stands beside it."""
    epsilon = reply["epsilon"]
    text = epsilon if isinstance(epsilon, str) else f"{epsilon:.4g}"
    return f"{text} (DP part {reply['dp_epsilon']:.4g})" if "dp_epsilon" in reply else text


@dataclass(frozen=True)
class RunData:
    """One run, as the report shows it."""

    name: str
    path: Path
    experiment: Experiment
    events: list[dict[str, Any]] = field(default_factory=list)
    damage: str = ""
    """Which lines of the log could not be read; empty: none."""
    evaluations: list[Evaluation] = field(default_factory=list)
    grids: list[tuple[int, Path]] = field(default_factory=list)
    """(round or step, PNG), in order."""
    audits: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Events of one kind, in order."""
        return [event for event in self.events if event.get("kind") == kind]

    @cached_property
    def rounds(self) -> list[dict[str, Any]]:
        """The last record of each round, by round, from the log or the checkpoints."""
        return rounds_of(self.events, RunDir(self.path).checkpoints)

    @property
    def is_federated(self) -> bool:
        """Whether places are rounds, not optimizer steps."""
        return bool(self.rounds) or any(entry["round"] is not None for entry in self.checkpoints)

    @property
    def place(self) -> str:
        """`round` or `step`."""
        return "round" if self.is_federated else "step"

    @property
    def status(self) -> str:
        """How the run ended, or how far it is."""
        last = next((event for event in reversed(self.events) if event.get("kind") in ("end", "start")), None)
        if last is None:
            return "not started"
        return str(last.get("status", "ended")) if last["kind"] == "end" else "running, or interrupted"

    @cached_property
    def sites(self) -> list[str]:
        """All sites that were ever asked, by alias."""
        return sorted({entry["site"] for event in self.rounds for entry in event.get("asked", [])})

    def participants(self, last_round: int) -> list[str]:
        """Sites whose updates are in the weights of `last_round`, by alias."""
        changed = self.changed_rounds(last_round)
        return sorted({entry["site"] for event in changed for entry in event.get("answered", [])})

    def changed_rounds(self, last_round: int) -> list[dict[str, Any]]:
        """Rounds up to `last_round` that changed the weights."""
        return [each for each in self.rounds if each["round"] <= last_round and each.get("weights_changed", True)]

    @property
    def main_group(self) -> tuple[str, ...] | None:
        """Metric and reference with the most evaluations, FID before others: the run's headline."""
        groups = [evaluation.group for evaluation in self.evaluations]
        return max(groups, key=lambda group: (groups.count(group), group[0] == "fid")) if groups else None


def read_run(path: Path) -> RunData:
    """Read a run directory.

    Raises:
        InputError: `path` holds no run.
    """
    run = RunDir(path)
    experiment, log = run.experiment, RunLogReader(run.metrics)
    checkpoints = [_checkpoint(folder) for folder in list_checkpoints(run.checkpoints) if (folder / META_FILE).exists()]
    return RunData(
        name=path.resolve().name,
        path=path,
        experiment=experiment,
        events=log.read(),
        damage=damage_text(log.damaged) if log.damaged else "",
        evaluations=_evaluations(path / "evaluation"),
        grids=_grids(run.samples),
        audits=_audits(path / AUDITS_FOLDER),
        checkpoints=checkpoints,
    )


def _evaluations(folder: Path) -> list[Evaluation]:
    found = []
    for file in sorted(folder.glob("*/result.json")):
        result = _json(file)
        metrics, place = (_object(result.get(key)) for key in ("metrics", "checkpoint"))
        name = next((key for key in metrics if key == "fid" or key.startswith("fd_")), None)
        number = place.get("round") if place.get("round") is not None else place.get("step")
        if name is not None and number is not None:
            _check_result(file, result)
            found.append(Evaluation(int(number), name, float(metrics[name]), result))
    return sorted(found, key=lambda each: each.place)


def _check_result(file: Path, result: dict[str, Any]) -> None:
    """Refuse a result that no `evaluate` has written: pages and gates stand on it.

    Raises:
        InputError: naming what is missing.
    """
    place, reference, intervals = result["checkpoint"], result.get("reference"), result.get("intervals", {})
    numbers = [result.get("num_images"), place.get("round", 0) or 0, place.get("step", 0) or 0]
    wrong = [
        name
        for name, is_right in (
            ("metrics", all(map(_is_number, result["metrics"].values()))),
            ("num_images, round or step", all(isinstance(each, int) for each in numbers)),
            ("reference", isinstance(reference, dict) and "name" in reference and _is_number(reference.get("n"))),
            ("intervals", isinstance(intervals, dict) and all(map(_is_pair, intervals.values()))),
            ("weights, sampler or nfe", {"weights", "sampler", "nfe"} <= result.keys()),
        )
        if not is_right
    ]
    if wrong:
        raise InputError(f"{file}: no result of `evaluate` ({wrong[0]}): delete it, or evaluate again")


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def _grids(folder: Path) -> list[tuple[int, Path]]:
    found = []
    for file in folder.glob("*.png"):
        kind, _, number = file.stem.partition("-")
        if kind in ("round", "step") and number.isdecimal():
            found.append((int(number), file))
    return sorted(found)


def _audits(folder: Path) -> list[dict[str, Any]]:
    return [_json(file) for file in sorted(folder.glob("*.json"))]


def _checkpoint(folder: Path) -> dict[str, Any]:
    try:
        meta = load_meta(folder)
    except InputError as error:
        return {"name": folder.name, "round": None, "step": None, "digest": str(error), "commit": "", "versions": {}}
    return {
        "name": folder.name,
        "round": meta.round,
        "step": meta.step,
        "digest": meta.digest,
        "commit": meta.commit,
        "versions": meta.versions,
        "parents": meta.parents,
    }


def _json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: it holds something else.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable JSON ({error}): delete it or restore it") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: holds no JSON object: delete it or restore it")
    return value
