"""Whatever a kept program leaves below it ends with its supervisor, however that dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

# Like nginx: a master that starts a worker in its own way, and a worker that ignores its master's end.
WORKER = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
MASTER = (
    "import pathlib, subprocess, sys, time;"
    f"worker = subprocess.Popen([sys.executable, '-c', {WORKER!r}]);"
    "pathlib.Path(sys.argv[1]).write_text(str(worker.pid)); time.sleep(600)"
)
SUPERVISOR = """
import signal, sys, time
from pathlib import Path
from deploy.processes.process import spawn
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests that run under nohup would hand on that it is ignored
keeper = [sys.executable, "-I", "-m", "deploy.processes.keeper", sys.executable, "-c", *sys.argv[1:]]
print(spawn(keeper, {}, None).pid, flush=True)
time.sleep(600)
"""


def until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        assert time.monotonic() < deadline, "a process is left"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_workers_worker_ends_when_the_supervisor_dies(tmp_path: Path, number: signal.Signals):
    file = tmp_path / "worker.pid"
    argv = [sys.executable, "-c", SUPERVISOR, MASTER, str(file)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        keeper = int(supervisor.stdout.readline())
        deadline = time.monotonic() + 30
        while not (file.exists() and file.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(supervisor.pid, number)
    until_gone([int(file.read_text()), keeper])


def test_a_keeper_that_is_told_to_end_ends_everything_and_gives_the_programs_code(tmp_path: Path):
    keeper = [sys.executable, "-I", "-m", "deploy.processes.keeper", sys.executable, "-c"]
    assert subprocess.run([*keeper, "raise SystemExit(7)"], check=False).returncode == 7
    file = tmp_path / "worker.pid"
    with subprocess.Popen([*keeper, MASTER, str(file)]) as process:
        while not (file.exists() and file.read_text()):
            time.sleep(0.05)
        process.terminate()
        process.wait(30)
    until_gone([int(file.read_text())])
