"""Messages to sites and back: pushes, a small pool of pullers, deadlines, retries. Knows nothing about models.

A pull returns at once while nothing of a reply has arrived, but blocks while the reply is still uploading, for up to
three minutes. So replies are fetched by four threads, and a thread that takes longer than `patience_seconds` gives its
turn away: finished replies are fetched one after the other (memory for one), and a stuck one holds up nobody.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import httpx
from flwr.app import Message, MessageType, RecordDict

from server.federation.messaging.transport import (
    SLOW_BYTES_PER_SECOND,
    ExchangeError,
    Grid,
    GuardedGrid,
    Timing,
    is_transient,
    persist,
)

log = logging.getLogger("maskfed.server")

NUM_PULLERS = 4
LOST_CODES = {3: "reply unavailable", 4: "reply unavailable", 5: "node unavailable", 8: "client process died"}
"""Flower error codes after which asking again makes sense; all others are the site's own failure."""


@dataclass
class _Asked:
    site: str
    server_round: int
    asked_at: float
    expires_at: float
    due_at: float
    backoff: float
    is_busy: bool = False


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
    seconds: float = 0.0
    """From question to answer."""


@dataclass
class _Turns:
    """At most one pull at a time, plus one for each that lasts longer than `patience_seconds`, up to four."""

    patience_seconds: float
    started: dict[int, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, who: int) -> bool:
        with self.lock:
            if any(time.monotonic() - start < self.patience_seconds for start in self.started.values()):
                return False
            self.started[who] = time.monotonic()
            return True

    def give(self, who: int) -> None:
        with self.lock:
            self.started.pop(who, None)


class Exchange:
    """Asks sites and hands every arrival to `on_arrival`, one at a time.

    `on_arrival` runs in a puller's thread under a lock; the arrival's message is dropped when it returns.
    """

    def __init__(self, grid: Grid, on_arrival: Callable[[Arrival], None], timing: Timing | None = None) -> None:
        self.grid, self.on_arrival, self.timing = grid, on_arrival, timing or Timing()
        self._asked: dict[str, _Asked] = {}
        self._lock, self._deliver = threading.Lock(), threading.Lock()
        self._closed = threading.Event()
        self._fatal: BaseException | None = None
        self._turns = _Turns(self.timing.patience_seconds)
        for index in range(NUM_PULLERS):
            threading.Thread(target=self._pull_forever, args=(index,), daemon=True, name=f"puller-{index}").start()

    def expect(self, reply_bytes: int) -> None:
        """Tell how large replies are: the patience with a pull grows by its time at 10 MB/s."""
        self._turns.patience_seconds = self.timing.patience_seconds + reply_bytes / SLOW_BYTES_PER_SECOND
        self.allow(2 * reply_bytes)  # secure sums have 64 bits an element, float32 has 32

    def allow(self, reply_bytes: int) -> None:
        """Tell the guarded Grid how large the arrays of an answer may be; nothing more is taken, nor put together."""
        if isinstance(self.grid, GuardedGrid):
            self.grid.allow(reply_bytes)

    def close(self) -> None:
        """Stop pulling; a pull that blocks ends with the process."""
        self._closed.set()

    def raise_fatal(self) -> None:
        """Raise in the caller's thread what ended a puller (the run was stopped, for example)."""
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
        now, what = time.monotonic(), f"round {server_round}" if server_round else "the question"
        ttl = max(1.0, deadline - now) + self.timing.late_seconds
        messages = [
            Message(record, node_id, message_type, ttl=ttl, group_id=str(server_round)) for node_id in nodes.values()
        ]
        # The same messages may be sent twice: the SuperLink knows them by the hash of their content.
        payload = sum(len(array.data) for each in record.array_records.values() for array in each.values())
        ids = list(
            persist(
                lambda: self.grid.push_messages(messages),
                f"sending {what}",
                self.timing,
                payload / SLOW_BYTES_PER_SECOND,
            )
        )
        now = time.monotonic()
        with self._lock:
            for site, message_id in zip(nodes, ids, strict=True):
                if message_id is None:
                    raise ExchangeError(f"{what}: the SuperLink did not take the message to {site}")
                self._asked[message_id] = _Asked(
                    site, server_round, now, deadline + self.timing.late_seconds, now, self.timing.backoff_seconds
                )

    def forget(self, site: str) -> None:
        """Stop polling for the answers of a site that is about to be asked again."""
        with self._lock:
            for message_id in [key for key, asked in self._asked.items() if asked.site == site and not asked.is_busy]:
                del self._asked[message_id]

    def _pull_forever(self, who: int) -> None:
        while not self._closed.is_set():
            found = self._next_due()
            if found is None or not self._turns.take(who):
                if found is not None:
                    found[1].is_busy = False
                self._closed.wait(min(0.1, self.timing.poll_seconds))
                continue
            try:
                self._pull(*found)
            except BaseException as error:  # carried over to the round loop's thread
                self._fatal = error
                return
            finally:
                found[1].is_busy = False
                self._turns.give(who)

    def _next_due(self) -> tuple[str, _Asked] | None:
        now = time.monotonic()
        with self._lock:
            for message_id in [key for key, asked in self._asked.items() if asked.expires_at < now]:
                if not self._asked[message_id].is_busy:
                    del self._asked[message_id]
            due = [item for item in self._asked.items() if item[1].due_at <= now and not item[1].is_busy]
            if not due:
                return None
            found = min(due, key=lambda item: item[1].due_at)
            found[1].is_busy = True
            return found

    def _pull(self, message_id: str, asked: _Asked) -> None:
        try:
            messages = list(self.grid.pull_messages([message_id]))
        except Exception as error:
            if is_transient(error):
                log.warning("fetching the reply of %s: %s; again in %.1f s", asked.site, error, asked.backoff)
                asked.due_at = time.monotonic() + asked.backoff
                asked.backoff = min(2 * asked.backoff, self.timing.max_backoff_seconds)
                return
            if isinstance(error, httpx.HTTPError):
                raise
            # What a hostile reply makes the decoder raise must cost that reply, not the round.
            self._arrived(message_id, asked, None, f"unreadable reply ({type(error).__name__})", is_lost=False)
            return
        asked.backoff = self.timing.backoff_seconds
        asked.due_at = time.monotonic() + self.timing.poll_seconds
        for message in messages:
            if message.has_error():
                code = message.error.code
                problem = f"{LOST_CODES.get(code, 'error')} (code {code}): {message.error.reason}"
                self._arrived(message_id, asked, None, problem, is_lost=code in LOST_CODES)
            else:
                self._arrived(message_id, asked, message, "", is_lost=False)

    def _arrived(self, message_id: str, asked: _Asked, message: Message | None, problem: str, is_lost: bool) -> None:
        with self._lock:
            if self._asked.pop(message_id, None) is None and message is None:
                return
        with self._deliver:
            seconds = time.monotonic() - asked.asked_at
            self.on_arrival(Arrival(asked.site, asked.server_round, message, problem, is_lost, seconds))
