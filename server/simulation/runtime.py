"""Flower's runtime for simulations: a SuperLink of its own on loopback, and everything below it, for one run."""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

from server.federation.fleet.allowances import FOLDER
from server.federation.fleet.superlink import Control, wait_ready
from server.runs.child_process import dies_with_parent

START_SECONDS = 90.0


@contextmanager
def simulation_runtime(out: Path) -> Iterator[Control]:
    """Flower's SuperLink in simulation mode, for one run; everything below it ends with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "MASKFED_SERVER_HOME": str(out.resolve()),
        "MASKFED_ALLOWANCES": str((out / FOLDER).resolve()),
        "MASKFED_SIMULATION": str(out.resolve()),
        "MASKFED_SIMULATION_PID": str(os.getpid()),
        "FLWR_HOME": str((out / "flwr").resolve()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    secret, address = secrets.token_bytes(32), f"127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="maskfed-simulation-") as folder, ExitStack() as running:
        file = Path(folder, "superexec.secret")
        file.touch(0o600)
        file.write_bytes(secret)
        insecure = ("--insecure", "--superexec-auth-secret-file", str(file))
        superlink = ("superlink", *insecure, "--simulation", "--isolation", "process", "--host", "127.0.0.1",
                     "--port", str(port), "--disable-runtime-dependency-installation")  # fmt: skip
        superexec = ("superexec", "server.simulation.entry", *insecure, "--runtime-api-address", address)
        running.enter_context(_guarded(superlink, settings, out / "runtime.log"))
        wait_ready(address, None, START_SECONDS)
        running.enter_context(_guarded(superexec, settings, out / "runtime.log"))
        yield running.enter_context(Control(address, None, secret))


@contextmanager
def _guarded(entry: Sequence[str], settings: dict[str, str], log_file: Path) -> Iterator[None]:
    """One of Flower's processes through its guarded entry: on loopback, too, only this simulation may call it."""
    with log_file.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-I", "-m", f"deploy.guards.{entry[0]}", *entry[1:]],
            env={**os.environ, **settings},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=dies_with_parent(),  # noqa: PLW1509  # one system call, no Python locks
        )
        try:
            yield
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
