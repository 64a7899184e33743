"""The SuperNode's way to the coordinator: Flower's own client, with our certificate and proxy."""

import inspect
import math
import ssl
import textwrap
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

from deploy.guards import supernode
from deploy.guards.supernode import LOOK_SECONDS, MessageWait, look_often, loop, main, show_certificate
from deploy.guards.web.calls import News, Pauses
from deploy.guards.web.held_questions import HELD_SECONDS, WAITING
from deploy.guards.web.http_client import HttpClient


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """What each of Flower's clients made its HTTP client with, ours last."""
    options: list[dict[str, object]] = []
    create = httpx.Client.__init__

    def note(self: httpx.Client, **given: object) -> None:
        options.append(given)
        create(self, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(httpx.Client, "__init__", note)
    monkeypatch.setattr(ProtobufClient, "__init__", ProtobufClient.__init__)  # undone with the test
    return options


@pytest.mark.parametrize("proxy", ["", "http://127.0.0.1:3128"])
def test_flowers_fleet_client_shows_the_certificate_and_takes_the_sites_proxy_only(
    made: list[dict[str, object]], proxy: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    context = ssl.create_default_context()
    show_certificate(context, proxy)
    with FleetHttpClient.from_server_address("fleet.example:443", False, None, []) as client:
        if proxy:
            assert (made[-1]["verify"], made[-1]["proxy"]) == (context, proxy)
            assert made[-1]["trust_env"] is False
            assert made[-1]["follow_redirects"] is False
        else:
            assert isinstance(client._client, HttpClient)
            assert client._client._connections._context is context


def run_loop(**given: object) -> None:
    """Flower's own loop, until something in it raises."""
    source = inspect.getsource(loop)
    assert source.count("time.sleep(") == source.count("time.sleep(3)") + source.count("time.sleep(0.5)") == 3
    loop_of = source[source.index("while True:\n            run_id = _pull_and_store_message(") :]
    body = textwrap.dedent(" " * 8 + loop_of[: loop_of.index("\n\ndef ")])
    names = ("state", "store", "node_config", "receive", "get_run", "get_fab", "pull_object", "push_object", "send",
             "confirm_message_received", "trusted_entities")  # fmt: skip
    exec(body, vars(loop) | dict.fromkeys(names) | given)


@pytest.fixture
def own_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is put into Flower's loop is taken out with the test."""
    for name in ("_pull_and_store_message", "_push_messages", "push_object_contents_from_iterable", "time"):
        monkeypatch.setattr(loop, name, vars(loop)[name])


@pytest.fixture
def state() -> InMemoryNodeState:
    return InMemoryNodeState(InMemoryObjectStore())


class _Coordinator:
    """What a SuperNode hears when it asks for messages; each answer is (seconds it takes, message)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: tuple[float, str | None]) -> None:
        self.now, self._answers, self.asked = 1000.0, list(answers), list[str]()
        monkeypatch.setattr(supernode.time, "monotonic", lambda: self.now)

    def receive(self) -> str | None:
        request = httpx.Request("POST", "https://localhost")
        MessageWait.tell(request)
        self.asked.append("waits" if WAITING in request.headers else "looks")
        seconds, message = self._answers.pop(0)
        self.now += seconds
        return message


def test_a_supernode_waits_before_it_looks_for_messages(monkeypatch: pytest.MonkeyPatch):
    coordinator = _Coordinator(monkeypatch, (1.5, None), (0.01, "message"))
    assert MessageWait().before(coordinator.receive)() == "message"
    assert coordinator.asked == ["waits", "looks"]


def test_a_coordinator_that_holds_no_questions_loses_no_message(monkeypatch: pytest.MonkeyPatch):
    """An older one gives the message to whoever asks first."""
    coordinator = _Coordinator(monkeypatch, (0.01, "message"))
    assert MessageWait().before(coordinator.receive)() == "message"
    assert coordinator.asked == ["waits"]


def test_an_idle_supernode_looks_at_times_without_being_called(monkeypatch: pytest.MonkeyPatch):
    coordinator = _Coordinator(monkeypatch, *[(HELD_SECONDS, None)] * 20)
    receive = MessageWait().before(coordinator.receive)
    while coordinator.now < 1000 + LOOK_SECONDS + HELD_SECONDS:
        assert receive() is None
    assert coordinator.asked.count("looks") == 1
    assert coordinator.asked.count("waits") >= LOOK_SECONDS // HELD_SECONDS


def test_a_wait_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch):
    coordinator = _Coordinator(monkeypatch)
    with pytest.raises(IndexError):
        MessageWait().before(coordinator.receive)()
    request = httpx.Request("POST", "https://localhost")
    MessageWait.tell(request)
    assert WAITING not in request.headers


@pytest.mark.usefixtures("own_loop")
def test_flowers_loop_looks_again_as_soon_as_something_has_come_or_gone(
    monkeypatch: pytest.MonkeyPatch, state: InMemoryNodeState
):
    """The loop itself runs: a message, the wait for its answer, and nothing after it."""
    events: list[str] = []
    pulled = iter([7, None])

    def pull(**_: object) -> int | None:
        run_id = next(pulled, "end")
        if run_id == "end":
            raise KeyboardInterrupt
        return run_id  # type: ignore[return-value]

    class Noted(Pauses):
        def begin(self) -> None:
            events.append("begin")

        def sleep(self, longest_seconds: float) -> None:
            events.append(f"sleep {longest_seconds}")

    monkeypatch.setattr(loop, "_pull_and_store_message", pull)
    monkeypatch.setattr(loop, "_push_messages", lambda **_: events.append("pushed"))
    tasks = News()
    look_often(Noted(), tasks)
    with pytest.raises(KeyboardInterrupt):
        run_loop(state=state)
    assert events == ["begin", "pushed", "begin", "sleep 3"]
    assert tasks.count == 1


def test_a_supernode_without_its_certificate_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from deploy.identity.certificates import create_authority
    from deploy.identity.site_identity import create_identity

    create_identity(tmp_path / "site", "site-0")
    create_authority(tmp_path / "ca.key", tmp_path / "ca.crt")
    options = {
        "--superexec-auth-secret-file": tmp_path / "site" / "site.secret",
        "--root-certificates": tmp_path / "ca.crt",
        "--auth-supernode-private-key": tmp_path / "site" / "node.key",
    }
    monkeypatch.setattr("sys.argv", ["supernode", *(str(part) for pair in options.items() for part in pair)])
    with pytest.raises(SystemExit, match=r"does not start: .*node.crt"):
        main()


class _Store:
    """Of one answer in three parts, the second of which comes after some looks, or never."""

    def __init__(self, looks: float) -> None:
        self.tree = ObjectTree(object_id="head", children=[ObjectTree(object_id="first"), ObjectTree(object_id="body")])
        self._looks, self.deleted = looks, False

    def get_object_tree(self, _: str) -> ObjectTree:
        return self.tree

    def get(self, object_id: str) -> bytes:
        self._looks -= object_id == "body"
        return b"" if object_id == "body" and self._looks > 0 else object_id.encode()

    def delete(self, _: str) -> None:
        self.deleted = True


@pytest.mark.usefixtures("own_loop")
@pytest.mark.parametrize(("looks", "ends"), [(3, 0), (math.inf, 1)])
def test_an_answer_whose_process_freezes_in_the_middle_ends_the_supernode(
    looks: float, ends: int, monkeypatch: pytest.MonkeyPatch
):
    """Flower's own function runs: it would look for the second part for ever."""
    sent: list[str] = []
    ended: list[int] = []
    monkeypatch.setattr(supernode, "STALLED_SECONDS", 0.6)
    monkeypatch.setattr(supernode.os, "_exit", ended.append)
    look_often(Pauses(), News())
    metadata = SimpleNamespace(run_id=1, group_id="", message_type="train", message_id="m", reply_to_message_id="q")
    state = SimpleNamespace(
        get_messages_legacy=lambda **_: [SimpleNamespace(metadata=metadata)],
        get_message_processing_duration=lambda **_: 1.0,
        delete_messages=lambda **_: None,
    )
    store = _Store(looks)
    loop._push_messages(
        state=state,
        object_store=store,
        send=lambda *_: ({"head", "first", "body"}, "session"),
        push_object=lambda _run, _session, name, _content: sent.append(name),
    )
    assert len(ended) == ends
    assert sorted(sent) == (["first"] if ends else ["body", "first", "head"])
    assert store.deleted


@pytest.mark.usefixtures("own_loop")
def test_an_answer_too_many_does_not_hold_back_the_next_ones(monkeypatch: pytest.MonkeyPatch, state: InMemoryNodeState):
    """A message was given up while it was taken, yet its task answers: Flower's loop would stay one answer behind."""
    sent: list[str] = []
    answers = [
        SimpleNamespace(metadata=SimpleNamespace(message_id=f"a{number}", reply_to_message_id=f"q{number}", run_id=7))
        for number in range(3)
    ]
    # Of what is pulled, and of the answer that has come meanwhile.
    coming = iter([(None, 0), ("q1", None), (None, 1), (None, None), ("q2", 2), (None, None)])

    def pull(**_: object) -> int | None:
        question, answer = next(coming, ("end", None))
        if question == "end":
            raise KeyboardInterrupt
        if answer is not None:
            state.store_message(answers[answer])  # type: ignore[arg-type]
        return 7 if question else None

    def push(state: InMemoryNodeState, **_: object) -> None:
        """As Flower's: all that is there; where nothing is it would wait."""
        found = [each.metadata.message_id for each in state.get_messages_legacy(is_reply=True)]
        sent.append(" ".join(found) or "waits")
        state.delete_messages(message_ids=found)

    monkeypatch.setattr(loop, "_pull_and_store_message", pull)
    monkeypatch.setattr(loop, "_push_messages", push)
    look_often(Pauses(), News())
    monkeypatch.setattr(loop, "time", SimpleNamespace(sleep=lambda _: None))
    with pytest.raises(KeyboardInterrupt):
        run_loop(state=state)
    assert sent == ["a0", "waits", "a1", "a2"]
