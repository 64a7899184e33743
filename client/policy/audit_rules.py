"""The site's rules on audits, as pure functions: a question and a few facts in, a refusal or nothing out."""

from dataclasses import dataclass

from client.policy.rules import Refusal, hidden, is_any_allowed
from client.settings import SitePolicy
from shared.messages.audit import AuditQuery
from shared.messages.training import experiment_digest


@dataclass(frozen=True)
class AuditFacts:
    """What the rules on audits need to know of the site at this moment."""

    image_size: int
    approved_experiments: frozenset[str]
    approved_references: frozenset[str] = frozenset()
    refused_experiments: frozenset[str] = frozenset()
    committed_rounds: int = 0
    """Completed rounds of the audited run here."""
    audits_of_run: int = 0
    """Audits of the run whose work has begun."""
    audits_last_day: int = 0
    is_clock_behind: bool = False
    too_few: str = ""
    """For the operator: why the verdict would say nothing; private."""


def review_audit(query: AuditQuery, policy: SitePolicy, facts: AuditFacts) -> Refusal | None:
    """Decide on a question; its cost is decided on by `Ledger.reserve`, in the step that charges it."""
    return (
        _review_task(query, policy, facts)
        or _review_run(policy, facts)
        or _review_subject(query, policy, facts)
        or (hidden(facts.too_few) if facts.too_few and query.evidence == "counts" else None)
    )


def _review_task(query: AuditQuery, policy: SitePolicy, facts: AuditFacts) -> Refusal | None:
    if "audit" not in policy.tasks:
        return Refusal("task_not_allowed", "this site audits nothing on request: policy.tasks has no 'audit'")
    if facts.is_clock_behind:
        return Refusal("clock", "the site's clock stands before its newest ledger entry")
    if facts.audits_last_day >= policy.max_rounds_per_day:
        return Refusal("too_many_rounds", f"the site answers at most {policy.max_rounds_per_day} audits in 24 hours")
    is_open = is_any_allowed(policy, facts.refused_experiments)
    if not is_open and experiment_digest(query.experiment) not in facts.approved_experiments:
        return Refusal("experiment_not_approved", "the site's operator has not approved this experiment yet")
    return None


def _review_run(policy: SitePolicy, facts: AuditFacts) -> Refusal | None:
    if not facts.committed_rounds:
        return Refusal("task_not_allowed", "this site has completed no round of that run: it has nothing to find in it")
    if facts.audits_of_run >= policy.audit.max_per_run:
        return Refusal("too_many_rounds", f"the site gives at most {policy.audit.max_per_run} verdicts for a run")
    return None


def _review_subject(query: AuditQuery, policy: SitePolicy, facts: AuditFacts) -> Refusal | None:
    if text := policy.ranges.first_outside(query.experiment, query.manifest.num_elements or None):
        return Refusal("out_of_range", text)
    steps = query.experiment.federation.local_steps
    if query.evidence == "canaries" and steps > policy.max_steps_per_round:
        text = f"{steps} steps per round, the site allows {policy.max_steps_per_round}: it trains its canaries as long"
        return Refusal("too_many_steps", text)
    if query.experiment.model.image_size != facts.image_size:
        return Refusal("data_not_ready", f"the site's images are {facts.image_size} pixels wide")
    unknown = set(query.reference_digests) - facts.approved_references
    if unknown and not is_any_allowed(policy, facts.refused_experiments):
        return Refusal("experiment_not_approved", f"the site's operator has not approved the reference {min(unknown)}")
    return None
