"""Keys, certificates and secrets, each made on the machine that uses it.

Everything is elliptic curve P-384: Flower authenticates nodes with OpenSSH keys on NIST curves. The CA key goes to a
folder of its own: it is needed again only to renew the server certificate and belongs offline in between.
"""

import datetime as dt
import hashlib
import ipaddress
import os
import secrets
import ssl
import stat
from collections.abc import Iterable
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA_NAME = "maskfed ca"
CA_DAYS = 3650
SERVER_DAYS = 365
SECRET_BYTES = 32
EXPIRY_WARNING_DAYS = 30
CLOCK_SKEW = dt.timedelta(minutes=5)


class ProvisionError(ValueError):
    """Something about keys, files, ports or programs is wrong. One line: the value, the limit and the remedy."""


def create_file(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a new file with `mode`, fsynced; an existing one is never overwritten.

    Raises:
        ProvisionError: the file exists already or the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError as error:
        raise ProvisionError(f"{path} exists already: move it away first, nothing is overwritten") from error
    except OSError as error:
        raise ProvisionError(f"{path}: {error.strerror}; give a folder that this user can write") from error
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)  # the umask must not decide who reads a key
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def check_private(path: Path) -> None:
    """Refuse a private file that somebody else could read or that is missing.

    Raises:
        ProvisionError: not a file, or its mode has any bit for group or others.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise ProvisionError(f"{path}: {error.strerror}; run the set-up command again") from error
    if mode & 0o077:
        raise ProvisionError(f"{path} has mode {mode:04o}, at most 0600 is safe: chmod 600 {path}")


def create_secret(path: Path) -> None:
    """Write 32 random bytes that superlink or supernode share with their superexec."""
    create_file(path, secrets.token_bytes(SECRET_BYTES), 0o600)


def create_node_key(path: Path) -> str:
    """Write a P-384 key in OpenSSH format to `path` (0600), its public half to `path`.pub; return the public line."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    create_file(path, private, 0o600)
    create_file(path.with_name(path.name + ".pub"), public + b"\n")
    return public.decode("ascii")


def create_authority(ca_key: Path, ca_certificate: Path) -> str:
    """Make the CA: private key to `ca_key`, certificate to `ca_certificate`; return its fingerprint."""
    for path in (ca_key, ca_certificate):
        if path.exists():
            raise ProvisionError(f"{path} exists already: move it away first, nothing is overwritten")
    key, certificate = _authority()
    create_file(ca_key, _private_pem(key), 0o600)
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
    check_private(ca_key)
    authority_key = serialization.load_pem_private_key(ca_key.read_bytes(), password=None)
    if not isinstance(authority_key, ec.EllipticCurvePrivateKey):
        raise ProvisionError(f"{ca_key} is not an elliptic curve key: give the ca.key that `init` wrote")
    authority = load_certificate(ca_certificate)
    if authority.public_key() != authority_key.public_key():
        raise ProvisionError(f"{ca_key} does not belong to {ca_certificate}: give the ca.key of this federation")
    server_key = ec.generate_private_key(ec.SECP384R1())
    signed = _server_certificate(authority_key, authority, server_key, hosts, days)
    create_file(certificate, signed.public_bytes(serialization.Encoding.PEM))
    create_file(key, _private_pem(server_key), 0o600)


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
    """Make `ca.crt`, `srv.pem` and `srv.key` for a loopback port; the CA key is thrown away at once.

    A SuperNode hands tasks with tokens to its own ClientApps over this port.
    """
    authority_key, authority = _authority()
    server_key = ec.generate_private_key(ec.SECP384R1())
    signed = _server_certificate(authority_key, authority, server_key, [], CA_DAYS)
    create_file(folder / "ca.crt", authority.public_bytes(serialization.Encoding.PEM))
    create_file(folder / "srv.pem", signed.public_bytes(serialization.Encoding.PEM))
    create_file(folder / "srv.key", _private_pem(server_key), 0o600)


def fingerprint(certificate: Path | bytes) -> str:
    """SHA-256 of a certificate (file or PEM bytes) as 16 groups of 4 hex digits, to compare by voice."""
    loaded = load_certificate(certificate)
    digest = hashlib.sha256(loaded.public_bytes(serialization.Encoding.DER)).hexdigest()
    return " ".join(digest[start : start + 4] for start in range(0, 64, 4))


def load_certificate(certificate: Path | bytes) -> x509.Certificate:
    """Read a PEM certificate from a file or from bytes."""
    try:
        data = certificate if isinstance(certificate, bytes) else certificate.read_bytes()
        return x509.load_pem_x509_certificate(data)
    except OSError as error:
        raise ProvisionError(f"{certificate!s}: {error.strerror}; run the set-up command first") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        name = "the certificate" if isinstance(certificate, bytes) else str(certificate)
        raise ProvisionError(f"{name} is not a PEM certificate: ask for it again") from error


def days_left(certificate: Path | bytes) -> float:
    """Days until a certificate ends; negative when it has ended."""
    left = load_certificate(certificate).not_valid_after_utc - dt.datetime.now(dt.UTC)
    return left / dt.timedelta(days=1)


def check_certificate(certificate: Path, hosts: Iterable[str], now: dt.datetime | None = None) -> None:
    """Refuse a certificate that has ended, has not begun, or does not name one of `hosts`.

    Raises:
        ProvisionError: with the cause and the command that cures it.
    """
    loaded = load_certificate(certificate)
    now = now or dt.datetime.now(dt.UTC)
    if now > loaded.not_valid_after_utc:
        raise ProvisionError(
            f"{certificate} expired on {loaded.not_valid_after_utc:%Y-%m-%d}: renew it, `maskfed-server renew`"
        )
    if now < loaded.not_valid_before_utc:
        raise ProvisionError(
            f"{certificate} is valid from {loaded.not_valid_before_utc:%Y-%m-%d %H:%M} UTC, the clock here says "
            f"{now:%Y-%m-%d %H:%M}: set the clock (NTP)"
        )
    named = certificate_hosts(loaded)
    for host in hosts:
        if host not in named:
            raise ProvisionError(
                f"host {host!r} is not in {certificate}, which names {', '.join(named)}: "
                f"renew it with `maskfed-server renew --host {host}`"
            )


def certificate_hosts(certificate: x509.Certificate) -> list[str]:
    """Names and addresses that a certificate is good for; none for a CA."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]


def client_context(ca_certificate: Path) -> ssl.SSLContext:
    """TLS 1.3 context that trusts this federation's CA and nothing else."""
    context = ssl.create_default_context(cafile=str(ca_certificate))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def _authority() -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
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
        _builder(CA_NAME, key.public_key(), CA_DAYS)
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
    identifier = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return (
        _builder("superlink", server_key.public_key(), days)
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in wanted]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
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


def _builder(subject: str, public_key: ec.EllipticCurvePublicKey, days: int) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    name, issuer = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (subject, CA_NAME))
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + dt.timedelta(days=days))
    )


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
