"""The way from a site to its coordinator: name, certificate, answer and clock, each with what to do about it."""

import logging
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx

from deploy.checks.clock import check_clock
from deploy.identity.enrolment import split_address
from deploy.identity.keys import ProvisionError, client_context

logger = logging.getLogger(__name__)


class Finding(NamedTuple):
    """One check: its name, whether things can work, and what was found or what to do."""

    name: str
    is_ok: bool
    text: str


def check_door(address: str, ca_certificate: Path) -> None:
    """For each start of a site: refuse what waiting does not cure, warn of a door that does not answer yet.

    Raises:
        ProvisionError: the certificate at `address` (host:port) is refused, or the clocks differ too much.
    """
    for finding in door_checks(address, ca_certificate):
        if not finding.is_ok and finding.name in ("TLS", "clock"):
            raise ProvisionError(finding.text)
        if not finding.is_ok:
            logger.warning("%s; trying on", finding.text)


def diagnose(address: str, ca_certificate: Path) -> str:
    """Why a SuperNode may have ended by itself, for the line that says so."""
    found = (finding.text for finding in door_checks(address, ca_certificate) if not finding.is_ok)
    return next(found, f"{address} answers; is this site's key registered there, or was it removed?")


def door_checks(address: str, ca_certificate: Path) -> Iterator[Finding]:
    """Whether the coordinator's address resolves, speaks TLS that our CA signed for this name, and tells our time."""
    try:
        host, port = split_address(address)
        with (
            socket.create_connection((host, port), timeout=5) as raw,
            client_context(ca_certificate).wrap_socket(raw, server_hostname=host),
        ):
            pass
    except ProvisionError as error:
        yield Finding("address", False, str(error))
        return
    except socket.gaierror:
        yield Finding("address", False, f"{host!r} does not resolve: correct `address`, or the name server")
        return
    except ssl.SSLCertVerificationError as error:
        reason = f"the certificate at {address} is refused ({error.verify_message.rstrip('.')})"
        yield Finding("TLS", False, f"{reason}: {_cure(error, host)}")
        return
    except (OSError, ssl.SSLError) as error:
        yield Finding("door", False, f"{address} cannot be reached ({error}): is `maskfed-server start` running?")
        return
    yield Finding("TLS", True, f"{address} has a certificate of this federation")
    yield _answer(address, ca_certificate)
    yield _clock(address, ca_certificate)


def _cure(error: ssl.SSLCertVerificationError, host: str) -> str:
    match error.verify_code:  # X509_V_ERR_* of OpenSSL
        case 9:
            return "set the clock that is wrong, here or there"
        case 10:
            return "the coordinator runs `maskfed-server renew`; or this clock is wrong"
        case 62 | 64:
            return f"correct `address` in site.toml, or the coordinator runs `maskfed-server renew --host {host}`"
    return "it is of another federation, or a proxy opens TLS on the way: compare the CA fingerprint by phone"


def _answer(address: str, ca_certificate: Path) -> Finding:
    try:
        reply = httpx.get(
            f"https://{address}/health", verify=client_context(ca_certificate), timeout=5, trust_env=False
        )
    except httpx.HTTPError as error:
        return Finding("door", False, f"{address} does not answer GET /health ({error}): see the coordinator's logs")
    if reply.status_code != httpx.codes.OK:
        return Finding("door", False, f"GET /health gives {reply.status_code}: see the coordinator's logs")
    return Finding("door", True, f"{address} answers")


def _clock(address: str, ca_certificate: Path) -> Finding:
    try:
        ahead = check_clock(address, ca_certificate)
    except ProvisionError as error:
        return Finding("clock", False, str(error))
    if ahead is None:
        return Finding("clock", True, "not compared: the door tells no time")
    return Finding("clock", True, f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} the coordinator's")
