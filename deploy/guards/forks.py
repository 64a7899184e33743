"""The superexec's side of the warmed parent (`deploy.warm`): it asks for processes and holds them.

Whatever goes wrong, the answer is that there is none, and the superexec starts the program itself, as without a parent.
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

START_SECONDS = 12.0
"""A claim of a task holds for 30 s, so this leaves time to start the program directly."""
ANSWER_SECONDS = 20.0
"""Enough for a parent that is loading torch; a frozen one costs the task its claim at most."""
RETRY_SECONDS = 300.0
"""After a parent that could not be started."""
MOST_BYTES = 2**16


def program(module: str) -> list[str]:
    """Command line of the parent; `-I` keeps working folder and environment out of `sys.path`."""
    return [sys.executable, "-I", "-m", "deploy.warm", module]


class Forked:
    """A task's process that the parent has forked: what the superexec uses of `subprocess.Popen`.

    It is another process's child, so it is held by a file descriptor of the kernel, which never means a later process.
    """

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid, self._pidfd = pid, pidfd

    def __del__(self) -> None:
        os.close(self._pidfd)

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


class Warm:
    """The superexec's side: starts the parent when it is needed and asks it for processes."""

    def __init__(self, module: str, expected: Path) -> None:
        self._module, self._expected = module, expected
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._is_ready, self._not_before = False, 0.0

    def fork(self, arguments: Sequence[str], *, is_quiet: bool) -> tuple[Forked, int] | None:
        """A new process for one task, and the end of the pipe that it reads its token from.

        None: there is no parent that could fork, so the program has to be started directly.
        """
        for _ in range(2):  # one that has ended, or will not fork any more, is replaced once
            if not self._await_ready():
                return None
            with contextlib.suppress(OSError, ValueError, LookupError):
                return self._ask(arguments, is_quiet)
            self.close()
        return None

    def reap(self) -> None:
        """Let go of a parent that has ended, so that it does not stay in the process table."""
        if (process := self._process) is not None:
            process.poll()

    def close(self) -> None:
        """End the parent; tasks that run go on."""
        process, self._process, self._is_ready = self._process, None, False
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if process is not None:
            process.kill()
            process.wait()

    def _await_ready(self) -> bool:
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None and time.monotonic() >= self._not_before:
            self._start()
        if self._process is None or self._is_ready:
            return self._is_ready
        try:
            self._is_ready = self._receive(START_SECONDS)[0] == {"file": str(self._expected)}
        except TimeoutError:
            return False  # it goes on loading for the next task
        except (OSError, ValueError):
            pass
        if not self._is_ready:  # it cannot run here, or would run another file
            self.close()
            self._not_before = time.monotonic() + RETRY_SECONDS
        return self._is_ready

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._process = subprocess.Popen(program(self._module), stdin=theirs.fileno())
            except OSError:
                self.close()
                self._not_before = time.monotonic() + RETRY_SECONDS

    def _ask(self, arguments: Sequence[str], is_quiet: bool) -> tuple[Forked, int]:
        assert self._socket is not None
        reading, writing = os.pipe()
        try:
            asked = json.dumps({"arguments": list(arguments), "is_quiet": is_quiet}).encode()
            socket.send_fds(self._socket, [asked], [reading])
            answer, fds = self._receive(ANSWER_SECONDS)
            return Forked(answer["pid"], fds[0]), writing
        except BaseException:
            os.close(writing)  # a process that was forked all the same finds no token and ends
            raise
        finally:
            os.close(reading)

    def _receive(self, seconds: float) -> tuple[Any, list[int]]:
        assert self._socket is not None
        self._socket.settimeout(seconds)
        content, fds, _, _ = socket.recv_fds(self._socket, MOST_BYTES, 1)
        for each in fds:
            os.set_inheritable(each, False)
        return json.loads(content), fds
