"""What waits for the operator's word, as `approve list` tells it: what it does, differs in and costs here.

It is worked out by that very command in a process of its own, since it loads torch and measures this machine: when
somebody looks at the page, once for each state of what waits, of policy, approvals and ledger.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, ClassVar

from client.home import Home

PATIENCE_SECONDS = 300.0
Facts = dict[str, Any]


class Decisions:
    """The facts of each experiment that waits, once they are known."""

    command: ClassVar[Sequence[str]] = (sys.executable, "-I", "-m", "client.cli.main", "approve", "list", "--json")

    def __init__(self, home: Home) -> None:
        self._home = home
        self._state: object = None
        """What the newest facts are of."""
        self._facts: dict[str, Facts] = {}
        self._running: tuple[subprocess.Popen[bytes], IO[bytes], float] | None = None

    def of(self, digest: str) -> Facts | None:
        """As `client.offers.in_words.waiting_facts`; None while they are not known."""
        return self._facts.get(digest)

    def catch_up(self) -> None:
        """Take what was worked out; begin anew where something has changed since."""
        if self._running:
            self._collect(*self._running)
        state = [_stamp(path) for path in (self._home.pending, self._home.settings, self._home.approved)]
        state.append(_stamp(self._home.ledger))
        if not self._running and state != self._state:
            self._state = state
            self._begin()

    def _begin(self) -> None:
        answer = tempfile.TemporaryFile()  # noqa: SIM115  # closed where the process has ended
        argv = [*self.command, "--home", str(self._home.path)]
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(argv, stdin=quiet, stdout=answer, stderr=quiet)
        # The page's own memory is limited, what torch needs is not the page's.
        _, most = resource.prlimit(process.pid, resource.RLIMIT_AS)
        resource.prlimit(process.pid, resource.RLIMIT_AS, (most, most))
        os.setpriority(os.PRIO_PROCESS, process.pid, 10)
        self._running = process, answer, time.monotonic()

    def _collect(self, process: subprocess.Popen[bytes], answer: IO[bytes], since: float) -> None:
        if process.poll() is None:
            if time.monotonic() - since < PATIENCE_SECONDS:
                return
            process.kill()
            process.wait()
        answer.seek(0)
        self._facts = _facts_of(answer.read()) if process.returncode == 0 else {}
        answer.close()
        self._running = None


def _facts_of(answer: bytes) -> dict[str, Facts]:
    try:
        return {each["digest"]: each for each in json.loads(answer)["waiting"]}
    except (ValueError, KeyError, TypeError):
        return {}


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return (0, 0)
    return status.st_mtime_ns, status.st_size
