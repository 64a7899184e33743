"""Through a proxy as it is met in the field: CONNECT, then bytes both ways."""

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from deploy.checks.dial import LARGEST_ANSWER_BYTES, ProxyError, Way, dial
from deploy.errors import ProvisionError


@contextlib.contextmanager
def proxy(answer: bytes, then: bytes = b"") -> Iterator[tuple[str, list[bytes]]]:
    """A proxy that says `answer` to its one client; its address, and what it was asked."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            stream, _ = listener.accept()
            with stream, contextlib.suppress(OSError):
                asked.append(stream.recv(4096))
                stream.sendall(answer + then)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
        thread.join()


def test_a_proxy_is_asked_for_the_door_and_nothing_of_the_door_is_swallowed():
    head = b"HTTP/1.1 200 Connection established\r\nVia: x\r\n\r\n"
    with proxy(head, b"hello") as (address, asked), dial(Way("fleet.example:443", address)) as stream:
        assert stream.recv(5) == b"hello"
    assert asked == [b"CONNECT fleet.example:443 HTTP/1.1\r\nHost: fleet.example:443\r\n\r\n"]


def test_an_ipv6_door_is_asked_for_in_brackets():
    with proxy(b"HTTP/1.0 200 OK\r\n\r\n") as (address, asked):
        dial(Way("[2001:db8::7]:443", address)).close()
    assert asked[0].startswith(b"CONNECT [2001:db8::7]:443 ")


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", r"refuses CONNECT .*407.*admit this host"),
        (b"HTTP/1.1 403 \x1b[2J\r\n\r\n", r"refuses CONNECT .*\\x1b"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "does not answer CONNECT"),
        (b"", "does not answer CONNECT"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * LARGEST_ANSWER_BYTES, "does not answer CONNECT"),
    ],
)
def test_what_a_proxy_answers_instead_is_one_plain_line(answer: bytes, told: str):
    with proxy(answer) as (address, _), pytest.raises(ProxyError, match=told) as caught:
        dial(Way("fleet.example:443", address))
    assert "\x1b" not in str(caught.value)


def test_a_proxy_of_another_form_is_refused_before_anybody_is_called():
    with pytest.raises(ProvisionError, match="http://host:port"):
        dial(Way("fleet.example:443", "socks5://127.0.0.1:1080"))
