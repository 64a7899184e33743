"""A site's answer to a request for audits: policy first, then the attacks, then pass or fail. No torch before policy.

The verdict leaves, uncharged and counted by `max_audits_per_day`; figures leave only where `audit_figures` allows it,
and are charged as a release without DP before they do.
"""

import datetime as dt
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import RecordDict
from numpy.typing import NDArray

from client.data.dataset import Dataset, open_dataset
from client.policy.refusals import UNKNOWN_REQUEST, RefusedError, note_refusal, refusal_of
from client.policy.rules import AuditFacts, review_audit
from client.records.journal import Journal
from client.records.ledger import Ledger, open_ledger
from client.settings import Home, SiteConfig, load_settings
from shared.messages.audit import MODEL_ARRAY, PIXELS, AuditAnswer, AuditQuery, AuditVerdict, reference_array
from shared.messages.envelope import header_record, read_array, read_header, validated
from shared.messages.packing import MessageError, array_digest, decode

if TYPE_CHECKING:
    from shared.evaluation.extractor import Extractor


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
        answer = AuditAnswer(status="audited", verdicts=_verdicts(query, content, home, settings, journal))
    except Exception as error:  # every failure becomes a typed refusal
        code, reason = refusal_of(error)
        note_refusal(journal, code, reason, digest)
        answer = AuditAnswer(status="refused", refusal=code, reason=reason)
    return RecordDict({"header": header_record(answer)})


def _verdicts(
    query: AuditQuery, content: RecordDict, home: Home, settings: SiteConfig, journal: Journal
) -> tuple[AuditVerdict, ...]:
    # Held to the end: no round meanwhile, and no second audit past the limit of the day.
    with open_ledger(home.ledger, Path(settings.head_file)) as ledger:
        data = open_dataset(home, settings.image_size)
        refusal = review_audit(query, settings.policy, _facts(ledger, data, settings, journal))
        if refusal is not None:
            raise RefusedError(refusal.code, refusal.reason)
        extractor = _extractor(query, settings)
        model, references = read_weights(query, content)

        import torch

        from client.answers.attacks import AuditOptions, audit
        from client.answers.audited_model import subject_in
        from client.answers.verdicts import charge_figures, note_release
        from client.privacy.epsilon import epsilon_of
        from client.training.local_round import choose_device

        if settings.threads:
            torch.set_num_threads(settings.threads)
        subject = subject_in(query, model, references, choose_device(settings.device))
        options = AuditOptions(extractor, query.num_images, query.control_steps)
        found = audit(home, settings, subject, options)
        if query.figures:
            charge_figures(ledger, data, settings.policy, query.run, query.digest, epsilon_of)
        note_release(journal, query.checkpoint_digest, figures=query.figures, request_digest=query.digest)
    return tuple(
        AuditVerdict(
            audit=verdict.audit,
            passed=verdict.passed,
            reason=verdict.reason,
            figures=verdict.figures if query.figures else {},
        )
        for verdict in found
    )


def _facts(ledger: Ledger, data: Dataset, settings: SiteConfig, journal: Journal) -> AuditFacts:
    from client.answers.verdicts import num_asked_since

    now = dt.datetime.now(dt.UTC)
    return AuditFacts(
        image_size=settings.image_size,
        num_held_out=len(data.held_out),
        audits_last_day=num_asked_since(journal, now - dt.timedelta(days=1)),
        spent_unit=ledger.unit_of(data.dataset_id),
        is_clock_behind=ledger.is_clock_behind(now),
    )


def _extractor(query: AuditQuery, settings: SiteConfig) -> "Extractor | None":
    """The feature network that is asked for, if the policy lists its file; None for pixels."""
    if query.extractor == PIXELS:
        return None
    from client.answers.statistics_request import allowed_extractors

    for network in allowed_extractors(settings):
        if network.space.extractor == query.extractor and network.space.sha256 == query.extractor_sha256:
            return network
    raise RefusedError(
        "task_not_allowed",
        f"extractor {query.extractor} with sha256 {query.extractor_sha256[:16]} is not in policy.extractors",
    )


def read_weights(query: AuditQuery, content: RecordDict) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
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
    return found[0], found[1:]
