"""A site's journal and ledger added up as they grow: what its page shows, in memory that does not follow them."""

import datetime as dt
from collections import OrderedDict, deque
from typing import Any, NamedTuple

from client.home import Home
from client.records.chain import ChainReader, Entry
from client.records.spending import TOTAL_CHANGES

NEWEST = 100
"""Entries that are kept of each kind."""
KNOWN_REQUESTS = 500
ENDS = ("release", "refusal", "resent", "accepted", "failure")


class SeenRequest(NamedTuple):
    """A request that came to this site."""

    time: dt.datetime
    task: str
    run: str
    server_round: int | None


class Released(NamedTuple):
    """What left the site with one answer."""

    time: dt.datetime
    asked: SeenRequest
    numbers: tuple[str, ...]
    bytes: int | None
    epsilon: float | None
    is_unbounded: bool


class SiteFigures:
    """What journal and ledger come to; call `catch_up` again and again."""

    def __init__(self, home: Home) -> None:
        self._journal, self._ledger = ChainReader(home.journal), ChainReader(home.ledger)
        self.newest: deque[Entry] = deque(maxlen=NEWEST)
        self.refusals: deque[tuple[Entry, SeenRequest | None]] = deque(maxlen=NEWEST)
        self.releases: deque[Released] = deque(maxlen=NEWEST)
        self.num_releases = 0
        self.epsilons: list[float] = []
        """Of the DP releases that this site has told, in order."""
        self.open: OrderedDict[str, SeenRequest] = OrderedDict()
        """Requests without an answer, by digest: the newest is what the site works on."""
        self._asked: OrderedDict[str, SeenRequest] = OrderedDict()
        self.num_charges = 0
        self.uncommitted: set[int] = set()
        self.newest_change = -1
        """Sequence number of the newest entry of the ledger that changes totals."""

    def catch_up(self) -> int:
        """Read and check what is new; how many entries that were.

        Raises:
            ChainError: journal or ledger is damaged.
        """
        entries, charges = self._journal.read_new(), self._ledger.read_new()
        for entry in entries:
            self._take(entry)
        for entry in charges:
            self._take_charge(entry)
        return len(entries) + len(charges)

    def _take(self, entry: Entry) -> None:
        self.newest.append(entry)
        fields = entry.fields
        digest = str(fields.get("request_digest", ""))
        if entry.kind == "request":
            number = fields.get("server_round")
            asked = SeenRequest(entry.time, str(fields.get("task", "")), str(fields.get("run", "")), number)
            self._asked[digest] = self.open[digest] = asked
            while len(self._asked) > KNOWN_REQUESTS:
                self.open.pop(self._asked.popitem(last=False)[0], None)
        if entry.kind in ENDS:
            self.open.pop(digest, None)
        if entry.kind == "refusal":
            self.refusals.append((entry, self._asked.get(digest)))
        if entry.kind == "release":
            self._take_release(entry, self._asked.get(digest))

    def _take_release(self, entry: Entry, asked: SeenRequest | None) -> None:
        fields: dict[str, Any] = entry.fields
        epsilon = fields.get("epsilon")
        if asked is None:  # by the operator's own hand
            asked = SeenRequest(entry.time, str(fields.get("task", "")), str(fields.get("run", "")), None)
        numbers = tuple(map(str, fields.get("numbers", ())))
        told = float(epsilon) if isinstance(epsilon, int | float) else None
        self.releases.append(
            Released(entry.time, asked, numbers, fields.get("bytes"), told, bool(fields.get("is_unbounded", False)))
        )
        self.num_releases += 1
        if told is not None:
            self.epsilons.append(told)

    def _take_charge(self, entry: Entry) -> None:
        if entry.kind in TOTAL_CHANGES:
            self.newest_change = entry.sequence
        if entry.kind == "reserve":
            self.num_charges += 1
            self.uncommitted.add(entry.sequence)
        if entry.kind == "commit":
            self.uncommitted.discard(int(entry.fields["reserve"]))
