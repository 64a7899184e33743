import io
from pathlib import Path

import pytest

from deploy.alerts import setup
from deploy.alerts.setup import change_alerts, in_words
from deploy.alerts.webhook import WebhookError, read_webhook
from deploy.errors import ProvisionError

URL = "https://hooks.example/services/secret"


def change(home: Path, to: str = "", proxy: str = "", *, off: bool = False, test: bool = False) -> dict[str, object]:
    return change_alerts(home, "coordinator", to, proxy, off=off, test=test)


def test_a_webhook_is_set_up_shown_without_its_path_and_taken_away(tmp_path: Path, monkeypatch):
    assert "nowhere" in in_words(change(tmp_path))
    facts = change(tmp_path, URL, "http://proxy:3128")
    assert facts == {"host": "hooks.example", "proxy": "http://proxy:3128", "tested": None}
    assert in_words(facts) == "alerts go to hooks.example through http://proxy:3128 while `start` runs"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{URL}/2\n"))
    change(tmp_path, "-")
    found = read_webhook(tmp_path)
    assert found is not None and (found.url, found.proxy) == (f"{URL}/2", "") and found.since > 1e9
    assert change(tmp_path, off=True)["host"] is None and read_webhook(tmp_path) is None


def test_a_test_message_says_what_came_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ProvisionError, match="no webhook to test"):
        change(tmp_path, test=True)
    bodies = []
    monkeypatch.setattr(setup, "post", lambda _webhook, body: bodies.append(body) or 204)
    assert "status 204" in in_words(change(tmp_path, URL, test=True))
    assert bodies[0]["text"] == "maskfed coordinator: this is a test: alerts arrive" and bodies[0]["kind"] == "test"

    def fails(_webhook: object, _body: object) -> int:
        raise WebhookError("hooks.example answered 403")

    monkeypatch.setattr(setup, "post", fails)
    with pytest.raises(ProvisionError, match=r"^the test did not arrive: hooks.example answered 403"):
        change(tmp_path, test=True)


@pytest.mark.parametrize(
    "options",
    [{"off": True, "to": URL}, {"off": True, "test": True}, {"proxy": "http://proxy:1"}, {"to": "http://x.y/"}],
)
def test_what_contradicts_itself_changes_nothing(options, tmp_path: Path):
    change(tmp_path, URL)
    with pytest.raises(ProvisionError):
        change(tmp_path, **options)
    found = read_webhook(tmp_path)
    assert found is not None and found.url == URL
