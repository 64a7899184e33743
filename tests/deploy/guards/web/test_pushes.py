"""What a node may push: an answer to its own question, in our messages' shape, no larger than was asked for."""

import base64
import datetime as dt
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id, get_object_tree
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore

from deploy.guards.web.asgi import PUSH_MESSAGES, PUSH_OBJECT, HttpRefusal
from deploy.guards.web.pushes import AllowanceFiles, NodePushes, walk
from server.federation.fleet.allowances import Allowances

NODE, OTHER, RUN = 77, 78, 5
QUESTION, SECOND = "a" * 64, "b" * 64


class Links:
    """The SuperLink's state: one registered key, and Flower's own object store."""

    def __init__(self) -> None:
        self.object_store = InMemoryObjectStore()
        self.keys: dict[bytes, int] = {}

    def state(self) -> "Links":
        return self

    def get_node_id_by_public_key(self, public_key: bytes) -> int | None:
        return self.keys.get(public_key)


@pytest.fixture
def links() -> Links:
    return Links()


@pytest.fixture
def pushes(tmp_path: Path, links: Links) -> NodePushes:
    allowances = Allowances(tmp_path, RUN)
    allowances.grant({QUESTION: NODE, SECOND: NODE, "c" * 64: OTHER}, 100_000)
    return NodePushes(links, AllowanceFiles(tmp_path / "run" / "allowances"))


def answer(elements: int = 1000, *, source: int = NODE, to: str = QUESTION, destination: int = 1) -> Message:
    arrays = ArrayRecord({"update": Array(np.arange(elements, dtype=np.float32))})
    content = RecordDict({"arrays": arrays, "header": ConfigRecord({"a": "b"})})
    metadata = Metadata(
        run_id=RUN, message_id="", src_node_id=source, dst_node_id=destination, reply_to_message_id=to,
        group_id="1", created_at=1.0, ttl=60.0, message_type="train",
    )  # fmt: skip
    message = make_message(metadata=metadata, content=content)
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


def pushed(message: Message, tree: ObjectTree | None = None) -> bytes:
    proto = message_to_proto(remove_content_from_message(message))
    return PushMessagesRequest(
        messages_list=[proto], message_object_trees=[tree or get_object_tree(message)]
    ).SerializeToString()


def refused(pushes: NodePushes, body: bytes, path: str = PUSH_MESSAGES, node: int = NODE) -> int:
    with pytest.raises(HttpRefusal) as caught:
        pushes.check_push(node, path, body)
    return caught.value.status


def identity(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_an_honest_answer_passes_with_all_its_objects(pushes: NodePushes):
    message = answer()
    pushes.check_push(NODE, PUSH_MESSAGES, pushed(message))
    for name, each in get_all_nested_objects(message).items():
        body = PushObjectRequest(object_id=name, object_content=each.deflate()).SerializeToString()
        pushes.check_push(NODE, PUSH_OBJECT, body)


def test_the_same_answer_may_be_pushed_again_and_another_one_not(pushes: NodePushes):
    pushes.check_push(NODE, PUSH_MESSAGES, pushed(answer()))
    pushes.check_push(NODE, PUSH_MESSAGES, pushed(answer()))
    assert refused(pushes, pushed(answer(999))) == 403


@pytest.mark.parametrize(
    ("change", "status"),
    [({"source": 1}, 403), ({"source": OTHER}, 403), ({"destination": OTHER}, 403), ({"to": ""}, 403),
     ({"to": "c" * 64}, 403), ({"to": "d" * 64}, 403)],
)  # fmt: skip
def test_a_node_answers_its_own_questions_and_nothing_else(pushes: NodePushes, change: dict[str, object], status: int):
    assert refused(pushes, pushed(answer(**change))) == status  # type: ignore[arg-type]


def test_objects_that_name_each_other_twice_are_refused_at_any_depth(pushes: NodePushes):
    """Four kilobytes that become gigabytes: each level names the one below it twice."""
    message = answer()
    for levels in (2, 4, 14):
        node = ObjectTree(object_id=identity("0"))
        for level in range(1, levels):
            node = ObjectTree(object_id=identity(str(level)), children=[node, node])
        tree = ObjectTree(object_id=message.metadata.message_id, children=[node])
        assert refused(pushes, pushed(message, tree)) == 400


def test_a_tree_of_six_levels_is_refused_and_one_of_five_is_ours(pushes: NodePushes):
    message = answer()
    assert max(depth for _, depth in walk(get_object_tree(message))) == 5
    node = ObjectTree(object_id=identity("leaf"))
    for level in range(4):
        node = ObjectTree(object_id=identity(str(level)), children=[node])
    tree = ObjectTree(object_id=message.metadata.message_id, children=[node])
    assert refused(pushes, pushed(message, tree)) == 400


def test_known_objects_get_no_other_children_by_a_second_answer(pushes: NodePushes, links: Links):
    """Across answers, too, an object expands to what its own tree listed: else they double with each answer."""
    first, second = answer(), answer(to=SECOND)
    pushes.check_push(NODE, PUSH_MESSAGES, pushed(first))
    links.object_store.preregister(RUN, get_object_tree(first))
    leaf = ObjectTree(object_id=first.metadata.message_id)
    assert refused(pushes, pushed(second, ObjectTree(object_id=second.metadata.message_id, children=[leaf]))) == 400


def test_more_objects_than_the_question_allows_are_refused(pushes: NodePushes):
    message = answer()
    children = [ObjectTree(object_id=identity(str(number))) for number in range(64)]
    assert refused(pushes, pushed(message, ObjectTree(object_id=message.metadata.message_id, children=children))) == 400


@pytest.mark.parametrize("name", ["", "../x", "A" * 64, "a" * 63, "a" * 64 + "\n"])
def test_an_id_that_is_no_digest_is_refused(pushes: NodePushes, name: str):
    message = answer()
    tree = ObjectTree(object_id=message.metadata.message_id, children=[ObjectTree(object_id=name)])
    assert refused(pushes, pushed(message, tree)) == 400


def test_two_messages_at_once_and_no_message_are_refused(pushes: NodePushes):
    one = PushMessagesRequest.FromString(pushed(answer()))
    two = PushMessagesRequest(messages_list=[*one.messages_list] * 2, message_object_trees=one.message_object_trees)
    assert refused(pushes, two.SerializeToString()) == 400
    assert refused(pushes, b"") == 400
    assert refused(pushes, b"\xff" * 100) == 400


def test_an_answer_that_grows_beyond_its_allowance_is_cut_off(pushes: NodePushes):
    first, second = bytes(90_000), bytes(20_000)
    pushes.check_push(NODE, PUSH_MESSAGES, with_chunks(answer(), first, second))
    pushes.check_push(NODE, PUSH_OBJECT, object_of(first))
    pushes.check_push(NODE, PUSH_OBJECT, object_of(first))  # a retry stores nothing new
    assert refused(pushes, object_of(second), PUSH_OBJECT) == 403


def test_what_is_not_the_object_that_was_listed_does_not_count_as_it(pushes: NodePushes):
    """A byte for each id, which Flower drops, and then the objects themselves: nothing of them was counted."""
    chunks = [bytes([number]) * 60_000 for number in range(3)]
    pushes.check_push(NODE, PUSH_MESSAGES, with_chunks(answer(), *chunks))
    for chunk in chunks:
        assert refused(pushes, object_of(b"x", get_object_id(chunk)), PUSH_OBJECT) == 400
    pushes.check_push(NODE, PUSH_OBJECT, object_of(chunks[0]))
    assert refused(pushes, object_of(chunks[1]), PUSH_OBJECT) == 403


def with_chunks(message: Message, *chunks: bytes) -> bytes:
    """The message with a tree that lists chunks of any content."""
    children = [ObjectTree(object_id=get_object_id(chunk)) for chunk in chunks]
    return pushed(message, ObjectTree(object_id=message.metadata.message_id, children=children))


def object_of(content: bytes, name: str = "") -> bytes:
    return PushObjectRequest(object_id=name or get_object_id(content), object_content=content).SerializeToString()


def test_objects_of_no_answer_and_of_other_nodes_answers_are_refused(pushes: NodePushes):
    message = answer()
    body = object_of(message.deflate())
    assert refused(pushes, body, PUSH_OBJECT) == 403
    pushes.check_push(NODE, PUSH_MESSAGES, pushed(message))
    assert refused(pushes, body, PUSH_OBJECT, node=OTHER) == 403


def test_a_question_that_is_asked_later_is_found(tmp_path: Path, pushes: NodePushes):
    message = answer(to="e" * 64)
    assert refused(pushes, pushed(message)) == 403
    Allowances(tmp_path, RUN).grant({"e" * 64: NODE}, 100_000)
    pushes.check_push(NODE, PUSH_MESSAGES, pushed(message))


def test_allowances_are_readable_by_their_owner_only(tmp_path: Path, pushes: NodePushes):
    (file,) = (tmp_path / "run" / "allowances").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert json.loads(file.read_text().splitlines()[0])["objects"] == 64


def headers(key: ec.EllipticCurvePrivateKey, seconds: float = 0.0) -> dict[str, str]:
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    signed = (dt.datetime.now(dt.UTC) + dt.timedelta(seconds=seconds)).isoformat()
    signature = key.sign(signed.encode(), ec.ECDSA(hashes.SHA256()))
    return {
        "flwr-public-key": base64.b64encode(public).decode(),
        "flwr-timestamp": signed,
        "flwr-signature": base64.b64encode(signature).decode(),
    }


def test_only_a_registered_key_that_signed_this_time_is_known(pushes: NodePushes, links: Links):
    key, stranger = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    good = headers(key)
    links.keys[base64.b64decode(good["flwr-public-key"])] = NODE
    assert pushes.authenticate(good) == NODE
    swapped = {**good, "flwr-signature": headers(stranger)["flwr-signature"]}
    for bad in ({}, headers(stranger), swapped, headers(key, -400), headers(key, 60), {**good, "flwr-timestamp": "x"}):
        with pytest.raises(HttpRefusal) as caught:
            pushes.authenticate(bad)
        assert caught.value.status == 401
