"""Who said it: the one place that decides whether a message is the answer of the site that was asked.

Flower's routing is no identity. A pull for one question returns everything that is addressed to the coordinator,
instructions included, and any registered node may push an instruction with whatever source it likes.
"""

import logging
import threading
from typing import Any

from flwr.app import Message

from shared.messages.text import one_line

log = logging.getLogger("maskfed.server")

SUPERLINK_NODE_ID = 1
"""Flower's address of the SuperLink itself, the source of its errors in place of an answer."""
SHOWN_FORGERIES = 20
"""Forged messages that a record describes; the others are only counted, so that a flood does not fill the disk."""


def forgery(message: Message, question_id: str, node_id: int) -> str:
    """Why `message` is not an answer of the node `node_id` to the question `question_id`; empty when it is one.

    An answer names the question, whose id only the asked node was told, and comes from that node. The SuperLink may
    put an error in its place.
    """
    metadata = message.metadata
    if metadata.reply_to_message_id != question_id:
        answers = one_line(metadata.reply_to_message_id, 64)
        return f"a message of node {metadata.src_node_id} in reply to {answers or 'nothing'}"
    sources = (node_id, SUPERLINK_NODE_ID) if message.has_error() else (node_id,)
    if metadata.src_node_id not in sources:
        return f"a message of node {metadata.src_node_id}, node {node_id} was asked"
    return ""


class Forgeries:
    """How many messages were forged, and what the first of them were."""

    def __init__(self) -> None:
        self._count = 0
        self._first: list[dict[str, str]] = []
        self._lock = threading.Lock()

    def add(self, site: str, problem: str) -> None:
        """Count a message that was found while looking for the answer of `site`."""
        log.warning("looking for the answer of %s: %s; dropped as forged", site, problem)
        with self._lock:
            self._count += 1
            if len(self._first) < SHOWN_FORGERIES:
                self._first.append({"site": site, "reason": problem})

    def take(self) -> dict[str, Any]:
        """`{"forged": {"count", "first"}}` since the last call, for a record; empty when there was none."""
        with self._lock:
            found = {"forged": {"count": self._count, "first": self._first}} if self._count else {}
            self._count, self._first = 0, []
            return found
