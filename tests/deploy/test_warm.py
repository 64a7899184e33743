"""Tasks are forked from a warmed parent: each alone, as if just started, and from nothing but the code on disk now."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from deploy.guards import forks
from deploy.guards.forks import Forked, Warm
from deploy.guards.superexec import installed, program
from tests.needs import need

TOKEN, VALUE = "ab" * 128, "cd" * 32
TASK = """
import atexit, json, logging, os, random, resource, signal, sys, threading
import small
LEFT, EXPECTED = [], set()

def main():
    name = sys.argv[sys.argv.index("--out") + 1]
    from cryptography.hazmat.primitives.asymmetric import ed25519  # its library has a generator of its own
    seen = {
        "argv": sys.argv, "pid": os.getpid(), "left": list(LEFT), "threads": len(os.listdir("/proc/self/task")),
        "files": {int(each): os.readlink(f"/proc/self/fd/{each}") for each in os.listdir("/proc/self/fd")
                  if os.path.exists(f"/proc/self/fd/{each}")},
        "random": [random.random(), sys.modules["numpy"].random.rand() if "numpy" in sys.modules else None,
                   os.urandom(8).hex(), ed25519.Ed25519PrivateKey.generate().private_bytes_raw().hex()],
        "signals": [signal.getsignal(each) == default for each, default in
                    ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler))],
        "limit": resource.getrlimit(resource.RLIMIT_AS)[0], "name": open("/proc/self/comm").read().strip(),
        "umask": os.umask(0o077), "environ": dict(os.environ), "dumpable": os.stat("/proc/self/environ").st_uid,
        "cmdline": open("/proc/self/cmdline").read(),
        "loaded": [each for each in ("heavy", "heavier") if each in sys.modules],
    }
    LEFT.append("something of the first message")
    class Kept:
        def __del__(self, write=open, name=name): write(name + ".taken-apart", "w").close()
    small.kept = Kept()
    atexit.register(lambda: open(name + ".at-exit", "w").close())
    random.seed(1)
    logging.getLogger().addHandler(logging.StreamHandler())
    logging._acquireLock()
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    EXPECTED.update(each[9:] for each in sys.argv if each.startswith("--expect-"))
    for library in ("heavy", "heavier"):
        if "--" + library in sys.argv:
            __import__(library)
    temporary = name + ".partial"
    json.dump(seen, open(temporary, "w"))
    os.rename(temporary, name)
    if "--stay" in sys.argv:
        signal.pause()
"""
LATER = {"heavy": ("heavy",), "heavier": ("heavier",)}
PARENT = """
import sys
sys.path.insert(0, {place!r})
from deploy import warm
from deploy.guards import apps

def run_without_flower(module, arguments):
    token, _ = apps.read_pipe()
    sys.argv = [module, *arguments, "--token", token]
    sys.modules[module].main()

warm.EVERY_TASK, warm.run = (), run_without_flower
warm.LATER["fake_task"] = {later!r}
{further}
warm.main()
"""


class Place:
    """A task of its own in `folder`, with a library that only some messages load, and a parent for it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._monkeypatch, self._count = folder, monkeypatch, 0
        (folder / "fake_task.py").write_text(TASK)
        (folder / "small").mkdir()
        for name in ("__init__", "not_loaded_yet"):
            (folder / "small" / f"{name}.py").write_text("")
        (folder / "heavy.py").write_text("")
        (folder / "heavier.py").write_text("")
        monkeypatch.setitem(forks.LATER, "fake_task", LATER)
        self.start_as()
        self.warm = Warm("fake_task", folder / "fake_task.py")

    def start_as(self, further: str = "") -> None:
        """Let parents be started with some more code, which runs last before they load."""
        argv = [sys.executable, "-c", PARENT.format(place=str(self.folder), later=LATER, further=further), "fake_task"]
        self._monkeypatch.setattr(forks, "program", lambda _: argv)

    def ask(self, *arguments: str) -> tuple[Forked, Path] | None:
        """A task that is told its token; what it sees is written to the path."""
        self._count += 1
        out = self.folder / f"seen-{self._count}.json"
        found = self.warm.fork(["--out", str(out), *arguments], is_quiet=True)
        if found is None:
            return None
        process, pipe = found
        with os.fdopen(pipe, "wb") as writing:
            writing.write(f"{TOKEN}\n{VALUE}\n".encode())
        return process, out

    def task(self, *arguments: str) -> dict[str, Any]:
        """What a task sees that has ended."""
        found = self.ask(*arguments)
        assert found is not None
        assert found[0].wait(30) == 0
        self.warm.heed(found[0])
        return dict(json.loads(found[1].read_text()))

    @property
    def parent(self) -> psutil.Process:
        assert self.warm._line is not None
        return psutil.Process(self.warm._line.process.pid)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    need(hasattr(os, "pidfd_open"), "processes are held by file descriptors of Linux")
    made = Place(tmp_path, monkeypatch)
    yield made
    made.warm.close()


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_each_task_is_alone_and_like_one_that_was_just_started(place: Place):
    place.start_as("import numpy; warm.run = apps.run")
    one, other = place.task(), place.task()
    parent = place.parent
    assert len({one["pid"], other["pid"], parent.pid, os.getpid()}) == 4
    assert other["left"] == []
    assert one["threads"] == other["threads"] == 1
    assert parent.num_threads() == 1
    for mine, others in zip(one["random"], other["random"], strict=True):
        assert mine != others
    for seen in (one, other):
        assert seen["files"].pop("0") == seen["files"].pop("1") == seen["files"].pop("2") == os.devnull
        assert [target.split(":")[0] for target in seen["files"].values()] == ["pipe"]
        assert seen["signals"] == [True, True]
        assert seen["limit"] == -1
        assert (seen["name"], seen["umask"]) == ("maskfed-task", 0o077)
        assert seen["dumpable"] == os.geteuid()
    assert one["argv"][1:-2] == ["--out", str(place.folder / "seen-1.json")]


def test_the_token_is_on_no_command_line_in_no_environment_and_unknown_to_the_parent(place: Place):
    seen = place.task()
    assert seen["argv"][-2:] == ["--token", TOKEN]
    assert TOKEN not in json.dumps([seen["environ"], seen["cmdline"]])
    assert place.parent.name() == "maskfed-warm"
    assert "OPENBLAS_NUM_THREADS" not in seen["environ"] or "OPENBLAS_NUM_THREADS" in os.environ


def test_a_task_ends_as_programs_do_but_is_not_taken_apart(place: Place):
    place.task()
    assert (place.folder / "seen-1.json.at-exit").exists()
    assert not (place.folder / "seen-1.json.taken-apart").exists()


def test_a_parent_is_there_before_the_first_task_and_not_again_once_it_was_idle(place: Place):
    place.warm.tend()
    first = place.parent
    place.task()
    assert place.parent.pid == first.pid
    place.warm.close()
    place.warm.tend()
    assert place.warm._line is None


def test_a_large_library_is_loaded_only_after_a_task_has_loaded_it_and_by_an_heir(place: Place):
    assert place.task()["loaded"] == []
    first = place.parent
    assert place.task("--heavy")["loaded"] == []
    place.warm.tend()
    assert place.task()["loaded"] == ["heavy"]
    assert place.parent.pid != first.pid
    assert place.parent.name() == "maskfed-warm"
    assert place.task("--heavier")["loaded"] == ["heavy"]
    assert place.task()["loaded"] == ["heavy", "heavier"]
    assert first.is_running()
    place.warm.close()
    eventually(lambda: not psutil.pid_exists(first.pid) or first.status() == "zombie")


def test_a_large_library_that_a_task_expects_of_later_ones_is_loaded_before_they_come(place: Place):
    assert place.task("--expect-heavier", "--expect-os.path")["loaded"] == []
    place.warm.tend()
    assert place.task()["loaded"] == ["heavier"]


def test_while_an_heir_loads_for_long_tasks_are_forked_from_the_old_parent(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(forks, "HEIR_SECONDS", 0.1)
    (place.folder / "heavy.py").write_text(
        "import os, time\nwhile not os.path.exists(__file__ + '.go'): time.sleep(0.01)"
    )
    place.task()
    place.warm._wanted.add("heavy")
    first = place.parent
    assert place.task()["loaded"] == []
    assert place.warm._heir is not None
    assert place.parent.pid == first.pid
    (place.folder / "heavy.py.go").touch()
    eventually(lambda: (place.warm.tend(), place.parent.pid != first.pid)[1])  # type: ignore[func-returns-value]
    assert place.task()["loaded"] == ["heavy"]


@pytest.mark.parametrize("text", ["raise ImportError", "import os; os._exit(0)", "import threading; "
                                  "threading.Thread(target=threading.Event().wait, daemon=True).start()"])  # fmt: skip
def test_an_heir_that_fails_leaves_the_parent_as_it_was(place: Place, text: str):
    place.task()
    (place.folder / "heavy.py").write_text(text)
    place.warm.close()
    place.task()
    place.warm._wanted.add("heavy")
    first = place.parent
    assert place.task()["loaded"] == []
    assert place.parent.pid == first.pid
    assert place.warm._heir is None


def test_an_heir_that_is_killed_or_frozen_once_it_serves_is_replaced_like_any_parent(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(forks, "ANSWER_SECONDS", 2.0)
    for end in ("kill", "suspend"):
        place.task("--heavy")
        assert place.task()["loaded"] == ["heavy"]
        getattr(place.parent, end)()
        assert place.task()["loaded"] == []


def test_another_user_of_the_machine_cannot_look_into_the_parent(place: Place):
    """Nor can a task: the kernel gives what belongs to a process that must not be dumped to root."""
    place.task()
    assert Path(f"/proc/{place.parent.pid}/environ").stat().st_uid == 0


def test_code_that_has_changed_on_disk_is_loaded_anew(place: Place):
    first = place.task()
    before = place.parent.pid
    (place.folder / "fake_task.py").write_text(TASK.replace('"left": list(LEFT)', '"left": "code that is new"'))
    second = place.task()
    assert (first["left"], second["left"]) == ([], "code that is new")
    assert place.parent.pid != before


@pytest.mark.parametrize("name", ["heavy.py", "small/__init__.py", "small/not_loaded_yet.py"])
def test_any_file_that_was_or_may_be_loaded_counts_and_no_other(place: Place, name: str):
    place.task("--heavy")
    place.task()
    before = place.parent.pid
    (place.folder / "another.py").write_text("")
    place.task()
    assert place.parent.pid == before
    (place.folder / "another.py").replace(place.folder / name)
    place.task()
    assert place.parent.pid != before


def test_a_parent_with_a_second_thread_forks_nothing(place: Place):
    place.start_as("import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()")
    assert place.ask() is None


@pytest.mark.parametrize("further", ["del warm.os.pidfd_open", "warm.Path = lambda _: 1 / 0"])
def test_a_machine_that_lacks_what_a_fork_needs_does_without_a_parent(place: Place, further: str):
    """And not only when the first task has been forked: the superexec then waits before it tries again."""
    place.start_as(further)
    assert place.ask() is None
    assert place.warm._line is None
    assert place.warm._not_before > time.monotonic() + 100


def test_a_parent_whose_cuda_was_touched_forks_nothing(place: Place):
    place.start_as(
        "import types; torch = types.ModuleType('torch'); sys.modules['torch'] = torch; "
        "torch.cuda = types.SimpleNamespace(is_initialized=lambda: True)"
    )
    assert place.ask() is None


@pytest.mark.parametrize("when", ["idle", "between"])
def test_a_parent_that_was_killed_is_replaced_and_its_tasks_go_on(place: Place, when: str):
    found = place.ask("--stay")
    assert found is not None
    eventually(found[1].exists)
    killed = place.parent
    if when == "idle":
        killed.kill()
        killed.wait(10)
    else:  # it dies with the question in its hands
        killed.suspend()
        place.warm._line._end.sendall(b"{}")  # type: ignore[union-attr]
        killed.kill()
    assert place.task()["left"] == []
    assert place.parent.pid != killed.pid
    assert found[0].poll() is None
    found[0].send_signal(signal.SIGKILL)
    assert found[0].wait(10) == 0


def test_a_frozen_parent_is_given_up_and_no_task_runs_twice(place: Place, monkeypatch: pytest.MonkeyPatch):
    place.task()
    monkeypatch.setattr(forks, "ANSWER_SECONDS", 2.0)
    frozen = place.parent
    frozen.suspend()
    place.task()
    assert place.parent.pid != frozen.pid
    assert not frozen.is_running()
    assert sorted(each.name for each in place.folder.glob("seen-*.json")) == ["seen-1.json", "seen-2.json"]


def test_a_task_without_a_token_ends(place: Place):
    """The superexec died, or gave the parent up, after the fork and before it wrote the token."""
    process, pipe = place.warm.fork(["--out", str(place.folder / "never")], is_quiet=True)  # type: ignore[misc]
    os.close(pipe)
    assert process.wait(20) == 0
    assert not (place.folder / "never").exists()


def test_the_parent_ends_when_nothing_comes_for_a_while_and_leaves_no_zombie(place: Place):
    place.start_as("warm.IDLE_SECONDS = 0.05")
    assert place.task()["left"] == []
    ended = place.parent
    eventually(lambda: (place.warm.tend(), not ended.is_running())[1])  # type: ignore[func-returns-value]
    assert place.task()["left"] == []


def test_the_parent_ends_with_its_superexec_however_that_ends(place: Place):
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(program("x")[0]).parent)!r})
from pathlib import Path
from deploy.guards import forks
forks.program = lambda _: {forks.program("x")!r}
warm = forks.Warm("fake_task", Path({str(place.folder / "fake_task.py")!r}))
assert warm.fork(["--out", "x"], is_quiet=True)
print(warm._line.process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    eventually(lambda: not psutil.pid_exists(int(done.stdout)))


def test_a_parent_that_would_run_another_file_is_not_used_nor_started_again(place: Place, tmp_path: Path):
    refused = Warm("fake_task", tmp_path / "elsewhere" / "fake_task.py")
    assert refused.fork(["--out", "x"], is_quiet=True) is None
    assert refused._line is None
    assert refused.fork(["--out", "x"], is_quiet=True) is None
    assert refused._line is None


def test_a_parent_that_cannot_be_started_costs_nothing_but_the_parent(
    place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    for argv in (["/nonexistent/python"], ["/bin/false"], ["/bin/echo", "{}"]):
        monkeypatch.setattr(forks, "program", lambda _, argv=argv: argv)
        assert Warm("fake_task", tmp_path).fork([], is_quiet=True) is None


@pytest.mark.parametrize(
    ("written", "told"),
    [(b"", set()), (b"\x02\xff", set()), (b"\x01" * 5000, {"second"}), (b"\x00\x01", {"first", "second"})],
)
def test_what_a_task_writes_to_its_pipe_picks_from_a_fixed_list_only(written: bytes, told: set[str]):
    heard, tell = os.pipe()
    os.write(tell, written)  # and the other end stays open, as something that a task leaves behind may hold it
    assert Forked(os.getpid(), os.dup(heard), heard).told(["first", "second"]) == told
    os.close(tell)


def test_what_a_sites_tasks_need_starts_no_thread_touches_no_gpu_and_loads_torch_last():
    """The real thing, all stages: some seconds of processor time, for no smaller set of libraries shows it."""
    code = """
import os, socket, sys
os.environ["OPENBLAS_NUM_THREADS"] = "1"
from deploy import warm
parent = warm.Parent(socket.socket(), "client.entry")
parent.load("client.entry")
assert "torch" not in sys.modules and not parent.unfit(), parent.unfit()
import torch
asked = []
for name in ("_cuda_getDeviceCount", "_cuda_init"):
    setattr(torch._C, name, lambda *_, name=name: asked.append(name) or 0)
state = torch.get_rng_state()
for modules in warm.LATER["client.entry"].values():
    parent.load(*modules)
assert not parent.unfit(), parent.unfit()
assert asked == [] and not torch.cuda.is_initialized()
assert torch.equal(state, torch.get_rng_state())
"""
    root = installed("client").parent
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=root, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
