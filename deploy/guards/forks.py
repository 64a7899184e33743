"""The superexec's side of the warmed parent (`deploy.warm`): it asks for processes and holds them.

Whatever goes wrong, there is none, and the superexec starts the program itself. A parent never loads anything once it
serves: when a task has loaded torch, or expects it, the parent forks an heir that loads it, and serves until that can.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.processes.process import die_with_parent

START_SECONDS = 12.0
"""A claim of a task holds for 30 s, so this leaves time to start the program directly."""
HEIR_SECONDS = 18.0
"""How long a task waits for an heir: it would have to load the same itself, and both would take longer then."""
ANSWER_SECONDS = 5.0
RETRY_SECONDS = 300.0
"""After a parent, or an heir, that could not be started."""
MOST_BYTES = 2**16
LATER: dict[str, dict[str, tuple[str, ...]]] = {
    "client.entry": {"torch": ("client.training.local_round",), "opacus": ("client.privacy.dp_sgd",)}
}
"""By task: what an heir loads once a task has loaded the first, or expects it. A task names it, never what to load."""


def program(module: str) -> list[str]:
    """Command line of the parent; `-I` keeps working folder and environment out of `sys.path`."""
    return [sys.executable, "-I", "-m", "deploy.warm", module]


class Forked:
    """A process that the parent has forked, held by a descriptor of the kernel, which never means a later process.

    `heard` is the end of the pipe in which a task says what it has loaded.
    """

    def __init__(self, pid: int, pidfd: int, heard: int) -> None:
        self.pid, self._pidfd, self._heard = pid, pidfd, heard

    def __del__(self) -> None:
        os.close(self._pidfd)
        os.close(self._heard)

    def poll(self) -> int | None:
        """0 once the process has ended, however it did."""
        return self.wait(0.0)

    def wait(self, timeout: float | None = None) -> int | None:
        """0 when the process has ended within `timeout` seconds, else None."""
        waiting = select.poll()
        waiting.register(self._pidfd, select.POLLIN)
        return 0 if waiting.poll(None if timeout is None else 1000 * timeout) else None

    def send_signal(self, number: int) -> None:
        """Send a signal to this very process; nothing happens when it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        """End the process at once."""
        self.send_signal(signal.SIGKILL)

    def told(self, names: Sequence[str]) -> set[str]:
        """Which of `names` the process has loaded: a byte counts, whatever it may have written."""
        os.set_blocking(self._heard, False)  # something that it has left behind may hold the other end
        try:
            places = os.read(self._heard, len(names))
        except BlockingIOError:
            places = b""
        return {name for place, name in enumerate(names) if place in places}


class _Line:
    """The socket to a parent, the process at its other end, and what that has loaded for tasks that need more."""

    def __init__(
        self, end: socket.socket, process: "subprocess.Popen[bytes] | Forked", holds: frozenset[str] = frozenset()
    ) -> None:
        self._end, self.process, self.holds, self.is_ready = end, process, holds, False

    def await_ready(self, expected: Path, seconds: float) -> bool:
        """Whether the parent has said within `seconds` that it serves.

        Raises:
            OSError, ValueError: it has ended, or would run another file than `expected`.
        """
        if not self.is_ready:
            try:
                said = self._receive(seconds)[0]
            except (TimeoutError, BlockingIOError):
                return False
            if said != {"file": str(expected)}:
                raise ValueError(f"the parent would run {said}")
            self.is_ready = True
        return True

    def ask(self, question: dict[str, object], fds: Sequence[int]) -> tuple[int, int]:
        """Process id of a new process of the parent, and the descriptor that holds it; `fds` become the process's.

        Raises:
            OSError, ValueError, LookupError: there is none.
        """
        socket.send_fds(self._end, [json.dumps(question).encode()], list(fds))
        answer, (pidfd,) = self._receive(ANSWER_SECONDS)
        return answer["pid"], pidfd

    def retire(self) -> None:
        """Let the parent end once all that it has forked has."""
        self._end.close()

    def end(self) -> None:
        """End the parent at once; what it has forked goes on."""
        self._end.close()
        self.process.kill()
        self.process.wait()

    def _receive(self, seconds: float) -> tuple[Any, list[int]]:
        self._end.settimeout(seconds)
        content, fds, _, _ = socket.recv_fds(self._end, MOST_BYTES, 1)
        for each in fds:
            os.set_inheritable(each, False)
        return json.loads(content), fds


class Warm:
    """Starts the parent when it is needed, asks it for processes, and replaces it by an heir that has loaded more.

    `heed` may be called in any thread, everything else in one.
    """

    def __init__(self, module: str, expected: Path) -> None:
        self._module, self._expected, self._names = module, expected, list(LATER.get(module, {}))
        self._line: _Line | None = None
        self._heir: _Line | None = None
        self._wanted = set[str]()
        self._retired: list[subprocess.Popen[bytes] | Forked] = []
        self._not_before = self._no_heir_before = 0.0

    def fork(self, arguments: Sequence[str], *, is_quiet: bool) -> tuple[Forked, int] | None:
        """A new process for one task, and the end of the pipe that it reads its token from; None: start it directly."""
        for _ in range(2):  # one that has ended, or will not fork any more, is replaced once
            self.tend(HEIR_SECONDS)
            if not self._is_ready():
                return None
            with contextlib.suppress(OSError, ValueError, LookupError):
                return self._task(arguments, is_quiet)
            self.close()
        return None

    def heed(self, ended: Forked) -> None:
        """Note what a task that has ended had loaded."""
        self._wanted |= ended.told(self._names)

    def tend(self, seconds: float = 0.0) -> None:
        """Have an heir made where one is wanted, and let it take over once it is ready, at most `seconds` from now."""
        self._retired = [each for each in self._retired if each.poll() is None]
        if self._line is None and not self._not_before:  # so that the first message finds a parent
            self._start()
        if self._line is not None and self._line.process.poll() is not None:
            self.close()
        if self._heir is None and time.monotonic() >= self._no_heir_before:
            self._beget()
        if (heir := self._heir) is None or self._line is None:
            return
        try:
            if heir.await_ready(self._expected, seconds):
                self._line.retire()
                self._retired.append(self._line.process)
                self._line, self._heir = heir, None
        except (OSError, ValueError):
            heir.end()
            self._heir, self._no_heir_before = None, time.monotonic() + RETRY_SECONDS

    def close(self) -> None:
        """End the parents; tasks that run go on. What the next one has to load is not known."""
        for line in (self._line, self._heir):
            if line is not None:
                line.end()
        for each in self._retired:
            each.kill()
            each.wait()
        self._line, self._heir, self._wanted, self._retired = None, None, set(), []

    def _is_ready(self) -> bool:
        if self._line is None and time.monotonic() >= self._not_before:
            self._start()
        if self._line is None:
            return False
        try:
            return self._line.await_ready(self._expected, START_SECONDS)  # else it goes on loading for the next task
        except (OSError, ValueError):  # it cannot run here, or would run another file
            self.close()
            self._not_before = time.monotonic() + RETRY_SECONDS
            return False

    def _start(self) -> None:
        self._not_before = time.monotonic()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                parent = subprocess.Popen(program(self._module), stdin=theirs.fileno(), preexec_fn=die_with_parent)  # noqa: PLW1509
                self._line = _Line(ours, parent)
            except OSError:
                ours.close()
                self._not_before = time.monotonic() + RETRY_SECONDS

    def _beget(self) -> None:
        if self._line is None or not self._line.is_ready or self._wanted <= self._line.holds:
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        wanted = frozenset(self._wanted | self._line.holds)
        try:
            self._heir = _Line(ours, self._forked({"load": sorted(wanted)}, theirs.fileno()), wanted)
        except (OSError, ValueError, LookupError):
            ours.close()
            self.close()
        finally:
            theirs.close()

    def _task(self, arguments: Sequence[str], is_quiet: bool) -> tuple[Forked, int]:
        reading, writing = os.pipe()
        try:
            return self._forked({"arguments": list(arguments), "is_quiet": is_quiet}, reading), writing
        except BaseException:
            os.close(writing)  # a process that was forked all the same finds no token and ends
            raise
        finally:
            os.close(reading)

    def _forked(self, question: dict[str, object], given: int) -> Forked:
        assert self._line is not None
        heard, tell = os.pipe()
        try:
            return Forked(*self._line.ask(question, (given, tell)), heard)
        except BaseException:
            os.close(heard)
            raise
        finally:
            os.close(tell)
