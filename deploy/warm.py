"""A warmed parent for a site's tasks: `python -I -m deploy.warm MODULE` forks one process for each of them.

Each message gets a process of its own, as before, which shares nothing with any other but the code that was loaded
before the fork. The parent never sees a token nor a byte of a message: the superexec passes it the ends of pipes, which
the forked process keeps. It loads nothing once it serves; an heir that it forks loads torch, after a task has. It
never touches CUDA, has one thread when it forks, and ends with the superexec or when nothing has come for a while. It
forks nothing any more when a file that it has loaded is another one now. Whatever goes wrong here, the superexec starts
the program itself.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import logging
import os
import resource
import select
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from deploy.guards.apps import file_of, run
from deploy.guards.forks import LATER, MOST_BYTES
from deploy.processes.memory_limits import lift_own_limit

IDLE_SECONDS = 300.0
EVERY_TASK = ("deploy.guards.web.calls", "deploy.guards.sizes", "deploy.processes.memory_limits", "httpcore")
"""What `deploy.guards.apps` uses, beside the module of the tasks itself, and httpx once it makes a client."""
BLAS_THREADS = "OPENBLAS_NUM_THREADS"
NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"
"""Whether there is a GPU is asked of its driver's management library then, which a fork does not harm."""
PARENT_NAME, TASK_NAMES = b"maskfed-warm", {"client.entry": b"flwr-clientapp"}
"""What the kernel calls the processes, of which the command lines are the same; at most 15 characters."""
Stamp = tuple[int, int, int, int, int]
_PR_SET_DUMPABLE, _PR_SET_NAME = 4, 15


class Parent:
    """The process that forks; `serve` returns in the processes of tasks only."""

    def __init__(self, connection: socket.socket, module: str) -> None:
        self._connection, self._module = connection, module
        self.tell = -1
        self._children: dict[int, int] = {}
        self._stamps: dict[str, Stamp] = {}

    def load(self, *modules: str) -> None:
        """Import what tasks will need, and remember which files that was.

        All files of our own packages count, also those that nobody has loaded yet: what is loaded later has to be of
        one version with what is.
        """
        for name in modules:
            importlib.import_module(name)
        files = {getattr(each, "__file__", None) for each in list(sys.modules.values())} | own_files(self._module)
        for file in files - self._stamps.keys():
            if file and (stamp := stamp_of(file)):
                self._stamps[file] = stamp
        gc.collect()
        gc.freeze()  # children leave these pages alone, so that they stay shared

    def serve(self) -> list[str]:
        """Fork until the superexec closes its end or nothing has come for a while, which end the process.

        Returns:
            The arguments of the task, in its own process.
        """
        self._announce()
        while True:
            ready, _, _ = select.select([self._connection.fileno(), *self._children], [], [], IDLE_SECONDS)
            for pidfd in self._children.keys() & set(ready):
                os.waitpid(self._children.pop(pidfd), 0)
                os.close(pidfd)
            if self._connection.fileno() in ready and (arguments := self._answer()) is not None:
                return arguments
            if not ready and not self._children:
                sys.exit(0)

    def unfit(self) -> str:
        """Why nothing is forked any more; empty when all is well."""
        threads = sum(1 for _ in Path("/proc/self/task").iterdir())
        if threads > 1:
            return f"{threads} threads"
        if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
            return "CUDA has been touched"
        changed = next((file for file, stamp in self._stamps.items() if stamp_of(file) != stamp), "")
        return f"{changed} is another file now" if changed else ""

    def _announce(self) -> None:
        os.close(os.pidfd_open(os.getpid()))  # where there is no such thing, nothing can be forked for the superexec
        self._exit_unless_fit()
        self._connection.sendall(json.dumps({"file": file_of(self._module)}).encode())

    def _exit_unless_fit(self) -> None:
        if reason := self.unfit():
            sys.exit(f"no process is forked any more: {reason}")

    def _answer(self) -> list[str] | None:
        content, fds, _, _ = socket.recv_fds(self._connection, MOST_BYTES, 2)
        if not content:
            self._end()
        self._exit_unless_fit()
        asked = json.loads(content)
        pid = os.fork()
        if pid == 0:
            return self._become(asked, *fds)
        for each in fds:
            os.close(each)
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = pid
        socket.send_fds(self._connection, [json.dumps({"pid": pid}).encode()], [pidfd])
        return None

    def _become(self, asked: dict[str, Any], given: int, tell: int) -> list[str] | None:
        """In the new process: the task, or the heir, which goes on in the loop of `serve`."""
        keep_only(given, tell)
        self._children.clear()
        self.tell = tell
        if "load" not in asked:
            become_task(TASK_NAMES.get(self._module, b"maskfed-task"), is_quiet=asked["is_quiet"])
            return list(asked["arguments"])
        lift_own_limit()  # torch reserves more addresses than a superexec may have
        self.load(*(module for name in asked["load"] for module in LATER[self._module][name]))
        self._announce()
        return None

    def _end(self) -> None:
        """Wait for what was forked, so that somebody does."""
        for pid in self._children.values():
            os.waitpid(pid, 0)
        sys.exit(0)


def own_files(module: str) -> set[str]:
    """Every code file of the packages that lie beside the package of `module` and are loaded."""
    root = Path(str(sys.modules[module].__file__)).parents[module.count(".")]
    loaded = {name.partition(".")[0] for name in sys.modules}
    return {str(file) for name in loaded if (root / name).is_dir() for file in (root / name).rglob("*.py")}


def stamp_of(file: str) -> Stamp | None:
    """What changes when a file does: content, name or owner; None: there is no such file."""
    try:
        found = Path(file).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def keep_only(given: int, tell: int) -> None:
    """Let `given` take the place of standard input, which was the parent's socket, and close all else but `tell`."""
    os.dup2(given, 0)
    os.closerange(3, tell)
    os.closerange(tell + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def become_task(name: bytes, *, is_quiet: bool) -> None:
    """Be like a program that was just started."""
    if is_quiet:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.close(null)
    _prctl()(_PR_SET_NAME, name)
    _prctl()(_PR_SET_DUMPABLE, 1)  # as after any start of a program
    if "numpy" in sys.modules:  # Python's own generator does this by itself
        sys.modules["numpy"].random.seed()


def report(tell: int, module: str) -> None:
    """Tell the superexec which of the large libraries this task has loaded, or expects of later ones."""
    known = sys.modules.keys() | getattr(sys.modules.get(module), "EXPECTED", set())
    told = bytes(number for number, name in enumerate(LATER.get(module, {})) if name in known)
    with contextlib.suppress(OSError):
        os.write(tell, told)


def leave(code: int) -> NoReturn:
    """End at once: taking everything apart that was loaded would touch, and so copy, most pages of the parent's."""
    atexit._run_exitfuncs()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _prctl() -> Callable[..., int]:
    call: Callable[..., int] = ctypes.CDLL(None).prctl
    return call


def main() -> None:
    """Load, and fork; in a forked process, run the task."""
    module = sys.argv[1]
    _prctl()(_PR_SET_NAME, PARENT_NAME)
    _prctl()(_PR_SET_DUMPABLE, 0)  # no task may look into it or change it
    os.umask(0o077)
    connection = socket.socket(fileno=0)
    parent = Parent(connection, module)
    before = dict(os.environ)
    os.environ |= {BLAS_THREADS: "1", NVML_CHECK: "1"}  # numpy's linear algebra would start threads when it is loaded
    parent.load(*EVERY_TASK, module)
    os.environ.pop(BLAS_THREADS)
    os.environ |= {name: before[name] for name in (BLAS_THREADS,) if name in before}
    arguments = parent.serve()
    connection.detach()
    code = 0
    try:
        run(module, arguments)
    except SystemExit as ended:
        if not isinstance(ended.code, int | None):
            raise
        code = ended.code or 0
    finally:
        report(parent.tell, module)
    leave(code)


if __name__ == "__main__":
    main()
