"""The short way to Flower's handlers, for the calls that a round makes many times.

Flower sends each call through six layers of middleware and resolves its dependencies anew: 8 ms of processor time
around a handler that takes 0.1. Here the same handlers are called after the same checks, by Flower's own functions:
type of content, protobuf, version and token of the caller, or the node that has signed. What goes wrong becomes the
answer that Flower's own translator makes of it. Every path that is not listed goes to Flower's application.
"""

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, cast

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import Response
from flwr.supercore.constant import TASK_TOKEN_HEADER
from flwr.supercore.dependencies.superexec import authenticate_superexec_request
from flwr.supercore.dependencies.task import authenticate_task
from flwr.supercore.dependencies.version import VersionDependency
from flwr.supercore.error import http_error_translator
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES, ProtobufTranslationMiddleware
from flwr.supercore.servicer.runtime.runtime_handlers import send_task_heartbeat
from google.protobuf.message import Message
from starlette.concurrency import run_in_threadpool

from deploy.guards.web.asgi import NODE, Receive, Scope, Send, end_if_exhausted
from deploy.guards.web.calls import News
from deploy.guards.web.held_questions import WAITING, HeldQuestions

Work = Callable[[Request, Any], Message]
"""Checks who calls, and gives Flower's answer to a parsed message; runs in a thread."""
Way = Callable[[Request], Awaitable[Response]]
FLEET = ("pull_messages", "push_messages", "pull_object", "push_object", "confirm_message_received")
"""Flower's names of the handlers of a node's calls; a path has hyphens instead."""
STORE = frozenset({"pull_messages", "confirm_message_received"})
"""Those that are also given the object store."""
OF_A_TASK = ("pull_task_input", "push_task_output", "get_nodes", *FLEET)
PULL_MESSAGES, PUSH_MESSAGES = "/v1/fleet/pull-messages", "/v1/runtime/push-messages"
TASK_OUTPUT, TASK_HEARTBEAT = "/v1/runtime/push-task-output", "/v1/runtime/send-task-heartbeat"
PUSHES = (PUSH_MESSAGES, "/v1/runtime/push-object")
ACQUIRE = "/v1/runtime/acquire-task"
ACQUIRE_METHOD = "/flwr.proto.Runtime/AcquireTask"
"""What a superexec signs its question for a task as."""
HELD_SECONDS = 1.0
"""How long a superexec's question waits for a task."""


class Direct:
    """An ASGI application before Flower's `app`, which answers the paths of `work` itself.

    With `held`, nodes may wait for messages.
    """

    def __init__(self, app: FastAPI, work: Mapping[str, Work], held: HeldQuestions | None = None) -> None:
        self._app = app
        self._ways: dict[str, Way] = {path: partial(_answer, each) for path, each in work.items()}
        if held is not None:
            self._ways[PULL_MESSAGES] = partial(_messages, held, self._ways[PULL_MESSAGES])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one call; its body was bounded, and its caller is known, by the guard before."""
        way = self._ways.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if way is None:
            await self._app(scope, receive, send)
            return
        request = Request({**scope, "app": self._app}, receive)
        response = await http_error_translator(request, way)
        await response(scope, receive, send)


def fleet_work(app: FastAPI) -> dict[str, Work]:
    """Work by path for calls of nodes: each speaks for the node that has signed it."""
    from flwr.superlink.servicer.fleet import fleet_handlers  # loads the database, which a site has not

    return {
        f"/v1/fleet/{name.replace('_', '-')}": partial(_of_node, app, getattr(fleet_handlers, name), name in STORE)
        for name in FLEET
    }


def runtime_work(
    app: FastAPI,
    component: str,
    tasks: News | None = None,
    answers: News | None = None,
    held: HeldQuestions | None = None,
) -> dict[str, Work]:
    """Work by path for calls of tasks and superexecs.

    Args:
        app: Flower's.
        component: what Flower calls the process: SuperLink or SuperNode.
        tasks: rings when there may be a task, and is rung when one ends; a superexec's question waits for it a little.
            None: it is answered at once.
        answers: told when a task has sent a part of its answer.
        held: told which nodes a task has pushed messages to.
    """
    version = VersionDependency(component_name=component, connection_name=f"Caller <-> {component} Runtime API")
    handlers = app.state.runtime_handlers
    of_tasks: dict[str, Work] = {
        f"/v1/runtime/{name.replace('_', '-')}": partial(_of_task, app, version, getattr(handlers, name))
        for name in OF_A_TASK
    }
    of_tasks[TASK_HEARTBEAT] = partial(_of_task, app, version, send_task_heartbeat)
    if tasks is not None:
        of_tasks[TASK_OUTPUT] = partial(_then, lambda _: tasks.ring(), of_tasks[TASK_OUTPUT])
    if answers is not None:
        of_tasks |= {path: partial(_then, lambda _: answers.ring(), of_tasks[path]) for path in PUSHES}
    if held is not None:
        of_tasks[PUSH_MESSAGES] = partial(_then, held.ring, of_tasks[PUSH_MESSAGES])
    return {**of_tasks, ACQUIRE: partial(_acquired, app, version, tasks)}


async def _messages(held: HeldQuestions, answer: Way, request: Request) -> Response:
    """Messages for the node that asks; none for one that only waits for them."""
    node = request.scope[NODE]
    if WAITING not in request.headers:
        held.asked(node)
        return await answer(request)
    await request.body()  # what is received after it is that the node has gone
    await held.wait(node, request.receive)
    return Response(media_type=PROTOBUF_MEDIA_TYPE)


async def _answer(work: Work, request: Request) -> Response:
    translation = ProtobufTranslationMiddleware
    translation._check_request_media_type(request)
    message = translation._parse_request(await request.body(), PROTOBUF_REQUEST_TYPES["POST", request.scope["path"]])
    request.state.protobuf_request = message
    try:
        result = await run_in_threadpool(work, request, message)
        return Response(result.SerializeToString(), media_type=PROTOBUF_MEDIA_TYPE)
    except MemoryError:
        end_if_exhausted()
        raise


def _of_node(
    app: FastAPI,
    handle: Callable[..., Message],
    is_given_store: bool,
    request: Request,
    message: Any,  # noqa: ANN401
) -> Message:
    if message.node.node_id != request.scope[NODE]:
        raise HTTPException(401, "Invalid SuperNode authentication")
    state = app.state.linkstate_factory.state()
    return handle(message, state, state.object_store) if is_given_store else handle(message, state)


def _of_task(
    app: FastAPI,
    version: VersionDependency,
    handle: Callable[..., Message],
    request: Request,
    message: Any,  # noqa: ANN401
) -> Message:
    version(request)
    state = app.state.runtime_state_factory.state()
    return handle(message, state, authenticate_task(request, request.headers.get(TASK_TOKEN_HEADER), state))


def _then(tell: Callable[[Any], None], work: Work, request: Request, message: Any) -> Message:  # noqa: ANN401
    answered = work(request, message)
    tell(message)
    return answered


def _acquired(
    app: FastAPI,
    version: VersionDependency,
    tasks: News | None,
    request: Request,
    message: Any,  # noqa: ANN401
) -> Message:
    version(request)
    state = app.state.runtime_state_factory.state()
    authenticate_superexec_request(request, state, ACQUIRE_METHOD)
    seen = tasks.count if tasks else 0
    answered = app.state.runtime_handlers.acquire_task(message, state)
    if not answered.token and tasks and tasks.wait(seen, HELD_SECONDS):
        # Where the news is that a task has ended there is none: the superexec looks after what has ended then.
        answered = app.state.runtime_handlers.acquire_task(message, state)
    return cast(Message, answered)
