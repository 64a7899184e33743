"""TLS as a client of the federation: whom it trusts, and what it shows."""

import os
import ssl
import sys
import tempfile
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from deploy.errors import ProvisionError


def client_context(ca_certificate: Path, identity: Path | None = None) -> ssl.SSLContext:
    """TLS 1.3 context that trusts this federation's CA and nothing else.

    Args:
        ca_certificate: file with the federation's CA.
        identity: a site's node key, with the certificate for the door beside it (`.crt`), which is shown then.

    Raises:
        ProvisionError: key or certificate cannot be read, or do not belong together.
    """
    context = ssl.create_default_context(cafile=str(ca_certificate))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if identity is not None:
        try:
            _show_identity(context, identity)
        except (OSError, ValueError, UnsupportedAlgorithm) as error:  # an SSLError is an OSError
            raise ProvisionError(f"{identity}, {identity.with_suffix('.crt')}: {error}") from error
    return context


def _show_identity(context: ssl.SSLContext, node_key: Path) -> None:
    """OpenSSL does not read node keys in OpenSSH form, so it gets the key as PEM, in memory: no file holds it."""
    key = serialization.load_ssh_private_key(node_key.read_bytes(), password=None)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with tempfile.TemporaryFile() if sys.platform != "linux" else os.fdopen(os.memfd_create("key"), "w+b") as file:
        file.write(private)
        file.seek(0)
        context.load_cert_chain(node_key.with_suffix(".crt"), f"/dev/fd/{file.fileno()}")
