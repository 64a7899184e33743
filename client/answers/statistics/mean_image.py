"""A site's answer to the question for its mean image: parse, review, charge, sum, answer. No torch before review.

One image leaves for all of the site's, under noise, charged before the first pixel is read; it belongs to an
experiment, which the operator has approved, and the same question again gets the same answer.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict
from numpy.typing import NDArray

from client.data.dataset import Dataset, open_dataset
from client.home import Home
from client.policy.approval import keep_pending, may_run
from client.policy.budget import reserve, told_fields, told_total
from client.policy.charges import mean_image_charge
from client.policy.facts import gather_facts
from client.policy.refusals import UNKNOWN_REQUEST, RefusedError, note_refusal, refusal_of
from client.policy.rules import mean_image_refusals, refusal_by_policy
from client.privacy.epsilon import epsilon_of
from client.records.journal import Journal
from client.records.ledger import Ledger, open_ledger
from client.records.replies import find_answer, keep_answer
from client.settings import SiteConfig, load_settings
from shared.messages.envelope import header_record, read_header, validated
from shared.messages.statistics import PIXEL_SUM, MeanImageAnswer, MeanImageQuery

Released = tuple[MeanImageAnswer, NDArray[np.float32]]


@dataclass(frozen=True)
class ParsedQuery:
    """A question that follows the protocol, at the site that it came to."""

    query: MeanImageQuery
    home: Home
    settings: SiteConfig


def answer_mean_image(content: RecordDict, home: Home) -> RecordDict:
    """The noisy sum of the pixels, or a typed refusal. Never raises."""
    digest, journal = UNKNOWN_REQUEST, Journal(home.journal)
    try:
        settings = load_settings(home)
        query = validated(MeanImageQuery, read_header(content))
        digest = query.digest
        journal.write("request", task="mean_image", run=query.run, request_digest=digest)
        return _record(*_answer(ParsedQuery(query, home, settings), journal))
    except Exception as error:  # every failure becomes a typed refusal
        code, reason = refusal_of(error)
    note_refusal(journal, code, reason, digest)
    return _record(MeanImageAnswer(request_digest=digest, status="refused", refusal=code, reason=reason))


def _answer(asked: ParsedQuery, journal: Journal) -> Released:
    """Under the ledger's lock: the stored answer, or a new one."""
    with open_ledger(asked.home.ledger, Path(asked.settings.head_file)) as ledger:
        data = open_dataset(asked.home, asked.settings.image_size)
        if stored := _find_stored(asked):
            journal.write("resent", request_digest=asked.query.digest)
            return stored
        _review(asked, data, ledger)
        released = _release(asked, data, ledger)
        keep_answer(asked.home.mean_images, asked.query.run, *released)
        journal.write(
            "release",
            task="mean_image",
            request_digest=asked.query.digest,
            numbers=["noisy pixel sum", "noisy num_units", "norm"],
            epsilon=released[0].epsilon,
            is_unbounded=released[0].is_unbounded,
        )
        return released


def _find_stored(asked: ParsedQuery) -> Released | None:
    """The answer that exactly this question got before: one charge, one noise; none if the operator forbids it now."""
    policy, experiment = asked.settings.policy, asked.query.experiment
    is_allowed = "mean_image" in policy.tasks and refusal_by_policy(experiment, policy) is None
    if not is_allowed or not may_run(asked.home, policy, experiment):
        return None
    return find_answer(asked.home.mean_images, asked.query.run, asked.query.digest, MeanImageAnswer)


def _review(asked: ParsedQuery, data: Dataset, ledger: Ledger) -> None:
    """Hold the question against the policy; an unknown experiment waits for approval.

    Raises:
        RefusedError: with the code and reason that the coordinator is told.
    """
    query, settings = asked.query, asked.settings
    facts = gather_facts(asked.home, settings, query.run, data, ledger)
    if refusal := next(mean_image_refusals(query.experiment, settings.policy, facts), None):
        if refusal.code == "experiment_not_approved":
            keep_pending(asked.home, query.experiment, query.run)
        raise RefusedError(refusal.code, refusal.reason, refusal.note)
    if ledger.of_task("mean_image", query.run):
        raise RefusedError("plan_changed", "this run's mean image was charged before: ask under a new name")


def _release(asked: ParsedQuery, data: Dataset, ledger: Ledger) -> Released:
    """Charge, then sum; torch is loaded here, and what can be refused is refused before the charge."""
    from client.answers.statistics.pixel_sum import PixelSummation

    query, policy = asked.query, asked.settings.policy
    privacy = query.experiment.privacy
    summation = PixelSummation(privacy.mean_image_noise, policy.mean_image_norm, data.size)
    units = data.units(privacy.unit)
    cost = mean_image_charge(query, data.dataset_id, data.fingerprint)
    entry = reserve(ledger, cost, policy, epsilon_of, asked.home)
    found = summation.run(data.images, units)
    ledger.commit(entry)
    fields = {
        "request_digest": query.digest,
        "status": "released",
        "num_units": found.num_units,
        "norm": policy.mean_image_norm,
        **told_fields(told_total(ledger, policy, epsilon_of), policy),
    }
    return MeanImageAnswer.model_validate(fields), found.pixels_D.astype(np.float32)


def _record(answer: MeanImageAnswer, pixels: NDArray[np.float32] | None = None) -> RecordDict:
    arrays = {} if pixels is None else {PIXEL_SUM: Array(pixels)}
    return RecordDict({"arrays": ArrayRecord(arrays), "header": header_record(answer)})
