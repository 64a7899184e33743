"""Processes of a federation: how each is started, when it is healthy, what is restarted with it, how all of them end.

Every process leads a process group of its own with its own log file, so that what it starts can be ended with it, and
is killed by the kernel when its supervisor dies. A supervisor restarts a process after any exit, code 0 included:
Flower's SuperNode ends with 0 when its key is refused for a moment.
"""

import contextlib
import ctypes
import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from deploy.provision import ProvisionError

logger = logging.getLogger(__name__)

STOP_SECONDS = 15.0
CHILDREN_SECONDS = 6.0
READY_SECONDS = 90.0
POLL_SECONDS = 0.25
LONGEST_BACKOFF_SECONDS = 60.0
STABLE_SECONDS = 60.0
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass(frozen=True)
class Service:
    """One process to keep running.

    `ready` is polled after a start until it returns True; `after_ready` then runs once per start (register keys, say).
    Services named in `takes_along` are restarted whenever this one had to be.
    """

    name: str
    argv: Sequence[str]
    env: dict[str, str]
    log: Path
    ready: Callable[[], bool] | None = None
    after_ready: Callable[[], None] | None = None
    takes_along: tuple[str, ...] = ()


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    started: float
    failures: int


@dataclass
class Supervisor:
    """Starts services in order, restarts what exits, stops in the reverse order.

    Use it as a context manager or call `stop` in a `finally`: nothing that it started outlives it.
    """

    services: list[Service]
    stop_seconds: float = STOP_SECONDS
    restarts: dict[str, int] = field(default_factory=dict)
    _running: dict[str, _Running] = field(default_factory=dict)
    _seen: dict[int, psutil.Process] = field(default_factory=dict)
    _stopping: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Start every service in order, each only when the one before it is healthy.

        Raises:
            ProvisionError: one ended or did not become healthy in time; everything is down again then.
        """
        try:
            for service in self.services:
                self._start(service, failures=0)
        except BaseException:
            self.stop()
            raise

    def watch(self, tick: Callable[[], None] | None = None, tick_seconds: float = 2.0) -> None:
        """Restart what exits until `request_stop` is called; `tick` runs every `tick_seconds` in between."""
        next_tick = time.monotonic()
        while not self._stopping.wait(POLL_SECONDS):
            self._restart_exited()
            if tick is not None and time.monotonic() >= next_tick:
                tick()
                next_tick = time.monotonic() + tick_seconds

    def request_stop(self) -> None:
        """Let `watch` and waits return; safe in a signal handler."""
        self._stopping.set()

    def pid(self, name: str) -> int:
        """Process id of a running service."""
        return self._running[name].process.pid

    def is_running(self, name: str) -> bool:
        """Whether the service's process is there now."""
        running = self._running.get(name)
        return running is not None and running.process.poll() is None

    def stop(self) -> None:
        """End everything, last started first: SIGTERM, wait, SIGKILL to the group; then whatever children are left."""
        self._stopping.set()
        self._note_children()
        for service in reversed(self.services):
            self._end(service.name)
        end_processes(list(self._seen.values()))
        self._seen.clear()

    def __enter__(self) -> "Supervisor":
        """Start all services."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop all services."""
        self.stop()

    def _start(self, service: Service, failures: int) -> None:
        process = spawn(service.argv, service.env, service.log)
        self._running[service.name] = _Running(process, time.monotonic(), failures)
        logger.info("%s started (pid %d)", service.name, process.pid)
        if service.ready is not None:
            self._wait_until_ready(service, process)
        if service.after_ready is not None:
            service.after_ready()

    def _wait_until_ready(self, service: Service, process: subprocess.Popen[bytes]) -> None:
        assert service.ready is not None
        deadline = time.monotonic() + READY_SECONDS
        while not service.ready():
            if process.poll() is not None:
                raise ProvisionError(
                    f"{service.name} ended with code {process.returncode} before it was healthy: "
                    f"{last_line(service.log)} (see {service.log})"
                )
            if time.monotonic() > deadline or self._stopping.wait(POLL_SECONDS):
                reason = "was stopped" if self._stopping.is_set() else f"is not healthy after {READY_SECONDS:.0f} s"
                raise ProvisionError(f"{service.name} {reason}: see {service.log}")

    def _restart_exited(self) -> None:
        by_name = {service.name: service for service in self.services}
        for service in self.services:
            running = self._running.get(service.name)
            if running is None or running.process.poll() is None:
                continue
            lived = time.monotonic() - running.started
            failures = 0 if lived > STABLE_SECONDS else running.failures + 1
            backoff = min(LONGEST_BACKOFF_SECONDS, 2.0**failures - 1)
            if lived < backoff:
                continue
            logger.warning("%s ended with code %s: starting it again", service.name, running.process.returncode)
            self.restarts[service.name] = self.restarts.get(service.name, 0) + 1
            self._end(service.name)
            for name in service.takes_along:
                self._end(name)
            for name in (service.name, *service.takes_along):
                self._try_start(by_name[name], failures)

    def _try_start(self, service: Service, failures: int) -> None:
        try:
            self._start(service, failures)
        except ProvisionError as error:  # `watch` tries again after the backoff
            logger.warning("%s", error)
            self._end(service.name)

    def _end(self, name: str) -> None:
        running = self._running.get(name)
        if running is None:
            return
        self._note_children()
        end_group(running.process, self.stop_seconds)

    def _note_children(self) -> None:
        for running in self._running.values():
            for process in _family(running.process.pid):
                self._seen[process.pid] = process


def spawn(argv: Sequence[str], env: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a process as leader of a new session, output appended to `log`, killed by the kernel when we die."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            list(argv),
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - the child only calls prctl, libc is loaded before the fork
        )


def end_group(process: subprocess.Popen[bytes], seconds: float) -> None:
    """SIGTERM to the process, SIGKILL to its whole group after `seconds` or as soon as the leader is gone."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            logger.warning("pid %d did not end within %.0f s: killed", process.pid, seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def end_processes(processes: Sequence[psutil.Process], seconds: float = CHILDREN_SECONDS) -> None:
    """Wait for processes that should be ending, then kill what is left. Recycled process ids are not touched."""
    _, alive = psutil.wait_procs(processes, timeout=seconds if any(p.is_running() for p in processes) else 0)
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=seconds)


def end_together(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    """SIGTERM to all at once, `seconds` for all of them to end, SIGKILL to the groups of the rest."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + seconds
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        end_group(process, 0.0)


def adopt_orphans() -> None:
    """Let descendants whose parents die become our children instead of the system's, so that none can escape us."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_descendants() -> int:
    """Wait for every descendant of this process to end and kill what stays; how many had to be killed."""
    left = [
        process for process in psutil.Process().children(recursive=True) if process.status() != psutil.STATUS_ZOMBIE
    ]
    _, alive = psutil.wait_procs(left, timeout=CHILDREN_SECONDS if left else 0)
    end_processes(alive, 0.0)
    return len(alive)


def handle_signals(stop: Callable[[], None]) -> None:
    """Call `stop` on SIGINT and SIGTERM; a second signal while stopping changes nothing."""

    def handler(_number: int, _frame: object) -> None:
        stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def check_port_free(host: str, port: int, name: str) -> None:
    """Refuse to start on a port that something listens on.

    Raises:
        ProvisionError: naming port and purpose.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ProvisionError(
                f"port {port} on {host} for the {name} cannot be used ({error.strerror}): free it or give another one"
            ) from error


@contextlib.contextmanager
def only_one(lock: Path) -> Iterator[None]:
    """Hold a lock file, so that two supervisors never work on one folder.

    Raises:
        ProvisionError: another process holds it.
    """
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ProvisionError(f"{lock.parent} is in use by another `start`: stop that one first") from error
        yield


def free_ports(count: int) -> list[int]:
    """Distinct loopback ports that nothing listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def last_line(log: Path, limit: int = 200) -> str:
    """Last line of a log that says something; for error messages."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "no log"
    return next((line.strip()[-limit:] for line in reversed(lines) if line.strip()), "empty log")


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _die_with_parent() -> None:
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
