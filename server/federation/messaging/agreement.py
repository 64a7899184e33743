"""Offers before rounds: which sites have accepted the plan of a run. Weights travel to these alone. No torch.

An answer is kept in the run's folder with the digest of the plan that it is for, so that a run that goes on asks only
whom it must: new sites, those that have not answered, and everybody when anything in the plan has changed.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from flwr.app import MessageType

from server.federation.messaging.exchange import Arrival, Exchange
from server.federation.messaging.sender import Forgeries
from server.federation.messaging.transport import Grid, Timing
from shared.errors import InputError
from shared.messages.agreement.offer import OFFER_ACTION, OfferAnswer, offer_record, read_answer
from shared.messages.agreement.plan import plan_digest
from shared.messages.training import RequestHeader
from shared.storage.files import write_atomically
from shared.storage.runlog import RunLog

log = logging.getLogger("maskfed.server")
ANSWERS_FILE = "offers.json"
MOST_QUESTIONS = 3
"""Times that a site is asked whose node goes away before it has answered."""
LONGEST_PAUSE = 64
"""Rounds until a site that goes on refusing is asked again."""
Status = Literal["accepted", "refused", "late", "failed", "rejected", "offline", "withdrawn"]


class Refused(Protocol):
    """What is read of a site that has refused a round."""

    site: str
    code: str
    reason: str


@dataclass(frozen=True)
class Outcome:
    """What became of the offer to one site."""

    status: Status
    reason: str = ""
    answer: OfferAnswer | None = None

    def as_json(self) -> dict[str, Any]:
        """The fields of its event in the run's log."""
        found = {"status": self.status, "reason": self.reason}
        if self.answer is not None:
            found |= self.answer.model_dump(mode="json", exclude={"schema_version", "status"}, exclude_none=True)
        return found


class Agreement:
    """Who has accepted the plan of one run.

    Args:
        grid: that the run's messages go through.
        folder: of the run.
        metrics: its log; each answer is an event of kind `offer`.
        timing: deadlines.
    """

    def __init__(self, grid: Grid, folder: Path, metrics: RunLog, timing: Timing) -> None:
        self._grid, self._path, self._metrics, self._timing = grid, folder / ANSWERS_FILE, metrics, timing
        self.plan, self.outcomes = "", dict[str, Outcome]()
        self._misses: dict[str, int] = {}
        self._again_at: dict[str, int] = {}

    def ask(self, header: RequestHeader, nodes: Mapping[str, int], attend: Callable[[], None] = lambda: None) -> bool:
        """Offer the plan to those of `nodes` (site to node id) who have not accepted it; whether anybody was asked.

        Who refused is asked again after 1, 2, 4, ... rounds: an operator may have approved meanwhile.
        """
        self._take_up(plan_digest(header))
        asked = {site: node for site, node in nodes.items() if self._must_ask(site, header.server_round)}
        if not asked:
            return False
        for site, outcome in _Asking(self._grid, header, self._timing, asked).outcomes(attend).items():
            self.note(site, outcome, header.server_round)
        return True

    def accepted(self, sites: Iterable[str]) -> list[str]:
        """Those of `sites` that have accepted."""
        return [site for site in sites if site in self.outcomes and self.outcomes[site].status == "accepted"]

    def withdraw(self, refused: Iterable[Refused], server_round: int) -> None:
        """Sites that had accepted have refused the round: they are asked anew before they are sent weights again."""
        for each in refused:
            if self.accepted([each.site]):
                text = f"accepted the offer and refused round {server_round}: {each.code}: {each.reason}"
                self.note(each.site, Outcome("withdrawn", text), server_round)

    def note(self, site: str, outcome: Outcome, server_round: int) -> None:
        """Keep and record an outcome."""
        self.outcomes[site] = outcome
        self._misses[site] = 0 if outcome.status == "accepted" else self._misses.get(site, 0) + 1
        self._again_at[site] = server_round + min(2 ** max(0, self._misses[site] - 1), LONGEST_PAUSE)
        self._metrics.write_durably("offer", site=site, round=server_round, **outcome.as_json())
        kept = {name: {"status": each.status, "reason": each.reason} for name, each in self.outcomes.items()}
        write_atomically(self._path, json.dumps({"plan": self.plan, "sites": kept}, indent=1) + "\n")

    @property
    def is_refused(self) -> bool:
        """Whether what is missing are refusals alone, so that asking again changes nothing before somebody acts."""
        return all(each.status in ("accepted", "refused", "withdrawn") for each in self.outcomes.values())

    def explain(self) -> str:
        """One line: what became of each offer that was not accepted."""
        open_ones = [(site, each) for site, each in sorted(self.outcomes.items()) if each.status != "accepted"]
        return "; ".join(f"{site} {each.status} ({each.reason})" for site, each in open_ones)

    def _must_ask(self, site: str, server_round: int) -> bool:
        if site not in self.outcomes:
            return True
        return not self.accepted([site]) and self._again_at.get(site, 0) <= server_round

    def _take_up(self, plan: str) -> None:
        """Acceptances of exactly this plan count, whenever they were made."""
        if plan == self.plan:
            return
        self.plan, self.outcomes, self._misses, self._again_at = plan, {}, {}, {}
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            sites = kept["sites"] if kept["plan"] == plan else {}
            self.outcomes = {site: Outcome("accepted") for site, each in sites.items() if each["status"] == "accepted"}
        except FileNotFoundError:
            return
        except (ValueError, TypeError, KeyError):
            log.warning("%s is damaged: all sites are asked again", self._path)


class _Asking:
    """One offer to several sites, until each has answered or the deadline has come."""

    def __init__(self, grid: Grid, header: RequestHeader, timing: Timing, nodes: Mapping[str, int]) -> None:
        self._header, self._timing, self._nodes = header, timing, dict(nodes)
        self._record = offer_record(header)
        self._found: dict[str, Outcome] = {}
        self._questions = dict.fromkeys(nodes, 1)
        self._lost: dict[str, str] = {}
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._forgeries = Forgeries()
        grid.allow(0)
        self._exchange = Exchange(grid, self._arrived, timing)

    def outcomes(self, attend: Callable[[], None]) -> dict[str, Outcome]:
        """Ask, wait, and say what became of each site."""
        seconds = self._timing.offer_seconds + self._timing.offer_seconds_per_site * len(self._nodes)
        deadline = time.monotonic() + seconds
        try:
            self._push(self._nodes, deadline)
            while len(self._found) < len(self._nodes) and time.monotonic() < deadline:
                self._exchange.raise_fatal()
                self._ask_lost(deadline)
                attend()
                self._changed.wait(self._timing.poll_seconds)
                self._changed.clear()
        finally:
            self._exchange.close()
        self._exchange.raise_fatal()
        forged = self._forgeries.take().get("forged")
        silent = f"no answer to the offer within {seconds:g} s" + ("; forged ones were dropped" if forged else "")
        with self._lock:
            return {site: self._found.get(site, Outcome("late", silent)) for site in self._nodes}

    def _push(self, nodes: Mapping[str, int], deadline: float) -> None:
        kind = f"{MessageType.QUERY}.{OFFER_ACTION}"
        self._exchange.push(self._record, nodes, self._header.server_round, deadline, kind)

    def _ask_lost(self, deadline: float) -> None:
        with self._lock:
            again = {site: self._nodes[site] for site in self._lost}
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
                self._found[site] = _outcome(arrival)
            elif arrival.is_lost and self._questions[site] < MOST_QUESTIONS:
                self._questions[site] += 1
                self._lost[site] = arrival.problem
            else:
                # Code that its operator has to approve is a no like any other: asking again does not change it.
                status: Status = "refused" if "code_not_approved" in arrival.problem else "failed"
                self._found[site] = Outcome(status, arrival.problem)


def _outcome(arrival: Arrival) -> Outcome:
    assert arrival.message is not None
    try:
        answer = read_answer(arrival.message.content)
    except InputError as error:
        return Outcome("rejected", str(error))
    except Exception as error:  # whatever one answer makes a parser raise costs that answer only
        return Outcome("rejected", f"the answer cannot be read ({type(error).__name__})")
    reason = "; ".join(f"{each.code}: {each.text}" for each in answer.reasons)
    return Outcome(answer.status, reason, answer)
