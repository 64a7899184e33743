"""Which program a site's superexec really starts, where "first on PATH" would find another one."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from flwr.proto.runtime_pb2 import AcquireTaskResponse
from flwr.proto.task_pb2 import Task

from deploy.guards.web.calls import HEADER, caller_value
from deploy.identity.keys import create_secret
from tests.needs import need, need_binary

TOKEN = "ab" * 128


class Runtime(BaseHTTPRequestHandler):
    """A SuperNode's runtime paths: one task, and a record of who came for it."""

    calls: list[tuple[str, str, str]] = []  # noqa: RUF012 - one server at a time

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        known = [path for path, _, _ in self.calls]
        self.calls.append((self.path, self.headers.get(HEADER, ""), self.headers.get("flwr-task-token", "")))
        is_first = self.path.endswith("acquire-task") and self.path not in known
        task = Task(task_id=1, run_id=5, type="flwr-clientapp")
        reply = AcquireTaskResponse(task=task, token=TOKEN) if is_first else AcquireTaskResponse()
        content = reply.SerializeToString()
        self.send_response(200 if self.path.endswith("acquire-task") else 500)
        self.send_header("content-type", "application/protobuf")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def runtime() -> Iterator[int]:
    Runtime.calls = []
    with HTTPServer(("127.0.0.1", 0), Runtime) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(("mount", "folder"), [("", "co:lon"), ("noexec", "site")])
def test_a_task_starts_the_installed_program_and_nothing_from_a_path(
    tmp_path: Path, runtime: int, mount: str, folder: str
):
    home, planted, marker = tmp_path / folder, tmp_path / "planted", tmp_path / "unapproved-code-ran"
    for place in (home, planted):
        place.mkdir()
        program = place / "flwr-clientapp"
        program.write_text(f"#!/bin/sh\ntouch {marker}\n")
        program.chmod(0o755)
    mounted = f"mount -t tmpfs -o {mount} tmpfs {home} && " if mount else ""
    create_secret(tmp_path / "site.secret")
    entry = [sys.executable, "-I", "-m", "deploy.guards.superexec", "client.entry", "--insecure"]
    further = ["--runtime-api-address", f"127.0.0.1:{runtime}", "--superexec-auth-secret-file"]
    argv = [*entry, *further, str(tmp_path / "site.secret")]
    env = {"PATH": f"{home}:{planted}:{os.environ['PATH']}", "FLWR_HOME": str(home), "PYTHONPATH": str(planted)}
    need(not mount or os.geteuid() == 0, "mounting a noexec file system needs root")
    shell = [need_binary("unshare"), "--mount", "sh", "-c", mounted + 'exec "$@"', "sh"] if mount else []
    with subprocess.Popen([*shell, *argv], env={**env, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"},
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as superexec:  # fmt: skip
        try:
            deadline = time.monotonic() + 120
            while not (found := [call for call in Runtime.calls if call[0].endswith("pull-task-input")]):
                assert time.monotonic() < deadline, Runtime.calls
                assert superexec.poll() is None
                time.sleep(0.1)
        finally:
            superexec.kill()
    value = caller_value(tmp_path / "site.secret")
    assert found[0] == ("/v1/runtime/pull-task-input", value, TOKEN)
    assert {call[1] for call in Runtime.calls} == {value}
    assert not marker.exists()
