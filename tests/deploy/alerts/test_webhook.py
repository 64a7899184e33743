"""A webhook whose receiver is slow, hostile or gone; an address that must not be used, and is shown to nobody."""

import contextlib
import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.alerts import webhook
from deploy.alerts.webhook import FILE, Webhook, WebhookError, check_webhook, post, read_webhook, write_webhook
from deploy.errors import ProvisionError

SECRET = "T0KEN-of-a-chat-service"
Answer = Callable[[socket.socket], None]


@contextlib.contextmanager
def receiver(answer: Answer) -> Iterator[tuple[str, list[bytes]]]:
    """An address on loopback whose connections `answer` deals with, and what it was sent."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection, contextlib.suppress(OSError):
                        connection.settimeout(5)
                        heard.append(_request(connection))
                        answer(connection)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/hooks/{SECRET}", heard


def _request(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(4096)
    head, _, body = data.partition(b"\r\n\r\n")
    length = next((int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0)
    while len(body) < length:
        body += connection.recv(4096)
    return head + b"\r\n\r\n" + body


def says(status: str, headers: str = "", body: bytes = b"") -> Answer:
    return lambda connection: connection.sendall(f"HTTP/1.1 {status}\r\n{headers}\r\n".encode() + body)


def drips(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    for number in range(200):
        connection.sendall(f"X-{number}: 1\r\n".encode())
        time.sleep(0.05)


def floods(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n")
    while True:
        connection.sendall(b"x" * 65536)


def many_headers(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        connection.sendall(b"X-Long: " + b"x" * 65536)


def test_a_message_is_one_line_of_json_and_its_status_comes_back():
    with receiver(says("204 No Content")) as (url, heard):
        assert post(Webhook(url), {"text": "site a\nrefused \x1b[31m", "kind": "refused"}) == 204
    head, _, body = heard[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /hooks/") and b"application/json" in head
    assert json.loads(body) == {"text": "site a\nrefused \x1b[31m", "kind": "refused"}
    assert b"\n" not in body and b"\x1b" not in body


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            says("302 Found", "Location: http://127.0.0.1:1/elsewhere\r\nContent-Length: 0\r\n"),
            "answered 302, and redi",
        ),
        (says("500 Oops", "Content-Length: 0\r\n"), "answered 500"),
        (says("404 Not Found", "Content-Length: 5\r\n", b"\x1b[2Jx"), "answered 404"),
        (lambda connection: connection.close(), "cannot be reached"),
        (lambda connection: connection.sendall(b"\x00\xff no HTTP\r\n\r\n"), "cannot be reached"),
        (many_headers, "cannot be reached"),
    ],
    ids=["redirect", "error", "control characters", "closed", "no HTTP", "endless headers"],
)
def test_what_a_receiver_does_is_one_line_that_shows_the_host_alone(answer, message, caplog):
    caplog.set_level(logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # as both programs do
    with receiver(answer) as (url, heard), pytest.raises(WebhookError, match=message) as caught:
        post(Webhook(url), {"text": "x"})
    assert str(caught.value).startswith("127.0.0.1 ") and "\n" not in str(caught.value)
    assert SECRET not in str(caught.value) + caplog.text and len(heard) == 1


@pytest.mark.parametrize("answer", [drips, lambda _connection: time.sleep(4)], ids=["drip", "silent"])
def test_a_slow_receiver_is_given_up_and_shown_by_its_host_alone(answer, monkeypatch):
    monkeypatch.setattr(webhook, "POST_SECONDS", 0.6)
    with receiver(answer) as (url, _), pytest.raises(WebhookError, match="did not answer within") as caught:
        post(Webhook(url), {"text": "x"})
    assert SECRET not in str(caught.value)


def test_a_body_without_end_is_not_read():
    with receiver(floods) as (url, _):
        assert post(Webhook(url), {"text": "x"}) == 200


def test_nobody_there_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    with pytest.raises(WebhookError, match=r"^127\.0\.0\.1 cannot be reached \(ConnectError\)$"):
        post(Webhook(f"http://127.0.0.1:{port}/{SECRET}"), {"text": "x"})


def test_a_receiver_whose_certificate_nobody_vouches_for_hears_nothing(tmp_path: Path):
    from deploy.identity.certificates import create_authority, issue_server_certificate

    create_authority(tmp_path / "ca.key", tmp_path / "ca.crt")
    issue_server_certificate(
        ca_key=tmp_path / "ca.key",
        ca_certificate=tmp_path / "ca.crt",
        certificate=tmp_path / "server.pem",
        key=tmp_path / "server.key",
        hosts=["127.0.0.1"],
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    heard = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True) as secured:
                heard.append(secured.recv(4096))

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(WebhookError, match="cannot be reached"):
            post(Webhook(f"https://127.0.0.1:{listening.getsockname()[1]}/{SECRET}"), {"text": "x"})
    assert not any(heard)


def test_variables_of_the_environment_lead_nowhere(monkeypatch: pytest.MonkeyPatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with receiver(says("200 OK", "Content-Length: 0\r\n")) as (url, _):
        assert post(Webhook(url), {"text": "x"}) == 200


def test_a_proxy_that_was_given_is_used():
    with receiver(says("407 No", "Content-Length: 0\r\n")) as (proxy, heard), pytest.raises(WebhookError):
        post(Webhook(f"https://hooks.example/{SECRET}", proxy.partition("/hooks")[0]), {"text": "x"})
    assert heard[0].startswith(b"CONNECT hooks.example:443 ") and SECRET.encode() not in heard[0]


@pytest.mark.parametrize(
    "url",
    [
        "",
        "hooks.example/x",
        "ftp://hooks.example/x",
        "file:///etc/passwd",
        "http://hooks.example/x",
        "http://169.254.169.254/latest",
        "http://127.0.0.1.hooks.example/",
        "https://",
        "https:///x",
        f"https://user:{SECRET}@hooks.example/x",
        f"https://{SECRET}@hooks.example/x",
        f"https://hooks.example/x\r\nX-Evil: {SECRET}",
        "https://hooks.example/a b",
        "https://hooks.example/\x00",
        "https://höoks.example/x",
        "https://hooks.example:99999/x",
        f"https://hooks.example/x#{SECRET}",
        "https://[::1/x",
        f"https://hooks.example/{'x' * 2000}",
    ],
)
def test_addresses_that_are_refused_are_not_repeated(url: str):
    with pytest.raises(ProvisionError) as caught:
        check_webhook(Webhook(url))
    assert "\n" not in str(caught.value) and SECRET not in str(caught.value) and len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "url", ["https://hooks.example/services/T/B/x?y=1", "http://localhost:9/x", "http://[::1]:9/x", "http://127.1.2.3/"]
)
def test_addresses_that_can_be_used(url: str):
    assert check_webhook(Webhook(url)).url == url


def test_a_proxy_with_a_password_is_refused():
    with pytest.raises(ProvisionError, match="without user and password"):
        check_webhook(Webhook("https://hooks.example/", "http://u:p@proxy:3128"))


def test_the_file_is_private_and_a_damaged_or_open_one_is_refused(tmp_path: Path):
    assert read_webhook(tmp_path) is None
    written = Webhook(f"https://hooks.example/{SECRET}", "http://proxy:3128", 12.5)
    write_webhook(tmp_path, written)
    assert read_webhook(tmp_path) == written and (tmp_path / FILE).stat().st_mode & 0o777 == 0o600
    (tmp_path / FILE).chmod(0o644)
    with pytest.raises(ProvisionError):
        read_webhook(tmp_path)
    (tmp_path / FILE).chmod(0o600)
    for text in (
        "",
        "[]",
        "null",
        '{"url": 5}',
        '{"url": "x", "more": 1}',
        '{"url": "http://hooks.example/"}',
        "[" * 5000,
    ):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(ProvisionError):
            read_webhook(tmp_path)
    with pytest.raises(ProvisionError, match="is no folder"):
        write_webhook(tmp_path / "absent", written)
