"""The coordinator's folder: what `init` writes into it, and its one settings file `coordinator.toml`."""

import ipaddress
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import tomli_w

from deploy.checks.clock import check_own_clock, warn_of_free_clock
from deploy.checks.database import check_database
from deploy.errors import ProvisionError
from deploy.identity.addresses import split_address
from deploy.identity.certificates import create_authority, issue_server_certificate, renew_server_certificate
from deploy.identity.keys import (
    certificate_hosts,
    check_certificate,
    check_private,
    check_private_folder,
    create_file,
    create_secret,
    load_certificate,
)
from deploy.identity.request_key import REQUEST_KEY, issue_request_key, read_request_certificate
from deploy.identity.site_certificates import check_door_authority, create_door_authority
from deploy.processes.nginx import CONNECTIONS_PER_ADDRESS, check_nginx, edge_service, has_ipv6
from deploy.processes.process import check_port_free
from deploy.processes.services import ServerPlan, server_services
from deploy.processes.supervision import Service

SETTINGS = "coordinator.toml"
UNFINISHED = "init.unfinished"
"""There while `init` runs; after a kill it tells the next one that it may begin again."""
_MADE = {SETTINGS, UNFINISHED, "ca", "pki", "superexec.secret"}
DEFAULT_PORT = 8443
CONNECTIONS = range(8, 2**16)
"""What one site needs, and what nginx takes."""


@dataclass(frozen=True)
class Coordinator:
    """Settings of a coordinator. Sites connect to `address`; the SuperLink itself listens on loopback only.

    With `edge`, nginx listens on the port of `address` on all interfaces and is the only door. `database` keeps
    Flower's state on disk, so that a run goes on by itself after a short loss of the server.
    `connections_per_address` bounds what one address may open at the door, before anything else is looked at.
    """

    schema: int
    address: str
    host: str
    port: int
    health_port: int
    edge: bool
    database: bool
    connections_per_address: int = CONNECTIONS_PER_ADDRESS


def create_coordinator(home: Path, settings: Coordinator, hosts: list[str]) -> str:
    """Write a coordinator's folder: settings, CA (its key in `ca/`), server certificate, request key, secret.

    Args:
        home: new or empty folder.
        settings: checked before anything is written.
        hosts: further names or addresses for the certificate, beside that of `settings.address`.

    Returns:
        Fingerprint of the CA certificate.

    Raises:
        ProvisionError: the folder is in use or the settings contradict each other; nothing has been written then.
    """
    check_settings(settings)
    if settings.edge:
        check_nginx()
    if home.is_dir() and not _is_unfinished(home) and any(home.iterdir()):
        raise ProvisionError(f"{home} is not empty: give a new folder, nothing is overwritten")
    is_new = not home.exists()
    try:
        home.mkdir(parents=True, exist_ok=True)
        home.chmod(0o700)
        _remove_unfinished(home)
    except OSError as error:
        raise ProvisionError(f"{home}: {error.strerror}; give a folder that this user can write") from error
    try:
        create_file(home / UNFINISHED, b"")
        digest = create_authority(home / "ca" / "ca.key", home / "pki" / "ca.crt")
        issue_server_certificate(
            ca_key=home / "ca" / "ca.key",
            ca_certificate=home / "pki" / "ca.crt",
            certificate=home / "pki" / "server.pem",
            key=home / "pki" / "server.key",
            hosts=[split_address(settings.address)[0], *hosts],
        )
        issue_request_key(
            ca_key=home / "ca" / "ca.key", ca_certificate=home / "pki" / "ca.crt", path=home / REQUEST_KEY
        )
        create_door_authority(home / "pki")
        create_secret(home / "superexec.secret")
        create_file(home / SETTINGS, tomli_w.dumps(asdict(settings)).encode())
    except BaseException:
        _remove_unfinished(home)
        if is_new and not any(home.iterdir()):
            home.rmdir()
        raise
    (home / UNFINISHED).unlink()
    return digest


def _is_unfinished(home: Path) -> bool:
    """Whether an `init` was killed in this folder: it holds nothing else then."""
    return (home / UNFINISHED).exists() and {path.name for path in home.iterdir()} <= _MADE


def _remove_unfinished(home: Path) -> None:
    if not _is_unfinished(home):
        return
    for folder in ("ca", "pki"):
        shutil.rmtree(home / folder, ignore_errors=True)
    for name in ("superexec.secret", SETTINGS, UNFINISHED):  # the mark last
        (home / name).unlink(missing_ok=True)


def read_coordinator(home: Path) -> Coordinator:
    """Read and check the settings and the modes of the private files.

    Raises:
        ProvisionError: not a coordinator's folder, bad settings, wrong modes, or a certificate that does not fit.
    """
    settings = read_settings(home)
    check_private_folder(home)
    needed = (home / "pki" / "server.key", home / "superexec.secret")
    for private in (*needed, *filter(Path.exists, (home / "ca" / "ca.key", home / "superlink.db"))):
        check_private(private)
    check_certificate(home / "pki" / "server.pem", ["127.0.0.1", split_address(settings.address)[0]])
    read_request_certificate(home / REQUEST_KEY)
    check_door_authority(home / "pki")
    return settings


def read_settings(home: Path) -> Coordinator:
    """Read and check `coordinator.toml` alone."""
    path = home / SETTINGS
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ProvisionError(f"{path}: {error.strerror}; run `maskfed-server init` or give --home") from error
    except (ValueError, RecursionError) as error:
        raise ProvisionError(f"{path}: not valid TOML ({error}): correct it") from error
    types = {name: each.type for name, each in Coordinator.__dataclass_fields__.items()}
    # Folders of earlier versions lack it.
    tree = {"connections_per_address": CONNECTIONS_PER_ADDRESS, **tree}
    for name in sorted(set(tree) ^ set(types)):
        raise ProvisionError(f"{path}: key {name!r} is {'unknown' if name in tree else 'missing'}: correct it")
    for name, kind in types.items():
        if type(tree[name]) is not kind:
            raise ProvisionError(f"{path}: {name} = {tree[name]!r} is not of type {getattr(kind, '__name__', kind)}")
    settings = Coordinator(**tree)
    check_settings(settings)
    return settings


def renew_certificate(home: Path, ca_key: Path, hosts: list[str], days: int) -> list[str]:
    """Replace the server certificate by one for the old names and `hosts`, and the request key; returns all its names.

    A folder of a version before signed messages gets its first request key.
    """
    settings = read_settings(home)
    certificate = home / "pki" / "server.pem"
    names = [*certificate_hosts(load_certificate(certificate)), split_address(settings.address)[0], *hosts]
    renew_server_certificate(
        ca_key=ca_key,
        ca_certificate=home / "pki" / "ca.crt",
        certificate=certificate,
        key=home / "pki" / "server.key",
        hosts=names,
        days=days,
    )
    issue_request_key(ca_key=ca_key, ca_certificate=home / "pki" / "ca.crt", path=home / REQUEST_KEY, days=days)
    return list(dict.fromkeys(names))


def start_plan(home: Path, settings: Coordinator, on_superlink_ready: Callable[[], object]) -> list[Service]:
    """The coordinator's services, clock and ports checked: SuperLink, superexec and, with an edge, nginx.

    Raises:
        ProvisionError: the clock stands before the coordinator's own files, a port is in use, nginx is missing.
    """
    check_own_clock(home / name for name in (SETTINGS, "pki/server.pem", "sites.json", "wanted.json"))
    check_port_free("127.0.0.1", settings.port, "SuperLink", home)
    check_port_free("127.0.0.1", settings.health_port, "health check", home)
    database = home / "superlink.db" if settings.database else None
    if database:
        check_database(database)
    services = server_services(ServerPlan(home, settings.port, database), on_superlink_ready)
    if settings.edge:
        port = split_address(settings.address)[1]
        for every in ("0.0.0.0", "::") if has_ipv6() else ("0.0.0.0",):
            check_port_free(every, port, "edge", home)
        services.append(edge_service(home, port, settings.port, connections=settings.connections_per_address))
    warn_of_free_clock()
    return services


def check_settings(settings: Coordinator) -> None:
    """Refuse settings that would expose Flower's open paths or that nobody could connect to."""
    if settings.schema != 1:
        raise ProvisionError(
            f"{SETTINGS}: schema {settings.schema}, this version knows 1: use the maskfed that wrote it"
        )
    host, port = split_address(settings.address)
    if settings.host != "127.0.0.1":
        raise ProvisionError(
            f"host {settings.host!r}: Flower's control and runtime paths are open, so the SuperLink listens on "
            "127.0.0.1 only: leave it so and use the edge"
        )
    for name, value in (("port", settings.port), ("health_port", settings.health_port)):
        if not 0 < value < 65536:
            raise ProvisionError(f"{name} {value}: give 1 to 65535")
    if settings.connections_per_address not in CONNECTIONS:
        least, most = CONNECTIONS[0], CONNECTIONS[-1]
        raise ProvisionError(f"connections_per_address {settings.connections_per_address}: give {least} to {most}")
    if not settings.edge and ":" in host:
        raise ProvisionError(
            f"address {settings.address!r} has no edge in front, and the SuperLink listens on 127.0.0.1: give that "
            "one, or init with --edge"
        )
    if not settings.edge and not is_loopback(host):
        raise ProvisionError(
            f"address {settings.address!r} is public, but there is no edge in front: init with --edge (needs nginx)"
        )
    if not settings.edge and port != settings.port:
        raise ProvisionError(
            f"address {settings.address!r} and port {settings.port} differ, and there is no edge: give the same port"
        )
    if len({settings.port, settings.health_port, port if settings.edge else -1}) < 3:
        raise ProvisionError(f"port {settings.port} is given twice: edge, SuperLink and health check need one each")


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine itself."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
