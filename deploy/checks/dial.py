"""Connections to the door, straight or through an HTTP proxy that knows CONNECT."""

import socket
from typing import NamedTuple

from deploy.identity.addresses import join_address, split_address, split_proxy

LARGEST_ANSWER_BYTES = 16 * 1024


class ProxyError(OSError):
    """A proxy does not let us through; the text says what it answered."""


class Way(NamedTuple):
    """How a site reaches its coordinator: `address` of the door, host:port, and `proxy`, http://host:port or empty."""

    address: str
    proxy: str = ""


def dial(way: Way, seconds: float = 5.0) -> socket.socket:
    """A TCP connection to the door, of whichever family answers.

    Raises:
        ProvisionError: the address or proxy has a wrong form.
        ProxyError: the proxy refuses, or speaks something else.
        OSError: nobody can be reached; a `socket.gaierror` when a name does not resolve.
    """
    host, port = split_address(way.address)
    if not way.proxy:
        return socket.create_connection((host, port), timeout=seconds)
    stream = socket.create_connection(split_proxy(way.proxy), timeout=seconds)
    try:
        target = join_address(host, port)
        stream.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode("ascii"))
        _check_answer(way.proxy, _head(stream))
    except BaseException:
        stream.close()
        raise
    return stream


def _head(stream: socket.socket) -> bytes:
    """The proxy's answer up to its empty line, byte by byte: what follows belongs to TLS."""
    head = b""
    while not head.endswith(b"\r\n\r\n") and len(head) < LARGEST_ANSWER_BYTES:
        byte = stream.recv(1)
        if not byte:
            break
        head += byte
    return head


def _check_answer(proxy: str, head: bytes) -> None:
    status = head.split(b"\r\n", 1)[0].decode("latin-1")
    parts = status.split(" ", 2)
    if not head.endswith(b"\r\n\r\n") or not parts[0].startswith("HTTP/1.") or len(parts) < 2:
        raise ProxyError(f"the proxy {proxy} does not answer CONNECT as one: correct --proxy")
    if parts[1] != "200":
        raise ProxyError(f"the proxy {proxy} refuses CONNECT ({status[:60]!a}): let it admit this host and port")
