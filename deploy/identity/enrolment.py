"""What a site and the coordinator hand each other once: an enrolment request and a join bundle, both without secrets.

The request is one line that survives mail and chat. It is signed with the site's node key and with its signing key,
over alias, both keys and time, so that nobody can enrol a key he does not have; old requests are refused, known keys
are refused by the registry.
"""

import base64
import binascii
import datetime as dt
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from deploy.errors import ProvisionError
from deploy.identity.addresses import split_address
from deploy.identity.keys import (
    check_private,
    create_file,
    fingerprint,
    load_certificate,
    load_signing_key,
    public_key_digest,
    signing_key_text,
)
from deploy.identity.request_key import REQUEST_KEY, read_request_certificate
from deploy.identity.site_certificates import issue_site_certificate

PREFIX = "maskfed-enrol-2:"
OLD_PREFIX = "maskfed-enrol-1:"
"""Of lines without a signing key, from versions before signed messages."""
BUNDLE_SCHEMA = 3
CURE_OLD = "install this version at the site, run `maskfed-client enroll ALIAS` there again and send the new line"
CURE_OLD_BUNDLE = (
    "run `maskfed-client enroll ALIAS --renew signing` there, send the line, and join with the bundle of "
    "`maskfed-server sites renew LINE --bundle FILE`"
)
REQUEST_DAYS = 14
ALIAS_PATTERN = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")
LARGEST_BUNDLE_BYTES = 64 * 1024


@dataclass(frozen=True)
class EnrolmentRequest:
    """A checked request: the sender holds the private halves of `public_key` (OpenSSH line) and `signing_key` (hex)."""

    alias: str
    public_key: str
    signing_key: str
    created: str


@dataclass(frozen=True)
class JoinBundle:
    """What a site needs to find and trust the coordinator; `code_digest` names the client code it runs with.

    `request_certificate` (PEM) names the key that signs requests now: older ones are not accepted any more.
    `site_certificate` (PEM) is over the site's own node key and opens the door.
    """

    schema: int
    alias: str
    address: str
    ca_certificate: str
    request_certificate: str
    site_certificate: str
    code_digest: str
    public_key_digest: str
    signing_key: str

    @property
    def ca_fingerprint(self) -> str:
        """To be compared with the coordinator by phone."""
        return fingerprint(self.ca_certificate.encode())


def check_alias(alias: str) -> str:
    """Return `alias` when it can be a site's name: it becomes a file and folder name and a key of random streams.

    Raises:
        ProvisionError: other than 1 to 32 lower-case letters, digits and inner hyphens.
    """
    if not ALIAS_PATTERN.fullmatch(alias):
        raise ProvisionError(f"alias {alias[:40]!r}: give 1 to 32 lower-case letters, digits and inner hyphens")
    return alias


def write_request(alias: str, node_key: Path, signing_key: Path) -> str:
    """Build the one-line enrolment request of a site from its private keys."""
    for path in (node_key, signing_key):
        check_private(path)
    node = serialization.load_ssh_private_key(node_key.read_bytes(), password=None)
    if not isinstance(node, ec.EllipticCurvePrivateKey):
        raise ProvisionError(f"{node_key} is not an elliptic curve key: run `maskfed-client enroll` in a new folder")
    signing = load_signing_key(signing_key)
    public = node.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    created = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    fields = asdict(EnrolmentRequest(check_alias(alias), public.decode(), signing_key_text(signing), created))
    signed = _signed_bytes(fields)
    fields["signature"] = base64.b64encode(node.sign(signed, ec.ECDSA(hashes.SHA384()))).decode()
    fields["second_signature"] = base64.b64encode(signing.sign(signed)).decode()
    return PREFIX + base64.urlsafe_b64encode(json.dumps(fields, sort_keys=True).encode()).decode()


def read_request(line: str, now: dt.datetime | None = None) -> EnrolmentRequest:
    """Check an enrolment line: form, alias, both signatures, age.

    Raises:
        ProvisionError: anything is wrong with it; nothing has been registered then.
    """
    fields = _decode(line.strip())
    try:
        created = dt.datetime.fromisoformat(fields["created"])
        _check_signatures(fields)
        age = (now or dt.datetime.now(dt.UTC)) - created
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, binascii.Error) as error:
        raise ProvisionError(
            "enrolment request: a signature or key is not valid: ask the site for a new line"
        ) from error
    if not dt.timedelta(minutes=-10) < age < dt.timedelta(days=REQUEST_DAYS):
        raise ProvisionError(
            f"enrolment request: made {fields['created']}, at most {REQUEST_DAYS} days are accepted (and 10 minutes "
            "into the future): ask the site for a new line, or set the clocks"
        )
    return EnrolmentRequest(
        check_alias(fields["alias"]), fields["public_key"], fields["signing_key"], fields["created"]
    )


def _check_signatures(fields: dict[str, str]) -> None:
    """Both keys have signed the same line; raises what the libraries raise."""
    node = serialization.load_ssh_public_key(fields["public_key"].encode())
    if not isinstance(node, ec.EllipticCurvePublicKey):
        raise ValueError("not an elliptic curve key")
    if not re.fullmatch(r"[0-9a-f]{64}", fields["signing_key"]):
        raise ValueError("not an Ed25519 key")
    signing = Ed25519PublicKey.from_public_bytes(bytes.fromhex(fields["signing_key"]))
    first, second = (base64.b64decode(fields[name], validate=True) for name in ("signature", "second_signature"))
    node.verify(first, _signed_bytes(fields), ec.ECDSA(hashes.SHA384()))
    signing.verify(second, _signed_bytes(fields))


def write_bundle(path: Path, request: EnrolmentRequest, address: str, pki: Path, code_digest: str) -> JoinBundle:
    """Write the join bundle for an accepted request to a new file; `pki` is the coordinator's folder of that name.

    Raises:
        ProvisionError: the file exists, or a key or CA is missing in `pki`.
    """
    split_address(address)
    certificate = read_request_certificate(pki / REQUEST_KEY.name)
    bundle = JoinBundle(
        schema=BUNDLE_SCHEMA,
        alias=request.alias,
        address=address,
        ca_certificate=(pki / "ca.crt").read_text(encoding="ascii"),
        request_certificate=certificate.public_bytes(serialization.Encoding.PEM).decode("ascii"),
        site_certificate=issue_site_certificate(pki, request.alias, request.public_key),
        code_digest=code_digest,
        public_key_digest=public_key_digest(request.public_key),
        signing_key=request.signing_key,
    )
    create_file(path, json.dumps(asdict(bundle), indent=2).encode() + b"\n")
    return bundle


def read_bundle(path: Path) -> JoinBundle:
    """Read and check a join bundle.

    Raises:
        ProvisionError: not a bundle of this schema, or a field of the wrong form.
    """
    try:
        if path.stat().st_size > LARGEST_BUNDLE_BYTES:
            raise ProvisionError(f"bundle {path}: larger than {LARGEST_BUNDLE_BYTES} bytes: not a join bundle")
        fields = json.loads(path.read_bytes())
    except OSError as error:
        raise ProvisionError(f"bundle {path}: {error.strerror}; give the file that `sites add` wrote") from error
    except ValueError as error:
        raise ProvisionError(f"bundle {path}: not JSON; give the file that `sites add` wrote") from error
    names = set(JoinBundle.__dataclass_fields__)
    if isinstance(fields, dict) and fields.get("schema") in range(1, BUNDLE_SCHEMA):
        raise ProvisionError(f"bundle {path}: made by an older maskfed: {CURE_OLD_BUNDLE}")
    if not isinstance(fields, dict) or set(fields) != names or fields["schema"] != BUNDLE_SCHEMA:
        raise ProvisionError(
            f"bundle {path}: not a join bundle of schema {BUNDLE_SCHEMA}: use the same maskfed version"
        )
    if not all(isinstance(fields[name], str) for name in names - {"schema"}):
        raise ProvisionError(f"bundle {path}: a field is not a text: give the file that `sites add` wrote")
    bundle = JoinBundle(**fields)
    check_alias(bundle.alias)
    split_address(bundle.address)
    for certificate in (bundle.ca_certificate, bundle.request_certificate, bundle.site_certificate):
        load_certificate(certificate.encode())
    for digest in (bundle.code_digest, bundle.public_key_digest, bundle.signing_key):
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ProvisionError(
                f"bundle {path}: {digest[:20]!r} is not a SHA-256: give the file that `sites add` wrote"
            )
    return bundle


def _decode(line: str) -> dict[str, str]:
    if line.startswith(OLD_PREFIX):
        raise ProvisionError(f"enrolment request: made by an older maskfed, without a signing key: {CURE_OLD}")
    if not line.startswith(PREFIX) or len(line) > 4096:
        raise ProvisionError(f"enrolment request: must be one line that starts with {PREFIX!r}: copy it whole")
    try:
        fields: Any = json.loads(base64.b64decode(line[len(PREFIX) :], altchars=b"-_", validate=True))
    except (ValueError, binascii.Error) as error:
        raise ProvisionError("enrolment request: cannot be decoded: copy the line whole") from error
    wanted = {*EnrolmentRequest.__dataclass_fields__, "signature", "second_signature"}
    if not isinstance(fields, dict) or set(fields) != wanted or not all(isinstance(v, str) for v in fields.values()):
        raise ProvisionError("enrolment request: unknown form: use the same maskfed version on both sides")
    return fields


def _signed_bytes(fields: dict[str, str]) -> bytes:
    """Every field after its length, so that no two requests share their bytes."""
    parts = [PREFIX, *(fields[name] for name in EnrolmentRequest.__dataclass_fields__)]
    return b"".join(len(part.encode()).to_bytes(8, "big") + part.encode() for part in parts)
