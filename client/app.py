"""What a site does with a message, from request to reply. No torch before the policy has said yes.

Everything that can go wrong becomes a typed refusal. Texts of exceptions stay in the site's own log: they may name
files or carry data.
"""

import datetime as dt
import io
import logging
import math
import time
from pathlib import Path

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from client.answers.signed_answer import answer_signed
from client.data.dataset import Dataset, open_dataset
from client.data.virtual_site import home_of
from client.policy.approval import keep_pending, read_approved
from client.policy.refusals import UNKNOWN_REQUEST, RefusedError, note_refusal, refusal_of
from client.policy.rules import Facts, charge_for, released_count, released_scalars, review
from client.privacy.epsilon import epsilon_of
from client.records.chain import Entry
from client.records.journal import Journal
from client.records.ledger import Ledger, open_ledger
from client.records.replies import find_reply, keep_reply
from client.records.site_log import site_log
from client.records.spending import Total
from client.settings import Home, SiteConfig, SitePolicy, load_settings, write_private
from shared.messages.audit import AUDIT_ACTION
from shared.messages.packing import encode
from shared.messages.training import ReplyHeader, TrainReply, TrainRequest

app = ClientApp()
log = logging.getLogger("maskfed.client")
MOST_BASES = 2
SPENT = ("epsilon", "delta", "is_unbounded", "epsilon_cap", "unit")
"""What each trained reply says of the ledger."""


@app.train()
def train(message: Message, context: Context) -> Message:
    """Flower's entry point; the coordinator's run configuration in `context` is not read."""
    home = home_of(context.node_config)
    with site_log(home):
        return answer_signed(message, home, "train", lambda content, home: handle(content, home).to_record())


@app.query()
def query(message: Message, context: Context) -> Message:
    """Questions for feature statistics."""
    from client.answers.statistics_request import answer_query

    home = home_of(context.node_config)
    with site_log(home):
        return answer_signed(message, home, "statistics", answer_query)


@app.query(AUDIT_ACTION)
def query_audit(message: Message, context: Context) -> Message:
    """Questions for audits of a model."""
    from client.answers.audit_request import answer_audit

    home = home_of(context.node_config)
    with site_log(home):
        return answer_signed(message, home, "audit", answer_audit)


def handle(content: RecordDict, home: Home) -> TrainReply:
    """Answer one training request: the update, or a typed refusal. Never raises."""
    digest, journal = UNKNOWN_REQUEST, Journal(home.journal)
    try:
        settings = load_settings(home)
        request = TrainRequest.from_record(content)
        digest = request.digest
        header = request.header
        journal.write("request", task="train", run=header.run, server_round=header.server_round, request_digest=digest)
        return _answer(request, digest, home, settings, journal)
    except Exception as error:  # every failure becomes a typed refusal
        code, reason = refusal_of(error)
    note_refusal(journal, code, reason, digest)
    return TrainReply(ReplyHeader(request_digest=digest, status="refused", refusal=code, reason=reason))


def _answer(request: TrainRequest, digest: str, home: Home, settings: SiteConfig, journal: Journal) -> TrainReply:
    header, policy = request.header, settings.policy
    with open_ledger(home.ledger, Path(settings.head_file)) as ledger:
        if "train" in policy.tasks and (stored := find_reply(home.replies, header.run, digest)):
            journal.write("resent", request_digest=digest)
            log.info("run %s round %d: the stored reply is sent again", header.run, header.server_round)
            return stored
        data = open_dataset(home, settings.image_size)
        refusal = review(header, policy, _facts(ledger, data, request, home, settings))
        if refusal is not None:
            if refusal.code == "experiment_not_approved":
                keep_pending(home, header.experiment)
            raise RefusedError(refusal.code, refusal.reason)
        base = _base_weights(home, request)

        from client.training.local_round import Round

        training = Round(request, base, data, home, settings)
        reservation, total = _reserve(ledger, request, digest, data, settings)
        log.info("run %s round %d accepted: %s after it", header.run, header.server_round, total)
        start = time.monotonic()
        update, scalars = training.run()
        scalars["seconds"] = time.monotonic() - start
        ledger.commit(reservation)
        own = _reply_header(request, digest, settings, num_images=len(data.train), scalars=scalars)
        reply = TrainReply(
            own.model_copy(update=_spent(total, policy) | _head(ledger)),
            encode(update, header.experiment.federation.wire_dtype),
        )
        keep_reply(home.replies, header.run, reply)
        journal.write("release", **_release(reply))
        return reply


def _reserve(
    ledger: Ledger, request: TrainRequest, digest: str, data: Dataset, settings: SiteConfig
) -> tuple[Entry, Total]:
    policy, charge = settings.policy, charge_for(request.header, data.dataset_id, data.fingerprint, digest)
    return ledger.reserve(charge, cap=policy.epsilon_cap, delta=policy.delta, epsilon_of=epsilon_of)


def _facts(ledger: Ledger, data: Dataset, request: TrainRequest, home: Home, settings: SiteConfig) -> Facts:
    now = dt.datetime.now(dt.UTC)
    return Facts(
        num_images=len(data.train),
        has_persons=data.persons is not None,
        image_size=settings.image_size,
        approved_experiments=read_approved(home).experiments,
        run_plan=ledger.plan_of(request.header.run),
        committed_rounds=ledger.num_committed(request.header.run),
        rounds_last_day=ledger.num_since(now - dt.timedelta(days=1)),
        spent_unit=ledger.unit_of(data.dataset_id),
        is_clock_behind=ledger.is_clock_behind(now),
    )


def _base_weights(home: Home, request: TrainRequest) -> NDArray[np.float32] | None:
    """Frozen tensors: from the request, which then is remembered, or from an earlier one."""
    digest = request.header.base_digest
    if not digest:
        return None
    path = home.base / f"{digest}.npy"
    if request.base is not None:
        buffer = io.BytesIO()
        np.save(buffer, request.base, allow_pickle=False)
        write_private(path, buffer.getvalue())
        for old in sorted(home.base.glob("*.npy"), key=lambda each: each.stat().st_mtime)[:-MOST_BASES]:
            old.unlink()
        return request.base
    if not path.exists():
        raise RefusedError("base_missing", "the site does not hold the frozen tensors of this run yet")
    stored: NDArray[np.float32] = np.load(path, allow_pickle=False)
    return stored


def _reply_header(
    request: TrainRequest, digest: str, settings: SiteConfig, *, num_images: int, scalars: dict[str, float]
) -> ReplyHeader:
    experiment, policy = request.header.experiment, settings.policy
    return ReplyHeader(
        request_digest=digest,
        status="trained",
        num_examples=released_count(num_images, experiment, policy),
        scalars=released_scalars(scalars, experiment, policy),
    )


def _spent(total: Total, policy: SitePolicy) -> dict[str, object]:
    is_finite = math.isfinite(total.epsilon)
    return {
        "epsilon": total.epsilon if is_finite else None,
        "delta": total.delta,
        "is_unbounded": total.is_unbounded or not is_finite,
        "epsilon_cap": policy.epsilon_cap,
        "unit": total.unit,
    }


def _head(ledger: Ledger) -> dict[str, object]:
    return {"ledger_sequence": ledger.head.sequence, "ledger_hash": ledger.head.hash}


def _release(reply: TrainReply) -> dict[str, object]:
    header = reply.header
    assert reply.update is not None
    return {
        "request_digest": header.request_digest,
        "numbers": ["update", "num_examples", *sorted(header.scalars), *SPENT, "ledger head"],
        "bytes": reply.update.nbytes,
        "epsilon": header.epsilon,
        "is_unbounded": header.is_unbounded,
    }
