import contextlib
import datetime as dt
import socket
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from deploy.checks.connection import Finding, check_door, diagnose, door_checks, lease_still_lives
from deploy.checks.dial import Way
from deploy.coordinator import Coordinator, create_coordinator, read_settings, renew_certificate
from deploy.doctor import coordinator_checks, site_checks
from deploy.errors import ProvisionError
from deploy.guards import superexec
from deploy.identity.certificates import create_authority
from deploy.identity.enrolment import read_request
from deploy.identity.site_certificates import issue_site_certificate
from deploy.identity.site_identity import accept_certificate, create_identity
from deploy.processes.process import free_ports


@pytest.fixture
def home(tmp_path: Path) -> Path:
    port, health = free_ports(2)
    settings = Coordinator(1, f"127.0.0.1:{port}", "127.0.0.1", port, health, edge=False, database=False)
    create_coordinator(tmp_path / "home", settings, [])
    return tmp_path / "home"


class Clock(BaseHTTPRequestHandler):
    ahead = dt.timedelta()

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def date_time_string(self, timestamp: float | None = None) -> str:
        return super().date_time_string(int((dt.datetime.now(dt.UTC) + self.ahead).timestamp()))

    def log_message(self, format: str, *args: object) -> None: ...


@contextlib.contextmanager
def listening(home: Path, host: str = "127.0.0.1") -> Iterator[int]:
    """A door with a clock that tests can set."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(home / "pki" / "server.pem", home / "pki" / "server.key")
    with HTTPServer((host, 0), Clock) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # refused handshakes are meant
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()
            Clock.ahead = dt.timedelta()


@pytest.fixture
def door(home: Path) -> Iterator[int]:
    with listening(home) as port:
        yield port


@pytest.fixture
def node_key(home: Path, tmp_path: Path) -> Path:
    """Node key of a site, its certificate beside it."""
    request = read_request(create_identity(tmp_path / "certified", "site-0"))
    accept_certificate(tmp_path / "certified", issue_site_certificate(home / "pki", "site-0", request.public_key))
    return tmp_path / "certified" / "node.key"


def named(findings: object) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}  # type: ignore[attr-defined]


def test_a_fresh_coordinator_is_well_and_the_ca_key_beside_it_is_a_warning(home: Path):
    found = named(coordinator_checks(home))
    assert all(finding.is_ok for finding in found.values())
    assert "warning" in found["CA key"].text
    (home / "ca" / "ca.key").unlink()
    assert "warning" not in named(coordinator_checks(home))["CA key"].text


def test_a_broken_coordinator_is_one_finding(home: Path):
    (home / "pki" / "server.key").chmod(0o644)
    (finding,) = coordinator_checks(home)
    assert not finding.is_ok
    assert "chmod 600" in finding.text


def test_a_good_door_is_told_with_its_clock(home: Path, door: int, node_key: Path):
    found = named(door_checks(Way(f"127.0.0.1:{door}"), home / "pki" / "ca.crt", node_key))
    assert found["TLS"].is_ok
    assert found["clock"].is_ok


def test_without_a_certificate_the_check_ends_with_the_handshake(home: Path, door: int):
    assert [each.name for each in door_checks(Way(f"127.0.0.1:{door}"), home / "pki" / "ca.crt")] == ["TLS"]


def test_a_door_that_closes_after_the_handshake_points_at_the_certificate(home: Path, node_key: Path):
    """What nginx does with a certificate that is revoked, has ended, or is of another door."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(home / "pki" / "server.pem", home / "pki" / "server.key")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def close_each() -> None:
            for _ in range(3):  # one connection for each check
                with contextlib.suppress(OSError), context.wrap_socket(listener.accept()[0], server_side=True):
                    pass

        thread = threading.Thread(target=close_each)
        thread.start()
        found = named(door_checks(Way(f"127.0.0.1:{listener.getsockname()[1]}"), home / "pki" / "ca.crt", node_key))
        thread.join()
    assert found["TLS"].is_ok
    assert not found["door"].is_ok
    assert "sites certify" in found["door"].text


def test_a_certificate_that_is_not_there_is_a_finding(home: Path, door: int, node_key: Path):
    node_key.with_suffix(".crt").unlink()
    found = named(door_checks(Way(f"127.0.0.1:{door}"), home / "pki" / "ca.crt", node_key))
    assert not found["door"].is_ok
    assert "node.crt" in found["door"].text


def test_clocks_that_differ_too_much_are_named(home: Path, door: int, node_key: Path):
    Clock.ahead = dt.timedelta(seconds=400)
    found = named(door_checks(Way(f"127.0.0.1:{door}"), home / "pki" / "ca.crt", node_key))
    assert not found["clock"].is_ok
    assert "s behind the coordinator's" in found["clock"].text
    Clock.ahead = dt.timedelta(seconds=-30)
    assert "s ahead of" in named(door_checks(Way(f"127.0.0.1:{door}"), home / "pki" / "ca.crt", node_key))["clock"].text


def test_calls_that_were_refused_for_their_time_are_a_finding(home: Path):
    (home / "logs").mkdir()
    line = '{"time":"2026-11-23T12:00:00+00:00","from":"10.0.0.9","status":401,"signed":"2026-11-23T12:01:00+00:00"}\n'
    (home / "logs" / "edge.log").write_text(line)
    found = named(coordinator_checks(home))
    assert not found["clock"].is_ok
    assert "10.0.0.9 is 60 s ahead" in found["clock"].text


def test_a_door_of_another_federation_is_not_trusted(door: int, tmp_path: Path):
    create_authority(tmp_path / "other.key", tmp_path / "other.crt")
    found = named(door_checks(Way(f"127.0.0.1:{door}"), tmp_path / "other.crt"))
    assert not found["TLS"].is_ok


@pytest.mark.parametrize(
    ("address", "name", "text"),
    [
        ("fleet.example", "address", "host:port"),
        ("no-such-host.invalid:443", "address", "does not resolve"),
        ("127.0.0.1:{free}", "door", "cannot be reached"),
    ],
)
def test_an_address_that_leads_nowhere_says_why(home: Path, address: str, name: str, text: str):
    found = named(door_checks(Way(address.format(free=free_ports(1)[0])), home / "pki" / "ca.crt"))
    assert not found[name].is_ok
    assert text in found[name].text


def test_a_site_before_join_and_with_an_open_key(home: Path, tmp_path: Path):
    create_identity(tmp_path / "site", "site-0")
    found = named(site_checks(tmp_path / "site", Way("127.0.0.1:1")))
    assert found["node.key"].is_ok
    assert not found["CA certificate"].is_ok
    (tmp_path / "site" / "node.key").chmod(0o640)
    assert "chmod 600" in named(site_checks(tmp_path / "site", Way("127.0.0.1:1")))["node.key"].text


def test_one_user_for_key_and_images_is_a_warning(tmp_path: Path):
    create_identity(tmp_path / "site", "site-0")
    found = named(site_checks(tmp_path / "site", Way("127.0.0.1:1")))
    assert found["users"].is_ok
    assert "warning: one user" in found["users"].text


def test_a_sites_supernode_is_probed_where_its_start_said(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    site = tmp_path / "site"
    create_identity(site, "site-0")
    (site / "ca.crt").write_bytes((home / "pki" / "ca.crt").read_bytes())
    address = f"127.0.0.1:{free_ports(1)[0]}"
    assert "never started" in named(site_checks(site, Way(address)))["SuperNode"].text
    (site / "health.address").write_text("127.0.0.1:17\n")
    monkeypatch.setattr("deploy.doctor.probe", {"127.0.0.1:17": "UNAVAILABLE"}.__getitem__)
    assert "not running (UNAVAILABLE)" in named(site_checks(site, Way(address)))["SuperNode"].text
    monkeypatch.setattr("deploy.doctor.probe", {"127.0.0.1:17": "SERVING"}.__getitem__)
    assert "says SERVING" in named(site_checks(site, Way(address)))["SuperNode"].text


def test_a_start_is_refused_by_what_waiting_does_not_cure(home: Path, node_key: Path, tmp_path: Path):
    ca = home / "pki" / "ca.crt"
    with listening(home, "127.0.0.2") as port, pytest.raises(ProvisionError, match=r"mismatch.*renew --host 127.0.0.2"):
        check_door(Way(f"127.0.0.2:{port}"), ca)
    create_authority(tmp_path / "other.key", tmp_path / "other.crt")
    with listening(home) as port:
        check_door(Way(f"127.0.0.1:{port}"), ca)
        with pytest.raises(ProvisionError, match=r"another federation.*fingerprint"):
            check_door(Way(f"127.0.0.1:{port}"), tmp_path / "other.crt")
        Clock.ahead = dt.timedelta(seconds=-60)
        with pytest.raises(ProvisionError, match=r"s ahead of .*set-ntp"):
            check_door(Way(f"127.0.0.1:{port}"), ca, node_key)
    renew_certificate(home, home / "ca" / "ca.key", [], days=0)
    with listening(home) as port, pytest.raises(ProvisionError, match=r"expired.*maskfed-server renew"):
        check_door(Way(f"127.0.0.1:{port}"), ca)


def test_a_door_that_is_not_there_yet_is_a_warning(home: Path, caplog: pytest.LogCaptureFixture):
    check_door(Way(f"127.0.0.1:{free_ports(1)[0]}"), home / "pki" / "ca.crt")
    assert "cannot be reached" in caplog.text


def test_a_supernode_that_ends_although_the_door_is_well_points_at_its_key(home: Path, door: int):
    assert "key registered" in diagnose(Way(f"127.0.0.1:{door}"), home / "pki" / "ca.crt")
    assert "host:port" in diagnose(Way("fleet.example"), home / "pki" / "ca.crt")


def test_a_lease_that_still_lives_is_told_from_a_key_that_is_not_registered(tmp_path: Path):
    log = tmp_path / "supernode.log"
    assert lease_still_lives(log) == ""
    start = "INFO : Starting Flower SuperNode\n"
    refused = "httpx.HTTPStatusError: Client error '412 Precondition Failed' for url\n"
    log.write_text(start + refused)
    assert "last connection" in lease_still_lives(log)
    # What an earlier start met says nothing about this one.
    log.write_text(start + refused + start + "httpx.HTTPStatusError: Client error '401 Unauthorized' for\n")
    assert lease_still_lives(log) == ""


def test_a_superlink_that_hangs_is_told_from_one_that_does_not_run(home: Path):
    """A port that takes connections and says nothing: what a stopped or frozen process leaves."""
    assert named(coordinator_checks(home))["SuperLink"].is_ok
    assert "not running" in named(coordinator_checks(home))["SuperLink"].text
    settings = read_settings(home)
    with socket.create_server(("127.0.0.1", settings.health_port)), socket.create_server(("127.0.0.1", settings.port)):
        found = named(coordinator_checks(home))["SuperLink"]
    assert not found.is_ok
    assert "hangs" in found.text


def test_a_sites_own_program_is_checked(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    site = tmp_path / "site"
    create_identity(site, "site-0")
    assert named(site_checks(site, Way("fleet.example:443")))["own code"].is_ok
    monkeypatch.setattr(superexec, "program", lambda _: ["/bin/echo", "/evil/client/entry.py"])
    found = named(site_checks(site, Way("fleet.example:443")))["own code"]
    assert not found.is_ok
    assert "/evil/client/entry.py" in found.text
