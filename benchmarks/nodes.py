"""Many stand-in nodes in one process: they take a request over the real HTTP fleet API and answer all at once.

`python -m benchmarks.nodes ADDRESS NUM_NODES NUM_ROUNDS` against an insecure SuperLink on loopback; no training. Only
the first node downloads the weights, so that what is measured is the ServerApp and not this process.
"""

import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree, push_objects
from flwr.supernode.fleet_http_connection import http_request_response

from shared.messages.packing import encode
from shared.messages.training import ReplyHeader, TrainReply, TrainRequest

ANSWER_SECONDS = 300.0


@dataclass
class Crowd:
    """What the nodes share: the barrier before answering, and the answer of each round."""

    num_nodes: int
    answers: dict[str, RecordDict] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.num_nodes, timeout=ANSWER_SECONDS)

    def answer(self, group: str, message: Any, tree: Any, pull: Any, confirm: Any) -> RecordDict:  # noqa: ANN401
        """The content of everybody's reply in one round; the first to ask downloads the request."""
        with self.lock:
            if group not in self.answers:
                run_id = message.metadata.run_id
                request = pull_and_inflate_object_from_tree(
                    tree, lambda key: pull(run_id, key), lambda _key: None, return_type=Message
                )
                self.answers.clear()
                self.answers[group] = make_answer(request.content)
        confirm(message.metadata.run_id, message.metadata.message_id)
        return self.answers[group]


def make_answer(content: RecordDict) -> RecordDict:
    """A reply in the request's protocol: ours, or that of Flower's own strategies."""
    if "header" not in content.config_records:
        (weights,) = content.array_records["arrays"].values()
        update = np.full(weights.shape, 1e-3, np.float32)
        metrics = MetricRecord({"num-examples": 1})
        return RecordDict({"arrays": ArrayRecord({"w": Array(update)}), "metrics": metrics})
    request = TrainRequest.from_record(content)
    header = ReplyHeader(request_digest=request.digest, status="trained")
    update = np.random.default_rng(0).normal(scale=1e-3, size=request.weights.shape).astype(np.float32)
    return TrainReply(header, encode(update, request.header.experiment.federation.wire_dtype)).to_record()


def serve(address: str, crowd: Crowd, num_rounds: int) -> None:
    """One node: as many messages as there are rounds."""
    with http_request_response(address, insecure=True) as connection:
        _node_id, receive, send, _run, _fab, pull, push, confirm = connection
        for _ in range(num_rounds):
            while (received := receive()) is None:
                time.sleep(0.1)
            message, tree = received
            content = crowd.answer(message.metadata.group_id, message, tree, pull, confirm)
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
