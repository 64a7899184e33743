"""The coordinator's request key `pki/request.pem`: made and certified by the CA at `init` and `renew`.

One file holds the Ed25519 key and its certificate, so that no crash leaves one without the other. What the certificate
is good for, and how sites check it, is in `shared/messages/request_key.py`.
"""

import datetime as dt
import os
import time
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

from deploy.errors import ProvisionError
from deploy.identity.certificates import CLOCK_SKEW, SERVER_DAYS, load_authority
from deploy.identity.keys import check_private, create_file, load_certificate

REQUEST_KEY = Path("pki", "request.pem")
"""In the coordinator's folder."""
REQUEST_PURPOSE = x509.ObjectIdentifier("2.25.174749951372443094992288095982931101530")
"""The one thing that the certificate is good for; sites look for this number."""
REQUEST_NAME = "maskfed requests"


def issue_request_key(*, ca_key: Path, ca_certificate: Path, path: Path, days: int = SERVER_DAYS) -> None:
    """Make a request key and its certificate; `path` (0600) is replaced in one step, whatever it held.

    The serial number is the time in nanoseconds, and larger than that of the certificate before: sites that have seen
    the new one refuse the old one.

    Raises:
        ProvisionError: the CA key is not there, or is another CA's; the old file is untouched then.
    """
    authority_key, authority = load_authority(ca_key, ca_certificate)
    serial = max(time.time_ns(), _old_serial(path) + 1)
    key = Ed25519PrivateKey.generate()
    certificate = _certificate(authority_key, authority, key, serial, days)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    new.unlink(missing_ok=True)
    create_file(new, private + certificate.public_bytes(serialization.Encoding.PEM), 0o600)
    new.replace(path)


def read_request_certificate(path: Path) -> x509.Certificate:
    """The certificate beside the request key.

    Raises:
        ProvisionError: the file is not there (a folder of an older version has none), or readable by others.
    """
    if not path.exists():
        raise ProvisionError(
            f"{path} is not there, and sites answer signed requests only: `maskfed-server renew --ca-key FILE` makes it"
        )
    check_private(path)
    return load_certificate(path)


def _old_serial(path: Path) -> int:
    return read_request_certificate(path).serial_number if path.exists() else 0


def _certificate(
    authority_key: ec.EllipticCurvePrivateKey,
    authority: x509.Certificate,
    key: Ed25519PrivateKey,
    serial: int,
    days: int,
) -> x509.Certificate:
    now = dt.datetime.now(dt.UTC)
    identifier = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, REQUEST_NAME)]))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + dt.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([REQUEST_PURPOSE]), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(authority_key, hashes.SHA384())
    )
