import json
import subprocess
import sys
from pathlib import Path

import pytest

from client.live.decisions import Decisions
from client.live.site import page
from client.policy.approval import keep_pending
from client.policy.budget import reserve
from client.records.journal import Journal
from client.records.ledger import open_ledger
from client.records.spending import Charge, read_kept_total
from client.training.progress import told
from tests.client.conftest import DP, MakeSite, experiment


def charge(**changes):
    fields = {
        "dataset_id": "d",
        "fingerprint": "f",
        "task": "train",
        "run": "first",
        "server_round": 3,
        "request_digest": "x",
        "plan_digest": "p",
        "mechanism": "dp-sgd",
        "noise_multiplier": 1.0,
        "sample_rate": 0.2,
        "steps": 2,
        "unit": "image",
    }
    return Charge(**{**fields, **changes})


def steps_times(rate):
    """An accountant that a test can foresee: epsilon is `rate` per step."""
    return lambda history, _delta: rate * sum(each.steps for each in history)


def spend(home, settings, *charges, rate=1.5):
    with open_ledger(home.ledger, Path(settings.head_file)) as ledger:
        for each in charges:
            ledger.commit(reserve(ledger, each, settings.policy, steps_times(rate), home))


@pytest.fixture(autouse=True)
def nothing_is_worked_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits costs no processor time here; `test_decisions` has it."""
    monkeypatch.setattr(Decisions, "catch_up", lambda _: None)


def by_id(parts):
    return {part["id"]: part for part in parts}


def rows(part):
    return {
        name: value if isinstance(value, str) else value["text"] for name, value in (row[:2] for row in part["rows"])
    }


def test_what_is_asked_now_is_told_with_its_progress(make_site: MakeSite):
    home, settings = make_site()
    shown = page(home.path)
    assert rows(by_id(shown.read())["now"])["asked now"] == "nothing: it waits for requests"
    Journal(home.journal).write("request", task="train", run="first", server_round=3, request_digest="x")
    with told(home, "first", 3, 40) as tell:
        tell(10)
        now = by_id(shown.read())["now"]
    facts = rows(now)
    assert facts["asked now"] == "train a round, round 3" and facts["asked by"].startswith("run first of")
    assert facts["steps"] == "10 of 40" and facts["newest sign of life"].endswith("UTC")
    assert facts["coordinator"] == settings.address
    Journal(home.journal).write("request", task="train", run="first", server_round=4, request_digest="y")
    assert "steps" not in rows(by_id(shown.read())["now"])  # the file tells of another round


def test_spending_is_that_of_the_newest_charge_and_says_what_another_costs(make_site: MakeSite):
    home, settings = make_site()
    shown = page(home.path)
    assert rows(by_id(shown.read())["spent"])["epsilon spent"] == "nothing yet"
    spend(home, settings, charge())
    spent = by_id(shown.read())["spent"]
    assert rows(spent)["epsilon spent"] == "3.000 of 10 per image at delta 1e-05"
    assert spent["rows"][0][1]["share"] == 0.3
    assert rows(spent)["after one more like the last"] == "6.000 (+3.000)"
    spend(home, settings, charge(server_round=4, steps=4))
    assert "15.000: BEYOND THE CAP" in rows(by_id(shown.read())["spent"])["after one more like the last"]


def test_a_release_without_dp_is_unbounded_whatever_comes_after(make_site: MakeSite):
    home, settings = make_site()
    spend(home, settings, charge(mechanism="none", steps=0), charge(server_round=4))
    spent = rows(by_id(page(home.path).read())["spent"])
    assert spent["epsilon spent"].startswith("unbounded") and spent["epsilon of the part with DP"].startswith("3.000")


def test_a_total_is_not_shown_once_the_ledger_has_gone_on(make_site: MakeSite):
    home, settings = make_site()
    spend(home, settings, charge())
    with open_ledger(home.ledger, Path(settings.head_file)) as ledger:
        ledger.reserve(charge(server_round=5), cap=10.0, delta=1e-5, epsilon_of=steps_times(1.0))
    spent = rows(by_id(page(home.path).read())["spent"])
    assert spent["epsilon spent"] == "not known since the newest entry: `maskfed-client status` computes it"
    assert spent["never completed"] == "1: they count as spent"


@pytest.mark.parametrize("text", ["", "{}", '{"sequence": "x"}', "[" * 100_000])
def test_a_damaged_total_counts_as_none(make_site: MakeSite, text: str):
    home, settings = make_site()
    spend(home, settings, charge())
    home.spent.write_text(text)
    assert read_kept_total(home.spent) is None
    assert "not known" in rows(by_id(page(home.path).read())["spent"])["epsilon spent"]


def test_a_total_that_cannot_be_written_costs_no_round(make_site: MakeSite, caplog: pytest.LogCaptureFixture):
    home, settings = make_site()
    home.spent.mkdir()
    spend(home, settings, charge())
    assert "will not show this charge" in caplog.text


def test_every_number_that_left_stands_there(make_site: MakeSite):
    home, _ = make_site()
    journal = Journal(home.journal)
    journal.write("request", task="train", run="first", server_round=3, request_digest="x")
    numbers = ["update", "num_examples", "epsilon"]
    journal.write("release", request_digest="x", numbers=numbers, bytes=40_400_000, epsilon=1.5, is_unbounded=False)
    journal.write("request", task="train", run="plain", server_round=1, request_digest="y")
    journal.write("release", request_digest="y", numbers=["update"], bytes=10, epsilon=None, is_unbounded=True)
    newest, oldest = by_id(page(home.path).read())["releases"]["rows"]
    assert oldest[1:] == ["train a round, round 3 of run first", "update, num_examples, epsilon", "40.4 MB", "1.500"]
    assert newest[4] == {"text": "unbounded", "state": "failed"}


def test_an_experiment_that_waits_is_shown_with_who_asked(make_site: MakeSite):
    home, _ = make_site()
    shown = page(home.path)
    assert "waiting" not in by_id(shown.read())
    keep_pending(home, experiment(privacy=DP), "first")
    ((number, run, _, what, dp, digest),) = by_id(shown.read())["waiting"]["rows"]
    assert (number, run, dp, len(digest)) == ("1", "first", "DP-SGD per image: sigma 1, q 0.2", 12)
    assert what == "3 rounds of 2 steps, model T at 16 px"


def test_hostile_names_stay_one_printable_line(make_site: MakeSite):
    home, _ = make_site()
    hostile = "<script>alert(1)</script>\u202e\n\x1b[2J" + "x" * 3000
    journal = Journal(home.journal)
    journal.write("request", task="train", run=hostile, server_round=1, request_digest="x")
    journal.write("refusal", code="policy", reason=hostile, request_digest="x")
    everything = json.dumps(page(home.path).read(), ensure_ascii=False)
    assert "\u202e" not in everything and "\\u001b" not in everything and "x" * 500 not in everything


def test_a_damaged_journal_is_told_in_one_line(make_site: MakeSite):
    home, _ = make_site()
    Journal(home.journal).write("approval", what="code", digest="ab")
    home.journal.write_bytes(home.journal.read_bytes().replace(b"code", b"mode", 1))
    parts = by_id(page(home.path).read())
    assert "journal.jsonl: line" in parts["damaged"]["lines"][0][0]


def test_the_page_holds_no_lock_changes_no_file_and_loads_no_torch(make_site: MakeSite):
    home, settings = make_site()
    spend(home, settings, charge())
    keep_pending(home, experiment(privacy=DP), "first")
    before = {path: path.stat().st_mtime_ns for path in home.path.rglob("*")}
    code = (
        "import sys, fcntl\nfrom pathlib import Path\n"
        "def refuse(*_): raise AssertionError('a lock')\nfcntl.flock = fcntl.lockf = refuse\n"
        "from client.live.decisions import Decisions\nDecisions.catch_up = lambda _: None\n"
        "from client.live.site import page\nparts = page(Path(sys.argv[1])).read()\nassert len(parts) > 4\n"
        "assert not {'torch', 'opacus'} & sys.modules.keys()\n"
    )
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", code, str(home.path)], check=True, cwd=root, timeout=60)
    assert {path: path.stat().st_mtime_ns for path in home.path.rglob("*")} == before
