"""A question for an audit on its way through the site: parse, review, charge, count, answer. No torch before review.

What leaves is a verdict on noisy counts, charged before the first loss is computed; or the outcome of a canary audit,
which touches no private image and costs nothing.
"""

import datetime as dt
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import RecordDict
from numpy.typing import NDArray

from client.answers.audit_power import too_few
from client.answers.verdicts import Verdict, audit_charge, note_release
from client.data.dataset import Dataset, open_dataset
from client.home import Home
from client.policy.approval import keep_pending, read_approved
from client.policy.audit_rules import AuditFacts, review_audit
from client.policy.budget import reserve
from client.policy.refusals import UNKNOWN_REQUEST, RefusedError, note_refusal, refusal_of
from client.privacy.epsilon import epsilon_of
from client.records.journal import Journal
from client.records.ledger import Ledger, open_ledger
from client.settings import SiteConfig, load_settings
from shared.messages.audit import MODEL_ARRAY, AuditAnswer, AuditQuery, AuditVerdict, reference_array
from shared.messages.envelope import header_record, read_array, read_header, validated
from shared.messages.packing import MessageError, array_digest, decode

if TYPE_CHECKING:
    from client.answers.audited_model import Subject

Flat = NDArray[np.float32]


@dataclass(frozen=True)
class ReceivedAudit:
    """A question that follows the protocol, with its arrays as they came."""

    query: AuditQuery
    content: RecordDict
    home: Home
    settings: SiteConfig


def answer_audit(content: RecordDict, home: Home) -> RecordDict:
    """Verdicts, or a typed refusal. Never raises."""
    digest, journal = UNKNOWN_REQUEST, Journal(home.journal)
    try:
        settings = load_settings(home)
        query = validated(AuditQuery, read_header(content))
        digest = query.digest
        journal.write(
            "request", task="audit", run=query.run, checkpoint_digest=query.checkpoint_digest, request_digest=digest
        )
        found = _verdicts(ReceivedAudit(query, content, home, settings), journal)
        note_release(journal, found, digest)
        answer = AuditAnswer(status="audited", verdicts=tuple(_released(verdict) for verdict in found))
    except Exception as error:  # every failure becomes a typed refusal
        code, reason = refusal_of(error)
        note_refusal(journal, code, reason, digest)
        answer = AuditAnswer(status="refused", refusal=code, reason=reason)
    return RecordDict({"header": header_record(answer)})


def read_weights(query: AuditQuery, content: RecordDict) -> tuple[Flat, ...]:
    """The packed weights of the model and of its references, each (num_elements,).

    Raises:
        MessageError: one is missing, misshapen, or has another digest than the header says.
    """
    names = [MODEL_ARRAY, *(reference_array(number) for number in range(len(query.reference_digests)))]
    found = []
    for name, digest in zip(names, (query.model_digest, *query.reference_digests), strict=True):
        flat = decode(read_array(content, name, query.manifest.num_elements), "float32")
        if array_digest(flat) != digest:
            raise MessageError(f"array {name!r} does not have the digest that the header names: send it again")
        found.append(flat)
    return tuple(found)


def _verdicts(asked: ReceivedAudit, journal: Journal) -> list[Verdict]:
    # Held to the end: no round meanwhile, and no second audit past the limit of the run.
    with open_ledger(asked.home.ledger, Path(asked.settings.head_file)) as ledger:
        data = open_dataset(asked.home, asked.settings.image_size)
        review(asked, data, ledger, journal)
        if asked.query.evidence == "canaries":
            return find_canaries(asked)
        subject = prepare(asked)
        policy = asked.settings.policy
        cost = audit_charge(data, policy, asked.query.audited_run, asked.query.digest)
        entry = reserve(ledger, cost, policy, epsilon_of, asked.home)
        found = count(asked, subject, data)
        ledger.commit(entry)
        return found


def review(asked: ReceivedAudit, data: Dataset, ledger: Ledger, journal: Journal) -> None:
    """Hold the question against the policy; nothing is charged yet.

    Raises:
        RefusedError: with the code and reason that the coordinator is told.
    """
    refusal = review_audit(asked.query, asked.settings.policy, _facts(asked, data, ledger, journal))
    if refusal is None:
        return
    if refusal.reason.endswith("this experiment yet"):
        keep_pending(asked.home, asked.query.experiment, asked.query.audited_run)
    raise RefusedError(refusal.code, refusal.reason, refusal.note)


def prepare(asked: ReceivedAudit) -> "Subject":
    """The networks of the question, ready; torch is loaded here.

    Raises:
        MessageError: an array is not the one of the header, or the tensors are not finite, or not of this network.
    """
    import torch

    from client.answers.audited_model import subject_in
    from client.training.local_round import choose_device

    if asked.settings.threads:
        torch.set_num_threads(asked.settings.threads)
    model, *references = read_weights(asked.query, asked.content)
    return subject_in(asked.query, model, references, choose_device(asked.settings.device))


def count(asked: ReceivedAudit, subject: "Subject", data: Dataset) -> list[Verdict]:
    """The verdicts of the charged, noisy counts."""
    from client.answers.audit_counts import counted_verdicts

    policy = asked.settings.policy
    return counted_verdicts(asked.settings.alias, subject, data, policy.unit, policy.audit)


def find_canaries(asked: ReceivedAudit) -> list[Verdict]:
    """Attack the DP-SGD that is installed here, at the plan's constants; no private image is in it.

    Raises:
        RefusedError: the plan trains without DP.
    """
    import secrets

    from client.privacy.canaries import audit_canaries, canary_plan
    from client.training.local_round import choose_device

    query, settings = asked.query, asked.settings
    if query.experiment.privacy.mechanism == "none":
        raise RefusedError("task_not_allowed", "the plan trains without DP: there is nothing that canaries could audit")
    found = audit_canaries(
        canary_plan(query.experiment), settings.policy.delta, np.random.default_rng(secrets.randbits(128)),
        device=choose_device(settings.device), precision=query.experiment.train.precision,
    )  # fmt: skip
    reason = "" if found.is_sound else "canaries refute the epsilon of the plan"
    figures = {"epsilon_at_least": round(found.bound, 3), "epsilon": round(found.epsilon, 3)}
    return [Verdict(settings.alias, "canaries", query.checkpoint, query.checkpoint_digest, not reason, reason, figures)]


def _facts(asked: ReceivedAudit, data: Dataset, ledger: Ledger, journal: Journal) -> AuditFacts:
    now, policy, approved = dt.datetime.now(dt.UTC), asked.settings.policy, read_approved(asked.home)
    return AuditFacts(
        image_size=asked.settings.image_size,
        approved_experiments=approved.experiments,
        approved_references=approved.references,
        refused_experiments=approved.refused,
        committed_rounds=ledger.num_committed(asked.query.audited_run),
        audits_of_run=len(ledger.of_task("audit", asked.query.audited_run)),
        audits_last_day=_num_asked_since(journal, now - dt.timedelta(days=1)),
        is_clock_behind=ledger.is_clock_behind(now),
        too_few=too_few(data, policy.unit, policy.audit),
    )


def _num_asked_since(journal: Journal, moment: dt.datetime) -> int:
    """Audits that were asked for after `moment`, before this one, whatever became of them."""
    asked = [entry for entry in journal.entries() if entry.kind == "request" and entry.fields.get("task") == "audit"]
    return sum(entry.time > moment for entry in asked[:-1])


def _released(verdict: Verdict) -> AuditVerdict:
    return AuditVerdict(
        audit=verdict.audit, passed=verdict.passed, reason=verdict.reason, figures=dict(verdict.figures)
    )
