"""Offers before rounds: which sites have accepted the plan of a run. Weights travel to these alone. No torch.

An answer is kept in the run's folder with the digest of the plan that it is for, so that a run that goes on asks only
whom it must: new sites, those that have not answered, and everybody when anything in the plan has changed.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from flwr.app import MessageType

from server.federation.messaging.asking import Asking, SiteAnswer, SiteQuestion
from server.federation.messaging.transport import Grid, Timing
from shared.messages.agreement.offer import OFFER_ACTION, OfferAnswer, offer_record, read_answer
from shared.messages.agreement.plan import plan_digest
from shared.messages.training import RequestHeader
from shared.storage.files import write_atomically
from shared.storage.runlog import RunLog

log = logging.getLogger("maskfed.server")
ANSWERS_FILE = "offers.json"
LONGEST_PAUSE = 64
"""Rounds until a site that goes on refusing is asked again."""
Status = Literal["accepted", "refused", "late", "failed", "rejected", "offline", "withdrawn"]
_STATUS: dict[str, Status] = {"late": "late", "failed": "failed", "rejected": "rejected"}


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
        record, seconds = offer_record(header), self._timing.question_seconds(len(asked))
        questions = {site: SiteQuestion(node_id, record) for site, node_id in asked.items()}
        kind = f"{MessageType.QUERY}.{OFFER_ACTION}"
        asking = Asking(
            self._grid, self._timing, questions, kind, header.server_round, lambda _, each: read_answer(each.content)
        )
        for site, found in asking.answers(seconds, attend).items():
            self.note(site, _outcome(found), header.server_round)
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


def _outcome(found: SiteAnswer[OfferAnswer]) -> Outcome:
    if found.value is None:
        # Code that its operator has to approve is a no like any other: asking again does not change it.
        status: Status = "refused" if "code_not_approved" in found.problem else _STATUS[found.status]
        return Outcome(status, found.problem)
    reason = "; ".join(f"{each.code}: {each.text}" for each in found.value.reasons)
    return Outcome(found.value.status, reason, found.value)
