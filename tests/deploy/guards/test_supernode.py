"""The SuperNode's way to the coordinator: Flower's own client, with our certificate and proxy."""

import inspect
import ssl
import textwrap
from pathlib import Path

import httpx
import pytest
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supernode.fleet_http_client import FleetHttpClient

from deploy.guards.supernode import look_often, loop, main, show_certificate
from deploy.guards.web.calls import News, Pauses


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
    with FleetHttpClient.from_server_address("fleet.example:443", False, None, []):
        assert made[-1]["verify"] is context
        assert made[-1]["proxy"] == (proxy or None)
        assert made[-1]["trust_env"] is False
        assert made[-1]["follow_redirects"] is False


def test_flowers_loop_looks_again_as_soon_as_something_has_come_or_gone(monkeypatch: pytest.MonkeyPatch):
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
    monkeypatch.setattr(loop, "time", loop.time)
    tasks = News()
    look_often(Noted(), tasks)
    source = inspect.getsource(loop)
    assert source.count("time.sleep(") == source.count("time.sleep(3)") + source.count("time.sleep(0.5)") == 3
    loop_of = source[source.index("while True:\n            run_id = _pull_and_store_message(") :]
    body = textwrap.dedent(" " * 8 + loop_of[: loop_of.index("\n\ndef ")])
    names = ("state", "store", "node_config", "receive", "get_run", "get_fab", "pull_object", "push_object", "send",
             "confirm_message_received", "trusted_entities")  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        exec(body, vars(loop) | dict.fromkeys(names))
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
