"""What `alerts` of both programs does: set the webhook up, take it away, send a test, say how it stands."""

import sys
import time
from pathlib import Path

from deploy.alerts.notifier import Alert, message
from deploy.alerts.webhook import FILE, Webhook, WebhookError, check_webhook, post, read_webhook, write_webhook
from deploy.errors import ProvisionError

FROM_INPUT = "-"


def change_alerts(home: Path, name: str, to: str, proxy: str, *, off: bool, test: bool) -> dict[str, object]:
    """Do what was asked for.

    Args:
        home: of the coordinator or the site.
        name: who speaks in a test message.
        to: a new address; `-`: read from standard input, so that no list of processes shows it; empty: none.
        proxy: http://host:port for the new address.
        off: take the webhook away.
        test: send a test message and wait for the answer.

    Returns:
        `host` (None: nothing is sent), `proxy`, and `tested`, the answer's status or None.

    Raises:
        ProvisionError: an address that cannot be used, options that contradict each other, or a test that failed.
    """
    if off and (to or test or proxy):
        raise ProvisionError("--off goes with none of --to, --proxy and --test: give one of them")
    if proxy and not to:
        raise ProvisionError("--proxy is part of a new address: give --to as well")
    if off:
        (home / FILE).unlink(missing_ok=True)
    if to:
        url = sys.stdin.readline().strip() if to == FROM_INPUT else to
        write_webhook(home, check_webhook(Webhook(url, proxy, time.time())))
    webhook = read_webhook(home)
    status = _tested(webhook, name) if test else None
    host = webhook.host if webhook else None
    return {"host": host, "proxy": webhook.proxy if webhook else "", "tested": status}


def in_words(facts: dict[str, object]) -> str:
    """The same for people."""
    if facts["host"] is None:
        return "alerts go nowhere: `alerts --to https://HOST/PATH` sends them to a webhook"
    way = f" through {facts['proxy']}" if facts["proxy"] else ""
    told = f"; a test message was taken (status {facts['tested']})" if facts["tested"] else ""
    return f"alerts go to {facts['host']}{way} while `start` runs{told}"


def _tested(webhook: Webhook | None, name: str) -> int:
    if webhook is None:
        raise ProvisionError("there is no webhook to test: give --to https://HOST/PATH")
    try:
        return post(webhook, message(name, Alert("test", "", "this is a test: alerts arrive")))
    except WebhookError as error:
        raise ProvisionError(f"the test did not arrive: {error}; what is set up stays") from error
