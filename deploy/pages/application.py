"""The live page as an ASGI application: a few fixed paths, GET only, figures for whoever shows the token.

Loopback is no authentication: any user of the machine reaches the port, and any page that a browser of this machine
shows can send requests to it. So nothing but the empty page and its script is given without the token; the name in
`Host` must be that of this machine, or another site's name could be bound to it (DNS rebinding); no other origin is
allowed anything; and nothing that a request says is ever part of a path.
"""

import asyncio
import hmac
from collections.abc import Mapping
from typing import Protocol

from deploy.guards.web.asgi import HttpRefusal, Receive, Scope, Send, headers_of
from deploy.pages.board import Board

LOCAL_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})
"""What a browser calls this machine; any port, since one may come through a forwarded one."""
MOST_STREAMS = 8
BEAT_SECONDS = 15.0
"""An empty line so often tells the page that the connection lives."""
PICTURES = "/picture/"
HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob:; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        b"require-trusted-types-for 'script'; trusted-types 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
"""With every answer: the page loads nothing from elsewhere, and nobody keeps or frames it."""


class Source(Protocol):
    """What a page shows; it reads files, holds no lock and changes nothing."""

    @property
    def files(self) -> Mapping[str, tuple[str, bytes]]:
        """The page and what it loads, by path: media type and content, without any figure, given to everybody."""

    def read(self) -> list[dict[str, object]]:
        """Parts of the page in order, each JSON with an `id`; called again and again by one thread at a time."""

    def picture(self, name: str) -> bytes | None:
        """A PNG that `read` has named; None for any other name."""


class Application:
    """Answers the requests of browsers on this machine."""

    def __init__(self, source: Source, token: str) -> None:
        self._source, self._token = source, token.encode()
        self._board = Board(source.read)
        self._streams = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        try:
            await self._answer(scope, receive, send)
        except HttpRefusal as refusal:
            await _send(send, refusal.status, "text/plain; charset=utf-8", str(refusal).encode())

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, path = headers_of(scope), scope["path"]
        check_request(scope["method"], headers)
        if file := self._source.files.get(path):
            await _send(send, 200, *file)
            return
        self._check_token(headers)
        if path == "/stream":
            await self._stream(receive, send)
        elif path.startswith(PICTURES):
            picture = await asyncio.to_thread(self._source.picture, path.removeprefix(PICTURES))
            if picture is None:
                raise HttpRefusal(404, "no such picture")
            await _send(send, 200, "image/png", picture)
        else:
            raise HttpRefusal(404, "no such path")

    def _check_token(self, headers: Mapping[str, str]) -> None:
        kind, _, shown = headers.get("authorization", "").partition(" ")
        # Compared whatever `kind` is, in a time that tells nothing of the token.
        is_right = hmac.compare_digest(shown.encode(), self._token)
        if not is_right or kind.lower() != "bearer":
            raise HttpRefusal(401, "show the token that `start` has printed, or that lies in page.token")

    async def _stream(self, receive: Receive, send: Send) -> None:
        """A line of JSON for each part, and again for each that has changed, until the browser goes."""
        if self._streams >= MOST_STREAMS:
            raise HttpRefusal(503, f"{MOST_STREAMS} windows show this page already: close one")
        self._streams += 1
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await send(_start(200, "application/x-ndjson"))
            async with self._board.watched():
                number = 0
                while not gone.done():
                    number, lines = self._board.newer(number)
                    await send({"type": "http.response.body", "body": lines or b"\n", "more_body": True})
                    await self._board.changed(number, gone, BEAT_SECONDS)
        finally:
            self._streams -= 1
            gone.cancel()


def check_request(method: str, headers: Mapping[str, str]) -> None:
    """Refuse what no browser that shows this page sends.

    Raises:
        HttpRefusal: another method than GET, a body, or a `Host` that is not this machine's name.
    """
    if method != "GET":
        raise HttpRefusal(405, "this page is read only: GET")
    if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
        raise HttpRefusal(413, "no body is taken here")
    name, colon, port = headers.get("host", "").lower().rpartition(":")
    if not colon or not port.isdecimal():
        name = headers.get("host", "").lower()
    if name not in LOCAL_NAMES:
        raise HttpRefusal(
            421, "this page answers at 127.0.0.1 and localhost only; from elsewhere forward the port by SSH"
        )


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send(send: Send, status: int, kind: str, content: bytes) -> None:
    await send(_start(status, kind, (b"content-length", str(len(content)).encode())))
    await send({"type": "http.response.body", "body": content})


def _start(status: int, kind: str, *more: tuple[bytes, bytes]) -> dict[str, object]:
    headers = [(b"content-type", kind.encode()), *more, *HEADERS]
    if status >= 400:
        headers.append((b"connection", b"close"))
    return {"type": "http.response.start", "status": status, "headers": headers}
