"""Whether what should listen at an address answers, over TLS of our own CA; by nobody's proxy."""

import os
import socket
from pathlib import Path

import httpx

from deploy.checks.dial import Way, dial
from deploy.identity.addresses import split_address
from deploy.identity.tls import client_context


def is_healthy(address: str, ca_certificate: Path) -> bool:
    """Whether the SuperLink at `address` answers GET /health over TLS that our CA signed."""
    return _get(f"https://{address}/health", ca_certificate) == 200


def is_listening(address: str, ca_certificate: Path) -> bool:
    """Whether something speaks HTTP over TLS that our CA signed at `address`."""
    return _get(f"https://{address}/health", ca_certificate) is not None


def is_answering(address: str, ca_certificate: Path) -> bool:
    """Whether whatever listens at `address` shakes hands by itself, without asking anybody behind it."""
    try:
        with dial(Way(address), 2.0) as raw:
            client_context(ca_certificate).wrap_socket(raw, server_hostname=split_address(address)[0]).close()
    except OSError:
        return False
    return True


def is_alive_behind(folder: Path, name: str) -> bool:
    """Whether the http behind the door answers on its unix socket, which lies in `folder`.

    It is reached through the folder, since the path of a socket may have 107 bytes only.
    """
    try:
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
            stream.settimeout(2.0)
            stream.connect(f"/proc/self/fd/{directory}/{name}")
            stream.sendall(b"PROXY UNKNOWN\r\nGET /alive HTTP/1.0\r\n\r\n")
            return stream.recv(12) == b"HTTP/1.1 204"
    except OSError:
        return False
    finally:
        os.close(directory)


def _get(url: str, ca_certificate: Path) -> int | None:
    try:
        return httpx.get(url, verify=client_context(ca_certificate), timeout=2.0, trust_env=False).status_code
    except httpx.HTTPError:
        return None
