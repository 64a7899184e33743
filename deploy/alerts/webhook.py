"""One webhook: an address of the operator's that is sent a line of JSON by POST. Whoever answers there is not trusted.

The address is a credential of most services, so it lies in a private file of the home and no log or error shows more
of it than the host. Redirects are not followed, no body of an answer is read, and a call ends after `POST_SECONDS`.
"""

import asyncio
import ipaddress
import json
import re
import ssl
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from deploy.errors import ProvisionError
from deploy.identity.addresses import split_proxy
from deploy.identity.keys import check_private, replace_file

FILE = "webhook.json"
POST_SECONDS = 10.0
MOST_CHARACTERS = 2000
_FORM = "give it as https://HOST/PATH, or http:// for this machine itself"


class WebhookError(Exception):
    """A message did not get there; the text names the host and nothing else of the address."""


@dataclass(frozen=True)
class Webhook:
    """Where alerts go."""

    url: str
    proxy: str = ""
    """http://host:port of a proxy that knows CONNECT; empty: straight."""
    since: float = 0.0
    """Unix time from which on things are told: when it was set up."""

    @property
    def host(self) -> str:
        """What may be shown of it."""
        return urlsplit(self.url).hostname or ""


def check_webhook(webhook: Webhook) -> Webhook:
    """The webhook, if its address can be used.

    Raises:
        ProvisionError: no https (or http on loopback), a user or password in it, characters that no address has.
    """
    if len(webhook.url) > MOST_CHARACTERS or not re.fullmatch(r"[!-~]+", webhook.url):
        raise ProvisionError(
            f"the webhook's address has {len(webhook.url)} characters, spaces or characters beyond ASCII: {_FORM}"
        )
    parts = _split(webhook.url)
    if parts.username is not None or parts.password is not None or "@" in parts.netloc:
        raise ProvisionError(f"the webhook's address has a user or password before its host: {_FORM}")
    if parts.scheme not in ("https", "http") or not parts.hostname:
        raise ProvisionError(f"the webhook's address is no web address: {_FORM}")
    if parts.scheme == "http" and not _is_loopback(parts.hostname):
        raise ProvisionError(f"the webhook on {parts.hostname[:80]} has no TLS: {_FORM}")
    if parts.fragment:
        raise ProvisionError("the webhook's address has a part behind #, which is never sent: leave it out")
    if webhook.proxy:
        split_proxy(webhook.proxy)
    return webhook


def write_webhook(home: Path, webhook: Webhook) -> None:
    """Keep it in the home, mode 0600, in place of the last one.

    Raises:
        ProvisionError: as `check_webhook`, or there is no such folder.
    """
    check_webhook(webhook)
    if not home.is_dir():
        raise ProvisionError(f"{home} is no folder: give the one of `start` with --home")
    replace_file(home / FILE, (json.dumps(asdict(webhook)) + "\n").encode(), 0o600)


def read_webhook(home: Path) -> Webhook | None:
    """The home's webhook; None where there is none.

    Raises:
        ProvisionError: the file is damaged, or others can read it.
    """
    path = home / FILE
    if not path.exists():
        return None
    check_private(path)
    try:
        found = Webhook(**json.loads(path.read_text(encoding="utf-8")))
        if not (isinstance(found.url, str) and isinstance(found.proxy, str) and isinstance(found.since, int | float)):
            raise TypeError("wrong types")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ProvisionError(f"{path} is damaged: set the webhook up again with `alerts --to`") from error
    return check_webhook(found)


def post(webhook: Webhook, message: Mapping[str, str]) -> int:
    """Send one message and wait for its status, at most `POST_SECONDS` in all.

    Returns:
        The status, 200 to 299.

    Raises:
        WebhookError: no answer in time, none at all, or another status; a redirect is one.
    """
    try:
        status = asyncio.run(_post(webhook, json.dumps(dict(message)).encode(), _trust()))
    except TimeoutError as error:
        raise WebhookError(f"{webhook.host} did not answer within {POST_SECONDS:.0f} s") from error
    except Exception as error:  # whatever a library raises over what a stranger has sent
        raise WebhookError(f"{webhook.host} cannot be reached ({type(error).__name__})") from error
    if not 200 <= status < 300:
        moved = ", and redirects are not followed" if 300 <= status < 400 else ""
        raise WebhookError(f"{webhook.host} answered {status}{moved}")
    return status


async def _post(webhook: Webhook, body: bytes, trust: ssl.SSLContext) -> int:
    import httpx

    headers = {"Content-Type": "application/json", "User-Agent": "maskfed", "Connection": "close"}
    # Over everything: each read of a slow answer would begin a patience of its own.
    async with asyncio.timeout(POST_SECONDS):
        options = {"verify": trust, "proxy": webhook.proxy or None, "trust_env": False, "follow_redirects": False}
        async with (
            httpx.AsyncClient(timeout=POST_SECONDS, **options) as client,  # type: ignore[arg-type]
            client.stream("POST", webhook.url, content=body, headers=headers) as answer,
        ):
            return answer.status_code


def _trust() -> ssl.SSLContext:
    """The authorities of this machine, where organisations add their own, and the usual ones."""
    import certifi

    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise ProvisionError(f"the webhook's address is no web address: {_FORM}") from error
    return parts


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
