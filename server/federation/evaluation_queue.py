"""What happens beside the rounds: evaluations in processes of their own, one at a time, and the progress file."""

import logging
import os
import re
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from server.federation.fleet.registry import write_json
from server.federation.updates.global_model import round_folder
from server.runs.child_process import in_background
from server.runs.run_directory import RunDir
from shared.errors import InputError
from shared.storage.checkpoint import checkpoint_number, list_checkpoints, load_meta
from shared.storage.runlog import RunLog

FINISH_SECONDS = 3600.0
"""How long a run waits at its end for the evaluations that are left."""
log = logging.getLogger("maskfed.server")


class Evaluations:
    """Observer of a run's rounds: queues an evaluation of round 0 and of every k-th round, and keeps `progress.json`.

    `attend` is what starts an evaluation; everything else only takes notes.

    Without a reference in the run's `finetune.json` nothing is evaluated. Weights of an earlier round are not measured
    again. A failed evaluation never fails the run.
    """

    def __init__(self, run_folder: Path, every_rounds: int, metrics: RunLog) -> None:
        self.run_folder, self.every_rounds, self.metrics = run_folder, every_rounds, metrics
        settings = RunDir(run_folder).stored_settings
        self.reference: str = settings.get("reference", "")
        self.arguments: list[str] = settings.get("evaluate_arguments", [])
        self._queue: deque[int] = deque()
        self._weights: dict[str, int] = {}
        """Digest of averaged weights, and the round that they are measured in."""
        self._running: tuple[int, subprocess.Popen[bytes]] | None = None
        self._last_progress: dict[str, Any] = {}
        for folder in list_checkpoints(run_folder / "checkpoints"):
            self.round_done(checkpoint_number(folder))

    def progress(
        self, server_round: int, stage: str, sites: dict[str, str], answers: dict[str, dict[str, float]] | None = None
    ) -> None:
        """Write `progress.json`, when something changed; `answers` has seconds and bytes of the sites that answered."""
        state = {
            "round": server_round,
            "stage": stage,
            "sites": sites,
            "answers": answers or {},
            "evaluating": self._evaluating(),
        }
        if state != self._last_progress:
            self._last_progress = state
            write_json(RunDir(self.run_folder).progress, {**state, "since": time.time(), "pid": os.getpid()})

    def attend(self) -> None:
        """Note how an evaluation ended, and start the next; to be called now and then."""
        if self._running and self._running[1].poll() is not None:
            server_round, process = self._running
            self._running = None
            if process.returncode:
                self._give_up(server_round, f"exit code {process.returncode}: {self._last_line(server_round)}")
        if self._queue and not self._running:
            server_round = self._queue.popleft()
            self._running = (server_round, self._start(server_round))

    def round_done(self, server_round: int) -> None:
        """Queue the evaluation of a round, unless it has a result, or the same weights as an earlier one."""
        if not (self.reference and self.every_rounds and server_round % self.every_rounds == 0):
            return
        same = self._weights.setdefault(self._weights_of(server_round), server_round)
        if same != server_round:
            log.info("evaluation of round %d: the weights of round %d, measured there", server_round, same)
        elif not self._result_file(server_round).exists():
            self._queue.append(server_round)

    def _weights_of(self, server_round: int) -> str:
        try:
            digests = load_meta(round_folder(self.run_folder / "checkpoints", server_round)).sha256
        except InputError:
            digests = {}
        return digests.get("ema.safetensors", f"unknown in round {server_round}")

    def oldest_needed(self) -> int | None:
        """Oldest round whose checkpoint an evaluation still reads."""
        rounds = [*self._queue, *([self._running[0]] if self._running else [])]
        return min(rounds, default=None)

    def finish(self, deadline_seconds: float = FINISH_SECONDS) -> None:
        """Wait for the evaluations that are left; those that are not done by the deadline are given up."""
        deadline = time.monotonic() + deadline_seconds
        while (self._queue or self._running) and time.monotonic() < deadline:
            self.attend()
            self.progress(self._last_progress.get("round", 0), "evaluating", {})
            time.sleep(0.2)
        for server_round in self._queue:
            self._give_up(server_round, f"not done {deadline_seconds:g} s after the last round")
        self._queue.clear()

    def close(self) -> None:
        """End a running evaluation."""
        if self._running:
            server_round, process = self._running
            process.kill()
            process.wait()
            self._running = None
            self._give_up(server_round, "ended with the run")

    def _start(self, server_round: int) -> subprocess.Popen[bytes]:
        checkpoint = round_folder(self.run_folder / "checkpoints", server_round)
        log_file = self._log_file(server_round)
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with log_file.open("wb") as output:
            return subprocess.Popen(
                evaluate_command(checkpoint, self.reference, self.arguments),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=in_background(),  # noqa: PLW1509  # system calls, no Python locks
            )

    def _give_up(self, server_round: int, problem: str) -> None:
        """A result is recorded by the evaluation itself, a failure here."""
        log.warning("evaluation of round %d: %s", server_round, problem)
        self._weights = {digest: place for digest, place in self._weights.items() if place != server_round}
        self.metrics.write("evaluation_failed", round=server_round, reason=problem)

    def _evaluating(self) -> int | None:
        return self._running[0] if self._running else None

    def _result_file(self, server_round: int) -> Path:
        return self.run_folder / "evaluation" / round_folder(Path(), server_round).name / "result.json"

    def _log_file(self, server_round: int) -> Path:
        return self.run_folder / "evaluation" / f"{round_folder(Path(), server_round).name}.log"

    def _last_line(self, server_round: int) -> str:
        lines = self._log_file(server_round).read_text(encoding="utf-8", errors="replace").split("\n")
        text = next((line for line in reversed(lines) if line.strip()), "no output")
        return re.sub(r"\s+", " ", text)[:500]


def evaluate_command(checkpoint: Path, reference: str, further: list[str]) -> list[str]:
    """The operator's own command; its result and its line in `metrics.jsonl` are named like the checkpoint."""
    command = [sys.executable, "-m", "server.cli.main", "evaluate", str(checkpoint)]
    return [*command, "--reference", reference, "--name", checkpoint.name, *further]
