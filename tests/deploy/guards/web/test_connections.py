"""Connections of strangers end, however they spin them out; those of known callers stay."""

import asyncio
import contextlib
import importlib
import resource
import socket
import threading
import time
from collections.abc import Iterator, MutableMapping
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn

from deploy.guards.web import connections
from deploy.guards.web.asgi import ADMITTED, Guard
from deploy.guards.web.calls import HEADER
from deploy.guards.web.connections import H11, HTTPTOOLS, MOST_AROUND_BYTES, close_the_silent
from deploy.processes.process import free_ports

VALUE = "5" * 64
KNOWN = b"POST /v1/control/x HTTP/1.1\r\nHost: a\r\n%s: %s\r\n" % (HEADER.encode(), VALUE.encode())
REFUSED = b"GET /v1/control/x HTTP/1.1\r\nHost: a\r\n\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


class Flower:
    """An application that says how long the body was, once it may."""

    def __init__(self) -> None:
        self.may_answer = threading.Event()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        while not self.may_answer.is_set():
            await asyncio.sleep(0.01)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"%d bytes" % len(body)})


@contextlib.contextmanager
def served(http: Any, app: Flower) -> Iterator[int]:
    """A guard behind uvicorn; its port."""
    (port,) = free_ports(1)
    config = uvicorn.Config(
        Guard(app, VALUE), port=port, http=http, ws="none", lifespan="off", log_level="critical", timeout_keep_alive=600
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield port
    finally:
        app.may_answer.set()
        server.should_exit = True
        thread.join()


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """uvicorn's protocols as the guards leave them; undone with the test."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    for module, name in (H11, HTTPTOOLS):
        protocol = getattr(importlib.import_module(module), name)
        for method in ("connection_made", "on_message_begin", "on_body", "data_received"):
            if hasattr(protocol, method):
                monkeypatch.setattr(protocol, method, getattr(protocol, method))
    monkeypatch.setattr(connections, "SILENT_SECONDS", 0.3)
    close_the_silent()
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def read_all(connection: socket.socket) -> bytes:
    """What comes until the connection is closed."""
    come = b""
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while part := connection.recv(2**16):
            come += part
    return come


@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_no_stranger_keeps_a_connection_and_who_may_ask_does(watched: None, http: str):
    app = Flower()
    with served(http, app) as port, contextlib.ExitStack() as stack:
        known, silent, half, refused, health = (
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20)) for _ in range(5)
        )
        known.sendall(KNOWN + b"Content-Length: 0\r\n\r\n")
        half.sendall(KNOWN)
        refused.sendall(REFUSED + KNOWN)  # the head of one more request, which never ends
        health.sendall(HEALTH)  # a body that never comes
        assert [read_all(each)[:12] for each in (silent, half, refused, health)][2] == b"HTTP/1.1 401"
        app.may_answer.set()
        assert known.recv(12) == b"HTTP/1.1 200"


@pytest.mark.parametrize(
    ("head", "more"),
    [
        (KNOWN, b"x: %s\r\n" % bytes(1000).replace(b"\0", b"x")),
        (KNOWN, b"x" * 1000),
        (b"GET /", b"x" * 1000),
        (b"", b"\r\n" * 500),
        (REFUSED[:-2] + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"x: y\r\n" * 100),
        (REFUSED[:-2] + b"Transfer-Encoding: chunked\r\n\r\n1;", b"x" * 1000),
    ],
    ids=["headers", "one header", "address", "nothing", "trailers", "size of a piece"],
)
def test_what_stands_around_a_body_has_a_limit(
    watched: None, monkeypatch: pytest.MonkeyPatch, head: bytes, more: bytes
):
    monkeypatch.setattr(connections, "SILENT_SECONDS", 600.0)
    with served("httptools", Flower()) as port, socket.create_connection(("127.0.0.1", port), timeout=20) as stranger:
        stranger.sendall(head)
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            for _ in range(1000):
                stranger.sendall(more)
            stranger.shutdown(socket.SHUT_WR)
        answers = read_all(stranger)
    assert answers.count(b"HTTP/1.1") <= 1
    assert b" 200 " not in answers


@pytest.mark.parametrize("http", ["h11", "httptools"])
@pytest.mark.parametrize("is_in_pieces", [False, True])
def test_a_body_is_not_what_stands_around_it(watched: None, http: str, *, is_in_pieces: bool):
    size = 8 * MOST_AROUND_BYTES
    piece = b"%x\r\n%s\r\n" % (2**12, bytes(2**12))
    body = piece * (size // 2**12) + b"0\r\n\r\n" if is_in_pieces else bytes(size)
    length = b"Transfer-Encoding: chunked" if is_in_pieces else b"Content-Length: %d" % size
    app = Flower()
    app.may_answer.set()
    with served(http, app) as port, socket.create_connection(("127.0.0.1", port), timeout=20) as known:
        for _ in range(2):
            known.sendall(KNOWN + length + b"\r\n\r\n" + body)
            answer = b""
            while b" bytes" not in answer:
                part = known.recv(2**16)
                assert part, answer
                answer += part
            assert b"%d bytes" % size in answer


@pytest.mark.parametrize(
    ("is_known", "is_complete", "is_new", "stays"),
    [
        (True, False, True, True),
        (True, False, False, True),
        (True, True, True, True),
        (True, True, False, False),
        (False, False, True, True),
        (False, False, False, False),
        (False, True, True, False),
        (False, True, False, False),
    ],
)
def test_a_connection_stays_for_requests_that_are_let_in(
    *, is_known: bool, is_complete: bool, is_new: bool, stays: bool
):
    done: list[str] = []
    cycle = SimpleNamespace(scope={ADMITTED: True} if is_known else {}, response_complete=is_complete)
    loop = SimpleNamespace(call_later=lambda *_: done.append("looks again"))
    transport: Any = SimpleNamespace(abort=lambda: done.append("ends"), is_closing=lambda: False)
    connections._look(SimpleNamespace(cycle=cycle, loop=loop), transport, None if is_new else cycle)
    assert done == ["looks again" if stays else "ends"]


@pytest.mark.parametrize(("module", "name"), [H11, HTTPTOOLS])
def test_a_uvicorn_without_the_watched_protocol_is_an_error(
    watched: None, monkeypatch: pytest.MonkeyPatch, module: str, name: str
):
    monkeypatch.delattr(importlib.import_module(module), name)
    with pytest.raises(RuntimeError, match=name):
        close_the_silent()
