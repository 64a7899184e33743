"""What a registered node may send in place of an answer: one function an attack."""

import hashlib
import json
from collections.abc import Callable

import httpx
import numpy as np
from flwr.app import Array
from flwr.app.metadata import Metadata
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from benchmarks.rogue_node import RogueNode
from shared.messages.packing import encode
from shared.messages.training import ReplyHeader, TrainReply, TrainRequest

FORGED_LOSS = 0.015625
"""What every forged reply says its loss is: exact in binary, so that it is found again in a run's record."""


Attack = Callable[[RogueNode, Metadata], bool]
"""Does its worst in answer to a question; whether anything of it was taken."""


def forged_source(node: RogueNode, asked: Metadata, sites: int = 2) -> bool:
    """Instructions to the coordinator in place of answers: each is booked as whosever answer is waited for."""
    request = TrainRequest.from_record(node.content(asked))
    update = encode(np.full(request.weights.shape, 1e-5, np.float32), request.header.experiment.federation.wire_dtype)
    header = ReplyHeader(request_digest=request.digest, status="trained", scalars={"loss": FORGED_LOSS})
    taken = 0
    for _ in range(sites):
        content = TrainReply(header, update).to_record()
        message = node.answer(asked, {}, content, src_node_id=1, reply_to_message_id="")
        status, session = node.push(message)
        objects = {name: each.deflate() for name, each in get_all_nested_objects(message).items()}
        taken += status == httpx.codes.OK and node.upload(asked, session, objects) > 0
    return taken > 0


def expanding_tree(node: RogueNode, asked: Metadata, levels: int = 19) -> bool:
    """Objects that name the one below twice: a few kilobytes that grow by two with each level when they are fetched."""
    tree = ObjectTree(object_id=hashlib.sha256(b"0").hexdigest())
    for level in range(1, levels):
        twice = [tree, ObjectTree(object_id=tree.object_id)]
        tree = ObjectTree(object_id=hashlib.sha256(str(level).encode()).hexdigest(), children=twice)
    message = node.answer(asked, {})
    top = ObjectTree(object_id=message.metadata.message_id, children=[tree])
    return node.push(message, top)[0] == httpx.codes.OK


def repeated_chunk(node: RogueNode, asked: Metadata, repetitions: int = 300) -> bool:
    """One chunk of 5 MB that its array lists many times: joined it has gigabytes."""
    message = node.answer(asked, {"update": Array(np.random.default_rng(0).random(650_000))})
    objects = {name: each.deflate() for name, each in get_all_nested_objects(message).items()}
    renamed: dict[str, str] = {}
    tree = _with_repeated_chunk(get_object_tree(message), objects, renamed, repetitions)
    status, session = node.push(message, tree, tree.object_id)
    return status == httpx.codes.OK and node.upload(asked, session, objects) > 0


def stored_for_nothing(node: RogueNode, asked: Metadata, chunks: int = 60) -> bool:
    """Hundreds of megabytes in an answer that never gets complete."""
    random = np.random.default_rng(1)
    arrays = {f"array{number}": Array(random.random(650_000)) for number in range(chunks)}
    message = node.answer(asked, arrays)
    status, session = node.push(message)
    objects = {name: each.deflate() for name, each in get_all_nested_objects(message).items()}
    del objects[message.metadata.message_id]
    return status == httpx.codes.OK and node.upload(asked, session, objects) > 100_000_000


def wrong_objects_first(node: RogueNode, asked: Metadata, chunks: int = 50) -> bool:
    """Something else under the name of each object, which nobody keeps, and then the objects: are they counted?"""
    message = node.answer(asked, {"update": Array(np.random.default_rng(2).random(chunks * 650_000))})
    status, session = node.push(message)
    objects = {name: each.deflate() for name, each in get_all_nested_objects(message).items()}
    del objects[message.metadata.message_id]
    node.upload(asked, session, dict.fromkeys(objects, b"ArrayChunk  1\0x"))
    return status == httpx.codes.OK and node.upload(asked, session, objects) > 100_000_000


def _with_repeated_chunk(
    tree: ObjectTree, objects: dict[str, bytes], renamed: dict[str, str], repetitions: int
) -> ObjectTree:
    """The same tree with an array that lists its chunk often; ids are those of the changed contents."""
    children = [_with_repeated_chunk(child, objects, renamed, repetitions) for child in tree.children]
    content = objects.pop(tree.object_id)
    head, _, body = content.partition(b"\0")
    kind, names, _ = head.decode().split(" ")
    if kind == "Array":
        described = json.loads(body)
        body = json.dumps({**described, "arraychunk_ids": [0] * repetitions}).encode()
    for old, new in renamed.items():
        body, names = body.replace(old.encode(), new.encode()), names.replace(old, new)
    content = f"{kind} {names} {len(body)}".encode() + b"\0" + body
    renamed[tree.object_id] = hashlib.sha256(content).hexdigest()
    objects[renamed[tree.object_id]] = content
    return ObjectTree(object_id=renamed[tree.object_id], children=children)
