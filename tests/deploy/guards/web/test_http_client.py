"""Answers and errors are those of httpx's own transport, but for answers that are too large or encoded."""

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import takewhile
from pathlib import Path

import httpx
import pytest

from deploy.guards.web import http_client
from deploy.guards.web.http_client import LARGEST_ANSWER_BYTES, Connections, HttpClient
from deploy.identity.certificates import create_authority, issue_server_certificate
from deploy.identity.tls import client_context

SECONDS = httpx.Timeout(20)
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class Server:
    """Answers each call with the next of `answers`, as it stands; an empty one closes the connection."""

    def __init__(self, answers: list[bytes], context: ssl.SSLContext | None = None) -> None:
        self._answers, self._context = answers, context
        self.asked, self.num_connections = list[tuple[str, bytes]](), 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)

    @contextmanager
    def running(self) -> Iterator["Server"]:
        self._thread.start()
        try:
            yield self
        finally:
            self._listening.shutdown(socket.SHUT_RDWR)
            self._listening.close()
            self._thread.join()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self.num_connections += 1
            try:
                with self._context.wrap_socket(connection, server_side=True) if self._context else connection as spoken:
                    self._speak(spoken)
            except OSError:
                continue

    def _speak(self, connection: socket.socket) -> None:
        with connection.makefile("rb") as reading:
            while head := b"".join(takewhile(lambda line: line.strip(), iter(reading.readline, b""))):
                fields = dict(line.lower().split(b": ", 1) for line in head.splitlines()[1:])
                self.asked.append((head.split()[1].decode(), reading.read(int(fields.get(b"content-length", b"0")))))
                answer = self._answers.pop(0)
                connection.sendall(answer)
                if not answer or b"connection: close" in answer or b"content-length" not in answer:
                    connection.shutdown(socket.SHUT_RDWR)
                    return


def post(client: httpx.Client | HttpClient, url: str, content: bytes = b"asked") -> httpx.Response:
    """A call as Flower makes it."""
    return client.send(client.build_request(method="POST", url=url, content=content, headers={"a": "b"}))


def outcome(client: httpx.Client | HttpClient, port: int) -> tuple[int, list[tuple[str, str]], bytes] | type[Exception]:
    """What a call gives: status, headers and body, or the kind of the error."""
    try:
        answered = post(client, f"http://127.0.0.1:{port}/a/b?c=%20d")
    except httpx.TransportError as error:
        return type(error)
    return answered.status_code, sorted(answered.headers.multi_items()), answered.content


@pytest.mark.parametrize(
    "answer",
    [
        OK,
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nA: 1\r\nA: 2\r\n\r\nbody!",
        b"HTTP/1.1 204 No Content\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 503 Busy\r\ncontent-length: 4\r\nconnection: close\r\n\r\nbusy",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nuntil the end",
        b"HTTP/1.1 307 Elsewhere\r\nlocation: http://127.0.0.1:9/\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\nconnection: close\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\nabc",
        b"nonsense\r\n\r\n",
        b"",
    ],
    ids=["small", "headers", "no body", "error", "pieces", "until the end", "redirect", "too short", "a piece missing",
         "a piece of no length", "no HTTP", "closed"],
)  # fmt: skip
def test_an_answer_is_what_httpx_makes_of_it(answer: bytes):
    with Server([answer, answer]).running() as server:
        with httpx.Client(timeout=SECONDS, trust_env=False) as theirs:
            expected = outcome(theirs, server.port)
        with closing(HttpClient(None, SECONDS, {})) as ours:
            assert outcome(ours, server.port) == expected
    assert server.asked[1] == server.asked[0] == ("/a/b?c=%20d", b"asked")


def test_nobody_there_and_nobody_who_answers_are_errors_that_httpx_has_too():
    with socket.create_server(("127.0.0.1", 0)) as silent, closing(HttpClient(None, httpx.Timeout(0.05), {})) as ours:
        assert outcome(ours, silent.getsockname()[1]) is httpx.ReadTimeout
        port = silent.getsockname()[1]
    with closing(HttpClient(None, SECONDS, {})) as ours, httpx.Client(timeout=SECONDS, trust_env=False) as theirs:
        assert outcome(ours, port) is outcome(theirs, port) is httpx.ConnectError
        with pytest.raises(httpx.UnsupportedProtocol):
            post(ours, "https://127.0.0.1/")


@pytest.mark.parametrize("told", [LARGEST_ANSWER_BYTES + 1, 10**15])
def test_an_answer_that_says_it_is_larger_than_any_can_be_is_not_waited_for(told: int):
    """Nor is anything allocated for it: 10**15 bytes would be a MemoryError."""
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % told
    with (
        Server([head]).running() as server,
        closing(HttpClient(None, SECONDS, {})) as ours,
        pytest.raises(httpx.RemoteProtocolError, match="more than 67108864 bytes"),
    ):
        post(ours, f"http://127.0.0.1:{server.port}/")


@pytest.mark.parametrize("begins", [b"connection: close\r\n\r\n", b"transfer-encoding: chunked\r\n\r\nffffffffff\r\n"])
def test_an_answer_that_tells_no_length_is_bounded_as_well(begins: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http_client, "LARGEST_ANSWER_BYTES", 1000)
    answer = b"HTTP/1.1 200 OK\r\n" + begins + bytes(1001)
    with (
        Server([answer]).running() as server,
        closing(HttpClient(None, SECONDS, {})) as ours,
        pytest.raises(httpx.RemoteProtocolError, match="more than 1000 bytes"),
    ):
        post(ours, f"http://127.0.0.1:{server.port}/")


def test_an_encoded_answer_is_refused_and_never_unpacked():
    answer = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 2\r\n\r\n\x1f\x8b"
    with Server([answer]).running() as server, closing(HttpClient(None, SECONDS, {})) as ours:
        assert ours.build_request("POST", "http://a", content=b"", headers={}).headers["accept-encoding"] == "identity"
        with pytest.raises(httpx.RemoteProtocolError, match="encoded as 'gzip'"):
            post(ours, f"http://127.0.0.1:{server.port}/")


def num_connections(calls: int, before: Callable[[Connections], object]) -> int:
    """How many connections so many calls take; `before` is done before each but the first."""
    with Server([OK] * calls).running() as server, closing(HttpClient(None, SECONDS, {})) as ours:
        for number in range(calls):
            if number:
                before(ours._connections)
            assert post(ours, f"http://127.0.0.1:{server.port}/").content == b"ok"
        return server.num_connections


def test_a_connection_is_used_again_unless_it_was_idle_for_long_or_is_closed():
    assert num_connections(3, lambda _: None) == 1

    def age(connections: Connections) -> None:
        connections._idle = [each._replace(since=each.since - 60) for each in connections._idle]

    assert num_connections(3, age) == 3

    def shut(connections: Connections) -> None:
        (idle,) = connections._idle
        idle.connection.sock.shutdown(socket.SHUT_RDWR)  # as if the other end had

    assert num_connections(3, shut) == 3


def test_a_refusal_that_comes_before_the_body_was_read_is_seen():
    """The other side answers and closes at once, so that most of the body can never be sent."""
    refusal = b"HTTP/1.1 413 Too large\r\ncontent-length: 3\r\nconnection: close\r\n\r\nno!"
    listening = socket.create_server(("127.0.0.1", 0))

    def refuse() -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(100)
            connection.sendall(refusal)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(2**16):  # else what was sent and not read would make the kernel drop the answer
                pass

    thread = threading.Thread(target=refuse)
    thread.start()
    with listening, closing(HttpClient(None, SECONDS, {})) as ours:
        answered = post(ours, f"http://127.0.0.1:{listening.getsockname()[1]}/", bytes(2**23))
        assert (answered.status_code, answered.content) == (413, b"no!")
    thread.join()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CA, `ca.crt`, and a server's key and certificate, `server.key` and `server.pem`."""
    folder = tmp_path_factory.mktemp("authority")
    create_authority(folder / "ca.key", folder / "ca.crt")
    issue_server_certificate(
        ca_key=folder / "ca.key", ca_certificate=folder / "ca.crt", certificate=folder / "server.pem",
        key=folder / "server.key", hosts=["127.0.0.1"],
    )  # fmt: skip
    create_authority(folder / "other.key", folder / "other.crt")
    return folder


def test_a_large_answer_over_tls_is_whole_and_another_authority_is_refused(authority: Path):
    body = bytes(range(256)) * 20_001
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(authority / "server.pem", authority / "server.key")
    with Server([answer], server_context).running() as server:
        url = f"https://127.0.0.1:{server.port}/"
        with closing(HttpClient(client_context(authority / "ca.crt"), SECONDS, {})) as ours:
            assert post(ours, url, body[:1000]).content == body
        assert server.asked == [("/", body[:1000])]
        with (
            closing(HttpClient(client_context(authority / "other.crt"), SECONDS, {})) as ours,
            pytest.raises(httpx.ConnectError, match="certificate"),  # Flower asks no more when it finds this word
        ):
            post(ours, url)
