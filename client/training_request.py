"""A training request's way through the site: parse, review, charge, train, reply.

Each stage is a function from one value to the next. Nothing is allocated or charged before `review` has accepted, and
no torch is loaded before: `prepare` is its door. Whatever goes wrong becomes a typed refusal in `handle`; texts of
exceptions stay in the site's own log, they may name files or carry data.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import RecordDict
from numpy.typing import NDArray

from client.data.dataset import Dataset, open_dataset
from client.home import Home
from client.policy import rules
from client.policy.approval import keep_pending, may_run
from client.policy.budget import reserve, told_fields, told_head, told_total
from client.policy.charges import charge_for, released_count, released_scalars
from client.policy.facts import gather_facts
from client.policy.refusals import UNKNOWN_REQUEST, RefusedError, note_refusal, refusal_of
from client.privacy.epsilon import epsilon_of
from client.records.chain import Entry
from client.records.journal import Journal
from client.records.ledger import Ledger, open_ledger
from client.records.replies import find_reply, keep_reply
from client.secure.masked_update import mask_update, remember_leaving
from client.secure.rosters import check_members, check_request
from client.settings import SiteConfig, load_settings
from client.training.frozen_tensors import frozen_tensors
from shared.messages.packing import encode
from shared.messages.training import ReplyHeader, TrainReply, TrainRequest

if TYPE_CHECKING:
    from client.training.local_round import Round

log = logging.getLogger("maskfed.client")
RELEASED = ("epsilon", "delta", "is_unbounded", "epsilon_cap", "unit", "ledger head")
"""What each trained reply says of the ledger."""
MASKED = "masked update, of no use alone"


@dataclass(frozen=True)
class Asked:
    """A request that follows the protocol, at the site that it came to."""

    request: TrainRequest
    digest: str
    home: Home
    settings: SiteConfig

    @property
    def run(self) -> str:
        """Name of the run that the round belongs to."""
        return self.request.header.run


@dataclass(frozen=True)
class Accepted:
    """A request that the policy allows, and the data set that it may use."""

    asked: Asked
    data: Dataset


@dataclass(frozen=True)
class Prepared:
    """The round made ready: nothing that the request says can fail any more."""

    accepted: Accepted
    training: "Round"


@dataclass(frozen=True)
class Charged:
    """A round whose cost is on disk."""

    prepared: Prepared
    reservation: Entry


@dataclass(frozen=True)
class Trained:
    """A completed round: the packed update, and the scalars that policy may release."""

    charged: Charged
    update: NDArray[np.float32]
    scalars: dict[str, float]


def handle(content: RecordDict, home: Home) -> TrainReply:
    """Answer one training request: the update, or a typed refusal. Never raises."""
    digest, journal = UNKNOWN_REQUEST, Journal(home.journal)
    try:
        asked = parse(content, home)
        digest, header = asked.digest, asked.request.header
        journal.write("request", task="train", run=header.run, server_round=header.server_round, request_digest=digest)
        return answer(asked, journal)
    except Exception as error:  # every failure becomes a typed refusal
        code, reason = refusal_of(error)
    note_refusal(journal, code, reason, digest)
    return TrainReply(ReplyHeader(request_digest=digest, status="refused", refusal=code, reason=reason))


def answer(asked: Asked, journal: Journal) -> TrainReply:
    """The stages under the ledger's lock, or the stored reply to the same request."""
    with open_ledger(asked.home.ledger, Path(asked.settings.head_file)) as ledger:
        if stored := find_stored(asked):
            journal.write("resent", request_digest=asked.digest)
            log.info("run %s: the stored reply is sent again", asked.run)
            remember_leaving(asked.request.header, asked.digest, asked.home)
            return stored
        accepted = review(asked, ledger)
        trained = train(charge(prepare(accepted), ledger), ledger)
        return keep(trained, reply(trained, ledger), journal)


def parse(content: RecordDict, home: Home) -> Asked:
    """Read the settings and the message.

    Raises:
        MessageError: the message does not follow the protocol.
        InputError: the site's settings cannot be used.
    """
    settings = load_settings(home)
    request = TrainRequest.from_record(content)
    return Asked(request, request.digest, home, settings)


def find_stored(asked: Asked) -> TrainReply | None:
    """The reply that exactly this request got before: one charge, one noise; none if approvals or policy forbid it now.

    Raises:
        RefusedError: it is masked for sites that the operator has taken back.
    """
    policy, experiment = asked.settings.policy, asked.request.header.experiment
    if rules.refusal_by_policy(experiment, policy) or not may_run(asked.home, policy, experiment):
        return None
    stored = find_reply(asked.home.replies, asked.run, asked.digest)
    if stored and (roster := asked.request.header.roster) is not None:
        check_members(roster, asked.run, asked.home, asked.settings)
    return stored


def review(asked: Asked, ledger: Ledger) -> Accepted:
    """Hold the request against the policy; an unknown experiment waits for approval.

    Raises:
        RefusedError: with the code and reason that the coordinator is told.
        SecureSumError: the roster of a masked round does not hold.
    """
    data = open_dataset(asked.home, asked.settings.image_size)
    refusal = rules.review(
        asked.request.header, asked.settings.policy, gather_facts(asked.home, asked.settings, asked.run, data, ledger)
    )
    if refusal is None:
        check_request(asked.request.header, asked.digest, asked.home, asked.settings)
        return Accepted(asked, data)
    if refusal.code == "experiment_not_approved":
        keep_pending(asked.home, asked.request.header.experiment, asked.run)
    raise RefusedError(refusal.code, refusal.reason, refusal.note)


def prepare(accepted: Accepted) -> Prepared:
    """Build the model with the request's tensors; torch is loaded here.

    Raises:
        RefusedError: the frozen tensors of the run are not held yet.
        MessageError: the tensors are not those of the experiment's model, or not finite.
    """
    from client.training.local_round import Round

    asked = accepted.asked
    base = frozen_tensors(asked.home, asked.request)
    return Prepared(accepted, Round(asked.request, base, accepted.data, asked.home, asked.settings))


def charge(prepared: Prepared, ledger: Ledger) -> Charged:
    """Reserve the round's cost; durable when this returns.

    Raises:
        RefusedError: the budget does not allow it; nothing was written.
    """
    asked, data = prepared.accepted.asked, prepared.accepted.data
    cost = charge_for(asked.request.header, data.dataset_id, data.fingerprint, asked.digest)
    return Charged(prepared, reserve(ledger, cost, asked.settings.policy, epsilon_of, asked.home))


def train(charged: Charged, ledger: Ledger) -> Trained:
    """Run the round and commit its charge."""
    start = time.monotonic()
    update, scalars = charged.prepared.training.run()
    ledger.commit(charged.reservation)
    return Trained(charged, update, {**scalars, "seconds": time.monotonic() - start})


def reply(trained: Trained, ledger: Ledger) -> TrainReply:
    """Only what is on the release list of client/README.md."""
    accepted = trained.charged.prepared.accepted
    asked, policy = accepted.asked, accepted.asked.settings.policy
    header = asked.request.header
    experiment, dealing = header.experiment, None
    if header.roster is None:
        update = encode(trained.update, experiment.federation.wire_dtype)
    else:
        place = (header.roster, asked.digest, asked.home, asked.settings.alias)
        update, dealing = mask_update(trained.update, header, *place)
    fields = {
        "request_digest": asked.digest,
        "status": "trained",
        "num_examples": released_count(len(accepted.data.train), experiment, policy),
        "scalars": released_scalars(trained.scalars, experiment, policy),
        **told_head(ledger),
        **told_fields(told_total(ledger, policy, epsilon_of), policy),
        "dealing": dealing,
    }
    return TrainReply(ReplyHeader.model_validate(fields), update)


def keep(trained: Trained, answered: TrainReply, journal: Journal) -> TrainReply:
    """Store the reply for a repeated request, and note what leaves."""
    asked = trained.charged.prepared.accepted.asked
    keep_reply(asked.home.replies, asked.run, answered)
    remember_leaving(asked.request.header, asked.digest, asked.home)
    header = answered.header
    assert answered.update is not None
    journal.write(
        "release",
        request_digest=header.request_digest,
        numbers=["update" if header.dealing is None else MASKED, "num_examples", *sorted(header.scalars), *RELEASED],
        bytes=answered.update.nbytes,
        epsilon=header.epsilon,
        is_unbounded=header.is_unbounded,
    )
    return answered
