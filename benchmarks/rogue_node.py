"""A registered node that speaks the fleet protocol by hand, with its own key and any message it likes."""

import base64
import datetime as dt
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ObjectTree, PullObjectRequest, PullObjectResponse, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree

from deploy.identity.tls import client_context
from shared.messages.agreement.offer import OfferAnswer
from shared.messages.envelope import header_record
from shared.messages.sealing import digests_of, read_seal, seal_reply
from shared.messages.signature import read_key


@dataclass
class RogueNode:
    """A node on `address` (host:port) with the key of a site's folder."""

    address: str
    ca_certificate: Path
    key_file: Path
    signing_key_file: Path
    node_id: int = 0
    tree: ObjectTree = field(default_factory=ObjectTree)
    """Of the newest question."""
    _runs: set[int] = field(default_factory=set)
    _stopped: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        key = serialization.load_ssh_private_key(self.key_file.read_bytes(), password=None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self._key = key
        self._public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        self._http = httpx.Client(
            verify=client_context(self.ca_certificate, self.key_file), trust_env=False, timeout=120.0
        )

    def call(self, path: str, body: bytes) -> httpx.Response:
        """One signed call of a fleet path."""
        signed = dt.datetime.now(dt.UTC).isoformat()
        headers = {
            "content-type": "application/protobuf",
            "accept": "application/protobuf",
            "flwr-public-key": base64.b64encode(self._public).decode(),
            "flwr-timestamp": signed,
            "flwr-signature": base64.b64encode(self._key.sign(signed.encode(), ec.ECDSA(hashes.SHA256()))).decode(),
        }
        return self._http.post(f"https://{self.address}/v1/fleet/{path}", content=body, headers=headers)

    def go_online(self) -> None:
        """Activate, and send heartbeats until `leave`."""
        self._activate()
        threading.Thread(target=self._beat, daemon=True).start()

    def leave(self) -> None:
        """Send no more heartbeats."""
        self._stopped.set()

    def question(self, seconds: float) -> Metadata:
        """What the coordinator asks this node in a run that it was not asked in before, as soon as it does."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            body = PullMessagesRequest(node=Node(node_id=self.node_id)).SerializeToString()
            reply = self.call("pull-messages", body)
            pulled = PullMessagesResponse.FromString(reply.content) if reply.is_success else PullMessagesResponse()
            for message, tree in zip(pulled.messages_list, pulled.message_object_trees, strict=True):
                asked, self.tree = message.metadata, tree
                if asked.message_type != MessageType.TRAIN:
                    self.accept(asked)
                    continue
                if asked.run_id in self._runs:
                    continue
                self._runs.add(asked.run_id)
                return Metadata(
                    run_id=asked.run_id, message_id=asked.message_id, src_node_id=asked.src_node_id,
                    dst_node_id=asked.dst_node_id, reply_to_message_id="", group_id=asked.group_id,
                    created_at=asked.created_at, ttl=asked.ttl, message_type=asked.message_type,
                )  # fmt: skip
            time.sleep(0.5)
        raise TimeoutError("the rogue node was not asked")

    def accept(self, asked: Metadata) -> None:
        """Agree to the plan that is offered, signed as the member that it is."""
        content, key = self.content(asked), read_key(self.signing_key_file, "")
        seal = read_seal(content, "request")
        answer = RecordDict({"arrays": ArrayRecord(), "header": header_record(OfferAnswer(status="accepted"))})
        sealed = seal_reply(answer, seal.statement("offer", seal.alias, digests_of(content)), key)
        message = self.answer(asked, {}, sealed)
        _status, session = self.push(message)
        self.upload(asked, session, {name: each.deflate() for name, each in get_all_nested_objects(message).items()})

    def content(self, asked: Metadata) -> RecordDict:
        """What the newest question says."""

        def pull(name: str) -> bytes:
            request = PullObjectRequest(node=Node(node_id=self.node_id), run_id=asked.run_id, object_id=name)
            for _ in range(600):  # the question is announced before all of it is there
                reply = self.call("pull-object", request.SerializeToString())
                pulled = PullObjectResponse.FromString(reply.content) if reply.is_success else PullObjectResponse()
                if pulled.object_available:
                    return pulled.object_content
                time.sleep(0.1)
            raise TimeoutError("the question does not get complete")

        message = pull_and_inflate_object_from_tree(self.tree, pull, lambda _name: None, return_type=Message)
        return message.content

    def answer(
        self, asked: Metadata, arrays: Mapping[str, Array], content: RecordDict | None = None, **changed: object
    ) -> Message:
        """A message in answer to `asked`; `changed` are fields of its metadata."""
        arbitrary = {"arrays": ArrayRecord(dict(arrays)), "header": ConfigRecord({"json": "{}"})}
        content = content or RecordDict(arbitrary)  # type: ignore[arg-type]
        now = time.time()
        # An answer that would stand longer than its question is refused by Flower itself.
        left = asked.created_at + asked.ttl - now - 1.0
        fields: dict[str, object] = {
            "run_id": asked.run_id, "message_id": "", "src_node_id": self.node_id, "dst_node_id": 1,
            "reply_to_message_id": asked.message_id, "group_id": asked.group_id, "created_at": now,
            "ttl": left, "message_type": asked.message_type, **changed,
        }  # fmt: skip
        message = make_message(metadata=Metadata(**fields), content=content)  # type: ignore[arg-type]
        message.metadata.__dict__["_message_id"] = message.object_id
        return message

    def push(self, message: Message, tree: ObjectTree | None = None, root: str = "") -> tuple[int, str]:
        """Push a message with its tree, or another one; status and the session to upload in."""
        proto = message_to_proto(remove_content_from_message(message))
        if root:
            proto.metadata.message_id = root
        request = PushMessagesRequest(
            node=Node(node_id=self.node_id),
            messages_list=[proto],
            message_object_trees=[tree or get_object_tree(message)],
        )
        reply = self.call("push-messages", request.SerializeToString())
        session = PushMessagesResponse.FromString(reply.content).session_id if reply.is_success else ""
        return reply.status_code, session

    def upload(self, asked: Metadata, session: str, objects: Mapping[str, bytes]) -> int:
        """Push objects; how many bytes were taken."""
        taken = 0
        for name, content in objects.items():
            request = PushObjectRequest(
                node=Node(node_id=self.node_id), run_id=asked.run_id, object_id=name, object_content=content,
                session_id=session,
            )  # fmt: skip
            reply = self.call("push-object", request.SerializeToString())
            taken += len(content) if reply.is_success else 0
        return taken

    def _activate(self) -> None:
        request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=30.0)
        reply = self.call("activate-node", request.SerializeToString())
        reply.raise_for_status()
        self.node_id = ActivateNodeResponse.FromString(reply.content).node_id

    def _beat(self) -> None:
        while not self._stopped.wait(5.0):
            beat = SendNodeHeartbeatRequest(node=Node(node_id=self.node_id), heartbeat_interval=30.0)
            body = beat.SerializeToString()
            try:
                if not self.call("send-node-heartbeat", body).is_success:
                    self._activate()
            except httpx.HTTPError:
                continue
