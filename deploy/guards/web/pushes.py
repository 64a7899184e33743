"""Who a node is, and what it may push: an answer to a question it was asked, in the shape that our messages have.

Flower keeps the children that each object names and expands them again when the answer is fetched: objects that name
each other several times grow exponentially, from a few hundred bytes. So an id is listed once, at most five deep
(message, record, array record, array, chunk), and what the store knows already must have the same children.

What a node was asked for is read from the files that the ServerApp writes before it asks: a JSON line per message,
`message`, `node`, `bytes`, `objects`; one file per Flower run, in a folder of the coordinator.
"""

import binascii
import datetime as dt
import json
import logging
import re
import threading
from base64 import b64decode
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from flwr.common.constant import SUPERLINK_NODE_ID, SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from google.protobuf.message import DecodeError

from deploy.guards.web.asgi import PUSH_OBJECT, HttpRefusal

log = logging.getLogger("maskfed.guard")
DEEPEST = 5
REMEMBERED = 8
"""Answers of one node that are open at a time; a node sends one after the other."""
MOST_KNOWN = 100_000
"""Questions that are remembered, the newest: 200 sites and 500 rounds."""
_OBJECT_ID = re.compile(r"[0-9a-f]{64}")
_read_key = lru_cache(maxsize=1024)(bytes_to_public_key)
"""Reading a key takes a third of the time of checking its signature; only registered keys are read."""


@dataclass(frozen=True)
class Allowance:
    """The one answer that a question allows: by which node, how many objects, how many bytes together."""

    node: int
    largest_bytes: int
    most_objects: int


class AllowanceFiles:
    """Allowances by message id; a file is read on from where it ended when an id is not known yet."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self._read: dict[Path, int] = {}
        self._known: dict[str, Allowance] = {}

    def find(self, message_id: str) -> Allowance | None:
        """The allowance of a question; None when nothing was asked under this id."""
        with self._lock:
            if message_id not in self._known:
                self._read_on()
            return self._known.get(message_id)

    def _read_on(self) -> None:
        for file in sorted(self._folder.glob("*.jsonl")):
            with file.open("rb") as opened:
                opened.seek(self._read.get(file, 0))
                whole, _, _ = opened.read().rpartition(b"\n")
            if not whole:
                continue
            self._read[file] = self._read.get(file, 0) + len(whole) + 1
            for line in whole.splitlines():
                # A line that a kill has torn allows nothing, and the others all the same.
                with suppress(ValueError, TypeError, KeyError, RecursionError):
                    entry = json.loads(line)
                    self._known[entry["message"]] = Allowance(entry["node"], entry["bytes"], entry["objects"])
        for message_id in list(self._known)[: max(0, len(self._known) - MOST_KNOWN)]:
            del self._known[message_id]


class Store(Protocol):
    """The part of Flower's object store that is asked."""

    def __contains__(self, object_id: str) -> bool:
        """Whether the store knows the id."""

    def get_object_tree(self, object_id: str) -> ObjectTree:
        """The children that the store knows, all the way down."""


class State(Protocol):
    """The part of Flower's link state that is asked."""

    @property
    def object_store(self) -> Store:
        """Where objects are."""

    def get_node_id_by_public_key(self, public_key: bytes) -> int | None:
        """The registered node of a key."""


class StateFactory(Protocol):
    """Gives the link state."""

    def state(self) -> State:
        """The one state of this process."""


@dataclass
class _Open:
    """An answer that is being uploaded."""

    question: str
    nodes: dict[str, ObjectTree]
    """Every object of the answer with its children."""
    missing: set[str]
    left_bytes: int


class NodePushes:
    """Authenticates nodes by their headers, and takes only what allowances allow."""

    def __init__(self, states: StateFactory, allowances: AllowanceFiles) -> None:
        self._states, self._allowances = states, allowances
        self._open: dict[int, deque[_Open]] = {}
        self._answered: dict[str, str] = {}
        self._lock = threading.Lock()

    def authenticate(self, headers: dict[str, str]) -> int:
        """Node id of the registered key that signed the time in the headers.

        Raises:
            HttpRefusal: 401, no such key, no such signature, or not this time.
        """
        try:
            key = b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER], validate=True)
            signature = b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER], validate=True)
            signed = headers[TIMESTAMP_HEADER]
            age = (now() - dt.datetime.fromisoformat(signed)).total_seconds()
            is_timely = -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE
            node_id = self._states.state().get_node_id_by_public_key(key)
            if not is_timely or node_id is None or len(key) > 1024 or len(signed) > 64:
                raise ValueError
            if not verify_signature(_read_key(key), signed.encode("ascii"), signature):
                raise ValueError
        except (KeyError, ValueError, TypeError, OverflowError, binascii.Error) as error:
            raise HttpRefusal(401, "no registered node signed this call") from error
        return node_id

    def check_push(self, node_id: int, path: str, body: bytes) -> None:
        """Refuse a push that no question asked `node_id` for.

        Raises:
            HttpRefusal: 400 for a malformed one, 403 for one that is not allowed; Flower's node then drops the answer.
        """
        try:
            if path == PUSH_OBJECT:
                self._take_object(node_id, PushObjectRequest.FromString(body))
            else:
                self._take_message(node_id, PushMessagesRequest.FromString(body))
        except DecodeError as error:
            raise HttpRefusal(400, "the body is no message of this path") from error
        except HttpRefusal as refusal:
            log.warning("a push of node %d is refused: %s", node_id, refusal)
            raise

    def _take_message(self, node_id: int, request: PushMessagesRequest) -> None:
        if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
            raise HttpRefusal(400, "one message and its tree are taken at a time")
        message, tree = request.messages_list[0], request.message_object_trees[0]
        metadata = message.metadata
        if metadata.src_node_id != node_id or metadata.dst_node_id != SUPERLINK_NODE_ID:
            raise HttpRefusal(403, "a node speaks for itself and to the coordinator only")
        question = metadata.reply_to_message_id
        allowance = self._allowances.find(question)
        if allowance is None or allowance.node != node_id:
            raise HttpRefusal(403, "the node was not asked this")
        if metadata.message_id != tree.object_id or message.content.ByteSize():
            raise HttpRefusal(400, "the message is not the root of its tree")
        with self._lock:
            self._check_tree(tree, allowance)
            if self._answered.setdefault(question, tree.object_id) != tree.object_id:
                raise HttpRefusal(403, "the question is answered already")
            if len(self._answered) > MOST_KNOWN:
                del self._answered[next(iter(self._answered))]
            self._begin(node_id, question, tree, allowance)

    def _check_tree(self, tree: ObjectTree, allowance: Allowance) -> None:
        store, seen = self._states.state().object_store, set[str]()
        for node, depth in walk(tree):
            if depth > DEEPEST or len(seen) >= allowance.most_objects:
                raise HttpRefusal(400, f"at most {allowance.most_objects} objects, {DEEPEST} deep, are taken")
            if not _OBJECT_ID.fullmatch(node.object_id) or node.object_id in seen:
                raise HttpRefusal(400, "every object has an id of its own and is listed once")
            seen.add(node.object_id)
        for node, _ in walk(tree):
            known = [upload.nodes.get(node.object_id, node) for uploads in self._open.values() for upload in uploads]
            if node.object_id in store:
                known.append(store.get_object_tree(node.object_id))
            if any(other != node for other in known):
                raise HttpRefusal(400, "an object that is known has other children")

    def _begin(self, node_id: int, question: str, tree: ObjectTree, allowance: Allowance) -> None:
        uploads = self._open.setdefault(node_id, deque(maxlen=REMEMBERED))
        if not any(upload.question == question for upload in uploads):
            nodes = {node.object_id: node for node, _ in walk(tree)}
            uploads.append(_Open(question, nodes, set(nodes), allowance.largest_bytes))

    def _take_object(self, node_id: int, request: PushObjectRequest) -> None:
        # Flower drops what is not what its id says: counted as that object, it would leave the real one uncounted.
        if get_object_id(request.object_content) != request.object_id:
            raise HttpRefusal(400, "an object is not what its id says")
        with self._lock:
            for upload in self._open.get(node_id, ()):
                if request.object_id in upload.nodes:
                    upload.left_bytes -= len(request.object_content) * (request.object_id in upload.missing)
                    upload.missing.discard(request.object_id)
                    if upload.left_bytes < 0:
                        raise HttpRefusal(403, "the answer is larger than the question allows")
                    return
        raise HttpRefusal(403, "no answer of this node has this object")


def walk(tree: ObjectTree, depth: int = 1) -> Iterator[tuple[ObjectTree, int]]:
    """All nodes of a tree with their depth; none below one that is too deep."""
    yield tree, depth
    if depth <= DEEPEST:
        for child in tree.children:
            yield from walk(child, depth + 1)
