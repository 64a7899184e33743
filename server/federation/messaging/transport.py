"""Calls to the SuperLink that end: retries with backoff, deadlines, and what is used of Flower's Grid."""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import httpx
from flwr.app import Message

log = logging.getLogger("maskfed.server")

SLOW_BYTES_PER_SECOND = 10e6
"""A connection slower than this is not waited for."""
SHORTEST_SECONDS, WAITED_SHARE, MOST_LOOKS_PER_SECOND = 0.1, 0.1, 20.0
T = TypeVar("T")


class NodeInfo(Protocol):
    """What is read of a node that is online."""

    @property
    def node_id(self) -> int:
        """Flower's address of a site."""

    @property
    def last_activated_at(self) -> str:
        """ISO 8601; changes when the site's node has been restarted or was away."""


class FlowerGrid(Protocol):
    """The part of Flower's Grid that is used, so that tests can stand in for it."""

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Nodes that are online."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send; the ids to pull replies with."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that are there."""


class Grid(FlowerGrid, Protocol):
    """A Grid that knows who has signed what; nothing asks sites or believes them without one."""

    def forgery(self, message: Message) -> str:
        """Why `message` is not signed by the site that was asked, for its question; empty when it is."""

    def allow(self, reply_bytes: int) -> None:
        """Say how many bytes of arrays the answers to the next questions may have."""


@runtime_checkable
class BoundedGrid(Protocol):
    """Flower's Grid where it takes answers up to a size only."""

    def allow(self, reply_bytes: int) -> None:
        """Say how many bytes of arrays the answers to the next questions may have."""


class ExchangeError(RuntimeError):
    """The SuperLink did not do its part before a deadline."""


@dataclass(frozen=True)
class Timing:
    """Seconds between and until things; tests shorten them."""

    poll_seconds: float = 1.0
    """The longest between two looks for an answer."""
    patience_seconds: float = 15.0
    """A pull that lasts longer gives its turn to the next."""
    backoff_seconds: float = 0.5
    max_backoff_seconds: float = 10.0
    call_deadline_seconds: float = 120.0
    """For one call to the SuperLink, retries included; uploads get the time of 10 MB/s on top."""
    late_seconds: float = 30.0
    """How long after the round's deadline a reply may still come, to be dropped with a record."""
    lost_seconds: float = 60.0
    """How long a lost site may take to come back and be asked again."""
    absent_grace_seconds: float = 20.0
    """How long a round waits for registered sites beyond `min_available`, unless they were absent in the last one."""
    offer_seconds: float = 300.0
    """How long an offer, or another question without arrays, waits for answers ..."""
    offer_seconds_per_site: float = 3.0
    """... and so much longer for each site that is asked."""
    report_seconds: float = 30.0
    """Between two log lines about the same wait."""

    def question_seconds(self, num_sites: int) -> float:
        """How long a question beside the training requests waits for the answers of so many sites."""
        return self.offer_seconds + self.offer_seconds_per_site * num_sites

    def pause(self, waited: float, num_open: int) -> float:
        """Seconds until the next look for an answer: a tenth of those waited for it, so that no round waits long.

        All `num_open` answers together are looked for at most 20 times a second; each at least every `poll_seconds`.
        """
        shortest = max(SHORTEST_SECONDS, num_open / MOST_LOOKS_PER_SECOND)
        return min(self.poll_seconds, max(shortest, WAITED_SHARE * waited))


def persist(call: Callable[[], T], doing: str, timing: Timing, extra_seconds: float = 0.0) -> T:
    """Run a grid call with retries and a deadline, also when the call itself would wait for ever.

    Args:
        call: may be run several times, in a thread of its own.
        doing: what it does, for log and errors.
        timing: deadline and backoff.
        extra_seconds: added to the deadline.

    Raises:
        ExchangeError: no success before the deadline.
    """
    result: list[T] = []
    failure: list[BaseException] = []
    seconds = timing.call_deadline_seconds + extra_seconds

    def attempt() -> None:
        wait, end = timing.backoff_seconds, time.monotonic() + seconds
        while True:
            try:
                result.append(call())
                return
            except BaseException as error:  # carried over to the caller's thread
                if not is_transient(error) or time.monotonic() + wait > end:
                    failure.append(error)
                    return
                log.warning("%s: %s; again in %.1f s", doing, error, wait)
            time.sleep(wait)
            wait = min(2 * wait, timing.max_backoff_seconds)

    thread = threading.Thread(target=attempt, daemon=True, name="grid-call")
    thread.start()
    thread.join(seconds + 1)
    if result:
        return result[0]
    if failure and not is_transient(failure[0]):
        raise failure[0]
    reason = f"last error: {failure[0]}" if failure else "no answer"
    raise ExchangeError(f"{doing}: gave up after {seconds:g} s ({reason})")


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: HTTP 5xx (a busy database gives 500), lost connections, broken-off uploads.

    Flower repeats an upload whose answer was lost, and then takes "not waited for any more" for a failure; sending the
    messages again begins a new session.
    """
    if type(error).__name__ == "ObjectPushError":
        return True
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= 500
    return isinstance(error, httpx.TransportError)
