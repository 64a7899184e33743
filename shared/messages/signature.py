"""Who said it: Ed25519 signatures over what a message says and where it belongs. No flwr, no torch.

Identity comes from the message, never from the route it came by. A signature covers a domain, the purpose, run and
round, the site that is asked or answers, the request that is answered, and the digests of header and arrays; so one
message cannot be passed off as another, nor as a site's other answer. The times of the question are covered, so that an
old one, or the answer to it, is known as old.
"""

import hashlib
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from shared.errors import InputError

DOMAIN = b"maskfed message 2"
"""No other statement of ours begins like this; another encoding gets another number."""
SIGNATURE_BYTES = 64
KEY_PATTERN = r"^[0-9a-f]{64}$"
"""A public key as text: its 32 bytes, hexadecimal."""
Purpose = Literal["train", "offer", "audit", "statistics", "mean_image", "secure_keys", "unmask"]
Direction = Literal["request", "reply"]
PURPOSES: dict[str, Purpose] = {
    "train": "train",
    "query": "statistics",
    "query.audit": "audit",
    "query.offer": "offer",
    "query.mean_image": "mean_image",
    "query.secure_keys": "secure_keys",
    "query.unmask": "unmask",
}
"""Purpose by the message type that routes a message to its handler; a type that is not listed is never sent."""


class SignatureError(InputError):
    """A message is not signed by whom it should be from, or not for the place where it turned up."""


@dataclass(frozen=True)
class Statement:
    """What is signed.

    Attributes:
        purpose: kind of question.
        direction: request (signed by the coordinator) or reply (signed by the site).
        run: name of the run or question.
        server_round: of the run; 0 outside of the rounds.
        alias: the site that is asked, or that answers.
        request_digest: of the request that this is, or that is answered (`request_digest`), hexadecimal.
        header_digest: SHA-256 of the header as it travels, hexadecimal.
        arrays_digest: SHA-256 over the arrays as they travel (`arrays_digest`), hexadecimal.
        issued_ms: when the question was asked, by the coordinator's clock, in milliseconds of Unix time.
        expires_ms: until when it stands, likewise.
    """

    purpose: Purpose
    direction: Direction
    run: str
    server_round: int
    alias: str
    request_digest: str
    header_digest: str
    arrays_digest: str
    issued_ms: int
    expires_ms: int

    def to_bytes(self) -> bytes:
        """One byte string per statement: every field with its length before it, so no two statements share one."""
        texts = (self.purpose, self.direction, self.run, str(self.server_round), self.alias)
        digests = (self.request_digest, self.header_digest, self.arrays_digest)
        times = (str(self.issued_ms), str(self.expires_ms))
        return framed([DOMAIN, *(text.encode() for text in (*texts, *digests, *times))])


def framed(parts: Iterable[bytes]) -> bytes:
    """Byte strings behind each other, each after its length in 8 bytes."""
    return b"".join(len(part).to_bytes(8, "big") + part for part in parts)


def request_digest(header_digest: str, arrays_digest: str) -> str:
    """What a reply names the request by: SHA-256 over both digests of the request, hexadecimal."""
    return hashlib.sha256(framed([b"maskfed request 1", header_digest.encode(), arrays_digest.encode()])).hexdigest()


def sign(key: Ed25519PrivateKey, statement: Statement) -> bytes:
    """The signature (64 bytes); the same statement has the same one each time (RFC 8032)."""
    return key.sign(statement.to_bytes())


def check_signature(public_key: str, statement: Statement, signature: bytes) -> None:
    """Refuse what the holder of `public_key` (hexadecimal) did not sign.

    Raises:
        SignatureError: the signature is not of this key, or of another statement.
    """
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)).verify(signature, statement.to_bytes())
    except (InvalidSignature, ValueError) as error:
        who = f"site {statement.alias!r}" if statement.direction == "reply" else "the coordinator"
        raise SignatureError(
            f"{statement.purpose} {statement.direction}: not signed by {who} for this place"
        ) from error


def public_text(key: Ed25519PrivateKey) -> str:
    """The public half as text (64 hexadecimal digits)."""
    return key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()


def read_key(path: Path, cure: str) -> Ed25519PrivateKey:
    """Read a private signing key (the first key of a PEM file that nobody else may read).

    Args:
        path: the file.
        cure: what makes it, for the error.

    Raises:
        InputError: missing, readable by others, or no Ed25519 key.
    """
    try:
        mode, data = stat.S_IMODE(path.stat().st_mode), path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; {cure}") from error
    if mode & 0o077:
        raise InputError(f"{path} has mode {mode:04o}, at most 0600 is safe: chmod 600 {path}")
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path} is not a private key in PEM form: {cure}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{path} is not an Ed25519 key: {cure}")
    return key
