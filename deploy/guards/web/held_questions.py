"""A node that has nothing to do waits for messages at the SuperLink, and not by asking again and again.

It asks as it always does, with `WAITING` in the headers: such a question is given no message, and is answered as soon
as there is one, or after a while. So one that is lost on its way, or whose node has gone, costs nothing: the message
waits for the next question without the header. The bell is rung when the ServerApp has pushed messages.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any

from flwr.proto.runtime_pb2 import PushAppMessagesRequest

WAITING = "maskfed-waits"
HELD_SECONDS = 3.0
"""As long as Flower's node sleeps between two questions; a SuperLink that ends waits for the questions it holds."""


class HeldQuestions:
    """One question of each node that waits; whoever asks a second one at the same time does not wait."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Event]] = {}
        self._unheard = set[int]()
        """Nodes that a bell has rung for since they last asked for messages."""

    def ring(self, pushed: PushAppMessagesRequest) -> None:
        """Messages have come for the nodes that they name; in any thread."""
        for node in {each.metadata.dst_node_id for each in pushed.messages_list}:
            self._unheard.add(node)
            if held := self._held.get(node):
                loop, rung = held
                with suppress(RuntimeError):  # the loop has ended, and all that it held with it
                    loop.call_soon_threadsafe(rung.set)

    def asked(self, node: int) -> None:
        """The node asks for messages and will be given what has come until now."""
        self._unheard.discard(node)

    async def wait(self, node: int, receive: Callable[[], Awaitable[Any]]) -> None:
        """Return when there may be a message for `node`, when it is gone, which `receive` tells, or after a while."""
        if node in self._unheard or node in self._held:
            return
        rung = asyncio.Event()
        self._held[node] = asyncio.get_running_loop(), rung
        waits: Iterable[asyncio.Future[Any]] = [asyncio.ensure_future(each) for each in (rung.wait(), receive())]
        try:
            if node not in self._unheard:  # nothing came between the look above and the bell being up
                await asyncio.wait(waits, timeout=HELD_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        finally:
            del self._held[node]
            for each in waits:
                each.cancel()
