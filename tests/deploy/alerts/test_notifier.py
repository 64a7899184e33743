"""Each thing is sent once, over restarts; a receiver that is away holds up nothing and loses nothing."""

import logging
import threading
import time
from pathlib import Path

import pytest

from deploy.alerts import notifier
from deploy.alerts.notifier import MOST_AT_ONCE, SENT_FILE, Notifier, notifying
from deploy.alerts.webhook import Webhook, WebhookError, write_webhook

Things = list[tuple[str, str, str]]


@pytest.fixture
def posted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts that were posted."""
    texts: list[str] = []
    monkeypatch.setattr(notifier, "post", lambda _webhook, body: texts.append(body["text"]))
    return texts


def home_with_webhook(path: Path) -> Path:
    write_webhook(path, Webhook("https://hooks.example/secret", "", 5.0))
    return path


def test_each_thing_is_told_once_even_after_a_restart(tmp_path: Path, posted: list[str]):
    home, things, asked = home_with_webhook(tmp_path), [("lost", "lost a", "site a was lost")], []

    def source(since: float) -> Things:
        asked.append(since)
        return list(things)

    first = Notifier(home, "coordinator", [source])
    assert (first.look(), first.look()) == (1, 0)
    things.append(("cap", "cap b", "site b is near its cap"))
    assert Notifier(home, "coordinator", [source]).look() == 1
    assert posted == ["maskfed coordinator: site a was lost", "maskfed coordinator: site b is near its cap"]
    assert set(asked) == {5.0}


def test_without_a_webhook_nothing_is_asked_or_sent(tmp_path: Path, posted: list[str]):
    assert Notifier(tmp_path, "x", [lambda _since: pytest.fail("asked")]).look() == 0 and not posted


def test_what_could_not_be_sent_is_sent_later_and_told_once(tmp_path, monkeypatch, caplog):
    home, is_away, texts = home_with_webhook(tmp_path), True, []

    def post(_webhook: object, body: dict[str, str]) -> None:
        if is_away:
            raise WebhookError("hooks.example answered 500")
        texts.append(body["text"])

    monkeypatch.setattr(notifier, "post", post)
    looks = Notifier(home, "x", [lambda _since: [("lost", "1", "one")]])
    assert (looks.look(), looks.look(), texts) == (0, 0, [])
    is_away = False
    assert looks.look() == 1 and texts == ["maskfed x: one"]
    assert [each.message for each in caplog.records] == ["alerts: hooks.example answered 500; it is tried again"]


def test_many_things_at_once_are_a_few_messages(tmp_path: Path, posted: list[str]):
    many = [("lost", str(number), f"thing {number}") for number in range(MOST_AT_ONCE + 37)]
    looks = Notifier(home_with_webhook(tmp_path), "x", [lambda _since: many])
    looks.look()
    assert len(posted) == MOST_AT_ONCE + 1 and posted[-1].startswith("maskfed x: and 37 more")
    assert looks.look() == 0


def test_a_source_that_fails_and_a_damaged_memory_end_nothing(tmp_path: Path, posted: list[str], caplog):
    home = home_with_webhook(tmp_path)
    (home / SENT_FILE).write_text("[" * 5000)

    def broken(_since: float) -> Things:
        raise KeyError("a secret in a damaged log")

    assert Notifier(home, "x", [broken]).look() == 0
    assert "secret" not in caplog.text and "KeyError" in caplog.text
    assert Notifier(home, "x", [lambda _since: [("lost", "1", "one")]]).look() == 1 and posted == ["maskfed x: one"]


def test_a_receiver_that_never_answers_holds_up_nobody(tmp_path, monkeypatch):
    is_posting, is_over = threading.Event(), threading.Event()

    def post(_webhook: object, _body: object) -> None:
        is_posting.set()
        is_over.wait(30)

    monkeypatch.setattr(notifier, "post", post)
    monkeypatch.setattr(logging, "raiseExceptions", False)
    with notifying(home_with_webhook(tmp_path), "x", [lambda _since: [("lost", "1", "one")]]):
        assert is_posting.wait(10)
        begun = time.monotonic()
    assert time.monotonic() - begun < 10 and not is_over.is_set()
    is_over.set()
