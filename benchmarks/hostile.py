"""What strangers and bad neighbours try, against a running coordinator behind its edge: nothing may be accepted.

Every attack must be refused and leave a line in a log or on the console, and the coordinator must stay up, with the
same processes. The fuzzed requests go to every path that the edge lets through.
"""

import base64
import json
import random
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import psutil

from benchmarks.local import command
from deploy.certificates import create_authority
from deploy.coordinator import read_coordinator
from deploy.edge import find_nginx
from deploy.enrolment import PREFIX, public_key_digest
from deploy.processes import end_together, free_ports, spawn
from deploy.provision import ProvisionError, client_context
from deploy.topology import environment, is_healthy, program

FUZZED = 1000
SEED = 0
EXPOSED = [
    "/health",
    *(
        f"/v1/fleet/{name}"
        for name in (
            "activate-node",
            "deactivate-node",
            "send-node-heartbeat",
            "pull-messages",
            "push-messages",
            "get-run",
            "get-fab",
            "push-object",
            "pull-object",
            "confirm-message-received",
        )
    ),
]


class Coordinator:
    """A coordinator with an edge in a temporary folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.home = root, root / "coordinator"
        self.port, superlink, health = free_ports(3)
        ports = ("--port", str(superlink), "--health-port", str(health))
        self.call("maskfed-server", "init", "--edge", "--address", f"localhost:{self.port}", *ports)
        argv = command("maskfed-server", "start", "--home", str(self.home))
        self.process = spawn(argv, environment(root / "flwr"), root / "start.log")
        while not is_healthy(f"localhost:{self.port}", self.home / "pki" / "ca.crt"):
            if self.process.poll() is not None:
                raise RuntimeError((root / "start.log").read_text())
            time.sleep(0.3)
        self.pids = self.family()

    def call(self, *arguments: str, home: Path | None = None) -> tuple[int, str]:
        """Exit code and what a command said."""
        chosen = ("--home", str(home or self.home))
        done = subprocess.run(command(*arguments, *chosen), capture_output=True, text=True, check=False, cwd=self.root)
        return done.returncode, (done.stdout + done.stderr).strip()

    def family(self) -> set[int]:
        """Process ids of the coordinator."""
        return {each.pid for each in psutil.Process(self.process.pid).children(recursive=True)}

    def refusals(self) -> list[dict[str, object]]:
        """Lines of the edge's log."""
        log = self.home / "logs" / "edge.log"
        return [json.loads(line) for line in log.read_text(errors="replace").splitlines()] if log.exists() else []

    def send(self, raw: bytes) -> int:
        """Status that the edge answers to raw bytes inside TLS; 0 when it just closes."""
        context = client_context(self.home / "pki" / "ca.crt")
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


def main() -> int:
    """Try everything once."""
    try:
        find_nginx()
    except ProvisionError as error:
        print(f"not measured: {error}")
        return 0
    with tempfile.TemporaryDirectory(prefix="maskfed-") as folder:
        coordinator = Coordinator(Path(folder))
        try:
            failed = [name for name, attack in ATTACKS.items() if not _try(name, attack, coordinator)]
            answers, lines = fuzz(coordinator)
            is_up = coordinator.family() == coordinator.pids
            is_up = is_up and is_healthy(f"127.0.0.1:{read_coordinator(coordinator.home).port}", _ca(coordinator))
        finally:
            end_together([coordinator.process], 40)
    accepted = sum(number for status, number in answers.items() if 200 <= status < 300)
    print(f"answers to {FUZZED} fuzzed requests: {dict(sorted(answers.items()))}; lines in the edge's log: {lines}")
    print(
        f"{len(ATTACKS) - len(failed)} of {len(ATTACKS)} attacks refused with a line in a log, {accepted} of {FUZZED} "
        f"fuzzed requests accepted, server {'up' if is_up else 'NOT up'}{': ' + ', '.join(failed) if failed else ''}"
    )
    return int(bool(failed) or accepted > 0 or not is_up or lines < FUZZED - answers[0])


def fuzz(coordinator: Coordinator) -> tuple[Counter[int], int]:
    """Random bytes under random headers to every exposed path; statuses, and lines in the edge's log."""
    random_ = random.Random(SEED)
    before = len(coordinator.refusals())
    answers: Counter[int] = Counter()
    for number in range(FUZZED):
        path = EXPOSED[number % len(EXPOSED)]
        method = random_.choice(["POST", "POST", "PUT", "GET", "DELETE"]) if path != "/health" else "POST"
        body = random_.randbytes(random_.randrange(0, 3000))
        headers = {
            "Host": "localhost",
            "Connection": "close",
            "Content-Length": str(len(body)),
            "Content-Type": random_.choice(["application/protobuf", "application/json", "application/x-protobuf", "*"]),
            "flwr-public-key": base64.b64encode(random_.randbytes(random_.randrange(200))).decode(),
            "flwr-timestamp": random_.choice(["0", "now", str(time.time()), "9" * 400, "-1"]),
            "flwr-signature": random_.randbytes(random_.randrange(100)).hex(),
        }
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        answers[coordinator.send("\r\n".join(lines).encode() + body)] += 1
    time.sleep(0.5)
    return answers, len(coordinator.refusals()) - before


def wrong_ca(coordinator: Coordinator) -> bool:
    """A site that was given another CA does not talk to us."""
    create_authority(coordinator.root / "other.key", coordinator.root / "other.crt")
    context = client_context(coordinator.root / "other.crt")
    try:
        with socket.create_connection(("127.0.0.1", coordinator.port)) as raw:
            context.wrap_socket(raw, server_hostname="localhost")
    except ssl.SSLCertVerificationError:
        return True
    return False


def unregistered_key(coordinator: Coordinator) -> bool:
    """A SuperNode whose key nobody has added."""
    home = coordinator.root / "stranger"
    coordinator.call("maskfed-client", "enroll", "stranger", home=home)
    return _supernode_is_refused(coordinator, home)


def revoked_key(coordinator: Coordinator) -> bool:
    """A SuperNode whose key was added and removed again."""
    home = coordinator.root / "revoked"
    _, line = coordinator.call("maskfed-client", "enroll", "revoked", home=home)
    added, _ = coordinator.call("maskfed-server", "sites", "add", line)
    removed, _ = coordinator.call("maskfed-server", "sites", "remove", "revoked")
    return added == removed == 0 and _supernode_is_refused(coordinator, home)


def replayed_enrolment(coordinator: Coordinator) -> bool:
    """The line of a site that is in, or that was removed, is worth nothing."""
    _, line = coordinator.call("maskfed-client", "enroll", "replay", home=coordinator.root / "replay")
    first, _ = coordinator.call("maskfed-server", "sites", "add", line)
    again, said = coordinator.call("maskfed-server", "sites", "add", line, "--bundle", "again.json")
    coordinator.call("maskfed-server", "sites", "remove", "replay")
    after, _ = coordinator.call("maskfed-server", "sites", "add", line, "--bundle", "after.json")
    return (first, again, after) == (0, 2, 2) and _is_one_line(said)


def stolen_enrolment(coordinator: Coordinator) -> bool:
    """A line whose alias was changed is not signed."""
    _, line = coordinator.call("maskfed-client", "enroll", "honest", home=coordinator.root / "honest")
    fields = json.loads(base64.urlsafe_b64decode(line.removeprefix(PREFIX)))
    forged = PREFIX + base64.urlsafe_b64encode(json.dumps(fields | {"alias": "thief"}).encode()).decode()
    code, said = coordinator.call("maskfed-server", "sites", "add", forged)
    return code == 2 and _is_one_line(said)


def foreign_bundle(coordinator: Coordinator) -> bool:
    """A site does not join with the bundle of another key."""
    home, other = coordinator.root / "first", coordinator.root / "second"
    coordinator.call("maskfed-client", "enroll", "first", home=home)
    _, line = coordinator.call("maskfed-client", "enroll", "second", home=other)
    coordinator.call("maskfed-server", "sites", "add", line, "--bundle", "second.json")
    return _join_is_refused(coordinator, home, coordinator.root / "second.json")


def path_in_a_bundle(coordinator: Coordinator) -> bool:
    """An alias that climbs out of its folder is no alias."""
    home = coordinator.root / "climber"
    coordinator.call("maskfed-client", "enroll", "climber", home=home)
    key = (home / "node.key.pub").read_text()
    for alias in ("../../climber", "a/b", "..", "/etc/passwd", "a\x00b"):
        bundle = {
            "schema": 1,
            "alias": alias,
            "address": f"localhost:{coordinator.port}",
            "ca_certificate": _ca(coordinator).read_text(),
            "code_digest": "0" * 64,
            "public_key_digest": public_key_digest(key),
        }
        (coordinator.root / "climb.json").write_text(json.dumps(bundle))
        if not _join_is_refused(coordinator, home, coordinator.root / "climb.json"):
            return False
    return not (home / "ca.crt").exists()


def oversized_body(coordinator: Coordinator) -> bool:
    """Nine megabytes to a path that takes at most eight."""
    head = (
        "POST /v1/fleet/push-object HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 9437184\r\n\r\n"
    )
    return coordinator.send(head.encode()) == 413


def forged_control(coordinator: Coordinator) -> bool:
    """The Control and Runtime API under every spelling that has worked somewhere."""
    paths = (
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/v1/fleet/../control/start-run",
        "//v1/control/start-run",
    )
    head = "POST {} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    return all(coordinator.send(head.format(path).encode()) == 404 for path in paths)


ATTACKS: dict[str, Callable[[Coordinator], bool]] = {
    "wrong CA": wrong_ca,
    "unregistered key": unregistered_key,
    "revoked key": revoked_key,
    "replayed enrolment": replayed_enrolment,
    "stolen enrolment": stolen_enrolment,
    "foreign bundle": foreign_bundle,
    "path in a bundle": path_in_a_bundle,
    "oversized body": oversized_body,
    "forged control calls": forged_control,
}


def _try(name: str, attack: Callable[[Coordinator], bool], coordinator: Coordinator) -> bool:
    is_refused = attack(coordinator)
    print(f"{name}: {'refused' if is_refused else 'NOT REFUSED'}", flush=True)
    return is_refused


def _supernode_is_refused(coordinator: Coordinator, home: Path) -> bool:
    """Whether a real SuperNode with this home's key ends by itself and the edge logged the refusal."""
    before = len(coordinator.refusals())
    runtime, health = free_ports(2)
    argv = [program("flower-supernode"), "--superlink", f"localhost:{coordinator.port}"]
    argv += ["--root-certificates", str(_ca(coordinator)), "--auth-supernode-private-key", str(home / "node.key")]
    argv += ["--port", str(runtime), "--health-server-address", f"127.0.0.1:{health}", "--isolation", "process"]
    argv += [
        "--superexec-auth-secret-file",
        str(home / "site.secret"),
        "--ssl-ca-certfile",
        str(home / "tls" / "ca.crt"),
    ]
    argv += ["--ssl-certfile", str(home / "tls" / "srv.pem"), "--ssl-keyfile", str(home / "tls" / "srv.key")]
    process = spawn(argv, environment(home / "flwr"), home / "supernode.log")
    deadline = time.monotonic() + 40
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.3)
    ended = process.poll() is not None
    end_together([process], 5)
    return ended and any(line["status"] in (401, 412) for line in coordinator.refusals()[before:])


def _join_is_refused(coordinator: Coordinator, home: Path, bundle: Path) -> bool:
    images = coordinator.root / "images"
    images.mkdir(exist_ok=True)
    arguments = (str(bundle), "--data", str(images), "--image-size", "16")
    code, said = coordinator.call("maskfed-client", "join", *arguments, home=home)
    return code == 2 and _is_one_line(said) and not (home / "site.toml").exists()


def _is_one_line(said: str) -> bool:
    return said.startswith("error: ") and "\n" not in said


def _ca(coordinator: Coordinator) -> Path:
    return coordinator.home / "pki" / "ca.crt"


if __name__ == "__main__":
    sys.exit(main())
