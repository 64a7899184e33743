"""Runs that somebody wants finished: `wanted.json` in the coordinator's home, and the resubmission of those that died.

Flower starts no ServerApp again by itself, and an in-memory SuperLink forgets its runs. `maskfed-server start` and
every follower of a run call `tick`, under one lock, so it does not matter who sees a death first.
"""

import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import ValidationError

from server.federation.fleet.registry import write_json
from server.federation.fleet.superlink_types import ControlError, SubmittedRun
from shared.errors import InputError
from shared.experiment.config import Experiment, Section, explain, parse_experiment
from shared.storage.checkpoint import checkpoint_number, list_checkpoints
from shared.storage.room import SPARE_BYTES, has_room
from shared.storage.runlog import RunLog, read_metrics

MAX_SUBMISSIONS = 5
"""Resubmissions without a new checkpoint, after which a run is given up."""
BACKOFF_SECONDS = 2.0
MAX_BACKOFF_SECONDS = 60.0
log = logging.getLogger("maskfed.server")

Status = Literal["running", "completed", "failed", "stopped"]


class RunControl(Protocol):
    """What this module asks of the SuperLink; `server.federation.fleet.superlink.Control` does it."""

    def submit(self, experiment: Experiment, run: str) -> int:
        """Start a ServerApp for a run; Flower's run id."""

    def run_state(self, run_id: int) -> SubmittedRun:
        """How a submission stands."""

    def stop(self, run_id: int) -> bool:
        """End a submission; false when it was over already."""


class WantedRun(Section):
    """One run: its newest Flower run id, and how it stands."""

    run: str
    run_id: int
    status: Status = "running"
    reason: str = ""
    submissions: int = 0
    """Resubmissions since the last new checkpoint."""
    rounds_done: int = 0
    """Newest checkpoint at the last (re)submission."""
    events_before: int = 0
    """Lines of `metrics.jsonl` before the last (re)submission: what they say about an end is of an earlier attempt."""
    not_before: float = 0.0
    """Unix time before which it is not submitted again."""


class Wanted:
    """The file `wanted.json`."""

    def __init__(self, home: Path) -> None:
        self.home, self.path = home, home / "wanted.json"

    def runs(self) -> dict[str, WantedRun]:
        """All runs ever submitted from this home, by name.

        Raises:
            InputError: the file is damaged.
        """
        try:
            entries = json.loads(self.path.read_text(encoding="utf-8"))["runs"]
            return {entry["run"]: WantedRun.model_validate(entry) for entry in entries}
        except FileNotFoundError:
            return {}
        except ValidationError as error:
            raise InputError(f"{self.path}: {explain(error)}; remove the entry") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path} is damaged ({error}): remove it, and resume runs with --resume") from error

    def submit(self, control: RunControl, run: str) -> WantedRun:
        """Submit the prepared run and want it finished.

        Raises:
            InputError: it is running already.
        """
        with self._changing() as runs:
            known = runs.get(run)
            if known and known.status == "running" and not control.run_state(known.run_id).is_finished:
                raise InputError(f"run {run} is running already: follow it with `maskfed-server status {run}`")
            runs[run] = self._submitted(control, WantedRun(run=run, run_id=0))
            return runs[run]

    def stop(self, control: RunControl, run: str) -> bool:
        """Stop a run and want it no longer; false when it was over already.

        Raises:
            InputError: there is no such run.
        """
        with self._changing() as runs:
            entry = runs.get(run)
            if entry is None:
                raise InputError(f"run {run!r} is unknown: known are {', '.join(runs) or 'none'}")
            if entry.status != "running":
                return False
            runs[run] = entry.model_copy(update={"status": "stopped", "reason": "stopped by the operator"})
            # Before the SuperLink is asked, which may hang: the process of the run ends all the same.
            self._end_processes(entry.run_id)
            return control.stop(entry.run_id)

    def _end_processes(self, run_id: int, *, at_once: bool = False) -> None:
        """Let the superexec end what is left of a run, after some seconds: one that only starts hears of no stop."""
        folder = self.home / "flwr" / "superexec"
        if folder.is_dir():
            (folder / "stopped").mkdir(exist_ok=True, mode=0o700)
            file = folder / "stopped" / str(run_id)
            file.touch()
            if at_once:
                os.utime(file, (0, 0))

    def has_running(self) -> bool:
        """Whether any run is still to be finished."""
        return any(entry.status == "running" for entry in self.runs().values())

    def tick(self, control: RunControl) -> None:
        """Look after every running run: note how it ended, or submit it again. Never raises for a SuperLink away."""
        if not self.has_running():
            return
        with self._changing() as runs:
            for run, entry in runs.items():
                if entry.status == "running":
                    try:
                        runs[run] = self._look_after(control, entry)
                    except (ControlError, OSError) as error:
                        log.warning("run %s: %s", run, error)
                    except ValueError as error:  # its directory is damaged: other runs must not suffer
                        log.error("run %s: %s", run, error)
                        runs[run] = entry.model_copy(update={"status": "failed", "reason": str(error)})

    def _look_after(self, control: RunControl, entry: WantedRun) -> WantedRun:
        state = control.run_state(entry.run_id)
        if not state.is_finished:
            return entry
        end = self._end(entry)
        if end.get("status") == "completed":
            return entry.model_copy(update={"status": "completed", "reason": ""})
        if end.get("status") == "stopped" or state.status == "finished:stopped":
            return entry.model_copy(update={"status": "stopped", "reason": end.get("reason") or state.details})
        reason = str(end.get("reason") or state.details or state.status)
        if end.get("is_final"):
            return entry.model_copy(update={"status": "failed", "reason": reason})
        return self._again(control, entry, state, reason)

    def _again(self, control: RunControl, entry: WantedRun, state: SubmittedRun, reason: str) -> WantedRun:
        if not has_room(self.home / "runs" / entry.run, SPARE_BYTES):
            return entry  # a full disk is no fault of the run: it waits, and the attempt is not counted
        submissions = 0 if self._rounds_done(entry.run) > entry.rounds_done else entry.submissions
        if submissions >= MAX_SUBMISSIONS:
            reason = f"given up after {submissions} resubmissions without a new checkpoint; last: {reason}"
            self._log(entry.run).write("end", status="failed", reason=reason, is_final=True)
            return entry.model_copy(update={"status": "failed", "reason": reason})
        now = time.time()
        if entry.not_before == 0.0 and submissions:
            wait = min(BACKOFF_SECONDS * 2**submissions, MAX_BACKOFF_SECONDS)
            return entry.model_copy(update={"not_before": now + wait, "reason": reason})
        if now < entry.not_before:
            return entry
        log.warning("run %s: %s (%s); submitting it again", entry.run, state.status, reason)
        # One that hangs would keep the run's folder for itself, and no other process of the run could begin.
        self._end_processes(entry.run_id, at_once=True)
        self._log(entry.run).write("resubmitted", reason=reason, submissions=submissions + 1)
        return self._submitted(control, entry.model_copy(update={"submissions": submissions + 1, "reason": reason}))

    def _submitted(self, control: RunControl, entry: WantedRun) -> WantedRun:
        folder = self.home / "runs" / entry.run
        experiment = parse_experiment((folder / "experiment.toml").read_text(encoding="utf-8"), name="experiment.toml")
        facts = {
            "status": "running",
            "rounds_done": self._rounds_done(entry.run),
            "events_before": len(read_metrics(folder / "metrics.jsonl")),
            "not_before": 0.0,
        }
        return entry.model_copy(update={**facts, "run_id": control.submit(experiment, entry.run)})

    def _end(self, entry: WantedRun) -> dict[str, Any]:
        events = read_metrics(self.home / "runs" / entry.run / "metrics.jsonl")[entry.events_before :]
        return next((event for event in reversed(events) if event["kind"] == "end"), {})

    def _rounds_done(self, run: str) -> int:
        folders = list_checkpoints(self.home / "runs" / run / "checkpoints")
        return checkpoint_number(folders[-1]) if folders else 0

    def _log(self, run: str) -> RunLog:
        return RunLog(self.home / "runs" / run / "metrics.jsonl")

    @contextlib.contextmanager
    def _changing(self) -> Iterator[dict[str, WantedRun]]:
        self.home.mkdir(parents=True, exist_ok=True)
        with (self.home / "wanted.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            runs = self.runs()
            before = dict(runs)
            try:
                yield runs
            finally:
                if runs != before:
                    write_json(self.path, {"runs": [entry.model_dump(mode="json") for entry in runs.values()]})
