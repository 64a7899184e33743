"""The folder of a simulation: what was asked for in it, its one run, and how that ended."""

import json
from pathlib import Path

from server.runs.run_directory import RunDir
from shared.errors import InputError
from shared.storage.runlog import read_metrics

RUN = "simulation"
ASKED_FILE = "simulation.json"
"""What is simulated; written last, so that a folder with it is complete."""


def run_of(out: Path) -> RunDir:
    """The run that a simulation's folder holds."""
    return RunDir(out / "runs" / RUN)


def is_complete(out: Path) -> bool:
    """Whether all rounds of the simulation in a folder are done."""
    return outcome(out, "")["status"] == "completed"


def check_same(out: Path, asked: dict[str, object]) -> None:
    """Refuse to go on with something else than what a folder was started with.

    Raises:
        InputError: names the first thing that differs.
    """
    try:
        stored = json.loads((out / ASKED_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{out / ASKED_FILE} is damaged ({error}): name a new folder with --out") from error
    for key, value in asked.items():
        if stored.get(key) != value:
            raise InputError(f"folder {out} holds a simulation with another {key}: name a new one with --out")


def outcome(out: Path, details: str) -> dict[str, str]:
    """What the run itself wrote of its end counts, not what the runtime says."""
    events = read_metrics(run_of(out).metrics)
    end: dict[str, object] = next((event for event in reversed(events) if event["kind"] == "end"), {})
    status = "completed" if end.get("status") == "completed" else "failed"
    return {"status": status, "reason": "" if status == "completed" else str(end.get("reason") or details)}
