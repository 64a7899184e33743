"""A node that waits is answered when a message has come for it, and what it waits for is given to nobody by that."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from flwr.proto.message_pb2 import Message, Metadata
from flwr.proto.runtime_pb2 import PushAppMessagesRequest

from deploy.guards.web import held_questions
from deploy.guards.web.held_questions import HeldQuestions

NODE, OTHER = 7, 2**63 + 5
"""Node ids take all 64 bits."""


@pytest.fixture(autouse=True)
def long(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends within a test has not ended by itself."""
    monkeypatch.setattr(held_questions, "HELD_SECONDS", 600.0)


def messages(*nodes: int) -> PushAppMessagesRequest:
    return PushAppMessagesRequest(messages_list=[Message(metadata=Metadata(dst_node_id=node)) for node in nodes])


async def stays() -> Any:
    """Who asks stays, and sends nothing more."""
    await asyncio.Event().wait()


async def goes() -> Any:
    return {"type": "http.disconnect"}


def ends(
    held: HeldQuestions,
    told: Callable[[], None] = lambda: None,
    receive: Callable[[], Awaitable[Any]] = stays,
    within: float = 60,
) -> bool:
    """Whether NODE's question ends after `told`, which is called in a thread once the question is held."""

    async def ask() -> bool:
        asking = asyncio.create_task(held.wait(NODE, receive))
        while NODE not in held._held and not asking.done():
            await asyncio.sleep(0)
        thread = threading.Thread(target=told)
        thread.start()
        thread.join()
        done, _ = await asyncio.wait({asking}, timeout=within)
        asking.cancel()
        return bool(done)

    return asyncio.run(ask())


def test_a_question_is_held_until_the_bell_rings_for_its_node():
    held = HeldQuestions()
    assert not ends(held, within=0.1)
    assert not ends(held, lambda: held.ring(messages(OTHER)), within=0.1)
    assert ends(held, lambda: held.ring(messages(OTHER, NODE)))
    assert not held._held


def test_what_came_while_nobody_asked_is_not_waited_for_until_the_node_has_asked_for_it():
    held = HeldQuestions()
    held.ring(messages(NODE))
    for _ in range(2):  # as long as it has not fetched it
        assert ends(held)
    held.asked(NODE)
    assert not ends(held, within=0.1)


def test_a_question_whose_node_has_gone_is_not_held():
    held = HeldQuestions()
    assert ends(held, receive=goes)
    assert not held._held


def test_a_question_ends_by_itself_after_a_while(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(held_questions, "HELD_SECONDS", 0.01)
    assert ends(HeldQuestions())


def test_a_second_question_of_a_node_is_not_held_beside_the_first():
    held = HeldQuestions()

    async def ask() -> None:
        first = asyncio.create_task(held.wait(NODE, stays))
        await asyncio.sleep(0)
        await asyncio.wait_for(held.wait(NODE, stays), 60)
        other = asyncio.create_task(held.wait(OTHER, stays))
        await asyncio.sleep(0)
        assert set(held._held) == {NODE, OTHER}
        held.ring(messages(NODE))
        await asyncio.wait_for(first, 60)
        assert set(held._held) == {OTHER}
        other.cancel()

    asyncio.run(ask())


def test_a_bell_that_rings_after_the_end_of_the_loop_is_no_error():
    held = HeldQuestions()

    async def leave() -> None:
        held._held[NODE] = asyncio.get_running_loop(), asyncio.Event()

    asyncio.run(leave())
    held.ring(messages(NODE))
