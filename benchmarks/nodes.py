"""Many stand-in nodes in one process: they take a request over the real HTTP fleet API and answer all at once.

`python -m benchmarks.nodes ADDRESS NUM_NODES NUM_ROUNDS` against an insecure SuperLink on loopback; no training. Only
the first node downloads the weights, so that what is measured is the ServerApp and not this process.
"""

import hashlib
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree, push_objects
from flwr.supernode.fleet_http_connection import http_request_response

from shared.messages.agreement.offer import OfferAnswer
from shared.messages.envelope import header_record
from shared.messages.packing import encode
from shared.messages.sealing import SEAL, digests_of, read_seal, seal_reply
from shared.messages.signature import PURPOSES, Purpose, Statement
from shared.messages.training import ReplyHeader, TrainReply, TrainRequest

ANSWER_SECONDS = 300.0
Answer = tuple[RecordDict, Statement | None]
"""A reply, and what the signed request that it answers states."""


@dataclass
class Crowd:
    """What the nodes share: the barrier before answering, and the answer of each round."""

    num_nodes: int
    answers: dict[str, Answer] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.num_nodes, timeout=ANSWER_SECONDS)

    def answer(self, group: str, message: Any, tree: Any, pull: Any, confirm: Any) -> Answer:  # noqa: ANN401
        """Everybody's reply in one round and what it answers; the first to ask downloads the request."""
        purpose = PURPOSES[message.metadata.message_type]
        group = f"{purpose} {group}"
        with self.lock:
            if group not in self.answers:
                run_id = message.metadata.run_id
                request = pull_and_inflate_object_from_tree(
                    tree, lambda key: pull(run_id, key), lambda _key: None, return_type=Message
                )
                self.answers.clear()
                self.answers[group] = make_answer(request.content, purpose), asked_in(request.content, purpose)
        confirm(message.metadata.run_id, message.metadata.message_id)
        return self.answers[group]


def make_answer(content: RecordDict, purpose: Purpose) -> RecordDict:
    """A reply in the request's protocol: ours, or that of Flower's own strategies."""
    if purpose == "offer":
        return RecordDict({"arrays": ArrayRecord(), "header": header_record(OfferAnswer(status="accepted"))})
    if "header" not in content.config_records:
        (weights,) = content.array_records["arrays"].values()
        update = np.full(weights.shape, 1e-3, np.float32)
        metrics = MetricRecord({"num-examples": 1})
        return RecordDict({"arrays": ArrayRecord({"w": Array(update)}), "metrics": metrics})
    request = TrainRequest.from_record(content)
    header = ReplyHeader(request_digest=request.digest, status="trained")
    update = np.random.default_rng(0).normal(scale=1e-3, size=request.weights.shape).astype(np.float32)
    return TrainReply(header, encode(update, request.header.experiment.federation.wire_dtype)).to_record()


def asked_in(content: RecordDict, purpose: Purpose) -> Statement | None:
    """What a signed request of ours states; Flower's own strategies sign nothing."""
    if SEAL not in content:
        return None
    seal, digests = read_seal(content, "request"), digests_of(content)
    return seal.statement(purpose, seal.alias, digests)


def alias_of(node_id: int) -> str:
    """The name of a stand-in site."""
    return f"n{node_id}"


def key_of(alias: str) -> Ed25519PrivateKey:
    """Its signing key, which guards nothing."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"stand-in {alias}".encode()).digest())


def serve(address: str, crowd: Crowd, num_rounds: int) -> None:
    """One node: as many messages as there are rounds, and offers before them."""
    with http_request_response(address, insecure=True) as connection:
        _node_id, receive, send, _run, _fab, pull, push, confirm = connection
        left = num_rounds
        while left:
            while (received := receive()) is None:
                time.sleep(0.1)
            message, tree = received
            left -= message.metadata.message_type == MessageType.TRAIN
            content, asked = crowd.answer(message.metadata.group_id, message, tree, pull, confirm)
            if asked is not None:
                alias = alias_of(message.metadata.dst_node_id)
                content = seal_reply(content, replace(asked, alias=alias), key_of(alias))
            crowd.barrier.wait()
            reply = Message(content, reply_to=message)
            with no_object_id_recompute():
                reply.metadata.__dict__["_message_id"] = reply.object_id
                wanted, session = send(reply, get_object_tree(reply), 0.0)
                run_id = message.metadata.run_id
                push_objects(
                    get_all_nested_objects(reply),
                    lambda key, data, run_id=run_id, session=session: push(run_id, session, key, data),  # type: ignore[misc]
                    object_ids_to_push=wanted,
                )
        time.sleep(3600)


def main(address: str, num_nodes: int, num_rounds: int) -> None:
    """Start every node; the process is ended from outside."""
    crowd = Crowd(num_nodes)
    for _ in range(num_nodes):
        threading.Thread(target=serve, args=(address, crowd, num_rounds), daemon=True).start()
    time.sleep(3600)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
