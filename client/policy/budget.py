"""Budget is reserved here, and here it is decided what the coordinator may know of it.

What it is told follows from the policy and from what was charged by this ledger; whether records are shared with other
data sets, and what those have spent, decides too but is the operator's to know.
"""

import datetime as dt
import logging
import math
from collections.abc import Iterable
from enum import IntEnum

from client.home import Home
from client.policy.refusals import RefusedError
from client.policy.rules import HIDDEN, Refusal, hidden
from client.private_files import write_private
from client.records.chain import Entry
from client.records.journal import Journal
from client.records.ledger import BudgetError, Ledger, UnitError
from client.records.ledger_history import History
from client.records.spending import Charge, EpsilonOf, KeptTotal, Total, total_of
from client.settings import SitePolicy, Unit
from shared.messages.agreement.plan import offer_digest

log = logging.getLogger("maskfed.client")
DAY = dt.timedelta(days=1)


def reserve(ledger: Ledger, charge: Charge, policy: SitePolicy, epsilon_of: EpsilonOf, home: Home) -> Entry:
    """Charge the data set before anything is computed from it; the true total is in the operator's log.

    Raises:
        RefusedError: `budget_exceeded` where this data set's own charges explain it, else `policy`.
    """
    if _is_choice(charge) and _is_after_hidden(ledger, charge, home):
        note = (
            "a private reason refused a plan in the last 24 hours: so that a series of them measures nothing, all are"
        )
        raise _refusal(ledger, charge, policy, epsilon_of, note)
    try:
        entry, total = ledger.reserve(charge, cap=policy.epsilon_cap, delta=policy.delta, epsilon_of=epsilon_of)
    except (BudgetError, UnitError) as error:
        raise _refusal(ledger, charge, policy, epsilon_of, str(error)) from error
    log.info("%s %s is charged: %s after it", charge.task, charge.run, total)
    _keep(home, ledger, entry, charge, total, epsilon_of)
    return entry


def has_hidden(home: Home) -> bool:
    """Whether a private reason was the answer today, since the operator has changed policy or approvals, or scanned.

    A refusal is free. If each plan met one that looks at counts, records or spending elsewhere, a series of plans would
    measure them: so the first such answer is the answer to every further plan, whatever kind of question it is for.
    """
    return bool(_hidden_today(home, Journal(home.journal).entries()))


def _hidden_today(home: Home, entries: list[Entry]) -> list[Entry]:
    changed = max(path.stat().st_mtime for path in (home.settings, home.approved) if path.exists())
    since = max(dt.datetime.now(dt.UTC) - DAY, dt.datetime.fromtimestamp(changed, dt.UTC))
    scanned = max((number for number, entry in enumerate(entries) if entry.kind == "scan"), default=-1)
    return [
        entry
        for entry in entries[scanned + 1 :]
        if entry.kind == "refusal" and entry.fields.get("code") == "policy" and entry.time > since
    ]


def _is_choice(charge: Charge) -> bool:
    """Whether the asker has chosen what this costs: not for an audit."""
    return charge.mechanism != "none" and charge.task != "audit"


def _is_after_hidden(ledger: Ledger, charge: Charge, home: Home) -> bool:
    """Whether a plan that binds the asker as much as this one, or more, has met a private reason today.

    Accepted plans, and runs that have begun, go on after a new plan was refused. A number of them, each of another
    cost, would measure all the same: the first of them that meets a private reason is the last that is looked at.
    """
    entries = Journal(home.journal).entries()
    runs = {entry.fields.get("request_digest"): entry.fields for entry in entries if entry.kind == "request"}
    accepted = {entry.fields.get("request_digest") for entry in entries if entry.kind == "accepted"}
    accepted_runs = {entry.fields.get("run") for entry in entries if entry.kind == "accepted"}

    def standing_of_refused(refusal: Entry) -> _Standing:
        asked = runs.get(refusal.fields.get("request_digest"), {})
        run = str(asked.get("run")) if asked.get("task") == "train" else ""
        if run and ledger.plan_of(run) is not None:
            return _Standing.BEGUN
        return _Standing.ACCEPTED if run in accepted_runs else _Standing.NEW

    own = _Standing.NEW
    if charge.task == "train" and ledger.plan_of(charge.run) == charge.plan_digest:
        own = _Standing.BEGUN
    elif charge.task == "train" and offer_digest(charge.run, charge.plan_digest) in accepted:
        own = _Standing.ACCEPTED
    return any(standing_of_refused(refusal) >= own for refusal in _hidden_today(home, entries))


class _Standing(IntEnum):
    """How much a plan binds whoever asks for it."""

    NEW = 0
    ACCEPTED = 1
    """Its offer was."""
    BEGUN = 2
    """A round of it was charged."""


def budget_refusal(history: History, charge: Charge, policy: SitePolicy, epsilon_of: EpsilonOf) -> Refusal | None:
    """Why the cap leaves no room for a charge, before it is made; told where this data set's own charges explain it."""
    if charge.mechanism == "none":
        return None
    if refusal := _own_refusal(history, charge, policy, epsilon_of):
        return refusal
    charges = [other for _, other in history.charges_of(charge.dataset_id)]
    total = _total([*charges, charge], policy, epsilon_of)
    if total.epsilon <= policy.epsilon_cap:
        return None
    return hidden(f"with data that shares records: {total} after a round, the cap is {policy.epsilon_cap:g}")


def told_total(history: History, policy: SitePolicy, epsilon_of: EpsilonOf) -> Total:
    """What replies say was spent: every charge of this ledger, whichever data sets share records."""
    return _total([charge for _, charge in history.charges], policy, epsilon_of)


def told_fields(total: Total, policy: SitePolicy) -> dict[str, object]:
    """The fields of a reply that tell of spending."""
    is_finite = math.isfinite(total.epsilon)
    return {
        "epsilon": max(0.0, total.epsilon) if is_finite else None,
        "delta": total.delta,
        "is_unbounded": total.is_unbounded or not is_finite,
        "epsilon_cap": policy.epsilon_cap,
        "unit": total.unit,
    }


def told_head(history: History) -> dict[str, object]:
    """The fields of a reply that bind it to the ledger: how often this coordinator was charged, and the newest hash.

    Not the newest sequence number: scans, and what other homes have charged on shared images, are entries, too, and
    whoever counts them would learn of one shared picture.
    """
    return {"ledger_sequence": len(history.charges) + len(history.committed), "ledger_hash": history.entries[-1].hash}


def own_unit(history: History, dataset_id: str) -> Unit | None:
    """The unit that the first DP charge on this very data set has fixed, whatever it shares with others."""
    return next((each.unit for _, each in history.own_charges(dataset_id) if each.mechanism != "none"), None)


def has_dp_releases(charges: Iterable[tuple[Entry, Charge]]) -> bool:
    """Whether something other than verdicts was released with DP.

    A verdict is charged with noise whatever the run trains with: a run without DP is audited between its rounds, and
    goes on.
    """
    return any(charge.mechanism != "none" and charge.task != "audit" for _, charge in charges)


def _keep(home: Home, ledger: Ledger, entry: Entry, charge: Charge, total: Total, epsilon_of: EpsilonOf) -> None:
    """Write down what was just computed, and what the same charge again would make of it, for the live page."""
    after = total
    if charge.mechanism != "none":
        charges = [other for _, other in ledger.charges_of(charge.dataset_id)]
        after = total_of([*charges, charge], total.delta, epsilon_of, num_uncommitted=0)
    kept = KeptTotal(
        sequence=entry.sequence,
        dataset_id=charge.dataset_id,
        epsilon=_finite(total.epsilon),
        is_unbounded=total.is_unbounded,
        delta=total.delta,
        unit=total.unit,
        epsilon_next=_finite(after.epsilon) if after is not total else None,
    )
    try:
        write_private(home.spent, kept.model_dump_json().encode())
    except OSError as error:  # nothing rests on it, and the round is charged
        log.warning("the live page will not show this charge: %s", error)


def _finite(epsilon: float) -> float | None:
    return epsilon if math.isfinite(epsilon) else None


def _refusal(ledger: Ledger, charge: Charge, policy: SitePolicy, epsilon_of: EpsilonOf, note: str) -> RefusedError:
    told = _own_refusal(ledger, charge, policy, epsilon_of) if charge.mechanism != "none" else None
    return RefusedError(told.code, told.reason, note) if told else RefusedError("policy", HIDDEN, note)


def _own_refusal(history: History, charge: Charge, policy: SitePolicy, epsilon_of: EpsilonOf) -> Refusal | None:
    own = [other for _, other in history.charges if other.dataset_id == charge.dataset_id]
    total = _total([*own, charge], policy, epsilon_of)
    if total.epsilon <= policy.epsilon_cap:
        return None
    text = f"epsilon per {charge.unit} would be {total.epsilon:.3f}, the cap is {policy.epsilon_cap:g}"
    return Refusal("budget_exceeded", text)


def _total(charges: list[Charge], policy: SitePolicy, epsilon_of: EpsilonOf) -> Total:
    return total_of(charges, policy.delta, epsilon_of, num_uncommitted=0)
