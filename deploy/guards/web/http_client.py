"""How Flower's processes speak HTTP with each other: by Python's own client, and with answers that are bounded.

httpx takes a body in pieces of one TLS record, 16 KB, through four layers each, and most of what a call costs is that.
Here each answer is read whole, and nothing is allocated for one that says it is larger than any can be. Flower is given
the requests, answers and errors of httpx that it knows.
"""

import http.client
import select
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx

KEPT_SECONDS = 4.0
"""Longest that a connection is idle and used again: uvicorn closes it after 5 s."""
LARGEST_ANSWER_BYTES = 64 * 2**20
"""The largest answers are a bundle, 10 MB, and a chunk of an array, 5 MB."""
PORTS = {"http": 80, "https": 443}


class _Idle(NamedTuple):
    connection: http.client.HTTPConnection
    place: tuple[str, str, int]
    since: float

    def is_usable(self) -> bool:
        """Whether it is not closed, nor about to be: an idle connection has nothing to say but that."""
        if self.connection.sock is None or time.monotonic() - self.since > KEPT_SECONDS:
            return False
        waiting = select.poll()
        waiting.register(self.connection.sock, select.POLLIN)
        return not waiting.poll(0)


class Connections:
    """Open connections; each thread that asks has one of its own meanwhile.

    `context` is for https, and None where only http is spoken. An answer is whole once it is there, and never decoded:
    one in another encoding is none.
    """

    def __init__(self, context: ssl.SSLContext | None) -> None:
        self._context = context
        self._idle: list[_Idle] = []
        self._lock = threading.Lock()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send, and read the answer.

        Raises:
            httpx.TransportError: as httpx's own transport does, and for an answer that is encoded or too large.
        """
        url, seconds = request.url, request.extensions.get("timeout", {})
        place = (url.scheme, url.raw_host.decode("ascii"), url.port or PORTS.get(url.scheme, 0))
        connection = self._take(place) or self._open(place, seconds.get("connect"))
        try:
            is_sent = _send(connection, request, seconds.get("write"))
            answered, body = _receive(connection, seconds.get("read"))
        except BaseException:
            connection.close()
            raise
        if is_sent and answered.isclosed() and not answered.will_close:
            with self._lock:
                self._idle.append(_Idle(connection, place, time.monotonic()))
        else:
            connection.close()
        return httpx.Response(answered.status, headers=answered.getheaders(), stream=httpx.ByteStream(body))

    def close(self) -> None:
        """Close what is idle."""
        with self._lock:
            for each in self._idle:
                each.connection.close()
            self._idle.clear()

    def _take(self, place: tuple[str, str, int]) -> http.client.HTTPConnection | None:
        with self._lock:
            while self._idle:
                idle = self._idle.pop()
                if idle.place == place and idle.is_usable():
                    return idle.connection
                idle.connection.close()
        return None

    def _open(self, place: tuple[str, str, int], seconds: float | None) -> http.client.HTTPConnection:
        scheme, host, port = place
        connection: http.client.HTTPConnection
        if scheme == "https" and self._context is not None:
            connection = http.client.HTTPSConnection(host, port, timeout=seconds, context=self._context)
        elif scheme == "http":
            connection = http.client.HTTPConnection(host, port, timeout=seconds)
        else:
            raise httpx.UnsupportedProtocol(f"no connection for {scheme} was prepared")
        try:
            with _told_as(httpx.ConnectTimeout, httpx.ConnectError):
                connection.connect()
        except BaseException:
            connection.close()
            raise
        return connection


class HttpClient:
    """In the place of the `httpx.Client` in Flower's `ProtobufClient`, with the part of it that is used there.

    It asks no proxy, whatever the environment says, follows no redirect and keeps no cookies.
    """

    def __init__(self, context: ssl.SSLContext | None, timeout: httpx.Timeout, headers: Mapping[str, str]) -> None:
        """Prepare: `context` as of `Connections`, `headers` go with every call."""
        self.timeout, self.headers = timeout, {**headers, "accept-encoding": "identity"}
        self._connections = Connections(context)

    def build_request(
        self,
        method: str,
        url: str,
        *,
        content: bytes,
        headers: Mapping[str, str],
        timeout: httpx.Timeout | float | None = None,
    ) -> httpx.Request:
        """A request with the headers of every call and its own."""
        seconds = httpx.Timeout(self.timeout if timeout is None else timeout).as_dict()
        return httpx.Request(
            method, url, content=content, headers={**self.headers, **headers}, extensions={"timeout": seconds}
        )

    def send(self, request: httpx.Request, *, stream: bool = False) -> httpx.Response:
        """Send, and read the whole answer, also where it is asked for as a stream.

        Raises:
            httpx.TransportError: see `Connections`.
        """
        response = self._connections.handle_request(request)
        response.request = request
        if not stream:
            response.read()
        return response

    def close(self) -> None:
        """Close what is idle."""
        self._connections.close()


def _send(connection: http.client.HTTPConnection, request: httpx.Request, seconds: float | None) -> bool:
    """Whether all was sent: who refuses a call may answer, and close, before it has read the body."""
    connection.sock.settimeout(seconds)
    body = request.read()
    with _told_as(httpx.WriteTimeout, httpx.WriteError):
        target = request.url.raw_path.decode("ascii")
        connection.putrequest(request.method, target, skip_host=True, skip_accept_encoding=True)
        for name, value in request.headers.raw:
            connection.putheader(name, value)
    try:
        with _told_as(httpx.WriteTimeout, httpx.WriteError):
            connection.endheaders(body)
    except httpx.WriteError:
        return False
    return True


def _receive(connection: http.client.HTTPConnection, seconds: float | None) -> tuple[http.client.HTTPResponse, bytes]:
    connection.sock.settimeout(seconds)
    with _told_as(httpx.ReadTimeout, httpx.ReadError):
        answered = connection.getresponse()
        if (encoding := answered.getheader("content-encoding", "identity")) != "identity":
            raise http.client.HTTPException(f"an answer encoded as {encoding[:20]!r}: none was asked for")
        return answered, _body(answered)


def _body(answered: http.client.HTTPResponse) -> bytes:
    declared = answered.length
    if declared is None or declared <= LARGEST_ANSWER_BYTES:
        # With its length told, one that ends too early is an error.
        body = answered.read() if declared is not None else answered.read(LARGEST_ANSWER_BYTES + 1)
        if len(body) <= LARGEST_ANSWER_BYTES:
            return body
    raise http.client.HTTPException(f"an answer of more than {LARGEST_ANSWER_BYTES} bytes, the most that is taken")


@contextmanager
def _told_as(late: type[httpx.TransportError], failed: type[httpx.TransportError]) -> Iterator[Any]:
    """Raise what httpx would; the texts are those of Python, by which Flower knows errors of TLS."""
    try:
        yield
    except TimeoutError as error:
        raise late(str(error)) from error
    except http.client.HTTPException as error:
        raise httpx.RemoteProtocolError(str(error) or type(error).__name__) from error
    except OSError as error:
        raise failed(str(error)) from error
    except ValueError as error:  # a length of a piece that is no number
        raise httpx.RemoteProtocolError(str(error)) from error
