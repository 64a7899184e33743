"""The page tells of what waits what `approve list` tells, worked out by that command, once for each state of things."""

import json
import sys
from pathlib import Path

import pytest

from client.live.decisions import Decisions
from client.live.site_page import SitePage, page
from client.offers.waiting import told
from client.policy.approval import keep_pending
from client.settings import save_settings
from shared.messages.training import experiment_digest
from tests.client.conftest import DP, MakeSite, experiment

ASKED = experiment(privacy=DP)
FACTS = {
    "number": 1,
    "digest": experiment_digest(ASKED),
    "run": "first",
    "asked": "2026-01-02 03:04",
    "recipe": "private",
    "differences": ["model.size = 'T', there 'S'"],
    "in_words": ["experiment abc", "3 rounds of 2 steps", "epsilon of this plan alone: 1.5"],
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file with a line for each time that the command has run; it prints what stands in `answer`."""
    (tmp_path / "answer").write_text(json.dumps({"waiting": [FACTS]}))
    code = (
        "import pathlib, sys\nplace = pathlib.Path(sys.argv[1])\nwith (place / 'calls').open('a') as file:\n"
        " file.write(' '.join(sys.argv[2:]) + '\\n')\nprint((place / 'answer').read_text())\n"
    )
    monkeypatch.setattr(Decisions, "command", (sys.executable, "-I", "-c", code, str(tmp_path)))
    return tmp_path / "calls"


def shown(site: SitePage) -> list[str] | None:
    """The lines about the decision once its process has ended; None without one."""
    site.read()
    if running := site._decisions._running:
        running[0].wait(timeout=60)
    found = [part for part in site.read() if part["id"].startswith("decision-")]
    return [line for line, _ in found[0]["lines"]] if found else None


def test_page_and_command_tell_the_same_of_a_decision(make_site: MakeSite, calls: Path):
    home, _ = make_site()
    site = page(home.path)
    assert shown(site) is None
    assert not calls.exists(), "nothing waits, nothing is worked out"
    keep_pending(home, ASKED, "first")
    assert shown(site) == told(FACTS)
    assert told(FACTS) == [
        "asked for by run 'first' on 2026-01-02 03:04 UTC",
        "3 rounds of 2 steps",
        "epsilon of this plan alone: 1.5",
        "recipe private, but for 1 field:",
        "  model.size = 'T', there 'S'",
    ]
    assert calls.read_text() == f"--home {home.path}\n"


def test_it_is_worked_out_anew_when_something_has_changed_and_only_then(make_site: MakeSite, calls: Path):
    home, settings = make_site()
    keep_pending(home, ASKED, "first")
    site = page(home.path)
    for _ in range(3):
        shown(site)
    assert len(calls.read_text().splitlines()) == 1
    policy = settings.policy.model_copy(update={"epsilon_cap": 123.5})
    save_settings(home, settings.model_copy(update={"policy": policy}))
    shown(site)
    assert len(calls.read_text().splitlines()) == 2


@pytest.mark.parametrize("answer", ["", "[]", "{", '{"waiting": [{}]}', '{"waiting": []}'])
def test_without_an_answer_the_page_names_the_command(make_site: MakeSite, calls: Path, answer: str):
    (calls.parent / "answer").write_text(answer)
    home, _ = make_site()
    keep_pending(home, ASKED, "first")
    site = page(home.path)
    assert shown(site) == []
    part = next(part for part in site.read() if part["id"].startswith("decision-"))
    assert "`maskfed-client approve list` tells the same" in part["empty"]
    assert len(calls.read_text().splitlines()) == 1, "not tried again and again"


def test_a_process_that_does_not_end_is_ended(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch):
    home, _ = make_site()
    monkeypatch.setattr(Decisions, "command", (sys.executable, "-I", "-c", "import time; time.sleep(600)"))
    monkeypatch.setattr("client.live.decisions.PATIENCE_SECONDS", 0.0)
    keep_pending(home, ASKED, "first")
    site = page(home.path)
    site.read()
    running = site._decisions._running
    assert running is not None
    site.read()
    assert running[0].poll() is not None
    assert site._decisions._running is None


def test_a_machine_that_starts_no_process_shows_the_rest(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch):
    home, _ = make_site()
    monkeypatch.setattr(Decisions, "command", ("/no/such/program",))
    keep_pending(home, ASKED, "first")
    assert shown(page(home.path)) == []
