"""What a browser of this machine gets, and what everybody else does."""

import asyncio
import json
from typing import Any

import pytest

from deploy.pages import application
from deploy.pages.application import Application

TOKEN = "t0ken-" * 6
GOOD = {"host": "127.0.0.1:8123", "authorization": f"Bearer {TOKEN}"}
SECRET = "hospital-a spent 7.25"


class Shown:
    """A page of one part and one picture."""

    def __init__(self) -> None:
        self.files = {"/": ("text/html; charset=utf-8", b"<!doctype html>"), "/live.js": ("text/javascript", b"1")}
        self.parts: list[dict[str, object]] = [{"id": "sites", "text": SECRET}]
        self.asked: list[str] = []

    def read(self) -> list[dict[str, object]]:
        return self.parts

    def picture(self, name: str) -> bytes | None:
        self.asked.append(name)
        return {"run-3": b"\x89PNG"}.get(name)


class Answer:
    def __init__(self, messages: list[dict[str, Any]]) -> None:
        self.status = messages[0]["status"]
        self.headers = {name.decode(): value.decode() for name, value in messages[0]["headers"]}
        self.body = b"".join(message.get("body", b"") for message in messages[1:])


def ask(
    path: str = "/stream",
    headers: dict[str, str] | list[tuple[str, str]] = GOOD,
    method: str = "GET",
    shown: Any = None,
) -> Answer:
    """One request; a stream is left after its first lines."""
    sent: list[dict[str, Any]] = []
    pairs = list(headers.items()) if isinstance(headers, dict) else headers
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(name.encode(), value.encode()) for name, value in pairs],
    }

    async def run() -> None:
        told = asyncio.Event()

        async def send(message: Any) -> None:
            sent.append(message)
            if SECRET.encode() in message.get("body", b""):
                told.set()

        async def receive() -> Any:
            await told.wait()
            return {"type": "http.disconnect"}

        await asyncio.wait_for(Application(shown or Shown(), TOKEN)(scope, receive, send), 20)

    asyncio.run(run())
    return Answer(sent)


def test_whoever_shows_the_token_gets_the_parts():
    lines = [json.loads(line) for line in ask().body.splitlines() if line]
    assert lines == [{"id": "order", "parts": ["sites"]}, {"id": "sites", "text": SECRET}]


@pytest.mark.parametrize(
    "shown",
    [
        None,
        "Bearer",
        "Bearer ",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN}x",
        f"Basic {TOKEN}",
        TOKEN,
        f"Bearer {TOKEN.upper()}",
        "Bearer \xfc",
    ],
)
@pytest.mark.parametrize("path", ["/stream", "/picture/run-3", "/whatever"])
def test_another_user_of_the_machine_learns_nothing_without_the_token(path: str, shown: str | None):
    source = Shown()
    headers = {"host": "localhost:1"} | ({} if shown is None else {"authorization": shown})
    answer = ask(path, headers, shown=source)
    assert answer.status == 401 and SECRET.encode() not in answer.body and source.asked == []


def test_a_token_in_the_address_is_no_token():
    assert ask("/stream?token=" + TOKEN, {"host": "localhost"}).status == 401


def test_two_tokens_count_as_none():
    pairs = [("host", "localhost"), ("authorization", f"Bearer {TOKEN}"), ("authorization", "Bearer x")]
    assert ask(headers=pairs).status == 401


@pytest.mark.parametrize("path", ["/", "/live.js"])
def test_the_empty_page_is_given_to_everybody_and_holds_no_figure(path: str):
    answer = ask(path, {"host": "127.0.0.1:99"})
    assert answer.status == 200 and SECRET.encode() not in answer.body


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8123", "127.0.0.1.evil.example", "localhost.evil.example:80", "127.0.0.2"),
        *("", "0.0.0.0:8123", "[::]:8123", "127.0.0.1:x", "user@127.0.0.1", "2130706433", "127.1", "localhost.", "::1"),
    ],
)
@pytest.mark.parametrize("path", ["/", "/stream"])
def test_a_name_that_was_bound_to_this_machine_from_outside_gets_nothing(path: str, host: str):
    assert ask(path, GOOD | {"host": host}).status == 421


def test_a_request_without_a_host_or_with_two_gets_nothing():
    assert ask(headers={"authorization": GOOD["authorization"]}).status == 421
    assert ask(headers=[*GOOD.items(), ("host", "127.0.0.1:8123")]).status == 421


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9", "127.0.0.1", "[::1]:8123"])
def test_this_machine_may_be_called_by_its_names_at_any_port(host: str):
    assert ask("/", {"host": host}).status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "get", "CONNECT"])
@pytest.mark.parametrize("path", ["/", "/stream"])
def test_nothing_but_reading_is_answered(path: str, method: str):
    assert ask(path, method=method).status == 405


@pytest.mark.parametrize("more", [{"content-length": "1"}, {"content-length": "x"}, {"transfer-encoding": "chunked"}])
def test_a_body_is_not_taken(more: dict[str, str]):
    assert ask(headers=GOOD | more).status == 413


@pytest.mark.parametrize(
    "path",
    [
        *("/picture/../page.token", "/picture//etc/passwd", "/picture/%2e%2e/x", "/picture/run-3/", "/picture/"),
        *("/page.token", "/../page.token", "//stream", "/stream/", "/Stream", "/live.js/..", "/picture/run-3\x00"),
    ],
)
def test_no_path_leads_out_of_what_is_named(path: str):
    assert ask(path).status == 404


def test_a_picture_that_the_page_has_named_is_given():
    answer = ask("/picture/run-3")
    assert (answer.status, answer.headers["content-type"], answer.body) == (200, "image/png", b"\x89PNG")


@pytest.mark.parametrize(("path", "status"), [("/", 200), ("/stream", 200), ("/picture/run-3", 200), ("/nothing", 404)])
def test_every_answer_forbids_other_origins_scripts_frames_and_storing(path: str, status: int):
    answer = ask(path, GOOD | {"origin": "http://evil.example"})
    assert answer.status == status
    assert not [name for name in answer.headers if name.startswith("access-control")]
    policy = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'" and policy["require-trusted-types-for"] == "'script'"
    assert not any("unsafe" in rule or "*" in rule or "data:" in rule for rule in policy.values())
    expected = {"cache-control": "no-store", "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
    assert expected.items() <= answer.headers.items()


def test_only_so_many_windows_are_fed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(application, "MOST_STREAMS", 2)

    async def run() -> list[int]:
        page, states = Application(Shown(), TOKEN), []
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/stream",
            "headers": [(name.encode(), value.encode()) for name, value in GOOD.items()],
        }
        leave = asyncio.Event()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                states.append(message["status"])

        async def receive() -> Any:
            await leave.wait()
            return {"type": "http.disconnect"}

        async def window() -> None:
            await page(scope, receive, send)

        open_windows = [asyncio.ensure_future(window()) for _ in range(2)]
        while len(states) < 2:
            await asyncio.sleep(0)
        await window()
        leave.set()
        await asyncio.gather(*open_windows)
        await window()  # there is room again
        return states

    assert asyncio.run(run()) == [200, 200, 503, 200]


def test_tokens_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch):
    compared: list[tuple[bytes, bytes]] = []
    monkeypatch.setattr(application.hmac, "compare_digest", lambda *both: compared.append(both) or False)
    assert ask(headers=GOOD).status == 401
    assert ask(headers={"host": "localhost", "authorization": f"Basic {TOKEN}"}).status == 401
    assert compared == [(TOKEN.encode(), TOKEN.encode())] * 2
