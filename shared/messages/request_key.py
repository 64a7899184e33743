"""The coordinator's request key: an Ed25519 key that the federation's CA has certified for signing requests only.

The CA key itself stays offline; the certificate travels with each request. Serial numbers grow with each renewal, so a
site that has seen a newer certificate refuses the older one: a key that was stolen is out with the first new request.
"""

import datetime as dt

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from shared.messages.signature import SignatureError

REQUEST_PURPOSE = "2.25.174749951372443094992288095982931101530"
"""Object identifier of the one extended key usage that the certificate has, from our own UUID (ITU-T X.667)."""
MAX_CERTIFICATE_BYTES = 2048


def check_certificate(
    certificate: bytes, authority: bytes, newest: bytes | None = None, now: dt.datetime | None = None
) -> str:
    """The public request key (hexadecimal) of a certificate that came with a request.

    Args:
        certificate: DER, from the other side.
        authority: the pinned CA certificate, PEM.
        newest: DER of the newest certificate that was accepted before; older ones are out.
        now: for tests.

    Raises:
        SignatureError: not of this CA, for another purpose, not valid now, or replaced by a newer one.
    """
    loaded = _load(certificate)
    try:
        loaded.verify_directly_issued_by(x509.load_pem_x509_certificate(authority))
    except (InvalidSignature, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SignatureError("the request key is not certified by this federation's CA") from error
    key = _request_key(loaded)
    now = now or dt.datetime.now(dt.UTC)
    if not loaded.not_valid_before_utc <= now <= loaded.not_valid_after_utc:
        raise SignatureError(
            f"the request key is certified from {loaded.not_valid_before_utc:%Y-%m-%d} to "
            f"{loaded.not_valid_after_utc:%Y-%m-%d}, the clock here says {now:%Y-%m-%d}: `maskfed-server renew`, or NTP"
        )
    if newest is not None and loaded.serial_number < serial_of(newest):
        raise SignatureError("the request key has been replaced by a newer one: restart the coordinator's `start`")
    return key


def serial_of(certificate: bytes) -> int:
    """Serial number of a DER certificate; the larger one is the newer one.

    Raises:
        SignatureError: not a certificate.
    """
    return _load(certificate).serial_number


def _request_key(certificate: x509.Certificate) -> str:
    try:
        usages = [
            usage.dotted_string for usage in certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        ]
        key = certificate.public_key()
    except (x509.ExtensionNotFound, ValueError, UnsupportedAlgorithm) as error:
        raise SignatureError("the certificate is not one for requests") from error
    if usages != [REQUEST_PURPOSE] or not isinstance(key, Ed25519PublicKey):
        raise SignatureError("the certificate is not one for requests")
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()


def _load(certificate: bytes) -> x509.Certificate:
    if len(certificate) > MAX_CERTIFICATE_BYTES:
        raise SignatureError(f"certificate of {len(certificate)} bytes, at most {MAX_CERTIFICATE_BYTES}")
    try:
        return x509.load_der_x509_certificate(certificate)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SignatureError("the certificate of the request key cannot be read") from error
