"""The way from a site to its coordinator: name, certificates, answer and clock, each with what to do about it.

Strangers get no further than a handshake, so a site without its certificate checks that far.
"""

import logging
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx

from deploy.checks.clock import check_clock
from deploy.checks.dial import ProxyError, Way, dial
from deploy.errors import ProvisionError
from deploy.identity.addresses import split_address
from deploy.identity.site_certificates import CURE_MISSING
from deploy.identity.tls import client_context

logger = logging.getLogger(__name__)

START_LINE = "Starting Flower SuperNode"
LEASE_LINE = "412 Precondition Failed"
"""How Flower 1.42 answers an activation while the node's last lease lives."""
TAIL_BYTES = 64 * 1024


class Finding(NamedTuple):
    """One check: its name, whether things can work, and what was found or what to do."""

    name: str
    is_ok: bool
    text: str


def check_door(way: Way, ca_certificate: Path, identity: Path | None = None) -> None:
    """For each start of a site: refuse what waiting does not cure, warn of a door that does not answer yet.

    Raises:
        ProvisionError: the certificate at the door is refused, or the clocks differ too much.
    """
    for finding in door_checks(way, ca_certificate, identity):
        if not finding.is_ok and finding.name in ("TLS", "clock"):
            raise ProvisionError(finding.text)
        if not finding.is_ok:
            logger.warning("%s; trying on", finding.text)


def diagnose(way: Way, ca_certificate: Path, identity: Path | None = None) -> str:
    """Why a SuperNode may have ended by itself, for the line that says so."""
    found = (finding.text for finding in door_checks(way, ca_certificate, identity) if not finding.is_ok)
    return next(found, f"{way.address} answers; is this site's key registered there, or was it removed?")


def lease_still_lives(log: Path) -> str:
    """What to say when a SuperNode's newest lines tell that its key is online already; empty when they do not."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    if LEASE_LINE not in text.rpartition(START_LINE)[2]:
        return ""
    return (
        "the coordinator still counts on this key's last connection, for up to a minute after its end: nothing to do; "
        "if it stays so, another host uses the same key"
    )


def door_checks(way: Way, ca_certificate: Path, identity: Path | None = None) -> Iterator[Finding]:
    """Whether the door can be reached, has a certificate of our CA for its name, lets us in and has our time.

    Args:
        way: to the door.
        ca_certificate: the federation's CA.
        identity: the site's node key, its certificate beside it; without it only the handshake is looked at.
    """
    address = way.address
    try:
        host, _ = split_address(address)
        with dial(way) as raw, client_context(ca_certificate).wrap_socket(raw, server_hostname=host):
            pass
    except ProvisionError as error:
        yield Finding("address", False, str(error))
        return
    except socket.gaierror:
        name = way.proxy or host
        yield Finding("address", False, f"{name!r} does not resolve: correct `address`, or the name server")
        return
    except ssl.SSLCertVerificationError as error:
        reason = f"the certificate at {address} is refused ({error.verify_message.rstrip('.')})"
        yield Finding("TLS", False, f"{reason}: {_cure(error, host)}")
        return
    except ProxyError as error:
        yield Finding("proxy", False, str(error))
        return
    except (OSError, ssl.SSLError) as error:
        yield Finding("door", False, f"{address} cannot be reached ({error}): {_cure_of_silence(way)}")
        return
    yield Finding("TLS", True, f"{address} has a certificate of this federation")
    if identity is None:
        return
    yield _answer(way, ca_certificate, identity)
    yield _clock(way, ca_certificate, identity)


def _cure_of_silence(way: Way) -> str:
    if way.proxy:
        return f"is {way.proxy} the right proxy, and is `maskfed-server start` running?"
    return "is `maskfed-server start` running? A site that gets out through a proxy only sets `proxy` in site.toml"


def _cure(error: ssl.SSLCertVerificationError, host: str) -> str:
    match error.verify_code:  # X509_V_ERR_* of OpenSSL
        case 9:
            return "set the clock that is wrong, here or there"
        case 10:
            return "the coordinator runs `maskfed-server renew`; or this clock is wrong"
        case 62 | 64:
            return f"correct `address` in site.toml, or the coordinator runs `maskfed-server renew --host {host}`"
    return "it is of another federation, or a proxy opens TLS on the way: compare the CA fingerprint by phone"


def _answer(way: Way, ca_certificate: Path, identity: Path) -> Finding:
    try:
        context = client_context(ca_certificate, identity)
        reply = httpx.get(
            f"https://{way.address}/health", verify=context, proxy=way.proxy or None, timeout=5, trust_env=False
        )
    except ProvisionError as error:
        return Finding("door", False, f"no certificate to show: {error}")
    except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):
        text = f"{way.address} closes the connection on this site's certificate: was the site removed, or its node key"
        return Finding("door", False, f"{text} replaced? The coordinator's logs/door.log says; {CURE_MISSING}")
    except httpx.HTTPError as error:
        return Finding(
            "door", False, f"{way.address} does not answer GET /health ({error}): see the coordinator's logs"
        )
    if reply.status_code != httpx.codes.OK:
        return Finding("door", False, f"GET /health gives {reply.status_code}: see the coordinator's logs")
    return Finding("door", True, f"{way.address} lets this site in and answers")


def _clock(way: Way, ca_certificate: Path, identity: Path) -> Finding:
    try:
        ahead = check_clock(way, ca_certificate, identity)
    except ProvisionError as error:
        return Finding("clock", False, str(error))
    if ahead is None:
        return Finding("clock", True, "not compared: the door tells no time")
    return Finding("clock", True, f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} the coordinator's")
