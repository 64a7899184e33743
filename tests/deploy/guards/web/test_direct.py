"""The short way answers as Flower's whole application does; Flower itself is asked for everything else."""

import asyncio
import threading
from collections.abc import Callable, MutableMapping
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from fastapi import FastAPI
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    Metadata,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
)
from flwr.proto.message_pb2 import Message as FlowerMessage
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    AcquireTaskResponse,
    GetNodesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushAppMessagesResponse,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TASK_TOKEN_HEADER, TaskType
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.superlink.main import create_app as create_superlink
from flwr.supernode.main import create_app as create_supernode
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from flwr.supernode.nodestate import NodeStateFactory
from google.protobuf.message import Message

from deploy.guards.web import direct
from deploy.guards.web.asgi import NODE, Scope
from deploy.guards.web.calls import News
from deploy.guards.web.direct import (
    ACQUIRE,
    ACQUIRE_METHOD,
    PULL_MESSAGES,
    PUSH_MESSAGES,
    Direct,
    fleet_work,
    runtime_work,
)
from deploy.guards.web.held_questions import WAITING, HeldQuestions

SECRET, RUN, NODE_ID = b"s" * 32, 5, 7
CONTENT = b"ConfigRecord  2\0{}"
OBJECT = get_object_id(CONTENT)
Answer = tuple[int, str, bytes]


class Asked:
    """One of Flower's applications; counts how often it is asked."""

    def __init__(self, app: FastAPI) -> None:
        self.app, self.state, self.times = app, app.state, 0

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        self.times += 1
        await self.app(scope, receive, send)


def ask(
    app: Any, path: str, body: bytes, headers: list[tuple[str, str]], method: str = "POST", node: int = 0
) -> Answer:
    """Status, type of content and body of an application's answer."""
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope = {
        **{"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"", NODE: node},
        **{"scheme": "https", "http_version": "1.1", "root_path": "", "server": ("a", 1), "client": ("b", 2)},
        "headers": [(name.encode(), value.encode()) for name, value in headers],
    }
    asyncio.run(app(scope, receive, send))
    kind = dict(sent[0]["headers"]).get(b"content-type", b"").decode()
    return sent[0]["status"], kind, b"".join(message.get("body", b"") for message in sent[1:])


def headers_by(interceptor: Any, message: Message, method: str = "") -> list[tuple[str, str]]:
    """What one of Flower's interceptors adds to a request."""
    request = httpx.Request("POST", "https://localhost/")
    before = set(request.headers)
    interceptor.intercept(ProtobufRequestContext(method, message, request), lambda _: httpx.Response(200))
    return [(name, value) for name, value in request.headers.items() if name not in before]


TYPE = ("content-type", PROTOBUF_MEDIA_TYPE)
PULL = PullObjectRequest(node=Node(node_id=NODE_ID), run_id=RUN, object_id=OBJECT)
VERSION = headers_by(RuntimeVersionHttpInterceptor(component_name="test"), PULL)
OLD = [(name, "1.0.0" if name.endswith("version") else value) for name, value in VERSION]


@pytest.fixture
def site() -> Asked:
    return new_site()


def new_site() -> Asked:
    """A SuperNode's application with a task, whose token is `token`, and an object."""
    factory = NodeStateFactory(ObjectStoreFactory())
    state = factory.state()
    state.set_node_id(NODE_ID)
    assert state.create_task(TaskType.CLIENT_APP, RUN, "f" * 64) is not None
    state.object_store.preregister(RUN, ObjectTree(object_id=OBJECT))
    state.object_store.put(OBJECT, CONTENT)
    return Asked(create_supernode(factory, SECRET))


def short(asked: Asked, work: Callable[[Any], Any]) -> Direct:
    return Direct(cast(FastAPI, asked), work(asked))


def of_site(asked: Asked) -> dict[str, direct.Work]:
    return runtime_work(cast(FastAPI, asked), "SuperNode")


def token_of(asked: Asked) -> str:
    """The token of the one task of a site."""
    state = asked.state.runtime_state_factory.state()
    token = state.claim_task(state.get_tasks()[0].task_id)
    assert token
    return str(token)


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ([TYPE, *VERSION, (TASK_TOKEN_HEADER, "token")], PULL.SerializeToString(), 200),
        ([TYPE, (TASK_TOKEN_HEADER, "token")], PULL.SerializeToString(), 200),
        ([TYPE, *VERSION], PULL.SerializeToString(), 401),
        ([TYPE, *VERSION, (TASK_TOKEN_HEADER, "other")], PULL.SerializeToString(), 401),
        ([TYPE, *VERSION, (TASK_TOKEN_HEADER, "token"), (TASK_TOKEN_HEADER, "token")], PULL.SerializeToString(), 401),
        ([TYPE, *OLD, (TASK_TOKEN_HEADER, "token")], PULL.SerializeToString(), 412),
        ([("content-type", "application/json"), (TASK_TOKEN_HEADER, "token")], PULL.SerializeToString(), 415),
        ([TYPE, *VERSION, (TASK_TOKEN_HEADER, "token")], b"\xff\xff", 400),
    ],
    ids=["good", "without a version", "no token", "another token", "two tokens", "old", "no protobuf", "garbage"],
)
def test_a_task_is_answered_as_by_flower(site: Asked, headers: list[tuple[str, str]], body: bytes, status: int):
    token = token_of(site)
    given = [(name, token if value == "token" else value) for name, value in headers]
    expected = ask(site.app, "/v1/runtime/pull-object", body, given)
    assert ask(short(site, of_site), "/v1/runtime/pull-object", body, given) == expected
    assert expected[0] == status
    assert site.times == 0
    if status == 200:
        assert PullObjectResponse.FromString(expected[2]).object_content == CONTENT


def test_an_error_of_the_handler_is_answered_as_by_flower(site: Asked):
    headers = [TYPE, *VERSION, (TASK_TOKEN_HEADER, token_of(site))]
    expected = ask(site.app, "/v1/runtime/get-nodes", GetNodesRequest().SerializeToString(), headers)
    assert (
        ask(short(site, of_site), "/v1/runtime/get-nodes", GetNodesRequest().SerializeToString(), headers) == expected
    )
    assert expected[0] >= 400
    assert site.times == 0


@pytest.mark.parametrize(("secret", "status"), [(SECRET, 200), (b"t" * 32, 401), (b"", 401)])
def test_a_task_is_given_to_the_superexec_that_knows_the_secret(site: Asked, secret: bytes, status: int):
    question = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
    signer = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={ACQUIRE_METHOD}) if secret else None
    headers = [TYPE, *VERSION, *(headers_by(signer, question, ACQUIRE_METHOD) if signer else [])]
    answered = ask(short(site, of_site), ACQUIRE, question.SerializeToString(), headers)
    assert (answered[0], site.times) == (status, 0)
    if status == 200:
        assert AcquireTaskResponse.FromString(answered[2]).token
        # The same question a second time is a replayed one, here as at Flower.
        assert ask(short(site, of_site), ACQUIRE, question.SerializeToString(), headers)[0] == 401
    else:
        assert answered == ask(site.app, ACQUIRE, question.SerializeToString(), headers)


def signed_question() -> tuple[bytes, list[tuple[str, str]]]:
    question = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
    signer = SuperExecAuthHttpInterceptor(master_secret=SECRET, protected_methods={ACQUIRE_METHOD})
    return question.SerializeToString(), [TYPE, *VERSION, *headers_by(signer, question, ACQUIRE_METHOD)]


def test_a_question_for_a_task_waits_until_there_is_one(site: Asked, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(direct, "HELD_SECONDS", 600.0)
    token_of(site)
    tasks, state = News(), site.state.runtime_state_factory.state()
    way = Direct(cast(FastAPI, site), runtime_work(cast(FastAPI, site), "SuperNode", tasks))
    looked = threading.Event()
    wait = tasks.wait
    monkeypatch.setattr(tasks, "wait", lambda seen, seconds: (looked.set(), wait(seen, seconds))[1])

    def come() -> None:
        assert looked.wait(60)
        state.create_task(TaskType.CLIENT_APP, RUN + 1, "f" * 64)
        tasks.ring()

    coming = threading.Thread(target=come)
    coming.start()
    answered = AcquireTaskResponse.FromString(ask(way, ACQUIRE, *signed_question())[2])
    coming.join()
    assert (answered.task.run_id, bool(answered.token)) == (RUN + 1, True)


def test_a_superexec_hears_when_a_task_has_ended(site: Asked, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(direct, "HELD_SECONDS", 600.0)
    tasks = News()
    way = Direct(cast(FastAPI, site), runtime_work(cast(FastAPI, site), "SuperNode", tasks))
    headers = [TYPE, *VERSION, (TASK_TOKEN_HEADER, token_of(site))]
    wait = tasks.wait

    def end(seen: int, seconds: float) -> bool:
        output = PushTaskOutputRequest(sub_status="completed").SerializeToString()
        assert ask_in_thread(way, "/v1/runtime/push-task-output", output, headers)[0] == 200
        return wait(seen, seconds)

    monkeypatch.setattr(tasks, "wait", end)
    status, _, body = ask(way, ACQUIRE, *signed_question())
    assert (status, AcquireTaskResponse.FromString(body).token) == (200, "")


def ask_in_thread(*question: Any) -> Answer:
    found: list[Answer] = []
    asking = threading.Thread(target=lambda: found.append(ask(*question)))
    asking.start()
    asking.join()
    return found[0]


@pytest.mark.parametrize(
    ("path", "message", "status"),
    [
        ("send-task-heartbeat", SendTaskHeartbeatRequest(), 200),
        ("push-task-output", PushTaskOutputRequest(sub_status="completed"), 200),
        ("pull-task-input", PullTaskInputRequest(), None),
    ],
)
def test_a_task_begins_and_ends_as_with_flower(path: str, message: Message, status: int | None):
    answers = []
    for shorten in (lambda asked: asked.app, lambda asked: short(asked, of_site)):
        asked = new_site()
        headers = [TYPE, *VERSION, (TASK_TOKEN_HEADER, token_of(asked))]
        answers.append(ask(shorten(asked), f"/v1/runtime/{path}", message.SerializeToString(), headers))
        stranger = ask(shorten(asked), f"/v1/runtime/{path}", message.SerializeToString(), [TYPE, *VERSION])
        assert stranger[0] == 401
        assert asked.times == 0
    assert answers[0] == answers[1]
    assert answers[0][0] == status or (status is None and answers[0][0] >= 400)  # of a run that the site does not know


def test_a_question_for_a_task_is_answered_without_one_after_a_while(site: Asked, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(direct, "HELD_SECONDS", 0.01)
    token_of(site)
    way = Direct(cast(FastAPI, site), runtime_work(cast(FastAPI, site), "SuperNode", News()))
    status, _, body = ask(way, ACQUIRE, *signed_question())
    assert (status, AcquireTaskResponse.FromString(body).token) == (200, "")


def test_who_waits_for_an_answer_hears_of_each_part_of_it(site: Asked):
    answers = News()
    way = Direct(cast(FastAPI, site), runtime_work(cast(FastAPI, site), "SuperNode", answers=answers))
    headers = [TYPE, *VERSION, (TASK_TOKEN_HEADER, token_of(site))]
    assert ask(way, "/v1/runtime/pull-object", PULL.SerializeToString(), headers)[0] == 200
    assert answers.count == 0
    push = PushObjectRequest(node=Node(node_id=NODE_ID), object_id=OBJECT, object_content=CONTENT)
    assert ask(way, "/v1/runtime/push-object", push.SerializeToString(), headers)[0] == 200
    assert answers.count == 1


@pytest.mark.parametrize(
    ("path", "method"), [("/v1/runtime/pull-object", "GET"), ("/v1/runtime/x", "POST"), ("/", "GET")]
)
def test_everything_else_is_flowers(site: Asked, path: str, method: str):
    assert ask(short(site, of_site), path, b"", [TYPE], method) == ask(site.app, path, b"", [TYPE], method)
    assert site.times == 1


@pytest.fixture(scope="module")
def superlink() -> tuple[Asked, Any, int]:
    """A SuperLink's application, what signs for its one node, and the node's id."""
    app = create_superlink()
    private, public = generate_key_pairs()
    state = app.state.linkstate_factory.state()
    node_id = state.create_node("account", "name", public_key_to_bytes(public), 0)
    assert state.activate_node(node_id, 30)
    return Asked(app), NodeAuthHttpInterceptor(private, public), node_id


def other(node_id: int) -> int:
    return node_id ^ 1


@pytest.mark.parametrize(
    ("path", "make", "speaks_as", "status"),
    [
        ("pull-messages", lambda node: PullMessagesRequest(node=node), int, 200),
        ("pull-messages", lambda node: PullMessagesRequest(node=node), other, 401),
        ("pull-object", lambda node: PullObjectRequest(node=node, run_id=3, object_id=OBJECT), int, None),
        ("confirm-message-received", lambda node: ConfirmMessageReceivedRequest(node=node, run_id=3), int, None),
        ("push-object", lambda node: SimpleNamespace(SerializeToString=lambda: b"\xff"), int, 400),
    ],
    ids=["good", "for another node", "of no run", "of no message", "garbage"],
)
def test_a_node_is_answered_as_by_flower(
    superlink: tuple[Asked, Any, int], path: str, make: Callable[[Node], Any], speaks_as: Callable[[int], int],
    status: int | None,
):  # fmt: skip
    asked, signer, node_id = superlink
    body = make(Node(node_id=speaks_as(node_id))).SerializeToString()
    headers = [TYPE, *VERSION, *headers_by(signer, PULL)]
    expected = ask(asked.app, f"/v1/fleet/{path}", body, headers)
    way = Direct(cast(FastAPI, asked), fleet_work(cast(FastAPI, asked)))
    assert ask(way, f"/v1/fleet/{path}", body, headers, node=node_id) == expected
    assert expected[0] == status or (status is None and expected[0] >= 400)
    assert asked.times == 0


def test_a_fleet_call_that_no_guard_has_looked_at_is_answered_to_nobody(superlink: tuple[Asked, Any, int]):
    """Without the guard's word for who has signed there is no node 0 to speak for."""
    asked, _, node_id = superlink
    way = Direct(cast(FastAPI, asked), fleet_work(cast(FastAPI, asked)))
    body = PullMessagesRequest(node=Node(node_id=node_id)).SerializeToString()
    assert ask(way, "/v1/fleet/pull-messages", body, [TYPE])[0] == 401


def test_a_node_that_waits_is_given_no_message_and_loses_none(superlink: tuple[Asked, Any, int]):
    asked, _, node_id = superlink
    looked: list[int] = []

    def work(_request: object, message: Any) -> Message:
        looked.append(message.node.node_id)
        return PullMessagesResponse(messages_list=[FlowerMessage()])

    held = HeldQuestions()
    held.ring(PushAppMessagesRequest(messages_list=[FlowerMessage(metadata=Metadata(dst_node_id=node_id))]))
    way = Direct(cast(FastAPI, asked), {PULL_MESSAGES: work}, held)
    body = PullMessagesRequest(node=Node(node_id=node_id)).SerializeToString()
    waits = [TYPE, *VERSION, (WAITING, "1")]
    assert ask(way, PULL_MESSAGES, body, waits, node=node_id) == (200, PROTOBUF_MEDIA_TYPE, b"")
    assert looked == []
    status, _, found = ask(way, PULL_MESSAGES, body, [TYPE, *VERSION], node=node_id)
    assert (status, looked) == (200, [node_id])
    assert len(PullMessagesResponse.FromString(found).messages_list) == 1


def test_the_nodes_that_a_task_pushes_to_hear_of_it(site: Asked):
    heard: list[int] = []
    held = SimpleNamespace(ring=lambda pushed: heard.extend(each.metadata.dst_node_id for each in pushed.messages_list))
    way = runtime_work(cast(FastAPI, site), "SuperNode", held=cast(HeldQuestions, held))
    push = PushAppMessagesRequest(messages_list=[FlowerMessage(metadata=Metadata(dst_node_id=9, run_id=RUN))])
    answered = ask(Direct(cast(FastAPI, site), way), PUSH_MESSAGES, push.SerializeToString(), [TYPE, *VERSION])
    assert (answered[0], heard) == (401, [])  # a stranger rings no bell
    site.state.runtime_handlers.push_messages = lambda *_: PushAppMessagesResponse()
    way = runtime_work(cast(FastAPI, site), "SuperNode", held=cast(HeldQuestions, held))
    headers = [TYPE, *VERSION, (TASK_TOKEN_HEADER, token_of(site))]
    assert ask(Direct(cast(FastAPI, site), way), PUSH_MESSAGES, push.SerializeToString(), headers)[0] == 200
    assert heard == [9]


def test_all_paths_are_flowers_and_a_site_has_none_of_the_fleet(superlink: tuple[Asked, Any, int], site: Asked):
    fleet, runtime = fleet_work(cast(FastAPI, superlink[0])), of_site(site)
    assert {("POST", path) for path in (*fleet, *runtime)} <= set(PROTOBUF_REQUEST_TYPES)
    assert all(path.startswith("/v1/runtime/") for path in runtime)


def test_a_process_without_memory_ends_also_on_the_short_way(site: Asked, monkeypatch: pytest.MonkeyPatch):
    ended: list[bool] = []

    def exhausted(*_: object) -> Message:
        raise MemoryError

    monkeypatch.setattr(direct, "end_if_exhausted", lambda: ended.append(True))
    way = Direct(cast(FastAPI, site), {"/v1/runtime/pull-object": exhausted})
    assert ask(way, "/v1/runtime/pull-object", PULL.SerializeToString(), [TYPE])[0] == 500
    assert ended == [True]
