"""nginx in front of the SuperLink: the only door, open for the fleet paths that an authenticated node calls."""

import re
import shutil
import sys
from importlib import resources
from pathlib import Path

from deploy.identity.keys import ProvisionError
from deploy.processes.services import environment, is_answering, is_healthy
from deploy.processes.supervision import Service

REQUESTS_PER_SECOND = 200


def find_nginx() -> str:
    """Path of nginx.

    Raises:
        ProvisionError: it is not installed.
    """
    for place in (None, "/usr/sbin:/usr/local/sbin:/sbin"):
        if found := shutil.which("nginx", path=place):
            return found
    raise ProvisionError("nginx is not installed, and a public address needs it in front: apt-get install nginx-light")


def write_configuration(home: Path, port: int, superlink_port: int, *, rate: int = REQUESTS_PER_SECOND) -> Path:
    """Fill in the template for a coordinator's folder; replaces what an earlier start wrote."""
    home = home.resolve()
    if not re.fullmatch(r"[\w./+-]+", str(home)):
        raise ProvisionError(f"{home}: nginx needs a path of letters, digits and . _ + - only: move the folder")
    run = home / "run"
    run.mkdir(exist_ok=True, mode=0o700)
    (home / "logs").mkdir(exist_ok=True)
    values = {
        "RUN": str(run),
        "LOGS": str(home / "logs"),
        "PKI": str(home / "pki"),
        "PORT": str(port),
        "SUPERLINK_PORT": str(superlink_port),
        "RATE": str(rate),
        "BURST": str(2 * rate),
    }
    text = resources.files("deploy.processes").joinpath("nginx.conf").read_text(encoding="utf-8")
    text = re.sub(r"@([A-Z_]+)@", lambda match: values.get(match[1], match[0]), text)
    path = run / "nginx.conf"
    path.write_text(text, encoding="utf-8")
    return path


def edge_service(home: Path, port: int, superlink_port: int, *, rate: int = REQUESTS_PER_SECOND) -> Service:
    """The door on `port`, all interfaces; healthy when GET /health passes through it."""
    configuration = write_configuration(home, port, superlink_port, rate=rate)
    prefix = str(home.resolve() / "run")
    error_log = str(home.resolve() / "logs" / "edge-error.log")
    return Service(
        "edge",
        [
            *(sys.executable, "-I", "-m", "deploy.processes.keeper"),
            *(find_nginx(), "-p", prefix, "-e", error_log, "-c", str(configuration)),
        ],
        environment(home / "flwr" / "edge"),
        home / "logs" / "edge-start.log",
        ready=lambda: is_healthy(f"127.0.0.1:{port}", home / "pki" / "ca.crt"),
        alive=lambda: is_answering(f"127.0.0.1:{port}", home / "pki" / "ca.crt"),
    )
