"""Flower's Grid with signatures: every request leaves signed, and only what the asked site has signed comes in.

The SuperLink hands a puller whatever was addressed to the coordinator, and asks nobody who wrote it. So a reply counts
only when it answers a question that was asked, comes from the node that was asked, and is signed by the site for this
very question; `sender` puts this check beside that of Flower's routing, and what fails is counted and dropped.
"""

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Message

from server.federation.fleet.registry import Registry
from server.federation.messaging.transport import BoundedGrid, FlowerGrid, NodeInfo
from shared.errors import InputError
from shared.messages.sealing import Digests, digests_of, read_seal, seal_request
from shared.messages.signature import PURPOSES, SignatureError, Statement, check_signature, read_key

REQUEST_KEY = Path("pki", "request.pem")
CURE = "`maskfed-server renew --ca-key FILE` makes it"


@dataclass(frozen=True)
class _Sent:
    node_id: int
    statement: Statement
    expires_at: float


class SignedGrid:
    """The part of Flower's Grid that is used, for one run of the coordinator's `home`.

    Raises:
        InputError: the request key is missing or not private, or a message goes to nobody who is registered.
    """

    def __init__(self, grid: FlowerGrid, home: Path, run: str) -> None:
        self._grid, self._run = grid, run
        self._registry = Registry(home / "sites.json")
        self._key, self._certificate = read_request_key(home / REQUEST_KEY)
        self._sent: dict[str, _Sent] = {}
        self._lock = threading.Lock()

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Nodes that are online."""
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Sign each message for the site that it goes to, and send; the same message again is signed the same way."""
        messages = list(messages)
        aliases = {site.node_id: site.alias for site in self._registry.active()}
        known: dict[int, Digests] = {}
        statements = [self._sign(message, aliases, known) for message in messages]
        ids = list(self._grid.push_messages(messages))
        now = time.time()
        with self._lock:
            self._sent = {key: sent for key, sent in self._sent.items() if sent.expires_at > now}
            for message, statement, message_id in zip(messages, statements, ids, strict=True):
                about = message.metadata
                self._sent[message_id] = _Sent(about.dst_node_id, statement, about.created_at + about.ttl)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Whatever is there, errors of Flower's included; ask `forgery` of each before it is believed."""
        return self._grid.pull_messages(message_ids)

    def forgery(self, message: Message) -> str:
        """Why the site that was asked has not signed `message` for its question; empty when it has."""
        with self._lock:
            sent = self._sent.get(message.metadata.reply_to_message_id)
        if sent is None:
            return "it answers no question that was asked"
        if message.has_error():
            # Of Flower's own making and unsigned; it carries no answer, and at most has the site asked again.
            return ""
        try:
            self._check(message, sent)
        except SignatureError as error:
            return str(error)
        except Exception as error:
            # What hostile content makes the digests raise costs that message only.
            return f"it cannot be read ({type(error).__name__})"
        return ""

    def allow(self, reply_bytes: int) -> None:
        """Tell a guarded Grid how many bytes of arrays the answers to the next questions may have."""
        if isinstance(self._grid, BoundedGrid):
            self._grid.allow(reply_bytes)

    def _sign(self, message: Message, aliases: dict[int | None, str], known: dict[int, Digests]) -> Statement:
        """Put the seal on; `known` keeps the digests of contents that messages share."""
        about, content = message.metadata, message.content
        alias = aliases.get(about.dst_node_id)
        if alias is None:
            raise InputError(
                f"node {about.dst_node_id} is no registered site with a signing key: `sites list` shows them"
            )
        arrays = content.get("arrays")
        digests = known.setdefault(id(content if arrays is None else arrays), digests_of(content))
        statement = Statement(
            PURPOSES[about.message_type], "request", self._run, int(about.group_id), alias,
            digests.request, digests.header, digests.arrays,
        )  # fmt: skip
        message.content = seal_request(content, statement, self._key, self._certificate)
        return statement

    def _check(self, message: Message, sent: _Sent) -> None:
        if message.metadata.src_node_id != sent.node_id:
            raise SignatureError("it comes from another node than the one that was asked")
        digests, asked = digests_of(message.content), sent.statement
        statement = replace(asked, direction="reply", header_digest=digests.header, arrays_digest=digests.arrays)
        keys = {site.alias: site.signing_key for site in self._registry.active()}
        seal = read_seal(message.content, "reply")
        check_signature(keys.get(asked.alias, ""), statement, seal.signature)


def read_request_key(path: Path) -> tuple[Ed25519PrivateKey, bytes]:
    """The coordinator's request key and its certificate (DER).

    Raises:
        InputError: missing, readable by others, or damaged.
    """
    key = read_key(path, CURE)
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} holds no certificate: {CURE}") from error
    return key, certificate.public_bytes(serialization.Encoding.DER)
