"""A benchmark that is ended takes everything down; what a killed one has left goes with the next start."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks import scratch as module
from benchmarks.scratch import NETWORK_FILE, PREFIX, ended_by_signals, mounted_below, note, remove_left, scratch

ROOT = Path(__file__).parents[2]
WORKS = """
import sys, time
from benchmarks.scratch import scratch

with scratch() as folder:
    (folder / "model").write_bytes(b"x")
    try:
        print(folder, flush=True)
        time.sleep(600)
    finally:
        print("taken down", len(list(folder.iterdir())), flush=True)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's folder for temporary files, for this process and those that it starts."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What is asked of the system; nothing of it is done."""
    asked: list[list[str]] = []

    def run(argv: list[object], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append([str(word) for word in argv])
        return subprocess.CompletedProcess(argv, 0, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return asked


@contextmanager
def at_work() -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A benchmark in another process, and the folder that it works in."""
    with subprocess.Popen([sys.executable, "-c", WORKS], cwd=ROOT, text=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_takes_everything_down(temporary: Path, number: signal.Signals):
    with at_work() as (process, folder):
        assert folder.is_dir()
        process.send_signal(number)
        assert process.communicate(timeout=60)[0] == "taken down 1\n"
        assert process.returncode == 128 + number
    assert list(temporary.iterdir()) == []


def test_what_a_killed_one_has_left_goes_with_the_next_start_and_what_is_in_use_does_not(
    temporary: Path, capsys: pytest.CaptureFixture[str]
):
    with at_work() as (killed, left), at_work() as (_, used):
        killed.kill()
        killed.wait()
        assert left.is_dir()
        with scratch() as folder:
            assert not left.exists() and not left.parent.exists()
            assert used.is_dir() and folder.is_dir() and list(folder.iterdir()) == []
            assert str(left.parent) in capsys.readouterr().err
            remove_left()
            assert folder.is_dir()
        assert [used.parent] == list(temporary.iterdir())


def test_what_is_not_a_benchmarks_of_this_user_is_not_touched(temporary: Path, monkeypatch: pytest.MonkeyPatch):
    elsewhere = temporary / "elsewhere"
    (elsewhere / "inside").mkdir(parents=True)
    (temporary / f"{PREFIX}link").symlink_to(elsewhere)
    (temporary / f"{PREFIX}file").write_text("")
    (temporary / "maskfed-other").mkdir()
    before = sorted(temporary.rglob("*"))
    remove_left()
    assert sorted(temporary.rglob("*")) == before
    (temporary / f"{PREFIX}others").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 12345)
        remove_left()
    assert (temporary / f"{PREFIX}others").is_dir()
    remove_left()
    assert sorted(temporary.rglob("*")) == before


def test_namespaces_links_and_disks_of_a_killed_one_go_too(
    temporary: Path, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
):
    folder = temporary / f"{PREFIX}a b"
    (folder / "inside").mkdir(parents=True)
    (folder / NETWORK_FILE).write_text("netns mf12as\nlink mfb12a\nnetns ../x\nlink eth0\nnetns mf -a\n")
    places = [f"{temporary}/{PREFIX}a\\040b/inside", f"{temporary}/{PREFIX}a\\040b/inside/site", f"{temporary}/else"]
    mounts = temporary / "mounts"
    mounts.write_text("".join(f"36 25 0:32 / {place} rw,relatime - tmpfs tmpfs rw\n" for place in places))
    monkeypatch.setattr(module, "MOUNTS", mounts)
    remove_left()
    assert commands == [
        ["ip", "netns", "pids", "mf12as"],
        ["ip", "netns", "del", "mf12as"],
        ["ip", "link", "del", "mfb12a"],
        ["umount", "--lazy", f"{folder}/inside/site"],
        ["umount", "--lazy", f"{folder}/inside"],
    ]
    assert not folder.exists()


def test_what_a_block_has_noted_goes_with_it(commands: list[list[str]]):
    with scratch():
        note("netns", "mf34bs")
        note("link", "mfb34b")
        for kind, name in (("link", "eth0"), ("netns", "mfa b"), ("bridge", "mfb34b"), ("link", "mf\nnetns mfx")):
            with pytest.raises(ValueError, match="would be removed"):
                note(kind, name)
    assert commands == [
        ["ip", "netns", "pids", "mf34bs"],
        ["ip", "netns", "del", "mf34bs"],
        ["ip", "link", "del", "mfb34b"],
    ]


def test_what_cannot_be_removed_is_said_and_stops_nobody(
    temporary: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    (temporary / f"{PREFIX}busy").mkdir()

    def refuse(folder: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(module, "_remove", refuse)
        remove_left()
    assert "cannot be removed" in capsys.readouterr().err
    assert mounted_below(temporary) == []


def test_handlers_of_signals_are_as_before():
    before = [signal.getsignal(number) for number in module.ENDING]
    with ended_by_signals(), scratch():
        assert [signal.getsignal(number) for number in module.ENDING] != before
    assert [signal.getsignal(number) for number in module.ENDING] == before
