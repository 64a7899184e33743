"""The guard before Flower's application: callers are known, and bodies bounded, before anything is read."""

import asyncio
import subprocess
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

from deploy.guards.web.asgi import ADMITTED, FLEET_BYTES, OBJECT_BYTES, PUSH_OBJECT, Guard, HttpRefusal
from deploy.guards.web.calls import HEADER

VALUE = "5" * 64
ROOT = Path(__file__).parents[4]


class Nodes:
    """Node 7 comes with a ticket; what it pushes is kept."""

    def __init__(self) -> None:
        self.pushed: list[bytes] = []

    def authenticate(self, headers: dict[str, str]) -> int:
        if headers.get("ticket") != "7":
            raise HttpRefusal(401, "no ticket")
        return 7

    def check_push(self, node_id: int, path: str, body: bytes) -> None:
        self.pushed.append(body)
        if body == b"bad":
            raise HttpRefusal(403, "not allowed")


class Caller:
    """Sends requests to a guard around an application that echoes; counts how much of a body was read."""

    def __init__(self, nodes: Nodes | None) -> None:
        self.seen: list[bytes] = []
        self.reads = 0
        self.is_known = False
        self.guard = Guard(self.echo, VALUE, nodes)

    async def echo(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        self.seen.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def call(self, path: str, headers: dict[str, str] | list[tuple[str, str]] | None = None, *, body: bytes = b"",
             parts: int = 1, method: str = "POST", kind: str = "http") -> int:  # fmt: skip
        pairs = list(headers.items()) if isinstance(headers, dict) else headers or []
        encoded = [(name.encode(), value.encode()) for name, value in pairs]
        scope = {"type": kind, "path": path, "method": method, "headers": encoded}
        pieces, sent = [body] * parts, []

        async def receive() -> MutableMapping[str, Any]:
            self.reads += 1
            return {"type": "http.request", "body": pieces.pop(), "more_body": bool(pieces)}

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message)

        asyncio.run(self.guard(scope, receive, send))
        self.is_known = ADMITTED in scope
        return int(sent[0]["status"]) if sent else 0


@pytest.fixture
def caller() -> Caller:
    return Caller(Nodes())


@pytest.mark.parametrize("headers", [{}, {HEADER: ""}, {HEADER: "4" * 64}, {HEADER: VALUE + "0"}, {HEADER: "é"}])
@pytest.mark.parametrize("api", ["/v1/control/", "/v1/runtime/"])
def test_no_control_or_runtime_path_of_flower_answers_a_stranger(caller: Caller, api: str, headers: dict[str, str]):
    paths = [path for _, path in PROTOBUF_REQUEST_TYPES if path.startswith(api)]
    assert len(paths) > 10
    assert {caller.call(path, headers, body=b"x") for path in paths} == {401}
    assert (caller.reads, caller.seen) == (0, [])


def test_our_own_processes_are_let_in_with_their_body(caller: Caller):
    assert caller.call("/v1/control/start-run", {HEADER: VALUE}, body=b"bundle", parts=2) == 200
    assert caller.seen == [b"bundlebundle"]


def test_whose_call_is_let_in_is_marked_for_who_watches_the_connection(caller: Caller):
    """A refused body is that of a known caller, too; health is open to all and keeps nobody's connection."""
    known = {"ticket": "7"}
    calls = [("/v1/control/x", {HEADER: VALUE}), ("/v1/fleet/get-run", known), ("/v1/fleet/get-run", {}), ("/x", known)]
    assert [(caller.call(path, headers), caller.is_known) for path, headers in calls] == [
        (200, True), (200, True), (401, False), (404, False),
    ]  # fmt: skip
    assert (caller.call(PUSH_OBJECT, known, body=b"bad"), caller.is_known) == (403, True)
    assert (caller.call("/health", {HEADER: VALUE}, method="GET"), caller.is_known) == (200, False)


def test_a_header_that_is_given_twice_is_none(caller: Caller):
    assert caller.call("/v1/control/list-nodes", [(HEADER, "x"), (HEADER, VALUE)]) == 401


def test_every_fleet_path_that_flower_has_is_known_or_closed(caller: Caller):
    flowers = {path for _, path in PROTOBUF_REQUEST_TYPES if path.startswith("/v1/fleet/")}
    assert flowers - set(FLEET_BYTES) == {"/v1/fleet/register-node", "/v1/fleet/unregister-node"}
    assert set(FLEET_BYTES) < flowers
    for path in flowers - set(FLEET_BYTES):
        assert caller.call(path, {"ticket": "7"}) == 404


def test_a_stranger_on_a_fleet_path_is_refused_before_the_body_is_read(caller: Caller):
    assert {caller.call(path, body=bytes(8_000_000)) for path in FLEET_BYTES} == {401}
    assert caller.reads == 0


def test_each_path_has_its_limit_and_takes_exactly_that(caller: Caller):
    for path, limit in FLEET_BYTES.items():
        assert caller.call(path, {"ticket": "7"}, body=bytes(limit)) == 200
        assert caller.call(path, {"ticket": "7"}, body=bytes(limit + 1)) == 413
        before = caller.reads
        assert caller.call(path, {"ticket": "7", "content-length": str(limit + 1)}, body=b"") == 413
        assert caller.reads == before
    assert OBJECT_BYTES == FLEET_BYTES[PUSH_OBJECT] > 5 * 2**20


def test_a_body_without_a_length_is_counted_as_it_comes(caller: Caller):
    assert caller.call("/v1/fleet/get-run", {"ticket": "7"}, body=bytes(1000), parts=1000) == 413
    assert caller.reads == 5


@pytest.mark.parametrize("length", ["-1", "1e3", "²", "9" * 400, "4 4"])
def test_a_length_that_is_no_number_is_refused(caller: Caller, length: str):
    assert caller.call("/v1/fleet/get-run", {"ticket": "7", "content-length": length}) == 413


def test_a_push_that_is_not_allowed_never_reaches_flower(caller: Caller):
    assert caller.call(PUSH_OBJECT, {"ticket": "7"}, body=b"bad") == 403
    assert caller.call(PUSH_OBJECT, {"ticket": "7"}, body=b"good") == 200
    assert caller.seen == [b"good"]


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/v1/fleet", "/v1/fleet/get-run/", "/v2/control/x"])
def test_what_is_not_needed_does_not_exist(caller: Caller, path: str):
    assert caller.call(path, {"ticket": "7", HEADER: VALUE}) == 404


def test_health_is_open_and_takes_no_body(caller: Caller):
    assert caller.call("/health", method="GET") == 200
    assert caller.call("/health", method="GET", body=b"x") == 413
    assert caller.call("/health", method="POST") == 404


def test_a_web_socket_gets_nothing(caller: Caller):
    assert caller.call("/v1/control/start-run", {HEADER: VALUE}, kind="websocket") == 0
    assert caller.seen == []


def test_a_site_has_no_fleet_paths():
    caller = Caller(None)
    assert {caller.call(path, {"ticket": "7", HEADER: VALUE}) for path in FLEET_BYTES} == {404}
    assert caller.call("/v1/runtime/acquire-task", {HEADER: VALUE}) == 200


HOARDER = """
import asyncio, resource, sys
from deploy.guards.web.asgi import Guard

kept = []

async def hoard(scope, receive, send):
    kept.append(bytearray(int(scope["query_string"])))
    await send({"type": "http.response.start", "status": 200, "headers": []})

async def receive():
    return {"type": "http.request", "body": b"", "more_body": False}

async def send(message):
    print(message["status"], flush=True)

def call(num_bytes):
    headers = [(b"content-length", b"0")]
    scope = {"type": "http", "path": "/health", "method": "GET", "headers": headers, "query_string": str(num_bytes)}
    try:
        asyncio.run(guard(scope, receive, send))
    except MemoryError:
        print("refused", flush=True)

guard = Guard(hoard, "value")
call(0)
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**27, -1))
call(2**30)
for _ in range(100):
    call(2**22)
"""


def test_a_process_whose_memory_is_used_up_ends_in_one_line_and_one_call_that_asks_for_too_much_does_not_end_it():
    """By the kernel's own limit: a gigabyte is refused, and calls go on; hoarded memory is the end."""
    done = subprocess.run([sys.executable, "-c", HOARDER], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1
    assert done.stdout.splitlines()[:3] == ["200", "refused", "200"]
    assert 3 < len(done.stdout.splitlines()) < 60
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "MASKFED_PARAMETERS" in line
