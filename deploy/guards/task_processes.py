"""Processes that a superexec has started: their start, their end with all below them, and whether they stand still."""

import os
import subprocess
import time
from contextlib import suppress
from typing import Any

import psutil

from deploy.guards.forks import Forked
from deploy.processes.process import die_with_parent, family, is_frozen

Process = subprocess.Popen[bytes] | Forked
FROZEN_SECONDS = 60.0
"""After which a process that somebody has stopped (SIGSTOP, a debugger) is ended; its SuperNode waits as long."""


class FrozenSince:
    """Since when processes stand still, as far as anybody has looked."""

    def __init__(self) -> None:
        self._since: dict[int, float] = {}

    def seconds(self, pid: int) -> float:
        """How long `pid` has stood still at each look, 0 if it does not."""
        if not is_frozen(pid):
            self._since.pop(pid, None)
            return 0.0
        now = time.monotonic()
        return now - self._since.setdefault(pid, now)


def start(argv: list[str], *, is_quiet: bool) -> tuple[subprocess.Popen[bytes], int]:
    """Start a program, which ends when we do, even if it hangs; it, and the end of the pipe to its standard input."""
    reading, writing = os.pipe()
    streams: dict[str, Any] = dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL if is_quiet else None)
    try:
        return subprocess.Popen(argv, stdin=reading, **streams, preexec_fn=die_with_parent), writing  # noqa: PLW1509
    except OSError:
        os.close(writing)
        raise
    finally:
        os.close(reading)


def end(process: Process) -> None:
    """Kill a process and all below it."""
    for each in reversed(family(process.pid) if process.poll() is None else []):
        with suppress(psutil.Error):
            each.kill()
    process.wait()
