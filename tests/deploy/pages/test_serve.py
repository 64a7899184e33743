"""The page's process on real sockets: alone, and as a service of a supervisor."""

import contextlib
import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from deploy.errors import ProvisionError
from deploy.pages import serve
from deploy.pages.application import Application
from deploy.pages.serve import server_of
from deploy.pages.service import is_answering, page_service
from deploy.pages.token import read_token
from deploy.processes.process import free_ports
from deploy.processes.supervision import Supervisor

MODULE = "shown"
SHOWN = """
class Empty:
    files = {"/": ("text/html", b"page")}
    def read(self):
        return [{"id": "facts", "value": 7}]
def page(_home):
    return Empty()
"""


class Empty:
    def __init__(self) -> None:
        self.files = {"/": ("text/html; charset=utf-8", b"page")}

    def read(self) -> list[dict[str, object]]:
        return [{"id": "facts", "value": 7}]

    def picture(self, _name: str) -> None:
        return None


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A page served by a thread, with few connections and little patience."""
    monkeypatch.setattr(serve, "MOST_CONNECTIONS", 4)
    monkeypatch.setattr(serve, "PATIENCE_SECONDS", 0.2)
    import asyncio

    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = server_of(Application(Empty(), "x" * 40))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening.dup()])))
        thread.start()
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def get(port: int, path: str, **headers: str) -> Iterator[http.client.HTTPResponse]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        connection.request("GET", path, headers=headers)
        with connection.getresponse() as answer:
            yield answer


def test_a_connection_that_asks_nothing_is_closed(port: int):
    with socket.create_connection(("127.0.0.1", port), timeout=20) as silent:
        silent.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
        assert silent.recv(100) == b""


def test_too_many_connections_are_cut_and_others_served_again(port: int):
    held = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(4)]
    deadline = time.monotonic() + 20
    while is_answering(port):
        assert time.monotonic() < deadline
    for each in held:
        each.close()
    while not is_answering(port):
        assert time.monotonic() < deadline


def test_headers_without_end_are_refused(port: int):
    with socket.create_connection(("127.0.0.1", port), timeout=20) as greedy:
        greedy.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: " + b"y" * (2**15))
        assert greedy.recv(2**16).startswith(b"HTTP/1.1 4")


def test_the_server_does_not_say_what_it_is(port: int):
    with get(port, "/") as answer:
        assert answer.status == 200 and answer.getheader("server") is None


@pytest.fixture
def home(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


def test_a_supervised_page_keeps_its_secret_and_its_port(home: Path, monkeypatch: pytest.MonkeyPatch):
    (number,) = free_ports(1)
    (home / "shown.py").write_text(SHOWN)
    with page_service(home, number, MODULE) as service:
        service.env["PYTHONPATH"] = str(home)
        service.argv.remove("-I")  # type: ignore[attr-defined]  # what is shown here is installed nowhere
        token = read_token(home)
        supervisor = Supervisor([service])
        with supervisor:
            threading.Thread(target=supervisor.watch).start()
            (first,) = psutil.Process().children()
            seen = [*first.cmdline(), *first.environ().values(), *first.environ()]
            assert not any(token in text for text in seen)
            with get(number, "/stream", Authorization=f"Bearer {token}") as stream:
                first_line = next(line for line in iter(stream.readline, b"") if line != b"\n")
                assert json.loads(first_line) == {"id": "order", "parts": ["facts"]}
            first.kill()
            # While it is away nobody else can take its port.
            with socket.socket() as thief:
                thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                with pytest.raises(OSError, match="in use"):
                    thief.bind(("127.0.0.1", number))
            deadline = time.monotonic() + 60
            while not is_answering(number):
                assert time.monotonic() < deadline
            assert supervisor.restarts == {"page": 1}
            with pytest.raises(ProvisionError, match="live page"), page_service(home, number, MODULE):
                pass
            assert read_token(home) == token
            supervisor.request_stop()
        assert not is_answering(number)
    written = (home / "logs" / "page.log").read_text()
    assert token not in written
    assert not [each for each in psutil.Process(os.getpid()).children() if each.status() != psutil.STATUS_ZOMBIE]
