"""How Flower's processes call: with a secret on control and runtime paths, and not more often than is of use.

Loopback is no authentication: any user of the machine reaches the port. So whoever calls a SuperLink's control and
runtime paths, or a SuperNode's runtime paths, shows a value derived from the 0600 file that Flower's superexec secret
lies in. The value is compared before anything of the call is parsed.
"""

import hashlib
import hmac
import importlib
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.supercore.protobuf.client import ProtobufClient

from deploy.errors import ProvisionError
from deploy.guards.web.http_client import HttpClient

HEADER = "maskfed-caller"
SHORTEST_SECONDS, WAITED_SHARE = 0.1, 0.25
"""Between two looks: a quarter of what was waited already, so that nobody waits much longer for having looked away."""
FIRST_PULL_SECONDS = 0.05
"""Before an object that is on its way is looked for again, and twice as long each time; Flower begins with 1 s."""
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
        kept, context = self._client, options.get("verify")
        self._client = HttpClient(  # type: ignore[assignment]
            context if isinstance(context, ssl.SSLContext) else None, kept.timeout, {HEADER: value}
        )
        kept.close()

    ProtobufClient.__init__ = guarded  # type: ignore[method-assign]


def look_again_soon() -> None:
    """Let this process wait no second for an object that its sender is about to send.

    Raises:
        RuntimeError: Flower's functions have no such pause, so that nothing would change.
    """
    pulls = importlib.import_module("flwr.supercore.inflatable.inflatable_utils")
    for name in ("pull_objects", "pull_and_inflate_object_from_tree"):
        defaults = getattr(pulls, name).__kwdefaults__ or {}
        if "initial_backoff" not in defaults:
            raise RuntimeError(f"{name} has no initial_backoff: this guard is written for another version of Flower")
        defaults["initial_backoff"] = FIRST_PULL_SECONDS


class News:
    """Wakes threads of this process that wait for something to come; counts, so that nothing comes unseen."""

    def __init__(self) -> None:
        self._changed, self.count = threading.Condition(), 0

    def ring(self) -> None:
        """Something has come."""
        with self._changed:
            self.count += 1
            self._changed.notify_all()

    def wait(self, seen: int, seconds: float) -> bool:
        """Whether more than `seen` has come, at most `seconds` from now."""
        with self._changed:
            return self._changed.wait_for(lambda: self.count != seen, max(0.0, seconds))


class StalledError(Exception):
    """Who was sending has stopped in the middle."""


class Pauses:
    """Takes the place of the module `time` in one of Flower's loops: it looks often while a run is active.

    After something has come the first looks are `SHORTEST_SECONDS` apart, then ever less often, down to Flower's own
    interval. So a question waits for a fraction of the time that its run spends anyway, and an idle site asks as
    rarely as before. `news` ends a pause.
    """

    patience: float | None = None
    """Seconds without news after which what is waited for counts as stopped, while something is waited for."""

    def __init__(self, news: News | None = None, share: float = WAITED_SHARE) -> None:
        self._since, self._news, self._share = time.monotonic(), news or News(), share
        self._seen, self._heard = self._news.count, self._since

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)

    def begin(self) -> None:
        """Something has come, or gone: the next look is soon."""
        self._since = time.monotonic()

    def sleep(self, longest_seconds: float) -> None:
        """Sleep until the next look, at most `longest_seconds`.

        Raises:
            StalledError: what is waited for has stopped.
        """
        waited = time.monotonic() - self._since
        has_news = self._news.wait(self._seen, min(longest_seconds, max(SHORTEST_SECONDS, self._share * waited)))
        self._seen, now = self._news.count, time.monotonic()
        self._heard = now if has_news else self._heard
        if self.patience is not None and now - self._heard > self.patience:
            raise StalledError

    @contextmanager
    def waiting_for_parts(self, patience: float) -> Iterator[None]:
        """Inside the block sleep no longer than `patience` seconds without news."""
        self._heard, self.patience = time.monotonic(), patience
        try:
            yield
        finally:
            self.patience = None
