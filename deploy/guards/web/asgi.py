"""What stands before Flower's own application: who calls is known before a byte of the body is read.

Flower reads and parses a body first and asks who sent it then, and asks nobody on its control paths. Here control and
runtime paths need the secret value of `calls`, fleet paths a node's signature over the headers, and each path has a
limit for its body. Every other path does not exist.
"""

import hmac
import os
import resource
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from starlette.concurrency import run_in_threadpool

from deploy.guards.web.calls import HEADER

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

SMALL_BYTES = 4 * 2**10
TREE_BYTES = 256 * 2**10
OBJECT_BYTES = 5 * 2**20 + 64 * 2**10
"""A chunk of an array and what is around it."""
OWN_BYTES = 64 * 2**20
"""Calls of our own processes: a submitted bundle, the trees of a question to all sites."""
PUSH_MESSAGES, PUSH_OBJECT = "/v1/fleet/push-messages", "/v1/fleet/push-object"
FLEET_BYTES = {
    **{
        f"/v1/fleet/{name}": SMALL_BYTES
        for name in (
            *("activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages"),
            *("get-run", "get-fab", "pull-object", "confirm-message-received"),
        )
    },
    PUSH_MESSAGES: TREE_BYTES,
    PUSH_OBJECT: OBJECT_BYTES,
}
"""Largest body of each fleet path that a registered node calls."""
NODE = "maskfed_node"
"""In the scope of a fleet call: the id of the node whose signature was checked."""
ADMITTED = "maskfed_admitted"
"""In the scope of a call whose caller is known."""
NEEDED_BYTES = 2**25
"""What a process must be able to get while it runs: less is nothing, threads and buffers take it at once."""


class HttpRefusal(Exception):  # noqa: N818 - an answer, not a fault
    """The answer in place of Flower's: an HTTP status and one line."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Fleet(Protocol):
    """Who calls a fleet path, and whether what is pushed may be."""

    def authenticate(self, headers: dict[str, str]) -> int:
        """Node id of the caller; `HttpRefusal` 401 otherwise."""

    def check_push(self, node_id: int, path: str, body: bytes) -> None:
        """Refuse what the node was not asked for."""


class Guard:
    """An ASGI application around Flower's. Without a `fleet`, there are no fleet paths."""

    def __init__(self, app: App, value: str, fleet: Fleet | None = None) -> None:
        self._app, self._value, self._fleet = app, value, fleet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or hand it to Flower with the body that was read."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        try:
            body = await self._admit(scope, receive)
        except HttpRefusal as refusal:
            await _answer(send, refusal)
            return
        try:
            await self._app(scope, _again(body, receive), send)
        except Exception:
            end_if_exhausted()
            raise

    async def _admit(self, scope: Scope, receive: Receive) -> bytes:
        """The body of a request that may pass."""
        path, headers = scope["path"], headers_of(scope)
        if path == "/health" and scope["method"] == "GET":
            return await _read(headers, receive, 0)
        if path.startswith(("/v1/control/", "/v1/runtime/")):
            if not hmac.compare_digest(headers.get(HEADER, "").encode(), self._value.encode()):
                raise HttpRefusal(401, "the caller is not known")
            scope[ADMITTED] = True
            return await _read(headers, receive, OWN_BYTES)
        if self._fleet is None or path not in FLEET_BYTES or scope["method"] != "POST":
            raise HttpRefusal(404, "no such path")
        node_id = await run_in_threadpool(self._fleet.authenticate, headers)
        scope[NODE], scope[ADMITTED] = node_id, True
        body = await _read(headers, receive, FLEET_BYTES[path])
        if path in {PUSH_MESSAGES, PUSH_OBJECT}:
            await run_in_threadpool(self._fleet.check_push, node_id, path, body)
        return body


def end_if_exhausted() -> None:
    """End this process, in one line, when its memory is used up: it would answer nobody any more, and not end either.

    A call that asked for too much by itself is over, and what it had is free: then nothing happens.
    """
    try:
        bytearray(NEEDED_BYTES)
    except MemoryError:
        limit = resource.getrlimit(resource.RLIMIT_AS)[0] / 2**30
        line = f"error: {limit:.1f} GiB, the most that this process may have, are used up: it ends; the limit follows "
        os.write(2, f"{line}MASKFED_PARAMETERS, the size of the largest model\n".encode())
        os._exit(1)


def headers_of(scope: Scope) -> dict[str, str]:
    """Headers by name; one that is given twice counts as none, so that nobody can differ on which one holds."""
    found: dict[str, str] = {}
    twice: set[str] = set()
    for raw_name, raw_value in scope["headers"]:
        name = raw_name.decode("latin-1").lower()
        if name in found:
            twice.add(name)
        found[name] = raw_value.decode("latin-1")
    return {name: text for name, text in found.items() if name not in twice}


async def _read(headers: dict[str, str], receive: Receive, limit: int) -> bytes:
    """The whole body, at most `limit` bytes."""
    declared = headers.get("content-length", "0")
    if not declared.isascii() or not declared.isdigit() or len(declared) > 12 or int(declared) > limit:
        raise HttpRefusal(413, f"at most {limit} bytes are taken here")
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise HttpRefusal(400, "the caller is gone")
        body += message.get("body", b"")
        if len(body) > limit:
            raise HttpRefusal(413, f"at most {limit} bytes are taken here")
        if not message.get("more_body", False):
            return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read, once, and then what really comes."""
    waiting = [body]

    async def replay() -> MutableMapping[str, Any]:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replay


async def _answer(send: Send, refusal: HttpRefusal) -> None:
    text = str(refusal).encode()
    headers = [
        (b"content-type", b"text/plain"),
        (b"content-length", str(len(text)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": text})
