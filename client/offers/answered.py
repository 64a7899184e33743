"""The offers of the last 24 hours and their answers: the same question is not worked on twice, many are not at all.

Whether a plan fits may depend on what the coordinator must not learn (counts, spending on shared records). One such no
is visible; so that a series of plans cannot measure where it begins, every further plan gets the same no until a day
has passed or the operator has changed policy or approvals.
"""

import datetime as dt
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import Field, ValidationError

from client.home import Home
from client.policy.rules import HIDDEN
from client.private_files import one_at_a_time, write_private
from client.settings import SitePolicy
from shared.experiment.config import Section
from shared.messages.agreement.offer import OfferAnswer, Reason
from shared.messages.training import RefusalCode
from shared.storage.files import canonical_json

DAY = dt.timedelta(days=1)
PASSING: frozenset[RefusalCode] = frozenset({"too_many_rounds", "clock"})
PASSING_TIME = dt.timedelta(minutes=10)
"""How long an answer stands that time alone may change."""


class Answered(Section):
    """One offer that was worked on."""

    time: dt.datetime
    offer: str = Field(pattern=r"^[0-9a-f]{64}$")
    num_entries: int = Field(ge=0)
    """Of the ledger."""
    basis: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Digest of policy and approvals."""
    answer: OfferAnswer

    def holds_at(self, now: dt.datetime) -> bool:
        """Whether the answer is still the same when nothing has changed but the time."""
        is_passing = any(reason.code in PASSING for reason in self.answer.reasons)
        return not is_passing or now - self.time < PASSING_TIME

    @property
    def is_hidden(self) -> bool:
        """Whether the answer depends on what the coordinator must not learn."""
        return any(reason.code == "policy" for reason in self.answer.reasons)


class _AnsweredFile(Section):
    answered: tuple[Answered, ...] = ()


class AnsweredOffers:
    """The answers of one day, held by this process alone; see `open_answered`."""

    def __init__(self, home: Home, policy: SitePolicy, now: dt.datetime, num_entries: int) -> None:
        self._home, self._policy, self._now, self._num_entries = home, policy, now, num_entries
        self.basis = _basis(home, policy)
        self._entries = [entry for entry in _read(home) if now - DAY < entry.time <= now + DAY]

    def find(self, offer: str) -> OfferAnswer | None:
        """The answer that exactly this offer got, as long as nothing has changed that it follows from."""
        state = (offer, self.basis, self._num_entries)
        known = (each for each in self._entries if (each.offer, each.basis, each.num_entries) == state)
        return next((each.answer for each in known if each.holds_at(self._now)), None)

    def is_beyond(self, offer: str) -> bool:
        """Whether the offer is a new one, and one too many today; an old one is worked on again after charges only."""
        offers = {entry.offer for entry in self._entries}
        return offer not in offers and len(offers) >= self._policy.max_offers_per_day

    @property
    def has_hidden(self) -> bool:
        """Whether a private reason was the answer today, under this policy and these approvals."""
        return any(entry.is_hidden and entry.basis == self.basis for entry in self._entries)

    def keep(self, offer: str, answer: OfferAnswer) -> None:
        """Store an answer, in place of an earlier one to the same offer under the same policy; after a day they go."""
        entry = Answered(time=self._now, offer=offer, basis=self.basis, num_entries=self._num_entries, answer=answer)
        self._entries = [each for each in self._entries if (each.offer, each.basis) != (offer, self.basis)]
        self._entries.append(entry)
        write_private(self._home.offers, _AnsweredFile(answered=tuple(self._entries)).model_dump_json().encode())


def too_many(policy: SitePolicy) -> OfferAnswer:
    """The answer to an offer beyond the day's number."""
    text = f"the site looks at {policy.max_offers_per_day} new offers in 24 hours, not at more"
    return OfferAnswer(status="refused", reasons=(Reason(code="too_many_offers", text=text),))


def hidden_reason() -> Reason:
    """What the coordinator is told where the reason is the operator's."""
    return Reason(code="policy", text=HIDDEN)


@contextmanager
def open_answered(home: Home, policy: SitePolicy, now: dt.datetime, num_entries: int) -> Iterator[AnsweredOffers]:
    """Hold the file; a second offer at the same time waits.

    Args:
        home: the site.
        policy: the site's.
        now: the time, UTC.
        num_entries: entries of the ledger, which answers follow from.
    """
    with one_at_a_time(home.offers):
        yield AnsweredOffers(home, policy, now, num_entries)


def _basis(home: Home, policy: SitePolicy) -> str:
    approved = home.approved.read_bytes() if home.approved.exists() else b""
    return hashlib.sha256(canonical_json(policy.model_dump(mode="json")) + b"\n" + approved).hexdigest()


def _read(home: Home) -> tuple[Answered, ...]:
    """A damaged file counts as none: the answers are worked out again, the day's count begins anew."""
    try:
        return _AnsweredFile.model_validate(json.loads(home.offers.read_bytes())).answered
    except (FileNotFoundError, ValueError, ValidationError):
        return ()
