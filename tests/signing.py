"""Keys and signatures for tests: a federation's CA and request key, sites whose keys follow from their aliases."""

import atexit
import functools
import hashlib
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import RecordDict

from deploy.identity.certificates import create_authority
from deploy.identity.request_key import REQUEST_KEY, issue_request_key
from deploy.identity.site_certificates import create_door_authority
from server.federation.messaging.signed_grid import read_request_key
from shared.messages.sealing import digests_of, read_seal, seal_reply, seal_request
from shared.messages.signature import Purpose, Statement, public_text


def key_of(alias: str) -> Ed25519PrivateKey:
    """The signing key of a test's site."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"test {alias}".encode()).digest())


def public_of(alias: str) -> str:
    return public_text(key_of(alias))


def pem_of(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def make_federation(home: Path) -> None:
    """CA (`ca/ca.key`, `pki/ca.crt`), request key (`pki/request.pem`) and the door's CA in a coordinator's folder."""
    create_authority(home / "ca" / "ca.key", home / "pki" / "ca.crt")
    create_door_authority(home / "pki")
    renew_request_key(home)


def renew_request_key(home: Path) -> None:
    issue_request_key(ca_key=home / "ca" / "ca.key", ca_certificate=home / "pki" / "ca.crt", path=home / REQUEST_KEY)


@functools.cache
def federation() -> Path:
    """One coordinator's folder for all tests that need just any."""
    home = Path(tempfile.mkdtemp(prefix="maskfed-test-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    make_federation(home)
    return home


def statement_of(
    content: RecordDict, alias: str, purpose: Purpose = "train", run: str = "run", server_round: int = 1,
    times: tuple[int, int] = (1_700_000_000_000, 4_000_000_000_000),
) -> Statement:  # fmt: skip
    """What an honest coordinator states about a request; it stands until the year 2096."""
    digests = digests_of(content)
    place = (run, server_round, alias, digests.request, digests.header, digests.arrays)
    return Statement(purpose, "request", *place, *times)


def signed_request(content: RecordDict, statement: Statement, home: Path | None = None) -> RecordDict:
    """The request as the coordinator of `home` sends it; default: of `federation()`."""
    key, certificate = read_request_key((home or federation()) / REQUEST_KEY)
    return seal_request(content, statement, key, certificate)


def signed_reply(
    answer: RecordDict, request: RecordDict, purpose: Purpose, key: Ed25519PrivateKey, /, **changed: Any
) -> RecordDict:
    """The answer to a signed request as the holder of `key` signs it."""
    seal = read_seal(request, "request")
    asked = seal.statement(purpose, seal.alias, digests_of(request))
    return seal_reply(answer, replace(asked, **changed), key)
