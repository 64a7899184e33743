"""The door, from outside: only what a keyed node needs, and nothing that gives a task away."""

import contextlib
import importlib
import json
import os
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from deploy.checks.answering import is_alive_behind
from deploy.coordinator import Coordinator, create_coordinator, start_plan
from deploy.errors import ProvisionError
from deploy.guards.web.asgi import FLEET_BYTES, PUSH_OBJECT
from deploy.identity.certificates import create_authority
from deploy.identity.enrolment import read_request
from deploy.identity.site_certificates import issue_site_certificate
from deploy.identity.site_identity import accept_certificate, create_identity
from deploy.identity.tls import client_context
from deploy.processes import nginx
from deploy.processes.door import SOCKET
from deploy.processes.nginx import find_nginx, find_stream_module, has_ipv6, write_configuration
from deploy.processes.process import free_ports
from deploy.processes.supervision import Supervisor
from server.federation.fleet.registry import Registry
from server.federation.fleet.superlink import connect
from tests.needs import need_binary

MOST = 12
"""Connections of one address."""
UPLOADS = 2
"""Of these, what may upload at a time."""
TRICKS = [
    "/v1/fleet/../control/list-nodes",
    "/v1/fleet/%2e%2e/control/list-nodes",
    "/v1%2fcontrol%2flist-nodes",
    "//v1/control/list-nodes",
    "/V1/CONTROL/LIST-NODES",
    "/v1/control//list-nodes",
    "/v1/fleet/pull-messages/../../control/list-nodes",
    "/v1/control/list-nodes/",
    "/v1/control/list-nodes;x",
    "/v1/fleet/register-node",
    "/v1/fleet/unregister-node",
    "/docs",
    "/openapi.json",
    "/redoc",
    "/",
    "/v1/fleet/",
    "/v1/fleet/pull-messages/x",
    "/.git/config",
    "/pki/server.key",
]


@dataclass
class Door:
    home: Path
    port: int
    superlink_port: int
    site: Path
    """Folder of a site that is let in, but whose key no SuperLink knows."""

    def request(
        self, path: str, method: str = "POST", content: bytes = b"", headers: dict[str, str] | None = None
    ) -> int:
        """Status of one request; the path goes out as it is, which httpx would tidy up."""
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", f"Content-Length: {len(content)}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        context = client_context(self.home / "pki" / "ca.crt", self.site / "node.key")
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=20) as raw,
            context.wrap_socket(raw, server_hostname="localhost") as stream,
        ):
            stream.sendall("\r\n".join([*lines, "", ""]).encode() + content)
            answer = stream.recv(65536)
        return int(answer.split(b" ", 2)[1])

    def lets_in(self, identity: Path | None, address: str = "127.0.0.1") -> bool:
        """Whether a client is answered by what is behind the handshake."""
        context = client_context(self.home / "pki" / "ca.crt", identity)
        try:
            with (
                socket.create_connection((address, self.port), timeout=20) as raw,
                context.wrap_socket(raw, server_hostname="localhost") as stream,
            ):
                stream.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                return stream.recv(12) == b"HTTP/1.1 404"
        except (ConnectionError, ssl.SSLError):
            return False

    def refused(self) -> list[dict[str, object]]:
        """Lines of who was not let in."""
        return settled_lines(self.home / "logs" / "door.log")

    def log(self) -> list[dict[str, object]]:
        return settled_lines(self.home / "logs" / "edge.log")


def settled_lines(log: Path) -> list[dict[str, object]]:
    """A log once it has stopped growing: nginx writes a line when it has closed the connection, not before."""
    text = None
    while text != (text := log.read_text() if log.exists() else ""):
        time.sleep(0.3)
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    need_binary("nginx")
    need_binary("/usr/lib/nginx/modules/ngx_stream_module.so")
    home = tmp_path_factory.mktemp("door") / "coordinator"
    port, superlink_port, health_port = free_ports(3)
    settings = Coordinator(1, f"localhost:{port}", "127.0.0.1", superlink_port, health_port, True, False, MOST)
    create_coordinator(home, settings, [])
    site = home.parent / "site"
    certify(home, site, "let-in")
    supervisor = Supervisor(start_plan(home, settings, lambda: None))
    with supervisor:
        yield Door(home, port, superlink_port, site)


def certify(home: Path, site: Path, alias: str) -> Registry:
    """A site that holds a certificate and stands in the registry."""
    request = read_request(create_identity(site, alias))
    registry = Registry(home / "sites.json")
    registry.add(request.alias, request.public_key, request.signing_key)
    accept_certificate(site, issue_site_certificate(home / "pki", alias, request.public_key))
    return registry


def test_nobody_else_may_look_into_the_memory_of_the_doors_processes(door: Door):
    """The key of the door's certificate is in it. Root's nginx would run as `nobody`, as may others on the machine."""
    found = [process for process in psutil.Process().children(recursive=True) if process.name() == "nginx"]
    assert len(found) >= 2
    assert {tuple(process.uids()) for process in found} == {(os.geteuid(),) * 3}


def test_health_is_the_only_page_of_the_superlink_that_is_served(door: Door):
    assert door.request("/health", "GET") == 200
    assert door.request("/health", "POST") == 403


def test_a_stranger_ends_in_the_handshake_with_one_line(door: Door):
    before = len(door.refused())
    assert not door.lets_in(None)
    assert [line["certificate"] for line in door.refused()[before:]] == ["NONE"]
    assert door.lets_in(door.site / "node.key")


def test_the_supervisor_asks_behind_the_door_and_leaves_no_line(door: Door):
    before = len(door.log()), len(door.refused())
    assert is_alive_behind(door.home / "run" / "door", SOCKET)
    assert (len(door.log()), len(door.refused())) == before
    assert not is_alive_behind(door.home / "run", SOCKET)
    assert not is_alive_behind(door.home / "nowhere", SOCKET)


def test_the_door_listens_on_every_family_of_this_host_and_tells_who_came(door: Door):
    configuration = (door.home / "run" / "nginx.conf").read_text()
    assert (f"listen [::]:{door.port} ssl" in configuration) == has_ipv6()
    # Containers may have the family but no address of it, not even the loopback's.
    for address in ["127.0.0.1", *(["::1"] if can_bind("::1") else [])]:
        assert door.lets_in(door.site / "node.key", address)
        assert door.log()[-1]["from"] == address


def can_bind(address: str) -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def test_connections_of_one_address_are_limited_before_the_handshake(door: Door):
    """Whoever opens more than the limit is closed at once; the others wait for a handshake that never comes."""
    before = len(door.refused())
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(socket.create_connection(("127.0.0.1", door.port))) for _ in range(MOST + 3)]
        for each in opened[MOST:]:
            each.settimeout(20)
            assert each.recv(1) == b""
        for each in opened[:MOST]:
            each.settimeout(0.05)
            with pytest.raises(TimeoutError):
                each.recv(1)
        # Another address, meanwhile, is served.
        context = client_context(door.home / "pki" / "ca.crt", door.site / "node.key")
        raw = stack.enter_context(socket.create_connection(("127.0.0.1", door.port), source_address=("127.0.0.7", 0)))
        stream = stack.enter_context(context.wrap_socket(raw, server_hostname="localhost"))
        stream.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert stream.recv(12) == b"HTTP/1.1 404"
    assert [line["status"] for line in door.refused()[before : before + 3]] == [503] * 3


def test_a_door_that_does_not_reload_is_told(door: Door, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(nginx, "RELOAD_SECONDS", 0.1)
    monkeypatch.setattr(nginx.psutil.Process, "send_signal", lambda *_: None)
    with pytest.raises(ProvisionError, match="goes on with its old revocations: restart"):
        nginx.reload_door(door.home)


def test_a_removed_site_is_not_let_in_any_more_and_the_others_are(door: Door, tmp_path: Path):
    from server.cli.membership.sites import sites_remove

    certify(door.home, tmp_path / "site", "short")
    assert door.lets_in(tmp_path / "site" / "node.key")
    sites_remove("short", door.home)
    deadline = time.monotonic() + 20
    while door.lets_in(tmp_path / "site" / "node.key") and time.monotonic() < deadline:
        time.sleep(0.1)
    said = (door.home / "logs" / "edge-start.log").read_text()[-2000:]
    assert not door.lets_in(tmp_path / "site" / "node.key"), said
    assert door.refused()[-1]["certificate"] == "FAILED:certificate revoked"
    assert door.lets_in(door.site / "node.key")


@pytest.mark.parametrize("router", ["flwr.superlink.routers.control.router", "flwr.supercore.routers.runtime.router"])
def test_no_control_or_runtime_path_of_flower_exists_outside(door: Door, router: str):
    paths = [route.path for route in importlib.import_module(router).router.routes]
    assert len(paths) > 15
    assert {path: door.request(path, content=b"{}") for path in paths} == dict.fromkeys(paths, 404)


@pytest.mark.parametrize("path", TRICKS)
def test_no_spelling_of_a_path_gets_through(door: Door, path: str):
    assert door.request(path) in {404, 400}
    assert door.request(path, "GET") in {404, 400}


def test_an_anonymous_client_gets_no_task_at_the_door_and_none_on_loopback(door: Door):
    """Flower's default would hand the ServerApp's task and token to whoever holds the CA certificate."""
    headers = {"content-type": "application/protobuf"}
    assert door.request("/v1/runtime/acquire-task", headers=headers) == 404
    verify = client_context(door.home / "pki" / "ca.crt")
    url = f"https://127.0.0.1:{door.superlink_port}/v1/runtime/acquire-task"
    reply = httpx.post(url, verify=verify, headers=headers, trust_env=False)
    assert reply.status_code in {401, 415, 422, 400}
    assert not reply.content or b"token" not in reply.content.lower()


def test_fleet_paths_are_open_but_refuse_who_has_no_registered_key(door: Door):
    for path in ("activate-node", "pull-messages", "push-object", "get-run"):
        assert door.request(f"/v1/fleet/{path}", headers={"content-type": "application/protobuf"}) in {400, 401, 422}


def test_the_door_takes_no_longer_body_than_the_superlink_does(door: Door):
    """It keeps a body in memory until all of it is there, for every connection of an address."""
    for path, limit in FLEET_BYTES.items():
        assert door.request(path, content=bytes(limit + 1)) == 413
    assert door.request(PUSH_OBJECT, content=bytes(FLEET_BYTES[PUSH_OBJECT])) == 401


def test_who_never_ends_what_it_sends_holds_few_bodies_and_nobody_up(door: Door):
    begun = f"POST {PUSH_OBJECT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000000\r\n\r\n".encode() + bytes(2**16)
    context = client_context(door.home / "pki" / "ca.crt", door.site / "node.key")
    with contextlib.ExitStack() as stack:
        for _ in range(UPLOADS):
            raw = stack.enter_context(socket.create_connection(("127.0.0.1", door.port)))
            stack.enter_context(context.wrap_socket(raw, server_hostname="localhost")).sendall(begun)
        deadline = time.monotonic() + 20
        while (status := door.request(PUSH_OBJECT, content=b"x")) != 503 and time.monotonic() < deadline:
            time.sleep(0.05)  # nginx has not read all of them yet
        assert status == 503
        assert door.request("/v1/fleet/pull-messages", content=b"x") == 401


def test_the_superlink_itself_is_on_loopback_only(door: Door):
    listening = [each for each in psutil.net_connections("tcp") if each.status == "LISTEN"]
    assert {each.laddr.ip for each in listening if each.laddr.port == door.superlink_port} == {"127.0.0.1"}


def test_another_ca_is_not_this_federation(door: Door, tmp_path: Path):
    create_authority(tmp_path / "ca.key", tmp_path / "ca.crt")
    with pytest.raises(ssl.SSLCertVerificationError), socket.create_connection(("127.0.0.1", door.port)) as raw:
        client_context(tmp_path / "ca.crt").wrap_socket(raw, server_hostname="localhost")


def test_every_refusal_leaves_one_line(door: Door):
    before = len(door.log())
    assert door.request("/v1/control/start-run-of-nobody") == 404
    lines = door.log()[before:]
    assert [(line["path"], line["status"]) for line in lines] == [("/v1/control/start-run-of-nobody", 404)]


def test_a_removed_site_is_unknown_to_the_superlink_at_once(door: Door, tmp_path: Path):
    from server.cli.membership.sites import sites_remove

    request = read_request(create_identity(tmp_path / "site", "gone"))
    registry = Registry(door.home / "sites.json")
    site = registry.add(request.alias, request.public_key, request.signing_key)
    with connect(door.home) as control:
        control.register(site)
        assert [node.status for node in control.nodes() if node.alias == "gone"] == ["registered"]
    sites_remove("gone", door.home)
    with connect(door.home) as control:
        assert [node.status for node in control.nodes() if node.alias == "gone"] in ([], ["unregistered"])
    assert "gone" not in {each.alias for each in registry.active()}


def test_an_nginx_without_the_stream_module_is_told_with_its_cure(tmp_path: Path):
    program = tmp_path / "nginx"
    program.write_text("#!/bin/sh\necho 'configure arguments: --with-stream_ssl_module --with-stream=dynamic' >&2\n")
    program.chmod(0o755)
    with pytest.raises(ProvisionError, match=r"no stream module.*apt-get install .*libnginx-mod-stream"):
        find_stream_module(str(program))


def test_an_nginx_with_the_module_built_in_loads_none(tmp_path: Path):
    program = tmp_path / "nginx"
    program.write_text("#!/bin/sh\necho 'configure arguments: --with-stream --with-stream_ssl_module' >&2\n")
    program.chmod(0o755)
    assert find_stream_module(str(program)) is None


def test_init_with_a_door_says_at_once_that_nginx_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("deploy.processes.nginx.shutil.which", lambda *_args, **_named: None)
    settings = Coordinator(1, "fleet.example:443", "127.0.0.1", 8443, 8190, edge=True, database=False)
    with pytest.raises(ProvisionError, match="apt-get install nginx"):
        create_coordinator(tmp_path / "home", settings, [])
    assert not (tmp_path / "home").exists()


def test_configuration_refuses_a_folder_that_nginx_would_misread(tmp_path: Path):
    with pytest.raises(ProvisionError, match="letters, digits"):
        write_configuration(tmp_path / "a b;", 443, 8443)


def test_no_placeholder_is_left_in_the_configuration(tmp_path: Path):
    text = write_configuration(tmp_path, 443, 8443).read_text()
    assert "@" not in "".join(line for line in text.splitlines() if not line.startswith("#"))


def test_missing_nginx_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("deploy.processes.nginx.shutil.which", lambda *_args, **_named: None)
    with pytest.raises(ProvisionError, match="apt-get install nginx"):
        find_nginx()
