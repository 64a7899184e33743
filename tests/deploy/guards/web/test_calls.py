"""What our own processes send with each call, and that loopback calls never look at proxy variables."""

import ast
import hashlib
import hmac
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import flwr.supercore.inflatable.inflatable_utils as pulls
import httpx
import pytest
from flwr.supercore.protobuf.client import ProtobufClient

from deploy.errors import ProvisionError
from deploy.guards import FLWR_VERSION
from deploy.guards.web.calls import (
    FIRST_PULL_SECONDS,
    HEADER,
    SHORTEST_SECONDS,
    News,
    Pauses,
    caller_value,
    look_again_soon,
    send_with_every_call,
)
from deploy.identity.keys import create_secret
from server import entry
from server.federation.fleet import superlink

ROOT = Path(__file__).resolve().parents[4]
SERVED = [ROOT / package for package in ("client", "deploy", "server", "shared")]


def test_flower_is_the_version_this_was_written_for():
    import flwr

    assert flwr.__version__ == FLWR_VERSION == superlink.FLWR_VERSION == entry.FLWR_VERSION


def test_the_coordinators_commands_show_what_the_guard_expects(tmp_path: Path):
    create_secret(tmp_path / "secret")
    secret = (tmp_path / "secret").read_bytes()
    expected = hmac.new(secret, b"maskfed calls of control and runtime paths", hashlib.sha256).hexdigest()
    assert caller_value(tmp_path / "secret") == superlink.caller_value(secret) == expected
    assert superlink.CALLER_HEADER == HEADER


def test_no_secret_no_call(tmp_path: Path):
    (tmp_path / "empty").touch()
    for file in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(ProvisionError, match=file.name):
            caller_value(file)


def test_every_client_of_flower_sends_the_value_and_asks_no_proxy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ProtobufClient, "__init__", ProtobufClient.__init__)
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    send_with_every_call("value")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        client = ProtobufClient.from_server_address(address, True, None, [])
        asking = threading.Thread(target=lambda: client._client.send(client._client.build_request(
            method="POST", url=f"http://{address}/", content=b"", headers={})))  # fmt: skip
        asking.start()
        connection, _ = listening.accept()  # so it did not go to a proxy
        with connection:
            assert f"\r\n{HEADER}: value\r\n".encode() in connection.recv(2**16)
            connection.sendall(b"HTTP/1.1 302 Elsewhere\r\nlocation: http://127.0.0.1:9/\r\ncontent-length: 0\r\n\r\n")
            asking.join()  # and it went nowhere else
    client.close()


def test_commands_reach_the_superlink_whatever_the_proxy_variables_say(monkeypatch: pytest.MonkeyPatch):
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with superlink.Control("127.0.0.1:1", None, b"secret") as control:
        assert isinstance(control._http._client, httpx.Client)
        assert not control._http._client.trust_env


def test_no_call_in_the_packages_leaves_proxies_to_the_environment():
    """httpx asks the environment unless told not to, and so does gRPC; all our own calls go to known addresses."""
    found = 0
    for path in (path for folder in SERVED for path in folder.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if "httpx" in text or "secure_channel" in text else ():
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name in {"httpx.Client", "httpx.get", "httpx.post"}:
                assert "trust_env=False" in ast.unparse(node), path
                found += 1
            if name.endswith(("insecure_channel", "secure_channel")):
                assert "grpc.enable_http_proxy" in ast.unparse(node), path
                found += 1
    assert found >= 4


class Clock(News):
    """Notes what is waited for; the time is its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.now, self.slept = 100.0, list[float]()
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def wait(self, seen: int, seconds: float) -> bool:
        self.slept.append(seconds)
        self.now += seconds
        return False


def test_pauses_grow_with_what_was_waited_up_to_flowers_own_and_begin_anew(monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)
    pauses, slept = Pauses(clock), clock.slept
    while clock.now < 120:
        pauses.sleep(3)
    assert slept[:4] == [SHORTEST_SECONDS] * 4
    assert slept[-1] == 3
    assert slept == sorted(slept)
    assert len(slept) < 30
    pauses.begin()
    pauses.sleep(3)
    pauses.sleep(0.05)
    assert slept[-2:] == [SHORTEST_SECONDS, 0.05]
    assert pauses.perf_counter is time.perf_counter
    even = Pauses(clock, share=0.0)
    clock.now += 1000
    even.sleep(3)
    assert slept[-1] == SHORTEST_SECONDS


def test_news_end_a_pause_also_when_they_came_just_before_it():
    news = News()
    pauses = Pauses(news)
    pauses.begin()
    news.ring()
    began = time.monotonic()
    pauses._since = began - 1e6
    pauses.sleep(600)  # what came before it began is not slept over
    threading.Timer(0.05, news.ring).start()
    pauses.sleep(600)
    assert time.monotonic() - began < 300


def test_an_object_that_is_on_its_way_is_looked_for_again_at_once(monkeypatch: pytest.MonkeyPatch):
    for function in (pulls.pull_objects, pulls.pull_and_inflate_object_from_tree):
        monkeypatch.setattr(function, "__kwdefaults__", dict(function.__kwdefaults__))
    waited: list[float] = []

    class Event(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waited.append(timeout or 0.0)
            return False

    look_again_soon()
    comes = iter([False, False, True])

    def pull(object_id: str) -> bytes:
        if not next(comes):
            raise pulls.ObjectUnavailableError(object_id)
        return b"content"

    monkeypatch.setattr(pulls, "threading", SimpleNamespace(Event=Event, Lock=threading.Lock))
    assert pulls.pull_objects(["a"], pull) == {"a": b"content"}
    assert [second for second in waited if second] == [
        pytest.approx(seconds, rel=0.21) for seconds in (FIRST_PULL_SECONDS, 2 * FIRST_PULL_SECONDS)
    ]


def test_another_flower_without_that_pause_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pulls, "pull_objects", lambda object_ids, pull: None)
    with pytest.raises(RuntimeError, match="pull_objects has no initial_backoff"):
        look_again_soon()
