"""Making the CA and what it signs: the server's certificate, and the loopback certificate of a site.

Everything is elliptic curve P-384. The CA key goes to a folder of its own: it is needed again only to renew the server
certificate and belongs offline in between.
"""

import datetime as dt
import ipaddress
from collections.abc import Iterable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from deploy.errors import ProvisionError
from deploy.identity.keys import check_private, create_file, fingerprint, load_certificate

CA_NAME = "maskfed ca"
CA_DAYS = 3650
SERVER_DAYS = 365
LOCAL_TLS = ("ca.crt", "srv.pem", "srv.key")
CLOCK_SKEW = dt.timedelta(minutes=5)


def create_authority(ca_key: Path, ca_certificate: Path) -> str:
    """Make the CA: private key to `ca_key`, certificate to `ca_certificate`; return its fingerprint."""
    for path in (ca_key, ca_certificate):
        if path.exists():
            raise ProvisionError(f"{path} exists already: move it away first, nothing is overwritten")
    key, certificate = make_authority(CA_NAME)
    create_file(ca_key, private_pem(key), 0o600)
    create_file(ca_certificate, certificate.public_bytes(serialization.Encoding.PEM))
    return fingerprint(ca_certificate)


def issue_server_certificate(
    *, ca_key: Path, ca_certificate: Path, certificate: Path, key: Path, hosts: Iterable[str], days: int = SERVER_DAYS
) -> None:
    """Sign a TLS server certificate for `hosts` (names or IP addresses; localhost and 127.0.0.1 are always in it).

    `certificate` and `key` are new files; to renew, issue to new names and rename them over the old ones (`renew`).

    Raises:
        ProvisionError: the CA key is not there (it may be offline), or a file exists already.
    """
    for path in (certificate, key):
        if path.exists():
            raise ProvisionError(f"{path} exists already: move it away first, nothing is overwritten")
    authority_key, authority = load_authority(ca_key, ca_certificate)
    server_key = ec.generate_private_key(ec.SECP384R1())
    signed = _server_certificate(authority_key, authority, server_key, hosts, days)
    create_file(certificate, signed.public_bytes(serialization.Encoding.PEM))
    create_file(key, private_pem(server_key), 0o600)


def load_authority(ca_key: Path, ca_certificate: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """The CA: private key and certificate.

    Raises:
        ProvisionError: the CA key is not there (it may be offline), is readable by others, or is another CA's.
    """
    if not ca_key.exists():
        raise ProvisionError(
            f"{ca_key} is not there: give --ca-key with the CA key that `init` wrote, where it is kept"
        )
    check_private(ca_key)
    authority_key = serialization.load_pem_private_key(ca_key.read_bytes(), password=None)
    if not isinstance(authority_key, ec.EllipticCurvePrivateKey):
        raise ProvisionError(f"{ca_key} is not an elliptic curve key: give the ca.key that `init` wrote")
    authority = load_certificate(ca_certificate)
    if authority.public_key() != authority_key.public_key():
        raise ProvisionError(f"{ca_key} does not belong to {ca_certificate}: give the ca.key of this federation")
    return authority_key, authority


def renew_server_certificate(
    *, ca_key: Path, ca_certificate: Path, certificate: Path, key: Path, hosts: Iterable[str], days: int = SERVER_DAYS
) -> None:
    """Replace certificate and key by fresh ones of the same CA; sites notice nothing, processes need a restart."""
    new_certificate, new_key = (path.with_name(path.name + ".new") for path in (certificate, key))
    for path in (new_certificate, new_key):
        path.unlink(missing_ok=True)
    issue_server_certificate(
        ca_key=ca_key,
        ca_certificate=ca_certificate,
        certificate=new_certificate,
        key=new_key,
        hosts=hosts,
        days=days,
    )
    new_key.replace(key)
    new_certificate.replace(certificate)


def create_local_tls(folder: Path) -> None:
    """Make the files of `LOCAL_TLS` for a loopback port; the CA key is thrown away at once.

    A SuperNode hands tasks with tokens to its own ClientApps over this port.
    """
    authority_key, authority = make_authority(CA_NAME)
    server_key = ec.generate_private_key(ec.SECP384R1())
    signed = _server_certificate(authority_key, authority, server_key, [], CA_DAYS)
    create_file(folder / "ca.crt", authority.public_bytes(serialization.Encoding.PEM))
    create_file(folder / "srv.pem", signed.public_bytes(serialization.Encoding.PEM))
    create_file(folder / "srv.key", private_pem(server_key), 0o600)


def make_authority(name: str) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """A new CA of that name, good for ten years: private key and certificate."""
    key = ec.generate_private_key(ec.SECP384R1())
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        certificate_builder(name, name, key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA384())
    )
    return key, certificate


def _server_certificate(
    authority_key: ec.EllipticCurvePrivateKey,
    authority: x509.Certificate,
    server_key: ec.EllipticCurvePrivateKey,
    hosts: Iterable[str],
    days: int,
) -> x509.Certificate:
    wanted = list(dict.fromkeys(["localhost", "127.0.0.1", *hosts]))
    return (
        certificate_builder("superlink", CA_NAME, server_key.public_key(), days)
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in wanted]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(issuer_identifier(authority), critical=False)
        .sign(authority_key, hashes.SHA384())
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError as error:
        raise ProvisionError(
            f"host {host!r} is neither a DNS name in ASCII nor an address: give one of these"
        ) from error


def issuer_identifier(authority: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    """Extension that names a CA in what it signs."""
    identifier = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def certificate_builder(
    subject: str, issuer: str, public_key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    """A certificate over a key, without extensions; subject and issuer are common names."""
    now = dt.datetime.now(dt.UTC)
    name, signer = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (subject, issuer))
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(signer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + dt.timedelta(days=days))
    )


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key in PEM form, PKCS 8, not encrypted."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
