"""The held-out check of a round: a process with torch that answers a question in a file. No torch here.

It runs between a round and the next, not beside them: a round on weights that are thrown away would cost the sites
training, and under DP budget, while the check costs seconds.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.federation.acceptance.bound import Losses
from server.runs.child_process import in_background
from server.runs.run_directory import RunDir
from shared.storage.files import write_atomically

FOLDER, QUESTION_FILE, ANSWER_FILE, LOG_FILE = "held-out", "question.json", "answer.json", "check.log"
CHECK_SECONDS = 3600.0
"""How long a check may take, with the search for suspects."""
POLL_SECONDS = 0.1
BAD_INPUT = 2


class CheckError(RuntimeError):
    """The check could not run: then no round is accepted. `is_final` says that trying again will not help."""

    def __init__(self, reason: str, *, is_final: bool) -> None:
        super().__init__(reason)
        self.is_final = is_final


@dataclass(frozen=True)
class CheckQuestion:
    """What the process is asked; paths as text.

    Attributes:
        checkpoint: folder whose group `model` is measured.
        images: public images, as `open_images` takes them.
        start: checkpoint of the round before; empty: only measure.
        before: its losses.
        bound: largest relative rise; beyond it suspects are looked for.
        replies: folder of the round's updates; empty: they are not kept.
    """

    checkpoint: str
    images: str
    start: str = ""
    before: Losses | None = None
    bound: float = 0.0
    replies: str = ""


@dataclass(frozen=True)
class Answer:
    """Losses by group, and the sites without whom they would not have jumped."""

    losses: dict[str, float]
    suspects: tuple[str, ...] = ()


class HeldOutCheck:
    """Checks of one run; off where the run has no public held-out images."""

    def __init__(self, run_folder: Path) -> None:
        self.folder = run_folder / FOLDER
        self.images = str(RunDir(run_folder).stored_settings.get("held_out", ""))

    def ask(self, question: CheckQuestion, attend: Callable[[], None]) -> Answer:
        """The answer of a new process; `attend` is called while it works.

        Raises:
            CheckError: it failed, or took longer than an hour.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        answer_file = self.folder / ANSWER_FILE
        answer_file.unlink(missing_ok=True)
        write_atomically(self.folder / QUESTION_FILE, json.dumps(vars(question)) + "\n")
        with (self.folder / LOG_FILE).open("wb") as output:
            self._wait(check_command(self.folder), output, attend)
        if not answer_file.exists():
            raise CheckError("the held-out check left no answer", is_final=False)
        answer: dict[str, Any] = json.loads(answer_file.read_text(encoding="utf-8"))
        return Answer(answer["losses"], tuple(answer["suspects"]))

    def _wait(self, command: list[str], output: Any, attend: Callable[[], None]) -> None:  # noqa: ANN401  # a file
        deadline = time.monotonic() + CHECK_SECONDS
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=in_background(),  # noqa: PLW1509  # system calls, no Python locks
        ) as process:
            try:
                while process.poll() is None:
                    if time.monotonic() > deadline:
                        raise CheckError(f"the held-out check took longer than {CHECK_SECONDS:g} s", is_final=False)
                    attend()
                    time.sleep(POLL_SECONDS)
            finally:
                process.kill()
        if process.returncode:
            raise CheckError(
                f"the held-out check failed with exit code {process.returncode}, so the round cannot be accepted: "
                f"{self._last_line()}",
                is_final=process.returncode == BAD_INPUT,
            )

    def _last_line(self) -> str:
        lines = (self.folder / LOG_FILE).read_text(encoding="utf-8", errors="replace").split("\n")
        text = next((line for line in reversed(lines) if line.strip()), "no output")
        return re.sub(r"\s+", " ", text)[:500]


def check_command(folder: Path) -> list[str]:
    """The process that reads the question in `folder` and leaves its answer there."""
    return [sys.executable, "-m", "server.evaluation.held_out.measure", str(folder)]
