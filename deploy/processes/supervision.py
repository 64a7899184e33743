"""Services and their supervisor: start in order, restart after any exit, stop in the reverse order.

Code 0 is no exception: Flower's SuperNode ends with 0 when its key is refused for a moment.
"""

import logging
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil

from deploy.errors import ProvisionError
from deploy.observe.health import HealthProcess
from deploy.observe.logs import cap_logs, check_room
from deploy.processes.liveness import CHECK_SECONDS, Liveness
from deploy.processes.process import end_group, end_processes, family, last_line, spawn

logger = logging.getLogger(__name__)

STOP_SECONDS = 15.0
READY_SECONDS = 90.0
POLL_SECONDS = 0.25
LONGEST_BACKOFF_SECONDS = 60.0
STABLE_SECONDS = 60.0
HUNG_SECONDS = 2.0
"""What a service that does not answer gets to end by itself."""
LOG_SECONDS = 10.0
COMPLAINT_SECONDS = 60.0


@dataclass(frozen=True)
class Service:
    """One process to keep running.

    `ready` is polled after a start until it returns True; `after_ready` then runs once per start (register keys, say).
    `alive`, or else `ready`, is asked while it runs: a service that does not answer three times is started again.
    Services named in `takes_along` are restarted whenever this one had to be. `diagnose` tells why it may have ended.
    """

    name: str
    argv: Sequence[str]
    env: dict[str, str]
    log: Path
    ready: Callable[[], bool] | None = None
    after_ready: Callable[[], object] | None = None
    takes_along: tuple[str, ...] = ()
    diagnose: Callable[[], str] | None = None
    alive: Callable[[], bool] | None = None
    settle_seconds: float = 0.0
    """How long after its start `alive` does not count yet."""
    pass_fds: tuple[int, ...] = ()
    """Of the supervisor's open files, those that the process gets: a listening socket, say."""


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    started: float
    failures: int
    is_ready: bool = False


@dataclass
class Supervisor:
    """Starts services in order, restarts what exits, stops in the reverse order.

    How they are can be asked at `health_address` (host:port), by gRPC health checks.
    Use it as a context manager or call `stop` in a `finally`: nothing that it started outlives it.
    """

    services: list[Service]
    health_address: str = ""
    stop_seconds: float = STOP_SECONDS
    check_seconds: float = CHECK_SECONDS
    restarts: dict[str, int] = field(default_factory=dict)
    _running: dict[str, _Running] = field(default_factory=dict)
    _seen: dict[int, psutil.Process] = field(default_factory=dict)
    _next_complaint: float = 0.0
    _stopping: threading.Event = field(default_factory=threading.Event)
    _liveness: Liveness = field(init=False)
    _health: HealthProcess = field(init=False)

    def __post_init__(self) -> None:
        probes = {service.name: service.alive or service.ready for service in self.services}
        self._health = HealthProcess(self.health_address)
        self._liveness = Liveness({name: probe for name, probe in probes.items() if probe}, self.check_seconds)

    def start(self) -> None:
        """Start every service in order, each only when the one before it is healthy.

        Raises:
            ProvisionError: one ended or did not become healthy in time; everything is down again then.
        """
        try:
            self._health.tell(self.health())
            for service in self.services:
                self._start(service, failures=0)
        except BaseException:
            self.stop()
            raise

    def watch(self, tick: Callable[[], None] | None = None, tick_seconds: float = 2.0) -> None:
        """Restart what exits and keep logs small until `request_stop`; `tick` runs every `tick_seconds` in between."""
        next_tick = next_cap = time.monotonic()
        self._liveness.start()
        while not self._stopping.wait(POLL_SECONDS):
            self._waiting_for_disks(self._restart_exited)
            self._waiting_for_disks(lambda: self._health.tell(self.health()))
            if time.monotonic() >= next_cap:
                for folder in {service.log.parent for service in self.services}:
                    self._waiting_for_disks(partial(cap_logs, folder))
                    self._waiting_for_disks(partial(check_room, folder))
                next_cap = time.monotonic() + LOG_SECONDS
            if tick is not None and time.monotonic() >= next_tick:
                self._waiting_for_disks(tick)
                next_tick = time.monotonic() + tick_seconds

    def _waiting_for_disks(self, action: Callable[[], object]) -> None:
        """What a full or failing disk does not let through is tried again: it must not end what runs."""
        try:
            action()
        except OSError as error:
            if time.monotonic() >= self._next_complaint:
                self._next_complaint = time.monotonic() + COMPLAINT_SECONDS
                logger.warning("%s: waiting, and trying again; everything else goes on", error)

    def request_stop(self) -> None:
        """Let `watch` and waits return; safe in a signal handler."""
        self._stopping.set()

    def health(self) -> dict[str, bool]:
        """By service, whether it runs, was ready once and answered when it was asked last."""
        return {each.name: self._is_well(each.name) for each in self.services}

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
        self._liveness.close()
        self._health.close()
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
        process = spawn(service.argv, service.env, service.log, service.pass_fds)
        self._running[service.name] = _Running(process, time.monotonic(), failures)
        self._liveness.forget(service.name)
        logger.info("%s started (pid %d)", service.name, process.pid)
        if service.ready is not None:
            self._wait_until_ready(service, process)
        if service.after_ready is not None:
            service.after_ready()
        self._running[service.name].is_ready = True

    def _is_well(self, name: str) -> bool:
        running = self._running.get(name)
        return running is not None and running.is_ready and self.is_running(name) and not self._liveness.misses(name)

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
            if running is None:
                continue
            lived = time.monotonic() - running.started
            is_running = running.process.poll() is None
            is_hanging = is_running and lived > service.settle_seconds and self._liveness.hangs(service.name)
            if is_running and not is_hanging:
                continue
            failures = 0 if lived > STABLE_SECONDS else running.failures + 1
            backoff = min(LONGEST_BACKOFF_SECONDS, 2.0**failures - 1)
            if lived < backoff:
                continue
            reason = f" ({service.diagnose()})" if service.diagnose else ""
            what = "hangs" if is_hanging else f"ended with code {running.process.returncode}"
            logger.warning("%s %s%s: starting it again", service.name, what, reason)
            self.restarts[service.name] = self.restarts.get(service.name, 0) + 1
            self._end(service.name, HUNG_SECONDS if is_hanging else None)
            for name in service.takes_along:
                self._end(name)
            for name in (service.name, *service.takes_along):
                self._try_start(by_name[name], failures)

    def _try_start(self, service: Service, failures: int) -> None:
        try:
            self._start(service, failures)
        except (ProvisionError, OSError) as error:  # `watch` tries again after the backoff
            logger.warning("%s", error)
            self._end(service.name)

    def _end(self, name: str, seconds: float | None = None) -> None:
        running = self._running.get(name)
        if running is None:
            return
        self._note_children()
        end_group(running.process, self.stop_seconds if seconds is None else seconds)

    def _note_children(self) -> None:
        for running in self._running.values():
            for process in family(running.process.pid):
                self._seen[process.pid] = process
