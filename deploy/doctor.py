"""What can be wrong with a coordinator or a site, checked from where it runs; each finding says what to do about it."""

from collections.abc import Iterator
from pathlib import Path

import psutil

from deploy.checks.answering import is_healthy
from deploy.checks.clock import is_synchronised, refused_clocks
from deploy.checks.connection import Finding, door_checks
from deploy.checks.dial import Way
from deploy.checks.probe import probe
from deploy.coordinator import Coordinator, is_loopback, read_coordinator
from deploy.errors import ProvisionError
from deploy.guards.superexec import program, verify_program
from deploy.identity.addresses import split_address
from deploy.identity.keys import (
    EXPIRY_WARNING_DAYS,
    check_certificate,
    check_private,
    days_left,
)
from deploy.identity.request_key import REQUEST_KEY
from deploy.identity.site_certificates import CURE_MISSING, SITE_CERTIFICATE
from deploy.identity.site_identity import CA_CERTIFICATE, NODE_KEY, SECRET, SIGNING_KEY, SPLIT_MARK
from deploy.processes.nginx import check_nginx
from deploy.processes.services import HEALTH_FILE

LEAST_FREE_GIB = 5.0
HUNG = frozenset({"DEADLINE_EXCEEDED", "NOT_SERVING"})
"""Answers of a health check while something does not answer; a port that is closed is UNAVAILABLE."""


def coordinator_checks(home: Path) -> list[Finding]:
    """Everything about a coordinator's folder and its processes; the CA key beside the server is a warning."""
    try:
        settings = read_coordinator(home)
    except ProvisionError as error:
        return [Finding("settings", False, str(error))]
    found = [
        Finding("settings", True, f"{home}: sites connect to {settings.address}"),
        _expiry("server certificate", home / "pki" / "server.pem", "`maskfed-server renew`"),
        _expiry("request key", home / REQUEST_KEY, "`maskfed-server renew`"),
        _expiry("CA certificate", home / "pki" / "ca.crt", "a new federation"),
        _authority_key(home),
        _own_clock(home),
        _space(home),
    ]
    if settings.edge:
        found.append(_nginx())
    return [*found, *_processes(home, settings)]


def site_checks(home: Path, way: Way) -> list[Finding]:
    """Everything about a site's identity files, its processes and its way to the coordinator."""
    own = [SIGNING_KEY, SECRET] if _is_split(home) else [SIGNING_KEY, NODE_KEY, SECRET, "tls/srv.key"]
    found = [*(_privacy(home / name) for name in own), _users(home), _own_program()]
    if not (home / CA_CERTIFICATE).exists():
        return [*found, Finding("CA certificate", False, "none: run `maskfed-client join` with the bundle")]
    found += [
        _expiry("CA certificate", home / CA_CERTIFICATE, "a new join bundle"),
        _expiry("loopback certificate", home / "tls" / "srv.pem", "`maskfed-client enroll` in a new folder"),
        _supernode(home),
    ]
    if _is_split(home):  # who holds the key shows the certificate; here only the handshake can be tried
        return [*found, *door_checks(way, home / CA_CERTIFICATE)]
    found.append(_expiry("certificate", home / SITE_CERTIFICATE, CURE_MISSING))
    return [*found, *door_checks(way, home / CA_CERTIFICATE, home / NODE_KEY)]


def _is_split(home: Path) -> bool:
    """Whether another user holds the node key, as after `split-site`."""
    return (home / f"{NODE_KEY}.pub").exists() and (home / SPLIT_MARK).exists()


def _own_program() -> Finding:
    """What tasks of the coordinator would run here: this installation's code, or nothing."""
    try:
        verify_program("client.entry")
    except ProvisionError as error:
        return Finding("own code", False, str(error))
    return Finding("own code", True, f"tasks run {' '.join(program('client.entry'))} and nothing from a bundle or PATH")


def _users(home: Path) -> Finding:
    if _is_split(home):
        return Finding("users", True, "the node key is with another user than the images")
    text = "warning: one user holds the node key and sees the images; deploy/systemd has units that separate them"
    return Finding("users", True, text)


def _supernode(home: Path) -> Finding:
    if not (home / HEALTH_FILE).exists():
        return Finding("SuperNode", True, "never started: `maskfed-client start` runs it")
    status = probe((home / HEALTH_FILE).read_text(encoding="ascii").strip())
    if status in HUNG:
        return Finding(
            "SuperNode", False, f"hangs ({status}): `maskfed-client start` ends and restarts it within a minute"
        )
    if status != "SERVING":
        return Finding("SuperNode", True, f"not running ({status}): `maskfed-client start` runs it")
    return Finding("SuperNode", True, "gRPC health check says SERVING")


def _processes(home: Path, settings: Coordinator) -> Iterator[Finding]:
    status = probe(f"127.0.0.1:{settings.health_port}")
    is_answering = is_healthy(f"127.0.0.1:{settings.port}", home / "pki" / "ca.crt")
    if status in HUNG or (status == "SERVING" and not is_answering):
        text = f"hangs (health check {status}, no answer on port {settings.port})"
        yield Finding("SuperLink", False, f"{text}: `maskfed-server start` ends and restarts it within a minute")
        return
    if status != "SERVING":
        yield Finding("SuperLink", True, f"not running ({status}): `maskfed-server start` runs it")
        return
    yield Finding("SuperLink", True, "gRPC health check says SERVING")
    yield _exposure(settings)
    host = "127.0.0.1" if settings.edge else split_address(settings.address)[0]
    yield from door_checks(Way(f"{host}:{split_address(settings.address)[1]}"), home / "pki" / "ca.crt")


def _exposure(settings: Coordinator) -> Finding:
    """Flower's own port must be bound to loopback: its control and runtime paths trust whoever reaches them."""
    try:
        listening = [each.laddr for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    except psutil.AccessDenied:
        return Finding("exposure", True, "not checked: needs more rights to list sockets")
    open_to = sorted({each.ip for each in listening if each.port == settings.port and not is_loopback(each.ip)})
    if open_to:
        return Finding("exposure", False, f"port {settings.port} listens on {', '.join(open_to)}: stop it, use `start`")
    return Finding("exposure", True, f"port {settings.port} listens on loopback only")


def _own_clock(home: Path) -> Finding:
    refused = [
        f"{address} is {abs(ahead):.0f} s {'ahead' if ahead > 0 else 'behind'}"
        for address, ahead in refused_clocks(home / "logs" / "edge.log").items()
    ]
    if refused:
        text = f"calls were refused for the time they were signed at: {', '.join(refused)}; set the clock that is wrong"
        return Finding("clock", False, text)
    if is_synchronised() is False:
        return Finding("clock", True, "warning: the kernel says that nothing sets it: timedatectl set-ntp true")
    return Finding("clock", True, "no call was refused for the time it was signed at")


def _expiry(name: str, path: Path, cure: str) -> Finding:
    try:
        check_certificate(path, [])
        left = days_left(path)
    except ProvisionError as error:
        return Finding(name, False, str(error))
    warning = f"warning: only {left:.0f} days left: {cure}" if left < EXPIRY_WARNING_DAYS else f"{left:.0f} days left"
    return Finding(name, True, warning)


def _authority_key(home: Path) -> Finding:
    key = home / "ca" / "ca.key"
    if not key.exists():
        return Finding("CA key", True, "not on this machine")
    return Finding("CA key", True, f"warning: {key} lies beside the server: move it to an offline place")


def _space(home: Path) -> Finding:
    free = psutil.disk_usage(str(home)).free / 2**30
    is_enough = free >= LEAST_FREE_GIB
    return Finding("disk", is_enough, f"{free:.1f} GiB free" + ("" if is_enough else f", {LEAST_FREE_GIB} are needed"))


def _privacy(path: Path) -> Finding:
    try:
        check_private(path)
    except ProvisionError as error:
        return Finding(path.name, False, str(error))
    return Finding(path.name, True, "readable by its owner only")


def _nginx() -> Finding:
    try:
        return Finding("nginx", True, check_nginx())
    except ProvisionError as error:
        return Finding("nginx", False, str(error))
