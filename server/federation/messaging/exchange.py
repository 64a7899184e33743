"""Messages to sites and back: pushes, pulls, deadlines, retries. Knows nothing about models.

A pull returns at once while nothing of a reply has arrived, but blocks while the reply is still uploading, and a site
that stores one small piece after the other can keep it blocked for an hour. So every pull runs in a thread of its own,
at most one for each site, and the next starts when all others have ended or have lasted longer than `patience_seconds`:
finished replies are fetched one after the other (memory for one), and a stuck one holds up nobody.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import httpx
from flwr.app import Message, MessageType, RecordDict

from server.federation.messaging.sender import forgery
from server.federation.messaging.transport import (
    SLOW_BYTES_PER_SECOND,
    ExchangeError,
    Grid,
    Timing,
    is_transient,
    persist,
)
from shared.messages.text import one_line

log = logging.getLogger("maskfed.server")

MAX_PULLS = 4
"""Pulls at a time. One whose question has expired is not counted any more: it ends by itself, or with the process."""
LOST_CODES = {3: "reply unavailable", 4: "reply unavailable", 5: "node unavailable", 8: "client process died"}
"""Flower error codes after which asking again makes sense; all others are the site's own failure."""


@dataclass
class _OpenQuestion:
    """A question that is open; whoever pulls its answer is the only one that changes it."""

    site: str
    node_id: int
    server_round: int
    asked_at: float
    expires_at: float
    due_at: float
    """When to look for the answer next."""
    backoff: float
    pulled_since: float | None = None
    """Start of the pull under way; None: there is none."""


@dataclass(frozen=True)
class Arrival:
    """A reply, or an error in its place, from a site that was asked in `server_round`."""

    site: str
    server_round: int
    message: Message | None
    problem: str = ""
    """Why there is no message; empty when there is one."""
    is_lost: bool = False
    """The site may answer when asked again."""
    is_forged: bool = False
    """Somebody else's message came where this site's answer was looked for; the question stays open."""
    seconds: float = 0.0
    """From question to answer."""


class Exchange:
    """Asks sites and hands every arrival to `on_arrival`, one at a time.

    `on_arrival` runs in a puller's thread under the exchange's lock; the arrival's message is dropped when it returns.
    """

    def __init__(self, grid: Grid, on_arrival: Callable[[Arrival], None], timing: Timing | None = None) -> None:
        self.grid, self.on_arrival, self.timing = grid, on_arrival, timing or Timing()
        self._patience = self.timing.patience_seconds
        self._asked: dict[str, _OpenQuestion] = {}
        self._is_closed = False
        self._fatal: BaseException | None = None
        # Guards everything above; notified whenever a pull may start earlier than was known before.
        self._changed = threading.Condition()
        threading.Thread(target=self._start_pulls, daemon=True, name="pulls").start()

    def expect(self, reply_bytes: int) -> None:
        """Tell how large replies are: the patience with a pull grows by its time at 10 MB/s."""
        self._patience = self.timing.patience_seconds + reply_bytes / SLOW_BYTES_PER_SECOND
        self.grid.allow(reply_bytes)

    def close(self) -> None:
        """Stop pulling; a pull that blocks ends with the process."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def raise_fatal(self) -> None:
        """Raise in the caller's thread what ended the pulls (the run was stopped, for example)."""
        if self._fatal is not None:
            raise self._fatal

    def online(self) -> dict[int, str]:
        """Nodes that are online, with the time of their last activation."""
        nodes = persist(lambda: list(self.grid.get_nodes()), "asking who is online", self.timing)
        return {node.node_id: node.last_activated_at for node in nodes}

    def push(
        self,
        record: RecordDict,
        nodes: Mapping[str, int],
        server_round: int,
        deadline: float,
        message_type: str = MessageType.TRAIN,
    ) -> None:
        """Send one shared record to `nodes` (site to node id); `deadline` is on `time.monotonic`'s clock.

        Round 0 is for questions outside of the rounds.

        Raises:
            ExchangeError: the SuperLink did not take the messages in time.
        """
        what = f"round {server_round}" if server_round else "the question"
        expires_at = deadline + self.timing.late_seconds
        ids = self._send(record, nodes, server_round, expires_at, message_type, what)
        now = time.monotonic()
        with self._changed:
            for (site, node_id), message_id in zip(nodes.items(), ids, strict=True):
                if message_id is None:
                    raise ExchangeError(f"{what}: the SuperLink did not take the message to {site}")
                self._asked[message_id] = _OpenQuestion(
                    site, node_id, server_round, now, expires_at, now, self.timing.backoff_seconds
                )
            self._changed.notify_all()

    def forget(self, site: str) -> None:
        """Stop polling for the answers of a site that is about to be asked again."""
        with self._changed:
            for message_id, asked in list(self._asked.items()):
                if asked.site == site and asked.pulled_since is None:
                    del self._asked[message_id]

    def _send(
        self,
        record: RecordDict,
        nodes: Mapping[str, int],
        server_round: int,
        expires_at: float,
        message_type: str,
        what: str,
    ) -> list[str | None]:
        ttl = max(1.0 + self.timing.late_seconds, expires_at - time.monotonic())
        # The same messages may be sent twice: the SuperLink knows them by the hash of their content.
        messages = [
            Message(record, node_id, message_type, ttl=ttl, group_id=str(server_round)) for node_id in nodes.values()
        ]
        payload = sum(len(array.data) for each in record.array_records.values() for array in each.values())
        return persist(
            lambda: list(self.grid.push_messages(messages)),
            f"sending {what}",
            self.timing,
            payload / SLOW_BYTES_PER_SECOND,
        )

    def _start_pulls(self) -> None:
        with self._changed:
            while not self._is_closed:
                now = time.monotonic()
                self._asked = {key: asked for key, asked in self._asked.items() if asked.expires_at >= now}
                message_id, seconds = self._next_pull(now)
                if message_id is None:
                    self._changed.wait(seconds)
                    continue
                asked = self._asked[message_id]
                asked.pulled_since = now
                threading.Thread(
                    target=self._pull, args=(message_id, asked), daemon=True, name=f"pull-{asked.site}"
                ).start()

    def _next_pull(self, now: float) -> tuple[str | None, float | None]:
        """The question to look after now; or none, and in how many seconds there may be one (None: not known)."""
        pulls = [asked for asked in self._asked.values() if asked.pulled_since is not None]
        busy_sites = {asked.site for asked in pulls}
        free = {key: asked for key, asked in self._asked.items() if asked.site not in busy_sites}
        if not free:
            return None, None
        message_id = min(free, key=lambda key: free[key].due_at)
        out_of_patience = (since + self._patience for asked in pulls if (since := asked.pulled_since) is not None)
        start = max(free[message_id].due_at, max(out_of_patience, default=now))
        if len(pulls) >= MAX_PULLS:
            start = max(start, min(asked.expires_at for asked in pulls))
        return (message_id, None) if start <= now else (None, start - now)

    def _pull(self, message_id: str, asked: _OpenQuestion) -> None:
        try:
            arrivals = self._fetch(message_id, asked)
            with self._changed:
                while arrivals:
                    self._deliver(message_id, arrivals.pop(0))
        except BaseException as error:  # carried over to the round loop's thread
            self._fatal = error
            self.close()
        finally:
            with self._changed:
                asked.pulled_since = None
                self._changed.notify_all()

    def _fetch(self, message_id: str, asked: _OpenQuestion) -> list[Arrival]:
        """What a pull brings, and when to look again."""
        try:
            messages = list(self.grid.pull_messages([message_id]))
        except Exception as error:
            if is_transient(error):
                log.warning("fetching the reply of %s: %s; again in %.1f s", asked.site, error, asked.backoff)
                asked.due_at = time.monotonic() + asked.backoff
                asked.backoff = min(2 * asked.backoff, self.timing.max_backoff_seconds)
                return []
            if isinstance(error, httpx.HTTPError):
                raise
            # What a hostile message makes the decoder raise must cost an answer, not the round; and since it may have
            # been somebody else's, the site is asked again.
            return [_arrival(asked, None, f"unreadable reply ({type(error).__name__})", is_lost=True)]
        asked.backoff = self.timing.backoff_seconds
        asked.due_at = time.monotonic() + self.timing.poll_seconds
        return [_read(self.grid, message, message_id, asked) for message in messages]

    def _deliver(self, message_id: str, arrival: Arrival) -> None:
        is_open = message_id in self._asked
        if not arrival.is_forged:
            self._asked.pop(message_id, None)
        if is_open or arrival.message is not None:
            self.on_arrival(arrival)


def _read(grid: Grid, message: Message, message_id: str, asked: _OpenQuestion) -> Arrival:
    if problem := forgery(message, message_id, asked.node_id) or grid.forgery(message):
        return _arrival(asked, None, problem, is_forged=True)
    if message.has_error():
        code = message.error.code
        problem = one_line(f"{LOST_CODES.get(code, 'error')} (code {code}): {message.error.reason}")
        return _arrival(asked, None, problem, is_lost=code in LOST_CODES)
    return _arrival(asked, message)


def _arrival(
    asked: _OpenQuestion, message: Message | None, problem: str = "", *, is_lost: bool = False, is_forged: bool = False
) -> Arrival:
    seconds = time.monotonic() - asked.asked_at
    return Arrival(asked.site, asked.server_round, message, problem, is_lost, is_forged, seconds)
