"""nginx in front of the SuperLink: the only door, for certified sites and the calls of an authenticated node."""

import contextlib
import os
import pwd
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import psutil

from deploy.checks.answering import is_alive_behind, is_answering
from deploy.errors import ProvisionError
from deploy.identity.site_certificates import check_door_authority
from deploy.processes.door import SOCKET
from deploy.processes.services import environment
from deploy.processes.supervision import Service

REQUESTS_PER_SECOND = 200
CONNECTIONS_PER_ADDRESS = 64
"""Several sites may share one address; each needs fewer than ten connections."""
NETWORK_SHARE, UPLOAD_SHARE = 4, 8
"""An IPv6 network of 48 bits may open so many times what one of 64 bits may; a part of an address's may upload."""
MOST_CONNECTIONS = 16384
"""Of the whole door. A site's connection takes four: its own, one through the socket (both ends), the SuperLink's."""
LARGEST_LIMIT = 2**16 - 1
"""That nginx takes for a number of connections."""
RELOAD_SECONDS, RELOAD_TRIES = 5.0, 3
STREAM_MODULE = "ngx_stream_module.so"
PACKAGES = "apt-get install nginx-light libnginx-mod-stream"


def find_nginx() -> str:
    """Path of nginx.

    Raises:
        ProvisionError: it is not installed.
    """
    for place in (None, "/usr/sbin:/usr/local/sbin:/sbin"):
        if found := shutil.which("nginx", path=place):
            return found
    raise ProvisionError(f"nginx is not installed, and a public address needs it in front: {PACKAGES}")


def find_stream_module(nginx: str) -> Path | None:
    """File of nginx's stream module; None where it is built in.

    Raises:
        ProvisionError: it is not installed, or this nginx was built without it.
    """
    built = subprocess.run([nginx, "-V"], capture_output=True, text=True, check=False).stderr
    if "--with-stream_ssl_module" in built:
        if re.search(r"--with-stream(?=\s|$)", built):
            return None
        folder = re.search(r"--modules-path=(\S+)", built)
        if "--with-stream=dynamic" in built and folder and (module := Path(folder[1], STREAM_MODULE)).is_file():
            return module
    raise ProvisionError(f"{nginx} has no stream module, which the door listens with: {PACKAGES}")


def check_nginx() -> str:
    """Path of an nginx that the door can run with.

    Raises:
        ProvisionError: nginx or its stream module is missing.
    """
    nginx = find_nginx()
    find_stream_module(nginx)
    return nginx


def write_configuration(
    home: Path,
    port: int,
    superlink_port: int,
    *,
    rate: int = REQUESTS_PER_SECOND,
    connections: int = CONNECTIONS_PER_ADDRESS,
) -> Path:
    """Fill in the template for a coordinator's folder; replaces what an earlier start wrote.

    Args:
        home: the coordinator's folder.
        port: of the door, on all interfaces, IPv4 and IPv6.
        superlink_port: on loopback.
        rate: most requests per second of one address.
        connections: most connections of one address; of IPv6 one network of 64 bits, and four times that of one of 48.

    Raises:
        ProvisionError: nginx would misread the folder's name, or lacks its stream module.
    """
    home = home.resolve()
    if not re.fullmatch(r"[\w./+-]+", str(home)):
        raise ProvisionError(f"{home}: nginx needs a path of letters, digits and . _ + - only: move the folder")
    run = home / "run"
    run.mkdir(exist_ok=True, mode=0o700)
    (home / "logs").mkdir(exist_ok=True)
    module = find_stream_module(find_nginx())
    most = min(MOST_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 64)
    values = {
        # By default root's workers are somebody's whom others may be, too, and who may look into their memory.
        "USER": f"user {pwd.getpwuid(0).pw_name};" if os.geteuid() == 0 else "",
        "LOAD_STREAM": f"load_module {module};" if module else "",
        "OPEN_FILES": str(most + 64),
        "CONNECTIONS": str(most),
        "CONNECTIONS_PER_ADDRESS": str(connections),
        "CONNECTIONS_PER_NETWORK": str(min(NETWORK_SHARE * connections, LARGEST_LIMIT)),
        "UPLOADS": str(max(2, connections // UPLOAD_SHARE)),
        "LISTEN_6": f"listen [::]:{port} ssl ipv6only=on;" if has_ipv6() else "",
        "RUN": str(run),
        "LOGS": str(home / "logs"),
        "PKI": str(home / "pki"),
        "PORT": str(port),
        "SUPERLINK_PORT": str(superlink_port),
        "RATE": str(rate),
        "BURST": str(2 * rate),
    }
    text = resources.files("deploy.processes").joinpath("nginx.conf").read_text(encoding="utf-8")
    text = re.sub(r"@([A-Z_0-9]+)@", lambda match: values.get(match[1], match[0]), text)
    path = run / "nginx.conf"
    path.write_text(text, encoding="utf-8")
    return path


def has_ipv6() -> bool:
    """Whether this host's kernel has IPv6 switched on."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::", 0))
    except OSError:
        return False
    return True


def edge_service(home: Path, port: int, superlink_port: int, *, connections: int = CONNECTIONS_PER_ADDRESS) -> Service:
    """The door on `port`, all interfaces; ready when it shakes hands, alive while the http behind it answers."""
    check_door_authority(home / "pki")
    configuration = write_configuration(home, port, superlink_port, connections=connections)
    prefix = home.resolve() / "run"
    error_log = str(home.resolve() / "logs" / "edge-error.log")
    return Service(
        "edge",
        [
            *(sys.executable, "-I", "-m", "deploy.processes.door", str(prefix / "door")),
            *(find_nginx(), "-p", str(prefix), "-e", error_log, "-c", str(configuration)),
        ],
        environment(home / "flwr" / "edge"),
        home / "logs" / "edge-start.log",
        ready=lambda: is_answering(f"127.0.0.1:{port}", home / "pki" / "ca.crt"),
        # A handshake without a certificate is a stranger's, and leaves a line: not every ten seconds.
        alive=lambda: is_alive_behind(prefix / "door", SOCKET),
    )


def reload_door(home: Path) -> bool:
    """Let a running door read its certificates and revocations again; whether there is one.

    Raises:
        ProvisionError: it goes on with the old ones, so that who was removed is still let in.
    """
    run = home.resolve() / "run"
    try:
        master = psutil.Process(int((run / "nginx.pid").read_text(encoding="ascii")))
        # Process ids come back: only what runs on this folder's configuration is told.
        if str(run / "nginx.conf") not in " ".join(master.cmdline()):
            return False
    except (OSError, ValueError, psutil.Error):
        return False
    with contextlib.suppress(psutil.NoSuchProcess):
        before = {worker.pid for worker in master.children()}
        for _ in range(RELOAD_TRIES):
            master.send_signal(signal.SIGHUP)
            if _has_new_worker(master, before):
                return True
        raise ProvisionError(
            f"the door goes on with its old revocations: restart `maskfed-server start`; {home}/logs/edge-start.log "
            "says why"
        )
    return False


def _has_new_worker(master: psutil.Process, before: set[int]) -> bool:
    """Whether a process that has read the new configuration serves soon; a signal alone proves nothing."""
    end = time.monotonic() + RELOAD_SECONDS
    while time.monotonic() < end:
        if {worker.pid for worker in master.children()} - before:
            return True
        time.sleep(0.05)
    return False
