"""The superexec starts one absolute program for one kind of task, or nothing; its token goes through a pipe."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.proto.task_pb2 import Task
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor.types import ExecutionSpec

import deploy
from deploy.errors import ProvisionError
from deploy.guards import replace, superexec, task_processes
from deploy.guards.forks import Forked
from deploy.guards.superexec import SLOW_FILE, STOP_FOLDER, TASKS, OneProgram, program, verify_program
from deploy.guards.task_processes import FROZEN_SECONDS

TOKEN, VALUE = "ab" * 128, "cd" * 32
ROOT = Path(deploy.__file__).resolve().parent.parent
running = importlib.import_module("flwr.supercore.superexec.run_superexec")

SHOW = """
import json, os, sys
lines = sys.stdin.read().split()
json.dump({"argv": sys.argv, "environ": dict(os.environ), "lines": lines}, open(os.environ["SEEN"], "w"))
"""


def spec(task_type: TaskType = TaskType.CLIENT_APP) -> ExecutionSpec:
    return ExecutionSpec(
        task_type=task_type, runtime_api_address="127.0.0.1:1", token=TOKEN, insecure=False,
        root_certificates_path="ca.crt", runtime_dependency_install=True, parent_pid=None, suppress_output=False,
        task_id=1,
    )  # fmt: skip


def launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> OneProgram:
    monkeypatch.setattr(superexec, "program", lambda _: [sys.executable, "-c", script])
    monkeypatch.setenv("SEEN", str(tmp_path / "seen.json"))
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    return OneProgram("client.entry", VALUE)


@pytest.mark.parametrize("module", TASKS)
def test_the_installed_program_is_verified_by_running_it(module: str):
    if module != "server.simulation.entry":
        verify_program(module)
    assert Path(program(module)[0]).is_absolute()
    assert program(module)[1:3] == ["-I", "-m"]


def test_no_path_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Flower's programs first on PATH, and the coordinator's code first in PYTHONPATH: neither counts."""
    for name in ("flwr-clientapp", "python", "python3"):
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "client").mkdir()
    (tmp_path / "client" / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "client" / "entry.py").write_text("")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    verify_program("client.entry")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("argv", "reason"),
    [(["/nonexistent/python"], "cannot be run"), (["/bin/false"], "no answer"), (["/bin/echo", "/x.py"], "it runs")],
)
def test_a_program_that_cannot_be_run_or_is_another_stops_the_superexec(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], reason: str
):
    monkeypatch.setattr(superexec, "program", lambda _: argv)
    with pytest.raises(ProvisionError, match=reason):
        verify_program("client.entry")


def test_a_module_that_is_not_ours_is_not_started(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["superexec", "evil.entry", "--superexec-auth-secret-file", "x"])
    with pytest.raises(SystemExit, match="no program of this project"):
        superexec.main()


def test_the_token_is_on_no_command_line_and_in_no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    executor = launch(monkeypatch, tmp_path, SHOW)
    executor.launch(spec())
    ((process, _),) = executor._children.values()
    assert TOKEN not in Path(f"/proc/{process.pid}/cmdline").read_text()
    assert process.wait(20) == 0
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["lines"] == [TOKEN, VALUE]
    assert TOKEN not in json.dumps([seen["argv"], seen["environ"]])
    assert "--allow-runtime-dependency-installation" not in seen["argv"]


class FakeWarm:
    """A parent that forks what it is told to, or nothing."""

    def __init__(self, process: subprocess.Popen[bytes] | None) -> None:
        self.process, self.asked = process, list[list[str]]()

    def fork(self, arguments: list[str], *, is_quiet: bool) -> tuple[subprocess.Popen[bytes], int] | None:
        self.asked.append(arguments)
        assert not is_quiet
        if self.process is None:
            return None
        assert self.process.stdin is not None
        return self.process, os.dup(self.process.stdin.fileno())


def test_a_task_is_forked_where_there_is_a_parent_and_started_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    executor = launch(monkeypatch, tmp_path, SHOW)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as forked:
        warm = executor._warm = FakeWarm(forked)  # type: ignore[assignment]
        executor.launch(spec())
        assert executor._children[0][0] is forked
        assert forked.communicate()[0].decode() == f"{TOKEN}\n{VALUE}\n"
    warm.process = None
    executor.launch(spec())
    process = executor._children[0][0]
    assert process is not forked
    assert process.wait(20) == 0
    assert json.loads((tmp_path / "seen.json").read_text())["argv"][1:] == warm.asked[0] == warm.asked[1]


def test_what_a_forked_task_had_loaded_is_heeded_once_it_has_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    executor, calls = launch(monkeypatch, tmp_path, ""), list[object]()

    class Noting:
        def heed(self, ended: Forked) -> None:
            calls.append(ended)

        def tend(self) -> None:
            calls.append("tend")

    (heard, tell), task = os.pipe(), os.fork()
    if task == 0:
        time.sleep(60)
        os._exit(0)
    os.close(tell)
    forked = Forked(task, os.pidfd_open(task), heard)
    executor._warm, executor._children = Noting(), {5: (forked, 0.0)}  # type: ignore[assignment]
    executor.reap()
    assert calls == []
    forked.kill()
    assert forked.wait(20) == 0
    executor.reconcile()
    assert calls == [forked, "tend"]
    os.waitpid(task, 0)


def test_the_next_task_is_looked_for_soon_after_one_has_begun_or_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    executor, begun = launch(monkeypatch, tmp_path, ""), list[str]()
    monkeypatch.setattr(executor.pauses, "begin", lambda: begun.append("begin"))
    executor.launch(spec())
    assert len(begun) == 1
    assert executor._children[0][0].wait(20) == 0
    executor.reap()
    executor.reap()
    assert len(begun) == 2


def test_only_a_sites_superexec_keeps_a_parent_and_each_has_pauses(monkeypatch: pytest.MonkeyPatch):
    for name in ("AutoExecPlugin", "get_executor", "time"):
        monkeypatch.setattr(running, name, getattr(running, name))
    for module in TASKS:
        executor = superexec.install(module, VALUE)
        assert (executor._warm is not None) == (module == "client.entry")
        assert running.time is executor.pauses


def test_an_older_process_of_a_run_is_ended_with_its_children_before_the_next_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    executor = launch(monkeypatch, tmp_path, "import subprocess; subprocess.Popen(['sleep', '600']).wait()")
    pids = []
    for run_id in (5, 6, 5, 5):
        executor.make_room(run_id)
        executor.launch(spec())
        pids.append(executor._children[run_id][0].pid)
        deadline = time.monotonic() + 20
        while not subprocess.run(["pgrep", "-P", str(pids[-1])], capture_output=True, check=False).stdout:
            assert time.monotonic() < deadline
    try:
        alive = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        assert alive == [pids[1], pids[3]]
        assert json.loads((tmp_path / SLOW_FILE).read_text())["run_id"] == 5
    finally:
        for run_id in (5, 6):
            executor.make_room(run_id)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_frozen_process_is_not_called_a_slow_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    executor = launch(monkeypatch, tmp_path, "import time; time.sleep(600)")
    told = []
    for is_frozen in (True, False):
        executor.make_room(5)
        executor.launch(spec())
        pid = executor._children[5][0].pid
        if is_frozen:
            os.kill(pid, signal.SIGSTOP)
            os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
        caplog.clear()
        executor.make_room(5)
        told.append((json.loads((tmp_path / SLOW_FILE).read_text())["is_frozen"], "was frozen" in caplog.text))
        assert not Path(f"/proc/{pid}").exists()
    assert told == [(True, True), (False, False)]
    assert "did not start within" in caplog.text


def test_what_stands_still_is_ended_after_a_while_though_its_run_comes_no_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    executor, now = launch(monkeypatch, tmp_path, "import time; time.sleep(600)"), [100.0]
    monkeypatch.setattr(task_processes, "time", SimpleNamespace(monotonic=lambda: now[0]))
    pids = {}
    for run_id in (5, 6):
        executor.make_room(run_id)
        executor.launch(spec())
        pids[run_id] = executor._children[run_id][0].pid

    def looked(seconds: float, number: int) -> list[int]:
        os.kill(pids[5], number)
        options = os.WNOWAIT | (os.WSTOPPED if number == signal.SIGSTOP else os.WCONTINUED)
        os.waitid(os.P_PID, pids[5], options)
        now[0] += seconds
        executor.end_frozen()
        return sorted(executor._children)

    try:
        assert looked(0.0, signal.SIGSTOP) == [5, 6]
        assert looked(FROZEN_SECONDS - 1, signal.SIGSTOP) == [5, 6]
        # What went on in between stands still anew.
        assert looked(2.0, signal.SIGCONT) == [5, 6]
        assert looked(0.0, signal.SIGSTOP) == [5, 6]
        assert looked(FROZEN_SECONDS + 1, signal.SIGSTOP) == [6]
        assert not Path(f"/proc/{pids[5]}").exists()
    finally:
        for run_id in (5, 6):
            executor.make_room(run_id)


def test_a_process_that_has_ended_does_not_stay_in_the_process_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    executor = launch(monkeypatch, tmp_path, "")
    executor.make_room(5)
    executor.launch(spec())
    ((process, _),) = executor._children.values()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{process.pid}").exists():
        executor.reap()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert executor._children == {}


def test_a_run_that_starts_at_once_leaves_no_word_of_a_slow_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / SLOW_FILE).write_text("{}")
    executor = launch(monkeypatch, tmp_path, "")
    executor.make_room(5)
    assert not (tmp_path / SLOW_FILE).exists()


def test_a_stopped_run_ends_even_before_it_has_begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A process that is still starting hears of no stop: `stop` leaves a file, and after a while it is ended."""
    executor = launch(monkeypatch, tmp_path, "import time; time.sleep(600)")
    pids = {}
    for run_id in (5, 6):
        executor.make_room(run_id)
        executor.launch(spec())
        pids[run_id] = executor._children[run_id][0].pid
    (tmp_path / STOP_FOLDER).mkdir()
    file = tmp_path / STOP_FOLDER / "5"
    file.touch()
    (tmp_path / STOP_FOLDER / "evil").touch()
    executor.end_stopped()
    assert Path(f"/proc/{pids[5]}").exists()
    os.utime(file, (time.time() - 60, time.time() - 60))
    executor.end_stopped()
    assert not Path(f"/proc/{pids[5]}").exists()
    assert Path(f"/proc/{pids[6]}").exists()
    assert not file.exists()
    executor.make_room(6)


@pytest.mark.parametrize("module", TASKS)
def test_flowers_superexec_offers_and_launches_one_kind_of_task(monkeypatch: pytest.MonkeyPatch, module: str):
    for name in ("AutoExecPlugin", "get_executor", "time"):
        monkeypatch.setattr(running, name, getattr(running, name))
    superexec.install(module, VALUE)
    executor = running.get_executor("subprocess")
    started: list[ExecutionSpec] = []
    monkeypatch.setattr(executor, "launch", started.append)
    plugin = running.AutoExecPlugin("127.0.0.1:1", False, None, executor=executor)
    assert set(plugin.supported_task_types) == {TASKS[module]}
    for kind in TaskType:
        plugin.launch_task(TOKEN, Task(task_id=1, run_id=3, type=kind))
    assert [each.task_type for each in started] == [TASKS[module]]


def test_a_guard_for_a_name_that_flower_lost_is_an_error():
    with pytest.raises(RuntimeError, match="has no lost"):
        replace(running, {"lost": None})
    with pytest.raises(RuntimeError):
        replace(running.run_superexec, {"AutoExecPlugin": None})


def test_a_process_without_a_token_ends_with_one_line():
    done = subprocess.run(
        [sys.executable, "-I", "-m", "deploy.guards.apps", "client.entry"],
        input="", capture_output=True, text=True, check=False, env={**os.environ},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "standard input does not hold a task's token: a superexec of maskfed starts this process"
    ]


def test_the_kernel_ends_what_a_superexec_has_started_when_that_dies():
    """A process that hangs, or is still loading, does not notice that its superexec was killed."""
    asked = "import ctypes, sys; n = ctypes.c_int(); ctypes.CDLL(None).prctl(2, ctypes.byref(n)); sys.exit(n.value)"
    process, pipe = task_processes.start([sys.executable, "-I", "-c", asked], is_quiet=True)
    os.close(pipe)
    assert process.wait() == signal.SIGKILL
