"""A site's answer to an offer: every refusal of its policy at once, and what the plan would cost. Nothing is charged.

No picture is opened and the ledger is only read. Sizes and ranges are checked, and the day's number of offers, before
any accountant runs. Reasons that look at counts, records or spending elsewhere are for the operator's log.
"""

import datetime as dt
import functools
import logging
import math
from dataclasses import dataclass
from pathlib import Path

from flwr.app import ArrayRecord, RecordDict

from client.data.dataset import Dataset, open_dataset
from client.home import Home
from client.offers.answered import AnsweredOffers, hidden_reason, open_answered, too_many
from client.policy.approval import keep_pending
from client.policy.budget import budget_refusal, has_hidden
from client.policy.charges import charge_for
from client.policy.facts import gather_facts
from client.policy.refusals import UNKNOWN_REQUEST, note_refusal, refusal_of
from client.policy.rules import Refusal, all_refusals
from client.privacy.epsilon import epsilon_of
from client.records.chain import ChainError
from client.records.journal import Journal
from client.records.ledger import read_ledger
from client.records.ledger_history import head_problem
from client.records.spending import EpsilonOf, Spending
from client.settings import SiteConfig, SitePolicy, load_settings
from shared.errors import InputError
from shared.experiment.config import Experiment
from shared.messages.agreement.offer import MOST_REASONS, OfferAnswer, Reason, read_offer
from shared.messages.agreement.plan import offer_digest, plan_digest
from shared.messages.envelope import header_record
from shared.messages.text import one_line
from shared.messages.training import RefusalCode, RequestHeader

NOT_COMPUTED: frozenset[RefusalCode] = frozenset({"out_of_range", "malformed", "noise_too_small", "too_many_steps"})
"""Refusals after which no accountant runs: it is safe only for plans that are inside the policy's ranges."""
LARGEST_EPSILON = 1e6
"""Above it, and where no bound exists, nothing is said."""
EXPECTED: set[str] = set()
"""What the rounds of an accepted plan will load: the process that they are forked from can load it before they come."""
log = logging.getLogger("maskfed.client")


@dataclass(frozen=True)
class Offered:
    """A plan that follows the protocol, at the site that it came to."""

    header: RequestHeader
    digest: str
    home: Home
    settings: SiteConfig


def answer_offer(content: RecordDict, home: Home) -> RecordDict:
    """Acceptance, or all refusals. Never raises; nothing is charged, whatever the answer."""
    digest, journal = UNKNOWN_REQUEST, Journal(home.journal)
    try:
        settings, header = load_settings(home), read_offer(content)
        is_over = header.server_round > header.experiment.federation.rounds
        digest = offer_digest(header.run, plan_digest(header), is_over=is_over)
        answer = _known_or_new(Offered(header, digest, home, settings), journal)
        if answer.status == "accepted":
            EXPECTED.update(("torch",) if header.experiment.privacy.mechanism == "none" else ("torch", "opacus"))
    except Exception as error:  # every failure becomes a typed refusal
        code, reason = refusal_of(error)
        note_refusal(journal, code, reason, digest)
        answer = OfferAnswer(status="refused", reasons=(Reason(code=code, text=one_line(reason)),))
    return RecordDict({"arrays": ArrayRecord(), "header": header_record(answer)})


def _known_or_new(offered: Offered, journal: Journal) -> OfferAnswer:
    """The stored answer, none beyond the day's number, or a new one that is then stored."""
    policy, num_entries = offered.settings.policy, len(read_ledger(offered.home.ledger).entries)
    with open_answered(offered.home, policy, dt.datetime.now(dt.UTC), num_entries) as answered:
        if known := answered.find(offered.digest):
            return known
        if answered.is_beyond(offered.digest):
            log.warning("an offer of run %s is not looked at: too many today", offered.header.run)
            return too_many(policy)
        answer = _worked_out(offered, answered)
        answered.keep(offered.digest, answer)
    fields = {"run": offered.header.run, "request_digest": offered.digest}
    journal.write("request", task="offer", **fields)
    if answer.reasons:
        text = "; ".join(f"{reason.code}: {reason.text}" for reason in answer.reasons)
        note_refusal(journal, answer.reasons[0].code, text, offered.digest)
    else:
        journal.write("accepted", **fields, epsilon_round=answer.epsilon_round, epsilon_run=answer.epsilon_run)
    return answer


def _worked_out(offered: Offered, answered: AnsweredOffers) -> OfferAnswer:
    accountant = functools.cache(lambda history, delta: epsilon_of(list(history), delta))

    def cached(history: list[Spending], delta: float) -> float:
        return float(accountant(tuple(history), delta))

    found = refusals_of(offered, cached)
    told = [Reason(code=each.code, text=one_line(each.reason)) for each in found if each.code != "policy"]
    for refusal in found:
        if refusal.note:
            log.warning("offer of run %s: %s", offered.header.run, refusal.note)
    if not told and (len(found) > 0 or answered.has_hidden or has_hidden(offered.home)):
        told = [hidden_reason()]
    if any(each.code == "experiment_not_approved" for each in found):
        keep_pending(offered.home, offered.header.experiment, offered.header.run)
    is_safe = not NOT_COMPUTED & {reason.code for reason in told}
    costs = plan_costs(offered.header.experiment, offered.settings.policy, cached) if is_safe else {}
    status = "refused" if told else "accepted"
    return OfferAnswer.model_validate({"status": status, "reasons": told[:MOST_REASONS], **costs})


def refusals_of(offered: Offered, accountant: EpsilonOf) -> list[Refusal]:
    """All that stands against the plan; the budget is asked last, and only of plans inside the policy's ranges."""
    header, settings = offered.header, offered.settings
    data, found = _data(offered)
    history = read_ledger(offered.home.ledger)
    if problem := head_problem(history, Path(settings.head_file)):
        raise ChainError(problem)
    facts = gather_facts(offered.home, settings, header.run, data, history)
    found += dict.fromkeys(all_refusals(header, settings.policy, facts))
    if data is None or NOT_COMPUTED & {refusal.code for refusal in found}:
        return found
    charge = charge_for(header, data.dataset_id, data.fingerprint, offered.digest)
    refusal = budget_refusal(history, charge, settings.policy, accountant)
    return [*found, refusal] if refusal else found


def _data(offered: Offered) -> tuple[Dataset | None, list[Refusal]]:
    """The data set, of which numbers alone are looked at; or what stands against it."""
    try:
        return open_dataset(offered.home, offered.settings.image_size), []
    except InputError as error:
        return None, [Refusal(*refusal_of(error))]


def plan_costs(experiment: Experiment, policy: SitePolicy, accountant: EpsilonOf) -> dict[str, object]:
    """Unit and epsilon of this plan alone, at the site's delta; nothing without DP.

    Its mean image is asked for before the first round, so it is in the rounds' figures.
    """
    privacy, federation = experiment.privacy, experiment.federation
    if privacy.mechanism == "none":
        return {}
    mean_image = [Spending(privacy.mean_image_noise, 1.0, 1)] if privacy.mean_image_noise else []

    def after(rounds: int) -> float | None:
        steps = [Spending(privacy.noise_multiplier, privacy.sample_rate, rounds * federation.local_steps)]
        epsilon = accountant(mean_image + (steps if rounds else []), policy.delta)
        return epsilon if math.isfinite(epsilon) and epsilon <= LARGEST_EPSILON else None

    return {
        "unit": privacy.unit,
        "epsilon_mean_image": after(0) if mean_image else None,
        "epsilon_round": after(1),
        "epsilon_run": after(federation.rounds),
        "delta": policy.delta,
        "epsilon_cap": policy.epsilon_cap,
    }
