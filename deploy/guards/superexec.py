"""The superexec of coordinator and site: `python -I -m deploy.guards.superexec MODULE ...` starts MODULE, nothing else.

Flower's own looks for `flwr-serverapp` or `flwr-clientapp` on PATH, which fails open: on a `noexec` mount, with a
lost x bit or a colon in the path it finds Flower's program, and that runs whatever code the other side sends. Here the
one program is this Python by its absolute path, and it was tried before the first task is taken. The token goes through
a pipe. A run has one process: an older one that did not start in time is ended before another is started. A site's
tasks are forked from a warmed parent (`deploy.warm`) where there is one, and started directly where there is not.
"""

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from flwr.proto.task_pb2 import Task
from flwr.supercore.cli import flower_superexec
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor
from flwr.supercore.superexec.executor.types import ExecutionSpec, LaunchResult
from flwr.supercore.superexec.plugin import AutoExecPlugin

import deploy
from deploy.errors import ProvisionError
from deploy.guards import replace
from deploy.guards.apps import VERIFY
from deploy.guards.forks import Forked, Warm
from deploy.guards.task_processes import FROZEN_SECONDS, FrozenSince, Process, end, start
from deploy.guards.web.calls import Pauses, caller_value, send_with_every_call
from deploy.observe.scrubber import scrub_journal
from deploy.processes.memory_limits import limit_own_memory
from deploy.processes.process import is_frozen
from deploy.processes.services import BEAT_FILE

TASKS = {
    "server.entry": TaskType.SERVER_APP,
    "client.entry": TaskType.CLIENT_APP,
    "server.simulation.entry": TaskType.SIMULATION,
}
"""The module that each kind of superexec starts, and the one kind of task that it takes; every other is refused."""
WARMED = ("client.entry",)
"""Tasks that are forked: a site has one for each message, a coordinator one for each run."""
SLOW_FILE = "slow-start.json"
"""In the superexec's FLWR_HOME: the run whose process did not start in time, or froze, read by `status`."""
STOP_FOLDER = "stopped"
"""In the superexec's FLWR_HOME: a file per stopped Flower run, by its id, written by `stop`."""
GRACE_SECONDS = 10.0
VERIFY_SECONDS = 120.0
log = logging.getLogger("maskfed.superexec")


def main() -> None:
    """Verify the program, put the guards in place, take tasks until the end."""
    scrub_journal()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    os.umask(0o077)
    module = sys.argv[1]
    try:
        limit_own_memory("superexec")
        if module not in TASKS:
            raise ProvisionError(f"{module} is no program of this project: {', '.join(TASKS)}")
        secret = Path(sys.argv[sys.argv.index("--superexec-auth-secret-file") + 1])
        value = caller_value(secret)
        verify_program(module)
    except ProvisionError as error:
        sys.exit(f"error: {error}")
    sys.argv = ["flower-superexec", *sys.argv[2:]]
    send_with_every_call(value)
    executor = install(module, value)
    threading.Thread(target=_beat, args=(executor,), daemon=True, name="beat").start()
    flower_superexec()


def program(module: str) -> list[str]:
    """The absolute program of a module's tasks; `-I` keeps working folder and environment out of `sys.path`."""
    return [sys.executable, "-I", "-m", "deploy.guards.apps", module]


def verify_program(module: str) -> None:
    """Try the program exactly as tasks start it.

    Raises:
        ProvisionError: it cannot be run, or would run a module that lies elsewhere than this one.
    """
    argv, expected = [*program(module), VERIFY], installed(module)
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=VERIFY_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ProvisionError(f"{' '.join(argv)} cannot be run ({error}): run `make` again") from error
    found = done.stdout.strip()
    if done.returncode or not found or Path(found).resolve() != expected:
        reason = f"it runs {found}" if found else (done.stderr.strip().splitlines() or ["no answer"])[-1]
        raise ProvisionError(f"{' '.join(argv)} must run {expected}, but {reason}: run `make` again")


def installed(module: str) -> Path:
    """The file of a module beside this one: the code of this installation."""
    return Path(deploy.__file__).resolve().parent.parent.joinpath(*module.split(".")).with_suffix(".py")


def install(module: str, value: str) -> "OneProgram":
    """Replace what Flower's superexec would start by the one program, and how often it asks for tasks."""
    running = importlib.import_module("flwr.supercore.superexec.run_superexec")
    warm = Warm(module, installed(module)) if module in WARMED else None
    executor, task_type = OneProgram(module, value, warm), TASKS[module]

    class OneTask(AutoExecPlugin):
        supported_task_types = frozenset({task_type})

        def launch_task(self, token: str, task: Task) -> LaunchResult:
            executor.make_room(task.run_id)
            return super().launch_task(token, task)

    guards = {"AutoExecPlugin": OneTask, "get_executor": lambda *_, **__: executor, "time": executor.pauses}
    replace(running, guards)
    return executor


class OneProgram(SubprocessExecutor):
    """Starts the one program for each task, and remembers which run it works for."""

    def __init__(self, module: str, value: str, warm: Warm | None = None) -> None:
        self._module, self._value, self._warm, self._run_id = module, value, warm, 0
        self._children: dict[int, tuple[Process, float]] = {}
        self._lock, self._frozen = threading.Lock(), FrozenSince()
        self.pauses = Pauses(share=0.0) if warm else Pauses()  # a SuperNode holds the question for a while

    def make_room(self, run_id: int) -> None:
        """End the process that is left of `run_id`: its claim is over, so it can do nothing but slow the next one."""
        self._run_id = run_id
        older = self._take(run_id)
        if older is None:
            with suppress(OSError):
                (_place() / SLOW_FILE).unlink(missing_ok=True)
            return
        process, started = older
        seconds, frozen = round(time.monotonic() - started), is_frozen(process.pid)
        slow = f"did not start within {seconds} s: this machine is too slow or too busy"
        log.warning("run %d: pid %d is ended, it %s", run_id, process.pid, "was frozen" if frozen else slow)
        with suppress(OSError):
            told = json.dumps({"run_id": run_id, "seconds": seconds, "is_frozen": frozen})
            (_place() / SLOW_FILE).write_text(told, encoding="ascii")
        end(process)

    def end_stopped(self) -> None:
        """End what is left of runs that were stopped and had `GRACE_SECONDS` to end by themselves."""
        for file in (_place() / STOP_FOLDER).glob("*"):
            if file.name.isdigit() and time.time() - file.stat().st_mtime > GRACE_SECONDS:
                if (left := self._take(int(file.name))) is not None:
                    end(left[0])
                file.unlink(missing_ok=True)

    def end_frozen(self) -> None:
        """End what has stood still for `FROZEN_SECONDS`: when its run is over, nobody makes room for another."""
        with self._lock:
            running = {run: process for run, (process, _) in self._children.items()}
        for run_id, process in running.items():
            if self._frozen.seconds(process.pid) >= FROZEN_SECONDS:
                log.warning("run %d: pid %d is ended, it was frozen", run_id, process.pid)
                end(process)
        self.reap()

    def reap(self) -> None:
        """Let go of processes that have ended: nobody else waits for them, and each would stay in the process table."""
        with self._lock:
            left = {run: kept for run, kept in self._children.items() if kept[0].poll() is None}
            for run in self._children.keys() - left.keys():
                self.pauses.begin()  # the next question of a run follows its last answer
                if self._warm is not None and isinstance(ended := self._children[run][0], Forked):
                    self._warm.heed(ended)
            self._children = left

    def reconcile(self) -> None:
        """Called by Flower before it looks for a task."""
        self.reap()
        if self._warm is not None:
            self._warm.tend()

    def _take(self, run_id: int) -> tuple[Process, float] | None:
        self.reap()
        with self._lock:
            return self._children.pop(run_id, None)

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Fork or start the program for one task; the token goes through its standard input."""
        arguments = ["--runtime-api-address", spec.runtime_api_address]
        if spec.insecure:
            arguments.append("--insecure")
        elif spec.root_certificates_path is not None:
            arguments += ["--root-certificates", spec.root_certificates_path]
        arguments += ["--parent-pid", str(os.getpid())]
        forked = None
        if self._warm and not (forked := self._warm.fork(arguments, is_quiet=spec.suppress_output)):
            log.warning("no parent could fork a process: the task's program is started directly")
        process, pipe = forked or start([*program(self._module), *arguments], is_quiet=spec.suppress_output)
        with suppress(BrokenPipeError), os.fdopen(pipe, "wb") as token:
            token.write(f"{spec.token}\n{self._value}\n".encode())
        with self._lock:
            self._children[self._run_id] = process, time.monotonic()
        self.pauses.begin()
        return LaunchResult.accepted()

    def close(self) -> None:
        """End what still runs."""
        if self._warm is not None:
            self._warm.close()
        for process, _ in self._children.values():
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)


def _beat(executor: OneProgram) -> None:
    """Show every second that this process is not frozen, look for stopped runs, reap what has ended."""
    while True:
        with suppress(OSError):
            (_place() / BEAT_FILE).touch()
            executor.end_stopped()
        executor.end_frozen()
        time.sleep(1.0)


def _place() -> Path:
    return Path(os.environ.get("FLWR_HOME", "."))


if __name__ == "__main__":
    main()
