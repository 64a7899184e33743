"""The short way to Flower's handlers, for the calls that a round makes many times.

Flower sends each call through six layers of middleware and resolves its dependencies anew: 8 ms of processor time
around a handler that takes 0.1. Here the same handlers are called after the same checks, by Flower's own functions:
type of content, protobuf, version and token of the caller, or the node that has signed. What goes wrong becomes the
answer that Flower's own translator makes of it. Every path that is not listed goes to Flower's application.
"""

import time
from collections.abc import Callable, Mapping
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
from google.protobuf.message import Message
from starlette.concurrency import run_in_threadpool

from deploy.guards.web.asgi import NODE, Receive, Scope, Send, end_if_exhausted
from deploy.guards.web.calls import News

Work = Callable[[Request, Any], Message]
"""Checks who calls, and gives Flower's answer to a parsed message; runs in a thread."""
FLEET = ("pull_messages", "push_messages", "pull_object", "push_object", "confirm_message_received")
"""Flower's names of the handlers of a node's calls; a path has hyphens instead."""
STORE = frozenset({"pull_messages", "confirm_message_received"})
"""Those that are also given the object store."""
OF_A_TASK = ("get_nodes", *FLEET)
PUSHES = ("/v1/runtime/push-messages", "/v1/runtime/push-object")
ACQUIRE = "/v1/runtime/acquire-task"
ACQUIRE_METHOD = "/flwr.proto.Runtime/AcquireTask"
"""What a superexec signs its question for a task as."""
HELD_SECONDS = 1.0
"""How long a superexec's question waits for a task."""


class Direct:
    """An ASGI application before Flower's `app`, which answers the paths of `work` itself."""

    def __init__(self, app: FastAPI, work: Mapping[str, Work]) -> None:
        self._app, self._work = app, work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one call; its body was bounded, and its caller is known, by the guard before."""
        work = self._work.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if work is None:
            await self._app(scope, receive, send)
            return
        request = Request({**scope, "app": self._app}, receive)
        response = await http_error_translator(request, partial(_answer, work))
        await response(scope, receive, send)


def fleet_work(app: FastAPI) -> dict[str, Work]:
    """Work by path for calls of nodes: each speaks for the node that has signed it."""
    from flwr.superlink.servicer.fleet import fleet_handlers  # loads the database, which a site has not

    return {
        f"/v1/fleet/{name.replace('_', '-')}": partial(_of_node, app, getattr(fleet_handlers, name), name in STORE)
        for name in FLEET
    }


def runtime_work(
    app: FastAPI, component: str, tasks: News | None = None, answers: News | None = None
) -> dict[str, Work]:
    """Work by path for calls of tasks and superexecs.

    Args:
        app: Flower's.
        component: what Flower calls the process: SuperLink or SuperNode.
        tasks: rings when there may be a task; a question for one waits for it a little. None: it is answered at once.
        answers: told when a task has sent a part of its answer.
    """
    version = VersionDependency(component_name=component, connection_name=f"Caller <-> {component} Runtime API")
    handlers = app.state.runtime_handlers
    of_tasks: dict[str, Work] = {
        f"/v1/runtime/{name.replace('_', '-')}": partial(_of_task, app, version, getattr(handlers, name))
        for name in OF_A_TASK
    }
    if answers is not None:
        of_tasks |= {path: partial(_then, answers.ring, of_tasks[path]) for path in PUSHES}
    return {**of_tasks, ACQUIRE: partial(_acquired, app, version, tasks)}


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


def _then(ring: Callable[[], None], work: Work, request: Request, message: Any) -> Message:  # noqa: ANN401
    answered = work(request, message)
    ring()
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
    end = time.monotonic() + HELD_SECONDS
    while True:
        seen = tasks.count if tasks else 0
        answered = app.state.runtime_handlers.acquire_task(message, state)
        if answered.token or not tasks or not tasks.wait(seen, end - time.monotonic()):
            return cast(Message, answered)
