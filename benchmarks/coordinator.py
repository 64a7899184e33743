"""A coordinator behind its door in a temporary folder, and how its sites and strangers talk to it."""

import json
import socket
import ssl
import subprocess
import time
from contextlib import closing
from pathlib import Path

import psutil

from benchmarks.local import command
from deploy.identity.enrolment import read_bundle
from deploy.identity.site_identity import accept_bundle
from deploy.identity.tls import client_context
from deploy.processes.process import free_ports, spawn
from deploy.processes.services import environment


class Coordinator:
    """Started at once; `process` is to be ended by whoever made it.

    Attributes:
        said: what every command that was called has said.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.home = root, root / "coordinator"
        self.said: list[str] = []
        self.port, superlink, health = free_ports(3)
        ports = ("--port", str(superlink), "--health-port", str(health))
        self.call("maskfed-server", "init", "--edge", "--address", f"localhost:{self.port}", *ports)
        argv = command("maskfed-server", "start", "--home", str(self.home))
        self.process = spawn(argv, environment(root / "flwr"), root / "start.log")
        while "ready: sites connect" not in (root / "start.log").read_text():
            if self.process.poll() is not None:
                raise RuntimeError((root / "start.log").read_text())
            time.sleep(0.3)
        self.pids = self.family()
        self.insider = self.enrol("insider")

    @property
    def ca(self) -> Path:
        """Certificate of its CA."""
        return self.home / "pki" / "ca.crt"

    def call(self, *arguments: str, home: Path | None = None) -> tuple[int, str]:
        """Exit code and what a command said."""
        chosen = ("--home", str(home or self.home))
        done = subprocess.run(command(*arguments, *chosen), capture_output=True, text=True, check=False, cwd=self.root)
        said = (done.stdout + done.stderr).strip()
        self.said.append(said)
        return done.returncode, said

    def family(self) -> set[int]:
        """Process ids of the coordinator; nginx has another worker after each reload."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return {each.pid for each in children if "nginx: worker" not in " ".join(each.cmdline())}

    def lines(self, name: str) -> list[str]:
        """Lines of one of the coordinator's logs."""
        log = self.home / "logs" / name
        return log.read_text(errors="replace").splitlines() if log.exists() else []

    def enrol(self, alias: str) -> Path:
        """Add a site; its node key, with the certificate for the door beside it."""
        home = self.root / alias
        code, said = self.call("maskfed-server", "sites", "add", self.request_of(alias))
        if code:
            raise RuntimeError(said)
        accept_bundle(home, read_bundle(self.root / f"{alias}.join.json"))
        return home / "node.key"

    def request_of(self, alias: str) -> str:
        """The line with which a site asks to be enrolled; what to do with it is told after it."""
        return self.call("maskfed-client", "enroll", alias, home=self.root / alias)[1].splitlines()[0]

    def refusals(self) -> list[dict[str, object]]:
        """Lines of the edge's log."""
        return [json.loads(line) for line in self.lines("edge.log")]

    def send(self, raw: bytes) -> int:
        """Status that the door answers to a certified site's raw bytes inside TLS; 0 when it just closes."""
        context = client_context(self.ca, self.insider)
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=20) as plain,
            closing(context.wrap_socket(plain, server_hostname="localhost")) as stream,
        ):
            try:
                stream.sendall(raw)
                answer = stream.recv(4096)
            except (ConnectionError, ssl.SSLError):
                return 0
        return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0
