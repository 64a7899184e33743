"""Certificates that let sites through the door: made over their node keys, revoked by a list.

They are signed by a CA of their own whose key stays in the coordinator's folder, so that adding a site needs no
offline key. It opens the door and nothing else: sites do not know this CA, and behind the door every call still needs
the signature of a registered node key. Certificates hold no secret and travel in the join bundle.
"""

import contextlib
import datetime as dt
import fcntl
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from deploy.errors import ProvisionError
from deploy.identity.certificates import (
    CLOCK_SKEW,
    certificate_builder,
    issuer_identifier,
    make_authority,
    private_pem,
)
from deploy.identity.keys import check_private, load_certificate, public_key_digest, replace_file

DOOR_KEY = "door-ca.pem"
"""In the coordinator's `pki`: private key and certificate of the CA in one file, so that no crash parts them."""
DOOR_CERTIFICATE = "door-ca.crt"
REVOCATIONS = "door.crl"
ISSUED = "door-issued.json"
SITE_CERTIFICATE = "node.crt"
"""Beside a site's node key."""
SITE_DAYS = 730
RENEW_DAYS = 60
"""A certificate with fewer days left is renewed by `sites certify`."""
DOOR_NAME = "maskfed door"
CURE_MISSING = (
    "the coordinator runs `maskfed-server sites certify` and sends the file that it writes; then "
    "`maskfed-client certificate FILE`"
)


def create_door_authority(pki: Path) -> bool:
    """Make the CA of the door and an empty list of revocations, unless they are there; whether they were made."""
    if (pki / DOOR_KEY).exists():
        return False
    key, certificate = make_authority(DOOR_NAME)
    public = certificate.public_bytes(serialization.Encoding.PEM)
    replace_file(pki / DOOR_CERTIFICATE, public)
    _write_list(pki, key, certificate, [])
    replace_file(pki / DOOR_KEY, private_pem(key) + public, 0o600)  # last: with it everything is there
    return True


def check_door_authority(pki: Path) -> None:
    """Refuse a folder without what the door checks sites with.

    Raises:
        ProvisionError: a file is missing, as in a folder of an earlier version, or readable by others.
    """
    for name in (DOOR_KEY, DOOR_CERTIFICATE, REVOCATIONS):
        if not (pki / name).exists():
            raise ProvisionError(
                f"{pki / name} is not there, and the door lets in certified sites only: `maskfed-server sites certify` "
                "makes it, and a certificate for each site"
            )
    check_private(pki / DOOR_KEY)


def issue_site_certificate(pki: Path, alias: str, public_key: str, days: int = SITE_DAYS) -> str:
    """Certificate (PEM) over a site's node key (OpenSSH line), good for TLS client authentication only.

    Its serial number is on disk before it is given out, so that it can be revoked whatever happens next.

    Raises:
        ProvisionError: no CA for the door, or the list of issued certificates is damaged.
    """
    check_door_authority(pki)
    authority_key, authority = _door_authority(pki)
    node = serialization.load_ssh_public_key(public_key.encode())
    if not isinstance(node, ec.EllipticCurvePublicKey):
        raise ProvisionError(f"the node key of site {alias!r} is not an elliptic curve key: it enrols again")
    certificate = (
        certificate_builder(alias, DOOR_NAME, node, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=True)
        .add_extension(issuer_identifier(authority), critical=False)
        .sign(authority_key, hashes.SHA384())
    )
    with _locked(pki) as issued:
        issued.append(
            {
                "serial": f"{certificate.serial_number:x}",
                "alias": alias,
                "key": public_key_digest(public_key),
                "until": certificate.not_valid_after_utc.isoformat(),
            }
        )
        replace_file(pki / ISSUED, json.dumps(issued, indent=1).encode() + b"\n")
    return certificate.public_bytes(serialization.Encoding.PEM).decode("ascii")


def write_revocations(pki: Path, public_keys: Collection[str]) -> bool:
    """Revoke every certificate that was issued over another key than `public_keys` (OpenSSH lines).

    So removed sites, replaced keys and bundles of an enrolment that failed are covered alike.

    Returns:
        Whether the list has changed, so that the door has to read it again.
    """
    check_door_authority(pki)
    registered = {public_key_digest(key) for key in public_keys}
    with _locked(pki) as issued:
        revoked = sorted(int(entry["serial"], 16) for entry in issued if entry["key"] not in registered)
        listed = x509.load_pem_x509_crl((pki / REVOCATIONS).read_bytes())
        if sorted(entry.serial_number for entry in listed) == revoked:
            return False
        _write_list(pki, *_door_authority(pki), revoked)
    return True


def days_left_by_key(pki: Path) -> dict[str, float]:
    """Days until the newest certificate over each node key ends, by the key's digest."""
    now = dt.datetime.now(dt.UTC)
    left: dict[str, float] = {}
    for entry in _issued(pki):
        days = (dt.datetime.fromisoformat(entry["until"]) - now) / dt.timedelta(days=1)
        left[entry["key"]] = max(days, left.get(entry["key"], days))
    return left


def install_site_certificate(pem: str, public_key: str, path: Path) -> None:
    """Put a certificate beside the node key that it was made over; an older one is replaced.

    Raises:
        ProvisionError: not a certificate for this key and for clients, or it has ended.
    """
    certificate = check_site_certificate(pem, public_key)
    replace_file(path, certificate.public_bytes(serialization.Encoding.PEM))


def check_site_certificate(pem: str, public_key: str) -> x509.Certificate:
    """The certificate, if it is one for this node key (OpenSSH line) that opens a door.

    Raises:
        ProvisionError: it is not.
    """
    certificate = load_certificate(pem.encode())
    if _public_line(certificate) != " ".join(public_key.split()[:2]):
        raise ProvisionError("the certificate belongs to another node key: ask for the one made for this site")
    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (x509.ExtensionNotFound, ValueError):
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    if ExtendedKeyUsageOID.CLIENT_AUTH not in usage:
        raise ProvisionError("the certificate is not one for sites: ask for the file that `sites certify` wrote")
    if certificate.not_valid_after_utc < dt.datetime.now(dt.UTC):
        raise ProvisionError(f"the certificate ended on {certificate.not_valid_after_utc:%Y-%m-%d}: {CURE_MISSING}")
    return certificate


def _public_line(certificate: x509.Certificate) -> str:
    try:
        public = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):
        return ""
    if not isinstance(public, ec.EllipticCurvePublicKey):
        return ""
    return public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode("ascii")


def _door_authority(pki: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    data = (pki / DOOR_KEY).read_bytes()
    key = serialization.load_pem_private_key(data, password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key, load_certificate(data)


def _write_list(pki: Path, key: ec.EllipticCurvePrivateKey, authority: x509.Certificate, serials: list[int]) -> None:
    """The list outlives every certificate: one that has run out would lock all sites out."""
    now = dt.datetime.now(dt.UTC)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.subject)
        .last_update(now - CLOCK_SKEW)
        .next_update(max(authority.not_valid_after_utc, now + dt.timedelta(days=1)))
        .add_extension(issuer_identifier(authority), critical=False)
    )
    for serial in serials:
        revoked = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
        builder = builder.add_revoked_certificate(revoked)
    replace_file(pki / REVOCATIONS, builder.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM))


@contextlib.contextmanager
def _locked(pki: Path) -> Iterator[list[dict[str, Any]]]:
    with (pki / "door.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield _issued(pki)


def _issued(pki: Path) -> list[dict[str, Any]]:
    path = pki / ISSUED
    if not path.exists():
        return []
    try:
        entries: list[dict[str, Any]] = json.loads(path.read_bytes())
        for entry in entries:
            int(entry["serial"], 16), entry["key"], entry["alias"], dt.datetime.fromisoformat(entry["until"])
    except (ValueError, KeyError, TypeError) as error:
        raise ProvisionError(f"{path} is damaged ({error}), and certificates are revoked by it: restore it") from error
    return entries
