"""Addresses as people give them: `host:port`, with IPv6 in brackets, and the proxy that a site goes through."""

import ipaddress
import re

from deploy.errors import ProvisionError

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.\-]*[A-Za-z0-9])?\.?")
_PROXY_PREFIX = "http://"
PROXY_VARIABLE = "MASKFED_PROXY"
"""Tells the SuperNode's entry the proxy that it goes through."""


def split_address(address: str) -> tuple[str, int]:
    """Split `host:port`; an IPv6 address stands in brackets, `[2001:db8::7]:443`, and comes back without them.

    Raises:
        ProvisionError: no port or one outside 1 to 65535, brackets forgotten, or a host that no certificate can name.
    """
    shown = address[:80]
    host, colon, port = address.rpartition(":")
    if colon and host and port.isascii() and port.isdigit() and len(port) < 20 and not 0 < int(port) < 65536:
        raise ProvisionError(f"address {shown!r}: port {port} is none: give 1 to 65535")
    if not (colon and host and port.isascii() and port.isdigit() and len(port) < 20):
        raise ProvisionError(f"address {shown!r}: give it as host:port, for example fleet.example:443")
    if host.startswith("[") or re.fullmatch(r"[0-9A-Fa-f:.%]*:[0-9A-Fa-f:.%]*", host):
        return _version_6(host, shown), int(port)
    if "_" in host:
        raise ProvisionError(
            f"address {shown!r}: host names have no underscore (RFC 1123), and TLS libraries do not match such a name "
            "with a certificate: give the host a name with a hyphen"
        )
    if not _NAME.fullmatch(host):
        raise ProvisionError(f"address {shown!r}: give it as host:port, for example fleet.example:443")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_proxy(proxy: str) -> tuple[str, int]:
    """Host and port of `http://host:port`, a proxy that knows CONNECT.

    Raises:
        ProvisionError: another form; also with a user and password, which would lie readable in `site.toml`.
    """
    if not proxy.startswith(_PROXY_PREFIX) or "@" in proxy:
        raise ProvisionError(
            f"proxy {proxy.rpartition('@')[2][:80]!r}: give it as http://host:port, without user and password: let the "
            "proxy admit this host by its address"
        )
    return split_address(proxy.removeprefix(_PROXY_PREFIX).rstrip("/"))


def _version_6(host: str, shown: str) -> str:
    try:
        if not (host.startswith("[") and host.endswith("]")) or "%" in host:
            raise ValueError
        return str(ipaddress.IPv6Address(host[1:-1]))
    except ValueError as error:
        raise ProvisionError(
            f"address {shown!r}: an IPv6 address stands in brackets, for example [2001:db8::7]:443"
        ) from error
