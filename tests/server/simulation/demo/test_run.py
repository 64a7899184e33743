import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from server.cli.main import main

Demo = Callable[..., str]
TRAINING_SOON = """
from server.cli.main import main
from server.simulation.demo import private
private.SITE_IMAGES = private.REFERENCE_IMAGES = 4
main()
"""


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Demo:
    """What a demo says that ends with exit code 2 before it starts anything."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["maskfed-server", "demo", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--public", "faces"], "give both --public and --faces"),
        (["--non-private", "--public", "none", "--faces", "none"], "images none: does not exist"),
        (["--public", "none", "--faces", "none"], "give --non-private with --public and --faces"),
        (["--budget", "soon"], "budget 'soon': give at least 60s"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(demo: Demo, arguments: list[str], line: str, tmp_path: Path):
    said = demo("--out", str(tmp_path / "out"), *arguments)
    assert said.startswith("error: ")
    assert line in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_port_in_use_is_named_before_anything_starts(demo: Demo, tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        said = demo("--out", str(tmp_path / "out"), "--port", str(port))
    assert f"port {port} on 127.0.0.1" in said
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_refused(demo: Demo, tmp_path: Path):
    (tmp_path / "file").touch()
    assert "is not empty" in demo("--out", str(tmp_path))


def test_interrupted_while_it_trains_it_leaves_no_process(tmp_path: Path):
    command = [sys.executable, "-c", TRAINING_SOON, "demo", "--out", str(tmp_path / "out"), "--sites", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        family: list[psutil.Process] = []
        deadline = time.monotonic() + 60
        while not family:
            assert time.monotonic() < deadline
            time.sleep(0.1)
            family = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
    _, left = psutil.wait_procs(family, timeout=5)
    assert left == []
