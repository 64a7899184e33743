"""A site's answer to a question for feature statistics: policy first, then the charged release. No torch before it."""

import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from client.home import Home
from client.policy.approval import require_approved
from client.policy.refusals import UNKNOWN_REQUEST, PolicyError, note_refusal, refusal_of
from client.records.journal import Journal
from client.secure.masked_statistics import claim_sum, masked_answer
from client.secure.masked_update import Place
from client.settings import SiteConfig, load_settings
from shared.errors import InputError
from shared.messages.envelope import read_bytes
from shared.messages.packing import MessageError
from shared.messages.statistics import MAX_FILE_BYTES, StatisticsAnswer, StatisticsQuery, parse_query

if TYPE_CHECKING:
    from shared.evaluation.extractor import Extractor


def answer_query(content: RecordDict, home: Home) -> RecordDict:
    """Statistics, or a refusal with its reason. Never raises."""
    digest, journal = UNKNOWN_REQUEST, Journal(home.journal)
    try:
        settings = load_settings(home)
        text = _text(content)
        digest = hashlib.sha256(text.encode()).hexdigest()
        query = _parse(text)
        journal.write("request", task="statistics", run=query.run, request_digest=digest)
        return _record(*_release(query, content, digest, home, settings))
    except Exception as error:  # every failure becomes a typed refusal
        code, reason = refusal_of(error)
    note_refusal(journal, code, reason, digest)
    return _record(StatisticsAnswer(status="refused", reason=reason))


def _parse(text: str) -> StatisticsQuery:
    try:
        return parse_query(text)
    except InputError as error:
        raise MessageError(str(error)) from error


def _text(content: RecordDict) -> str:
    header = content.config_records.get("header")
    text = None if header is None else header.get("json")
    if not isinstance(text, str):
        raise MessageError("statistics query without a header")
    return text


def _release(
    query: StatisticsQuery, content: RecordDict, digest: str, home: Home, settings: SiteConfig
) -> tuple[StatisticsAnswer, bytes]:
    """The answer, and the file or the masked numbers that go with it."""
    if "statistics" not in settings.policy.tasks:
        raise PolicyError("policy.tasks does not list `statistics`: this site releases none")
    from client.answers.statistics.site_statistics import StatisticsPlan, release_statistics
    from client.privacy.epsilon import epsilon_of
    from shared.evaluation.feature_statistics import statistics_bytes
    from shared.evaluation.private_statistics import Projection, load_projection

    network = next((each for each in allowed_extractors(settings) if each.space == query.space), None)
    if network is None:
        raise PolicyError(
            f"extractor {query.extractor} with sha256 {query.extractor_sha256[:16]} is not in policy.extractors"
        )
    projection: Projection | None = None
    if query.kind == "dp":
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "projection.safetensors"
            path.write_bytes(read_bytes(content, "file", MAX_FILE_BYTES))
            projection = load_projection(path)
        require_approved(home, settings, "projection", projection.projected_space.sha256)
    if query.roster is not None:
        place = Place(query.roster, query.run, digest, home, settings.alias)
        claim_sum(place, query.kind, settings)
    plan = StatisticsPlan(query.kind, query.space, projection, query.noise_multiplier, query.run, digest, query.roster)
    found = release_statistics(home, settings, plan, lambda: network, epsilon_of)
    if query.roster is None:
        return StatisticsAnswer(status="released"), statistics_bytes(found)
    return masked_answer(found, 1.0 if projection is None else projection.radius, place)


def allowed_extractors(settings: SiteConfig) -> "Iterator[Extractor]":
    """The feature networks of `policy.extractors`, each `name`, `onnx:FILE` or `name=weights file`, loaded in turn.

    Raises:
        InputError: a file of the list is missing or has another digest than the published one.
    """
    from shared.evaluation.networks import load_extractor

    for entry in settings.policy.extractors:
        spec, _, path = entry.partition("=")
        yield load_extractor(spec, weights=Path(path) if path else None)


def _record(answer: StatisticsAnswer, file: bytes = b"") -> RecordDict:
    arrays = {"file": Array(np.frombuffer(file, np.uint8))} if file else {}
    header = ConfigRecord({"json": answer.model_dump_json()})
    return RecordDict({"arrays": ArrayRecord(arrays), "header": header})
