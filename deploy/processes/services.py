"""The command lines of the secure topology: which programs run where, with which flags and environment.

Server: SuperLink on loopback with TLS, node authentication, process isolation and a secret; a superexec of our own.
Site: SuperNode with process isolation, its own loopback TLS and its own secret; a superexec of our own. All four start
through the guarded entries of `deploy.guards`: without them Flower lets anyone who reaches the port take tasks, submit
code and register keys, and runs what it finds on PATH.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy.checks.answering import is_healthy, is_listening
from deploy.checks.connection import diagnose, lease_still_lives
from deploy.checks.dial import Way
from deploy.errors import ProvisionError
from deploy.identity.addresses import PROXY_VARIABLE, split_address, split_proxy
from deploy.identity.keys import (
    check_certificate,
    check_private,
    warn_of_expiry,
)
from deploy.identity.site_certificates import CURE_MISSING, SITE_CERTIFICATE
from deploy.processes.memory_limits import DEFAULT_PARAMETERS, PARAMETERS_VARIABLE
from deploy.processes.supervision import Service

KEPT_VARIABLES = (
    "HOME",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "TZ",
    "CUDA_VISIBLE_DEVICES",
    "MASKFED_PARAMETERS",
    "MASKFED_REGISTRY",
    "XDG_STATE_HOME",
    "LD_LIBRARY_PATH",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
)
POLL_INTERVAL_SECONDS = "1.0"
"""Of a superexec without work; with work it looks more often (`deploy.guards.web.calls`)."""
ALLOWANCES = "run/allowances"
"""In the coordinator's folder: what the ServerApp lets each asked site push, read by the SuperLink's guard."""
BEAT_FILE = "alive"
"""In a superexec's FLWR_HOME: touched every second while it runs."""
MOST_BEAT_SECONDS = 10.0
SETTLE_SECONDS = 150.0
"""It tries its program first, which may take long on a busy machine."""
LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1"}
"""Weights come and go in pieces of 5 MB, each of them new memory. In pages of 4 KB the kernel takes more processor
time to give it than is spent on what it holds; so glibc asks for pages of 2 MB, which it does where all threads share
one place. It gives them back as early. Not where tasks are forked: what parent and task share is copied piece by piece,
and large pages have to be taken apart for that."""
HEALTH_FILE = "health.address"
"""In a site's folder: where its SuperNode answers gRPC health checks; written at each start, read by `doctor`."""


@dataclass(frozen=True)
class ServerPlan:
    """Where the coordinator's processes listen and keep their files. `home` is the coordinator folder."""

    home: Path
    port: int
    database: Path | None = None

    @property
    def certificate_authority(self) -> Path:
        """CA certificate, the only certificate that sites trust."""
        return self.home / "pki" / "ca.crt"

    @property
    def address(self) -> str:
        """The SuperLink's own address, always loopback."""
        return f"127.0.0.1:{self.port}"


@dataclass(frozen=True)
class SitePlan:
    """Where a site's processes listen and keep their files. `home` is the site folder.

    `proxy` is that of the way to the coordinator, http://host:port, or empty.
    """

    home: Path
    superlink: str
    port: int
    health_port: int
    parameters: float = DEFAULT_PARAMETERS
    """Of the largest model that the site's policy allows."""
    proxy: str = ""


def environment(flwr_home: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """A small environment: no telemetry, no update check, an own FLWR_HOME, this Python's programs first on PATH."""
    flwr_home.mkdir(parents=True, exist_ok=True, mode=0o700)
    programs = str(Path(sys.executable).parent)
    path = [programs, os.environ.get("PATH", os.defpath)]
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    return {
        **kept,
        "PATH": os.pathsep.join(path),
        "FLWR_HOME": str(flwr_home.resolve()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": POLL_INTERVAL_SECONDS,
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",
        **(extra or {}),
    }


def compiler_caches(folder: Path) -> dict[str, str]:
    """Where torch keeps compiled kernels: in the owner's folder.

    What lies there is loaded as code, and by default it lies in the temporary folder, where another user may have made
    it before.
    """
    return {name: str(folder.resolve() / name.lower()) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}


def guarded(entry: str, *arguments: str) -> list[str]:
    """Command line of a guarded entry; `-I` keeps working folder and environment out of `sys.path`."""
    return [sys.executable, "-I", "-m", f"deploy.guards.{entry}", *arguments]


def server_services(plan: ServerPlan, on_superlink_ready: Callable[[], object]) -> list[Service]:
    """SuperLink and its superexec; `on_superlink_ready` registers the sites' keys after each start of the SuperLink."""
    pki, secret = plan.home / "pki", plan.home / "superexec.secret"
    for private in (pki / "server.key", secret):
        check_private(private)
    check_certificate(pki / "server.pem", ["127.0.0.1"])
    for certificate in (pki / "server.pem", pki / "ca.crt"):
        warn_of_expiry(certificate)
    superlink = [
        *guarded("superlink"),
        *("--host", "127.0.0.1", "--port", str(plan.port)),
        *("--ssl-ca-certfile", str(pki / "ca.crt"), "--ssl-certfile", str(pki / "server.pem")),
        *("--ssl-keyfile", str(pki / "server.key")),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
        *(("--database", str(plan.database)) if plan.database else ()),
    ]
    superexec = [
        *guarded("superexec", "server.entry"),
        *("--runtime-api-address", plan.address, "--root-certificates", str(pki / "ca.crt")),
        *("--superexec-auth-secret-file", str(secret)),
    ]
    logs, homes = plan.home / "logs", plan.home / "flwr"
    app = {"MASKFED_SERVER_HOME": str(plan.home.resolve()), **LARGE_PAGES}
    return [
        Service(
            "superlink",
            superlink,
            environment(
                homes / "superlink",
                {"MASKFED_ALLOWANCES": str((plan.home / ALLOWANCES).resolve()), **LARGE_PAGES},
            ),
            logs / "superlink.log",
            ready=lambda: is_healthy(plan.address, plan.certificate_authority),
            after_ready=on_superlink_ready,
        ),
        Service(
            "superexec",
            superexec,
            environment(homes / "superexec", app),
            logs / "superexec.log",
            alive=lambda: is_beating(homes / "superexec"),
            settle_seconds=SETTLE_SECONDS,
        ),
    ]


def site_services(plan: SitePlan) -> list[Service]:
    """SuperNode and the site's superexec; the SuperNode is restarted with its superexec, or it would wait for ever."""
    certificate = plan.home / SITE_CERTIFICATE
    if not certificate.exists():
        raise ProvisionError(f"{certificate} is not there, and the door lets in certified sites only: {CURE_MISSING}")
    key, secret, tls = plan.home / "node.key", plan.home / "site.secret", plan.home / "tls"
    for private in (key, secret, tls / "srv.key"):
        check_private(private)
    split_address(plan.superlink)
    for each in (plan.home / "ca.crt", certificate):
        warn_of_expiry(each)
    if plan.proxy:
        split_proxy(plan.proxy)
    runtime = f"127.0.0.1:{plan.port}"
    supernode = [
        *guarded("supernode"),
        *("--superlink", plan.superlink, "--root-certificates", str(plan.home / "ca.crt")),
        *("--auth-supernode-private-key", str(key), "--host", "127.0.0.1", "--port", str(plan.port)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
        *("--ssl-ca-certfile", str(tls / "ca.crt"), "--ssl-certfile", str(tls / "srv.pem")),
        *("--ssl-keyfile", str(tls / "srv.key")),
    ]
    superexec = [
        *guarded("superexec", "client.entry"),
        *("--runtime-api-address", runtime, "--root-certificates", str(tls / "ca.crt")),
        *("--superexec-auth-secret-file", str(secret)),
    ]
    logs, homes = plan.home / "logs", plan.home / "flwr"
    size = {PARAMETERS_VARIABLE: f"{plan.parameters:.0f}"}
    app = {"MASKFED_CLIENT_HOME": str(plan.home.resolve()), **size, **compiler_caches(homes / "compiled")}
    remove_own_clientapp(plan.home / "bin")
    (plan.home / HEALTH_FILE).write_text(f"127.0.0.1:{plan.health_port}\n", encoding="ascii")
    return [
        Service(
            "supernode",
            supernode,
            environment(
                homes / "supernode", {**size, **LARGE_PAGES, **({PROXY_VARIABLE: plan.proxy} if plan.proxy else {})}
            ),
            logs / "supernode.log",
            ready=lambda: is_listening(runtime, tls / "ca.crt"),
            diagnose=lambda: (
                lease_still_lives(logs / "supernode.log")
                or diagnose(Way(plan.superlink, plan.proxy), plan.home / "ca.crt", key)
            ),
        ),
        Service(
            "superexec",
            superexec,
            environment(homes / "superexec", app),
            logs / "superexec.log",
            takes_along=("supernode",),
            alive=lambda: is_beating(homes / "superexec"),
            settle_seconds=SETTLE_SECONDS,
        ),
    ]


def remove_own_clientapp(folder: Path) -> None:
    """Remove the script that earlier versions put first on PATH: no PATH is asked any more."""
    (folder / "flwr-clientapp").unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def is_beating(flwr_home: Path) -> bool:
    """Whether a superexec has touched its file within the last seconds; true while it has not begun to."""
    try:
        return time.time() - (flwr_home / BEAT_FILE).stat().st_mtime < MOST_BEAT_SECONDS
    except OSError:
        return True
