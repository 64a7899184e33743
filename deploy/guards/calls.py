"""The secret that goes with every call to a control or runtime path, and clients that send it.

Loopback is no authentication: any user of the machine reaches the port. So whoever calls a SuperLink's control and
runtime paths, or a SuperNode's runtime paths, shows a value derived from the 0600 file that Flower's superexec secret
lies in. The value is compared before anything of the call is parsed.
"""

import hashlib
import hmac
from pathlib import Path

import httpx
from flwr.supercore.protobuf.client import ProtobufClient

from deploy.errors import ProvisionError

HEADER = "maskfed-caller"
_PURPOSE = b"maskfed calls of control and runtime paths"


def caller_value(secret_file: Path) -> str:
    """What callers send in `HEADER`: HMAC-SHA256 of a fixed text under the secret, 64 hexadecimal digits.

    Raises:
        ProvisionError: the file cannot be read or is empty.
    """
    try:
        secret = secret_file.read_bytes()
    except OSError as error:
        raise ProvisionError(f"{secret_file}: {error.strerror}") from error
    if not secret:
        raise ProvisionError(f"{secret_file} is empty: head -c 32 /dev/urandom > {secret_file}")
    return hmac.new(secret, _PURPOSE, hashlib.sha256).hexdigest()


def send_with_every_call(value: str) -> None:
    """Let every HTTP client that Flower makes in this process send `value`, ask no proxy and follow no redirect."""
    start = ProtobufClient.__init__

    def guarded(self: ProtobufClient, base_url: str, **options: object) -> None:
        start(self, base_url, **options)  # type: ignore[arg-type]
        kept = self._client
        self._client = httpx.Client(
            verify=options.get("verify", True),  # type: ignore[arg-type]
            timeout=kept.timeout,
            headers={HEADER: value},
            trust_env=False,
            follow_redirects=False,
        )
        kept.close()

    ProtobufClient.__init__ = guarded  # type: ignore[method-assign]
