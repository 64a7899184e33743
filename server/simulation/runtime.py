"""Flower's runtime for simulations: a SuperLink of its own on loopback, and everything below it, for one run."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from server.federation.fleet.superlink import Control, wait_ready
from server.runs.child_process import dies_with_parent

START_SECONDS = 90.0


@contextmanager
def simulation_runtime(out: Path) -> Iterator[Control]:
    """Flower's SuperLink in simulation mode, for one run; everything below it ends with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    programs = Path(sys.executable).parent
    settings = {
        "MASKFED_SERVER_HOME": str(out.resolve()),
        "MASKFED_SIMULATION": str(out.resolve()),
        "MASKFED_SIMULATION_PID": str(os.getpid()),
        "FLWR_HOME": str((out / "flwr").resolve()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    }
    command = [str(programs / "flower-superlink"), "--insecure", "--simulation", "--host", "127.0.0.1"]
    with (out / "runtime.log").open("ab") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--disable-runtime-dependency-installation"],
            env={**os.environ, **settings},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=dies_with_parent(),  # noqa: PLW1509  # one system call, no Python locks
        )
        try:
            wait_ready(f"127.0.0.1:{port}", None, START_SECONDS)
            with Control(f"127.0.0.1:{port}", None) as control:
                yield control
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
    for child in psutil.wait_procs(family, timeout=5)[1]:
        child.kill()
