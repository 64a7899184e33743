"""Keys, secrets and certificates as files: each made on the machine that uses it, never overwritten, checked when read.

Node keys are elliptic curve P-384 in OpenSSH form, which is what Flower authenticates nodes with. Messages are signed
with Ed25519 keys in PEM form.
"""

import contextlib
import datetime as dt
import errno
import hashlib
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from deploy.errors import ProvisionError

logger = logging.getLogger(__name__)

SECRET_BYTES = 32
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
EXPIRY_WARNING_DAYS = 30


def create_file(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a new file with `mode`, whole or not at all; an existing one is never overwritten.

    Raises:
        ProvisionError: the file exists already, the folder cannot be written, or the disk is full.
    """
    if path.exists():
        raise ProvisionError(f"{path} exists already: move it away first, nothing is overwritten")
    replace_file(path, data, mode)


def replace_file(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one; fsynced.

    Raises:
        ProvisionError: the folder cannot be written, or the disk is full; the old file is untouched then.
    """
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.unlink(missing_ok=True)
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            os.fchmod(file.fileno(), mode)  # the umask must not decide who reads a key
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        cure = "free some space there" if error.errno in _FULL else "give a folder that this user can write"
        raise ProvisionError(f"{path}: {error.strerror}; {cure}, then run the command again") from error


@contextlib.contextmanager
def removed_if_unfinished(folder: Path) -> Iterator[Path]:
    """A new folder to make files in, gone after the block with whatever was not moved out; also what a kill left."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(mode=0o700)
        yield folder
    except OSError as error:
        cure = "free some space there" if error.errno in _FULL else "give a folder that this user can write"
        raise ProvisionError(f"{folder}: {error.strerror}; {cure}, then run the command again") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_private(path: Path) -> None:
    """Refuse a private file that somebody else could read or that is missing.

    Raises:
        ProvisionError: not a file, or its mode has any bit for group or others.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        cure = "`maskfed-client enroll` makes a site's keys, `maskfed-server init` a coordinator's"
        raise ProvisionError(f"{path}: {error.strerror}; {cure}") from error
    if mode & 0o077:
        raise ProvisionError(f"{path} has mode {mode:04o}, at most 0600 is safe: chmod 600 {path}")


def check_private_folder(path: Path) -> None:
    """Refuse a folder of private files that somebody else could enter.

    Raises:
        ProvisionError: its mode has any bit for group or others.
    """
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ProvisionError(f"{path} has mode {mode:04o}, at most 0700 is safe: chmod 700 {path}")


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
    create_file(path.with_name(path.name + ".pub"), public + b"\n")
    create_file(path, private, 0o600)
    return public.decode("ascii")


def create_signing_key(path: Path) -> str:
    """Write an Ed25519 key to `path` (0600), its public half to `path`.pub; return that half, hexadecimal."""
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    create_file(path.with_name(path.name + ".pub"), signing_key_text(key).encode() + b"\n")
    create_file(path, private, 0o600)
    return signing_key_text(key)


def load_signing_key(path: Path) -> Ed25519PrivateKey:
    """Read a signing key.

    Raises:
        ProvisionError: not an Ed25519 key in PEM form.
    """
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ProvisionError(f"{path} is not a private key: `maskfed-client enroll ALIAS --renew signing`") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ProvisionError(f"{path} is not an Ed25519 key: `maskfed-client enroll ALIAS --renew signing`")
    return key


def signing_key_text(key: Ed25519PrivateKey) -> str:
    """The public half as text: 64 hexadecimal digits."""
    return key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()


def public_key_digest(public_key: str) -> str:
    """SHA-256 (hex) of the key part of an OpenSSH line; a comment does not change it."""
    return hashlib.sha256(" ".join(public_key.split()[:2]).encode()).hexdigest()


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


def warn_of_expiry(certificate: Path) -> None:
    """Log a warning when a certificate ends within 30 days; called at each start."""
    left = days_left(certificate)
    if left < EXPIRY_WARNING_DAYS:
        logger.warning("%s: only %.0f days left; see the runbook, deploy/README.md", certificate, left)


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
