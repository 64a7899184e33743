import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.local import command


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command("maskfed-server", "demo", *arguments), capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--public", "faces"], "give both --public and --faces"),
        (["--non-private", "--public", "none", "--faces", "none"], "images none: does not exist"),
        (["--public", "none", "--faces", "none"], "give --non-private with --public and --faces"),
        (["--budget", "soon"], "budget 'soon': give at least 60s"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(arguments: list[str], line: str, tmp_path: Path):
    done = demo("--out", str(tmp_path / "out"), *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_port_in_use_is_named_before_anything_starts(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        done = demo("--out", str(tmp_path / "out"), "--port", str(port))
    assert done.returncode == 2
    assert f"port {port} on 127.0.0.1" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    assert "is not empty" in demo("--out", str(tmp_path)).stderr


def test_interrupted_while_it_trains_it_leaves_no_process(tmp_path: Path):
    with subprocess.Popen(
        command("maskfed-server", "demo", "--out", str(tmp_path / "out"), "--sites", "2"), stdout=subprocess.PIPE
    ) as process:
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
