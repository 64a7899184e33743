"""A stand-in for Flower's Grid: sites are functions, in threads; replies can be late, hostile, or not come at all."""

import itertools
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from shared.messages.agreement.offer import OFFER_ACTION, OfferAnswer
from shared.messages.envelope import header_record
from shared.messages.sealing import SEAL, read_seal
from shared.messages.signature import PURPOSES
from tests.signing import key_of, signed_reply

# Flower makes messages only inside a task.
TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

Answer = RecordDict | Error | None
"""Content of a reply, an error in its place, or nothing at all."""


@dataclass
class Node:
    node_id: int
    last_activated_at: str = "2026-01-01T00:00:00+00:00"


@dataclass
class Site:
    """A site: `answer(content, how_often_asked)`, after `delay_seconds`, signed unless the answer is so already."""

    answer: Callable[[RecordDict, int], Answer]
    delay_seconds: float = 0.0
    is_online: bool = True
    asked: int = 0
    is_signing: bool = True
    """Whether it signs what is no answer to an offer."""
    offer: Callable[[RecordDict], Answer] = lambda _: answer_record(OfferAnswer(status="accepted"))
    """Its answer to an offer, which is not counted in `asked`."""
    offered: int = 0
    queries: dict[str, Callable[[RecordDict], Answer]] = field(default_factory=dict)
    """Its answers to other questions, by message type; like offers, they are not counted in `asked`."""


@dataclass
class FakeGrid:
    """`push_messages`, `pull_messages`, `get_nodes` over `sites`; `failures` are raised by the next calls."""

    sites: dict[int, Site]
    failures: list[Exception] = field(default_factory=list)
    activated: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._replies: dict[str, Message] = {}
        self._count = itertools.count()
        self._lock = threading.Lock()

    def get_nodes(self) -> Iterable[Node]:
        self._fail()
        return [
            Node(node_id, self.activated.get(node_id, Node(0).last_activated_at))
            for node_id, site in self.sites.items()
            if site.is_online
        ]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self._fail()
        ids = []
        for message in messages:
            message_id = f"message-{next(self._count)}"
            ids.append(message_id)
            threading.Thread(target=self._work, args=(message_id, message), daemon=True).start()
        return ids

    def forgery(self, message: Message) -> str:
        """For tests of what lies above the signatures; `conduct` puts a `SignedGrid` around this one."""
        return ""

    def allow(self, reply_bytes: int) -> None:
        """Sizes are the guards' business."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self._fail()
        with self._lock:
            return [self._replies.pop(key) for key in message_ids if key in self._replies]

    def _work(self, message_id: str, message: Message) -> None:
        site = self.sites[message.metadata.dst_node_id]
        kind = message.metadata.message_type
        is_offer = kind == f"query.{OFFER_ACTION}" or kind in site.queries
        if kind in site.queries:
            answer = site.queries[kind](message.content)
        elif is_offer:
            site.offered += 1
            answer = site.offer(message.content)
        else:
            site.asked += 1
            answer = site.answer(message.content, site.asked)
            time.sleep(site.delay_seconds)
        if answer is not None:
            message.metadata.__dict__["_message_id"] = message_id
            if (is_offer or site.is_signing) and isinstance(answer, RecordDict):
                answer = _signed(answer, message)
            reply = Message(answer, reply_to=message)
            with self._lock:
                self._replies[message_id] = reply

    def _fail(self) -> None:
        with self._lock:
            if self.failures:
                raise self.failures.pop(0)


def answer_record(answer: OfferAnswer) -> RecordDict:
    return RecordDict({"arrays": ArrayRecord(), "header": header_record(answer)})


def _signed(answer: RecordDict, message: Message) -> RecordDict:
    """With the key of the site that is asked; questions without a seal come from tests below the signatures."""
    if SEAL in answer or "header" not in answer or SEAL not in message.content:
        return answer
    key = key_of(read_seal(message.content, "request").alias)
    return signed_reply(answer, message.content, PURPOSES[message.metadata.message_type], key)
