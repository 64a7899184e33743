"""Signatures in Flower's messages: a third record beside header and arrays, checked before either is parsed.

A request's seal names site, run, round and its times, and brings the certificate of the key that signed it. A reply's
seal is the signature alone: the coordinator knows what it asked of whom.
"""

import hashlib
from dataclasses import dataclass, replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from shared.messages.request_key import MAX_CERTIFICATE_BYTES
from shared.messages.signature import (
    SIGNATURE_BYTES,
    Direction,
    Purpose,
    SignatureError,
    Statement,
    framed,
    request_digest,
    sign,
)

SEAL = "signature"
MAX_NAME = 100
REQUEST_FIELDS = frozenset({"alias", "run", "round", "issued_ms", "expires_ms", "certificate", "signature"})


@dataclass(frozen=True)
class Digests:
    """SHA-256 of a message's header and of its arrays, as they travel."""

    header: str
    arrays: str

    @property
    def request(self) -> str:
        """Names a request in its replies."""
        return request_digest(self.header, self.arrays)


@dataclass(frozen=True)
class Seal:
    """What stands in a seal, its form checked and nothing else; all but the signature are a request's."""

    signature: bytes
    alias: str = ""
    run: str = ""
    server_round: int = 0
    issued_ms: int = 0
    expires_ms: int = 0
    certificate: bytes = b""

    def statement(self, purpose: Purpose, alias: str, digests: Digests) -> Statement:
        """What a request with this seal and content states when it is for `purpose` and `alias`."""
        contents = (digests.request, digests.header, digests.arrays)
        times = (self.issued_ms, self.expires_ms)
        return Statement(purpose, "request", self.run, self.server_round, alias, *contents, *times)


def digests_of(content: RecordDict) -> Digests:
    """Digests of the bytes that a message brings; nothing is parsed or copied.

    Raises:
        SignatureError: records that no message of ours has, which no signature would cover.
    """
    header, arrays = content.get("header"), content.get("arrays")
    if not set(content) <= {"header", "arrays", SEAL} or not isinstance(header, ConfigRecord):
        raise SignatureError("message with records that are not covered by its signature")
    if set(header) != {"json"} or not isinstance(header["json"], str):
        raise SignatureError("message header with fields that are not covered by its signature")
    if arrays is not None and not isinstance(arrays, ArrayRecord):
        raise SignatureError("message with records that are not covered by its signature")
    try:
        text = header["json"].encode()
    except UnicodeError as error:
        raise SignatureError("message header that is not text") from error
    return Digests(hashlib.sha256(text).hexdigest(), _arrays_digest(arrays))


def _arrays_digest(arrays: ArrayRecord | None) -> str:
    """Over name, type, shape and bytes of each array, by name; no record counts as one without arrays."""
    hasher = hashlib.sha256(b"maskfed arrays 1")
    for name, array in sorted(arrays.items() if arrays is not None else ()):
        about = (name, str(array.dtype), ",".join(map(str, array.shape)), str(array.stype))
        hasher.update(framed([part.encode("utf-8", "backslashreplace") for part in about]))
        hasher.update(len(array.data).to_bytes(8, "big"))
        hasher.update(array.data)
    return hasher.hexdigest()


def seal_request(content: RecordDict, statement: Statement, key: Ed25519PrivateKey, certificate: bytes) -> RecordDict:
    """The request with its seal; header and arrays are shared with `content`, so that they are uploaded once."""
    return _sealed(
        content,
        {
            "alias": statement.alias,
            "run": statement.run,
            "round": statement.server_round,
            "issued_ms": statement.issued_ms,
            "expires_ms": statement.expires_ms,
            "certificate": certificate,
            "signature": sign(key, statement),
        },
    )


def seal_reply(content: RecordDict, asked: Statement, key: Ed25519PrivateKey) -> RecordDict:
    """The reply with its seal, as the answer to the request that `asked` states.

    Ed25519 draws nothing: the same reply to the same request has the same seal each time, so that a stored reply is
    sent again as it was.
    """
    digests = digests_of(content)
    own = replace(asked, direction="reply", header_digest=digests.header, arrays_digest=digests.arrays)
    return _sealed(content, {"signature": sign(key, own)})


def _sealed(content: RecordDict, fields: dict[str, str | int | bytes]) -> RecordDict:
    records = {name: record for name, record in content.items() if name != SEAL}
    return RecordDict({**records, SEAL: ConfigRecord(dict(fields))})


def read_seal(content: RecordDict, direction: Direction) -> Seal:
    """The seal of a message from the other side, its form checked.

    Raises:
        SignatureError: there is none, or it is not of this form.
    """
    record = content.get(SEAL)
    names = {"signature"} if direction == "reply" else REQUEST_FIELDS
    if not isinstance(record, ConfigRecord) or set(record) != names:
        raise SignatureError(f"{direction} without a signature: both sides need the same maskfed version")
    fields = dict(record)
    signature, certificate = fields["signature"], fields.get("certificate", b"")
    alias, run = fields.get("alias", ""), fields.get("run", "")
    if not isinstance(signature, bytes) or len(signature) != SIGNATURE_BYTES:
        raise SignatureError(f"{direction} with a signature that is not of {SIGNATURE_BYTES} bytes")
    if not isinstance(certificate, bytes) or len(certificate) > MAX_CERTIFICATE_BYTES:
        raise SignatureError("request with a certificate of another form")
    if not (isinstance(alias, str) and isinstance(run, str) and max(len(alias), len(run)) <= MAX_NAME):
        raise SignatureError("request whose seal names no site and run")
    server_round, issued_ms, expires_ms = (
        _natural(fields.get(name, 0)) for name in ("round", "issued_ms", "expires_ms")
    )
    return Seal(signature, alias, run, server_round, issued_ms, expires_ms, certificate)


def _natural(number: object) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**53:
        raise SignatureError("request whose seal has no round or times")
    return number
