"""Connections that a process keeps: those on which somebody asks who may.

Every user of the machine reaches the port, and uvicorn keeps a connection for as long as something comes in, be it a
byte a second, and all headers that come, be they gigabytes. What nobody has let in yet is bounded here, in time and
bytes, whether it comes before a request, as its head, after its body or as one more request behind a refused one.
"""

import asyncio
import importlib
import resource
from collections.abc import Callable
from typing import Any

from deploy.guards.web.asgi import ADMITTED

SILENT_SECONDS = 20.0
"""How long a connection is kept on which no request is let in, or since the last one ended."""
MOST_AROUND_BYTES = 64 * 2**10
"""Of one request without its body: address, headers, what stands around pieces of a body, and trailers."""
MOST_DESCRIPTORS = 2**16
H11 = "uvicorn.protocols.http.h11_impl", "H11Protocol"
HTTPTOOLS = "uvicorn.protocols.http.httptools_impl", "HttpToolsProtocol"
"""What uvicorn may speak HTTP with. The first has a limit of its own for what stands around a body."""


def close_the_silent() -> None:
    """Let uvicorn close connections of strangers, and let this process have more than the usual 1,024.

    Raises:
        RuntimeError: uvicorn has no such protocol, so that nothing would be closed.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, MOST_DESCRIPTORS), hard))
    for module, name in (H11, HTTPTOOLS):
        _wrap(module, name, "connection_made", _watched)
    for method, wrapper in (("on_message_begin", _begun), ("on_body", _with_body), ("data_received", _counted)):
        _wrap(*HTTPTOOLS, method, wrapper)


def _wrap(module: str, name: str, method: str, wrapper: Callable[[Any], Any]) -> None:
    protocol = getattr(importlib.import_module(module), name, None)
    if protocol is None or not hasattr(protocol, method):
        raise RuntimeError(f"{module} has no {name} with `{method}`")
    setattr(protocol, method, wrapper(getattr(protocol, method)))


def _watched(made: Callable[[Any, asyncio.Transport], None]) -> Callable[[Any, asyncio.Transport], None]:
    def connection_made(self: Any, transport: asyncio.Transport) -> None:  # noqa: ANN401 - one of uvicorn's protocols
        self.bytes_around = 0
        made(self, transport)
        self.loop.call_later(SILENT_SECONDS, _look, self, transport, None)

    return connection_made


def _look(protocol: Any, transport: asyncio.Transport, before: object) -> None:  # noqa: ANN401
    """Close a connection unless its newest request was let in or may still be, and is not over since the last look."""
    cycle = protocol.cycle
    if cycle is None or not _is_of_use(cycle, is_new=cycle is not before):
        transport.abort()
    elif not transport.is_closing():
        protocol.loop.call_later(SILENT_SECONDS, _look, protocol, transport, cycle)


def _is_of_use(cycle: Any, *, is_new: bool) -> bool:  # noqa: ANN401 - uvicorn's request and response
    is_let_in = ADMITTED in cycle.scope
    return (is_let_in or not cycle.response_complete) if is_new else (is_let_in and not cycle.response_complete)


def _begun(begin: Callable[[Any], None]) -> Callable[[Any], None]:
    def on_message_begin(self: Any) -> None:  # noqa: ANN401
        self.bytes_around = 0
        begin(self)

    return on_message_begin


def _with_body(take: Callable[[Any, bytes], None]) -> Callable[[Any, bytes], None]:
    def on_body(self: Any, body: bytes) -> None:  # noqa: ANN401
        self.bytes_around -= len(body)
        take(self, body)

    return on_body


def _counted(receive: Callable[[Any, bytes], None]) -> Callable[[Any, bytes], None]:
    def data_received(self: Any, data: bytes) -> None:  # noqa: ANN401
        self.bytes_around += len(data)
        receive(self, data)
        if self.bytes_around > MOST_AROUND_BYTES:
            self.transport.abort()

    return data_received
