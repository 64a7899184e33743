"""Open and masked rounds of the same real sites, in pairs whose order alternates, so that a drifting machine cancels.

By the operators' own commands: each kind is a run of its own, rosters are approved, and both train the same model in as
many steps. A masked round has one question more, whose seconds are told apart; the rest is what masks may cost.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.local import LocalFederation, federation, make_experiment, random_checkpoint
from server.runs.run_directory import RunDir
from shared.experiment.config import Experiment
from shared.storage.runlog import read_metrics

ROUNDS = 2
"""Of each run; the first warms up and does not count."""


@dataclass(frozen=True)
class Workload:
    """What is compared."""

    num_sites: int
    size: str
    local_steps: int
    pairs: int
    bits: int


@dataclass(frozen=True)
class Compared:
    """Seconds of the rounds that count, pair by pair, without the question for masks; and of that."""

    open_seconds: list[float]
    masked_seconds: list[float]
    unmask_seconds: list[float]
    num_left: int
    """Processes that were left over."""
    is_whole: bool
    """Whether every round had all sites and changed the weights."""

    @property
    def ratios(self) -> list[float]:
        """Masked over open, pair by pair."""
        return [masked / plain for plain, masked in zip(self.open_seconds, self.masked_seconds, strict=True)]

    @property
    def overhead(self) -> float:
        """Median of the pairs' ratios, less 1."""
        return median(self.ratios) - 1


def experiment_of(load: Workload, settings: Sequence[str] = ()) -> Experiment:
    """A plan of two rounds with all sites."""
    lines = (
        f"rounds = {ROUNDS}",
        f"local_steps = {load.local_steps}",
        f"min_available = {load.num_sites}",
        f"min_replies = {load.num_sites}",
        *settings,
    )
    return make_experiment(
        '[train]\nobjective = "dsm"\nbatch = 4\nprecision = "float32"\n'
        f'[model]\nsize = "{load.size}"\nimage_size = 32\npatch_size = 4\n[federation]\n' + "\n".join(lines)
    )


def compare(load: Workload) -> Compared:
    """Run all pairs: open and masked, masked and open, and so on."""
    kinds = {
        "open": experiment_of(load),
        "masked": experiment_of(load, ("secure = true", f"secure_bits = {load.bits}")),
    }
    records: dict[str, list[Any]] = {"open": [], "masked": []}
    is_whole = True
    with federation(load.num_sites) as local:
        init = random_checkpoint(local.root / "init", kinds["open"])
        approve_all(local, init, kinds["masked"])
        for number in range(load.pairs):
            for kind in ("open", "masked") if number % 2 == 0 else ("masked", "open"):
                rounds = rounds_of(local, init, kinds[kind], f"{kind}-{number}")
                is_whole &= all(len(each["answered"]) == load.num_sites and each["weights_changed"] for each in rounds)
                records[kind].append(rounds[-1]["seconds"])
                print(f"pair {number + 1}, {kind:6s}: {rounds[-1]['seconds']}", flush=True)
        num_left = local.stop()
    unmask = [float(each["unmask"]) for each in records["masked"]]
    masked = [float(each["total"]) - extra for each, extra in zip(records["masked"], unmask, strict=True)]
    return Compared([float(each["total"]) for each in records["open"]], masked, unmask, num_left, is_whole)


def approve_all(local: LocalFederation, init: Path, experiment: Experiment) -> None:
    """A first run that every site refuses, for it knows nobody yet; then the operators approve its roster."""
    with suppress(RuntimeError):
        local.finetune(init, experiment, "unknown")
    for index in range(local.num_sites):
        local.call("maskfed-client", "approve", "roster", "unknown", "--yes", "--home", str(local.site(index)))


def rounds_of(local: LocalFederation, init: Path, experiment: Experiment, run: str) -> list[Any]:
    """Records of the rounds of a run."""
    local.finetune(init, experiment, run)
    events = read_metrics(RunDir(local.home / "runs" / run).metrics)
    return [event for event in events if event["kind"] == "round"]
