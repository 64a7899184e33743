"""Single processes: how they are started, ended with all their children, and which ports they may use.

Each leads a session of its own and is killed by the kernel when the process that started it dies.
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
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

from deploy.errors import ProvisionError

logger = logging.getLogger(__name__)

CHILDREN_SECONDS = 6.0
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def spawn(
    argv: Sequence[str], env: dict[str, str], log: Path | None, pass_fds: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """Start a process as leader of a new session, killed by the kernel when we die.

    Its output is appended to `log`; without one it goes where ours goes. Of our open files it gets `pass_fds`.
    """
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") if log else contextlib.nullcontext() as output:
        return subprocess.Popen(
            list(argv),
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            start_new_session=True,
            pass_fds=pass_fds,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - the child only calls prctl, libc is loaded before the fork
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
    """Call `stop` on SIGINT, SIGTERM and SIGHUP (the terminal went); a second one while stopping changes nothing."""

    def handler(_number: int, _frame: object) -> None:
        stop()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, handler)


def check_port_free(host: str, port: int, name: str, home: Path | None = None) -> None:
    """Refuse to start on a port that something listens on.

    Args:
        host: address to bind.
        port: to try.
        name: purpose.
        home: folder whose own left-over processes are told from strangers.

    Raises:
        ProvisionError: naming port and purpose, and who holds it, as far as that can be seen.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if ":" in host:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            cure = _holder(port, home) or "free it or give another one"
            raise ProvisionError(
                f"port {port} on {host} for the {name} cannot be used ({error.strerror}): {cure}"
            ) from error


def _holder(port: int, home: Path | None) -> str:
    """Who listens on `port`, and what to do about it; empty when it cannot be seen."""
    try:
        connections = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        return ""
    for each in connections:
        if each.status != psutil.CONN_LISTEN or each.laddr.port != port or each.pid is None:
            continue
        with contextlib.suppress(psutil.Error, OSError):
            holder = psutil.Process(each.pid)
            said = " ".join(holder.cmdline())[:80] or holder.name()
            if home is not None and _is_orphan_of(holder, home):
                return f"pid {each.pid} ({said}) is left over from an earlier start of this folder: kill {each.pid}"
            return f"pid {each.pid} ({said}) holds it: stop that one or give another port"
    return ""


def _is_orphan_of(process: psutil.Process, home: Path) -> bool:
    """Whether a process was started for `home`: its command line or, for nginx's worker, an open file says so."""
    places = [*process.cmdline(), *(file.path for file in process.open_files())]
    return any(str(home.resolve()) in place for place in places)


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


def family(pid: int) -> list[psutil.Process]:
    """A process and all its descendants; empty when it is gone."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def is_frozen(pid: int) -> bool:
    """Whether a process stands still, by a signal or a debugger; one that is gone does not."""
    try:
        return psutil.Process(pid).status() in {psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP}
    except psutil.NoSuchProcess:
        return False


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with_parent() -> None:
    """For `preexec_fn`: the kernel kills this process when the thread that starts it ends, even one that is stopped."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
