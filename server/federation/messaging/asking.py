"""A question to several sites beside the training requests: asked until each has answered or the deadline has come.

Who is lost is asked again; an answer that cannot be read costs that site alone. Each site may be sent its own record.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from flwr.app import Message, RecordDict

from server.federation.messaging.exchange import Arrival, Exchange
from server.federation.messaging.sender import Forgeries
from server.federation.messaging.transport import Grid, Timing
from shared.errors import InputError

MOST_QUESTIONS = 3
"""Times that a site is asked whose node goes away before it has answered."""
T = TypeVar("T")


@dataclass(frozen=True)
class SiteQuestion:
    """One site's question: where it goes, and what it says. Sites with the same record are sent it at once."""

    node_id: int
    record: RecordDict


@dataclass(frozen=True)
class SiteAnswer(Generic[T]):
    """What became of the question to one site; `value` is there when it has answered."""

    status: Literal["answered", "rejected", "failed", "late"]
    value: T | None = None
    problem: str = ""


class Asking(Generic[T]):
    """One question, under way.

    Args:
        grid: that the run's messages go through.
        timing: retries.
        questions: by site.
        kind: message type, which routes the question to its handler.
        server_round: of the run; 0 outside of the rounds.
        read: makes an answer's value; what it raises is that site's `rejected`.
    """

    def __init__(
        self,
        grid: Grid,
        timing: Timing,
        questions: Mapping[str, SiteQuestion],
        kind: str,
        server_round: int,
        read: Callable[[str, Message], T],
    ) -> None:
        self._timing, self._questions, self._kind, self._round = timing, dict(questions), kind, server_round
        self._read = read
        self._found: dict[str, SiteAnswer[T]] = {}
        self._times = dict.fromkeys(questions, 1)
        self._lost: set[str] = set()
        self._lock, self._changed, self._forgeries = threading.Lock(), threading.Event(), Forgeries()
        grid.allow(0)
        self._exchange = Exchange(grid, self._arrived, timing)

    def answers(
        self,
        seconds: float,
        attend: Callable[[], None],
        is_enough: Callable[[Mapping[str, SiteAnswer[T]]], bool] = lambda _: False,
    ) -> dict[str, SiteAnswer[T]]:
        """Ask and wait; what became of each site.

        Args:
            seconds: until the deadline.
            attend: called again and again; must not block.
            is_enough: whether what has come ends the wait before all have answered.
        """
        deadline = time.monotonic() + seconds
        try:
            self._push(self._questions, deadline)
            while not self._is_over(is_enough) and time.monotonic() < deadline:
                self._exchange.raise_fatal()
                self._ask_lost(deadline)
                attend()
                self._changed.wait(self._timing.poll_seconds)
                self._changed.clear()
        finally:
            self._exchange.close()
        self._exchange.raise_fatal()
        forged = self._forgeries.take().get("forged")
        silent = f"no answer within {seconds:g} s" + ("; forged ones were dropped" if forged else "")
        with self._lock:
            return {site: self._found.get(site, SiteAnswer("late", problem=silent)) for site in self._questions}

    def _is_over(self, is_enough: Callable[[Mapping[str, SiteAnswer[T]]], bool]) -> bool:
        with self._lock:
            return len(self._found) == len(self._questions) or is_enough(self._found)

    def _push(self, questions: Mapping[str, SiteQuestion], deadline: float) -> None:
        records = {id(asked.record): asked.record for asked in questions.values()}
        for key, record in records.items():
            nodes = {site: asked.node_id for site, asked in questions.items() if id(asked.record) == key}
            self._exchange.push(record, nodes, self._round, deadline, self._kind)

    def _ask_lost(self, deadline: float) -> None:
        with self._lock:
            again = {site: self._questions[site] for site in self._lost}
            self._lost.clear()
        if again:
            self._push(again, deadline)

    def _arrived(self, arrival: Arrival) -> None:
        """Runs in a puller's thread."""
        site = arrival.site
        if arrival.is_forged:
            self._forgeries.add(site, arrival.problem)
            return
        with self._lock:
            if site in self._found:
                return
            self._changed.set()
            if arrival.message is not None:
                self._found[site] = self._answer(site, arrival.message)
            elif arrival.is_lost and self._times[site] < MOST_QUESTIONS:
                self._times[site] += 1
                self._lost.add(site)
            else:
                self._found[site] = SiteAnswer("failed", problem=arrival.problem)

    def _answer(self, site: str, message: Message) -> SiteAnswer[T]:
        try:
            return SiteAnswer("answered", self._read(site, message))
        except InputError as error:
            return SiteAnswer("rejected", problem=str(error))
        except Exception as error:  # whatever one answer makes a parser raise costs that answer only
            return SiteAnswer("rejected", problem=f"the answer cannot be read ({type(error).__name__})")
