"""Operators' commands run for show, on one machine: in the foreground, side by side, or as daemons; all of them end."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from deploy.errors import ProvisionError
from deploy.processes.process import adopt_orphans, end_descendants, end_together, last_line, spawn

START_SECONDS = 90.0
STOP_SECONDS = 40.0
LONGEST_SHOWN = 160


class CommandError(RuntimeError):
    """A command failed; the text names it and its last words."""


@dataclass
class Commands:
    """Runs commands and tells which.

    Attributes:
        logs: folder for the output of what is not shown.
        say: prints a line.
    """

    logs: Path
    say: Callable[[str], None]
    _daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def run(self, *command: str, log: str = "") -> None:
        """One command in the foreground: its output on the console, or in the file `log`.

        Raises:
            CommandError: its exit code is not 0.
        """
        self.say(f"$ {_text(command)}")
        path = self.logs / log if log else None
        self._wait(self._spawn(command, path), command, path)

    def refused(self, *command: str, log: str) -> str:
        """One command that has to fail; all that it said.

        Raises:
            CommandError: it did not, or not by its own decision.
        """
        self.say(f"$ {_text(command)}")
        path = self.logs / log
        process = self._spawn(command, path)
        code = process.wait()
        self._running.remove(process)
        if code not in (1, 2):
            raise CommandError(f"`{_text(command)}` ended with code {code} where a refusal was expected")
        return path.read_text(encoding="utf-8", errors="replace")

    def together(self, commands: Sequence[Sequence[str]]) -> list[str]:
        """Commands side by side; the last line that each printed. What sites do alike is shown once."""
        is_alike = len(commands) > 1 and {command[0] for command in commands} == {"maskfed-client"}
        for command in commands[:1] if is_alike else commands:
            self.say(f"$ {_text(command)}" + ("   (and so at each site)" if is_alike else ""))
        logs = [self.logs / f"{command[1]}-{number}.log" for number, command in enumerate(commands)]
        started = [self._spawn(command, log) for command, log in zip(commands, logs, strict=True)]
        for process, command, log in zip(started, commands, logs, strict=True):
            self._wait(process, command, log)
        return [last_line(log, limit=4096) for log in logs]

    def output(self, *command: str) -> str:
        """What a command prints, without telling of it."""
        done = subprocess.run(_argv(command), capture_output=True, text=True, check=False, start_new_session=True)
        if done.returncode:
            raise CommandError(f"`{_text(command)}` ended with code {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def daemon(self, *command: str, log: str, ready: str = "") -> None:
        """A process that stays; with `ready`, wait until it has printed that. The first one is ended last.

        Raises:
            CommandError: it ended, or was not ready in time.
        """
        self.say(f"$ {_text(command)} &")
        path = self.logs / log
        process = spawn(_argv(command), dict(os.environ), path)
        self._daemons.append(process)
        deadline = time.monotonic() + START_SECONDS
        while ready and ready not in path.read_text(encoding="utf-8", errors="replace"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise CommandError(f"`{_text(command)}` did not come up: {last_line(path)}")
            time.sleep(0.2)

    @contextmanager
    def everything_ends(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM become KeyboardInterrupt; on the way out every process ends, in the right order."""

        def interrupt(_number: int, _frame: FrameType | None) -> None:
            raise KeyboardInterrupt

        adopt_orphans()
        old = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number in old:
                signal.signal(number, signal.SIG_IGN)
            self._take_down()
            for number, handler in old.items():
                signal.signal(number, handler)

    def _take_down(self) -> None:
        if not self._daemons and not self._running:
            return
        self.say("\ntaking everything down: sites, then the coordinator")
        end_together(self._running, STOP_SECONDS)
        end_together(self._daemons[1:], STOP_SECONDS)
        end_together(self._daemons[:1], STOP_SECONDS)
        killed = end_descendants()
        self.say("  no process is left" + (f" ({killed} had to be killed)" if killed else ""))

    def _spawn(self, command: Sequence[str], log: Path | None) -> subprocess.Popen[bytes]:
        process = spawn(_argv(command), dict(os.environ), log)
        self._running.append(process)
        return process

    def _wait(self, process: subprocess.Popen[bytes], command: Sequence[str], log: Path | None) -> None:
        code = process.wait()
        self._running.remove(process)
        if code:
            said = f": {last_line(log)}" if log else ""
            raise CommandError(f"`{_text(command)}` ended with code {code}{said}")


def _argv(command: Sequence[str]) -> list[str]:
    path = Path(sys.executable).parent / command[0]
    if not path.exists():
        raise ProvisionError(f"{command[0]} is not installed beside {sys.executable}: run `make` again")
    return [str(path), *command[1:]]


def _text(command: Sequence[str]) -> str:
    """For the eye: an enrolment line is long."""
    return shlex.join(part if len(part) < LONGEST_SHOWN else f"{part[:40]}..." for part in command)
