"""A thread that looks every few seconds for what the operator should hear of, and sends each thing once.

It holds up nothing and ends nothing: a receiver that is away or slow is tried again, and what goes wrong is one line of
the log now and then.
"""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread
from typing import NamedTuple

from deploy.alerts.webhook import Webhook, WebhookError, post, read_webhook
from deploy.errors import ProvisionError
from deploy.identity.keys import replace_file

logger = logging.getLogger(__name__)

LOOK_SECONDS = 10.0
COMPLAINT_SECONDS = 600.0
MOST_AT_ONCE = 20
"""Messages of one look; the last one says how many more there are."""
MOST_KEPT = 5000
SENT_FILE = "webhook.sent.json"


class Alert(NamedTuple):
    """One thing to tell, once. Its text has no number that a site keeps for itself."""

    kind: str
    """refused, lost, cap, given_up, certificate, records or test."""
    key: str
    """The same for the same thing, whenever it is seen."""
    text: str


Source = Callable[[float], Iterable[tuple[str, str, str]]]
"""Given a Unix time, the fields of an `Alert` for each thing that happened since, or holds now."""


class Notifier:
    """What was sent, and what is still to be sent."""

    def __init__(self, home: Path, name: str, sources: Iterable[Source]) -> None:
        self._home, self._name, self._sources = home, name, list(sources)
        self._sent = _read_sent(home)
        self._next_complaint = 0.0

    def look(self) -> int:
        """Send what is new; how many messages that were. Nothing is raised."""
        try:
            webhook = read_webhook(self._home)
            return self._send_new(webhook) if webhook else 0
        except (WebhookError, ProvisionError) as error:
            self._complain(f"{error}; it is tried again")
        except Exception as error:  # a damaged log must not end the thread: the next look may read it
            self._complain(f"{type(error).__name__} while looking for alerts")
        return 0

    def _send_new(self, webhook: Webhook) -> int:
        found = {each[1]: Alert(*each) for source in self._sources for each in source(webhook.since)}
        new = [alert for key, alert in found.items() if key not in self._sent]
        for alert in new[:MOST_AT_ONCE]:
            post(webhook, message(self._name, alert))
            self._remember([alert])
        if len(new) > MOST_AT_ONCE:
            more = len(new) - MOST_AT_ONCE
            post(webhook, message(self._name, Alert(new[-1].kind, "", f"and {more} more: see `status` and the page")))
            self._remember(new[MOST_AT_ONCE:])
        return len(new)

    def _remember(self, alerts: list[Alert]) -> None:
        self._sent.update(dict.fromkeys(alert.key for alert in alerts))
        for key in list(self._sent)[:-MOST_KEPT]:
            del self._sent[key]
        replace_file(self._home / SENT_FILE, json.dumps(list(self._sent)).encode(), 0o600)

    def _complain(self, text: str) -> None:
        if time.monotonic() >= self._next_complaint:
            self._next_complaint = time.monotonic() + COMPLAINT_SECONDS
            logger.warning("alerts: %s", text)


@contextlib.contextmanager
def notifying(home: Path, name: str, sources: Iterable[Source]) -> Iterator[None]:
    """Look and send in a thread of its own while the block runs; leaving the block waits for nobody.

    Args:
        home: of the coordinator or the site; its webhook may be set up while this runs.
        name: who speaks, for the text.
        sources: what there is to tell.
    """
    notifier, is_over = Notifier(home, name, sources), Event()

    def run() -> None:
        while not is_over.is_set():
            notifier.look()
            is_over.wait(LOOK_SECONDS)

    Thread(target=run, name="alerts", daemon=True).start()
    try:
        yield
    finally:
        is_over.set()


def message(name: str, alert: Alert) -> dict[str, str]:
    """What is posted: `text` for people, which chat services show as it is, the rest for programs."""
    text = f"maskfed {name}: {alert.text}"
    return {"text": text, "kind": alert.kind, "who": name, "time": datetime.now(UTC).isoformat(timespec="seconds")}


def _read_sent(home: Path) -> dict[str, None]:
    try:
        found = json.loads((home / SENT_FILE).read_text(encoding="utf-8"))
        return dict.fromkeys(map(str, found)) if isinstance(found, list) else {}
    except (OSError, ValueError, RecursionError):
        return {}
