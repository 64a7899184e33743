import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from server.federation.fleet.online import note_online
from server.federation.fleet.superlink_types import Node
from server.live.coordinator_page import MOST_RUNS, page
from server.runs.run_directory import create
from shared.experiment.config import parse_experiment
from shared.storage.runlog import RunLog
from tests.server.live.test_figures import write_round

EXPERIMENT = "[federation]\nrounds = 9\n"


@pytest.fixture
def home(tmp_path):
    """Two sites, a run that goes on in its third round."""
    (tmp_path / "coordinator.toml").write_text('address = "fleet.example:443"\n')
    names = {"north": "a", "south": "b"}
    sites = [
        {"alias": name, "public_key": f"ssh {key}", "signing_key": key * 64, "added": "2026-11-01T00:00:00+00:00"}
        for name, key in names.items()
    ]
    (tmp_path / "sites.json").write_text(json.dumps({"sites": sites}))
    (tmp_path / "wanted.json").write_text(json.dumps({"runs": [{"run": "first", "run_id": 1, "status": "running"}]}))
    run = create(tmp_path / "runs" / "first", parse_experiment(EXPERIMENT))
    log = RunLog(run.metrics)
    log.write("start", round=0)
    spent = {"epsilon": 6.0, "epsilon_cap": 8.0, "delta": 1e-5, "unit": "person"}
    write_round(log, 1, {"north": "answered", "south": "answered"}, scalars={"loss": 0.5}, **spent)
    write_round(log, 2, {"north": "answered", "south": "refused"}, scalars={"loss": 0.4}, **spent)
    state = {"round": 3, "stage": "training", "sites": {"north": "answered", "south": "requeued"}, "since": 1e9}
    run.progress.write_text(json.dumps({**state, "answers": {"north": {"seconds": 31.0, "bytes": 40_000_000}}}))
    run.samples.mkdir(exist_ok=True)
    (run.samples / "round-000002.png").write_bytes(b"\x89PNG")
    return tmp_path


def by_id(parts):
    return {part["id"]: part for part in parts}


def texts(part):
    return [[each if isinstance(each, str) else each["text"] for each in row] for row in part["rows"]]


def test_the_page_tells_sites_runs_and_the_running_round(home):
    note_online(home, [Node(1, "north", "online", b""), Node(2, "south", "offline", b"")], time.time())
    parts = by_id(page(home).read())
    assert parts["title"]["title"] == "Coordinator fleet.example:443"
    assert ["sites online", "1 of 2"] in parts["now"]["rows"]
    north, south = texts(parts["sites"])
    assert (north[0], north[1], north[4], north[5]) == ("north", "online", "2 of 2, 0 refused", "6 of 8 per person")
    assert parts["sites"]["rows"][0][5]["share"] == 0.75
    assert (south[1], south[6]) == ("offline", "refused: why refused")
    assert texts(parts["runs"]) == [["first", "running", "2 of 9", "–", ""]]
    assert texts(parts["run-first-running"]) == [
        ["north", "answered", "31.0 s", "40 MB"],
        ["south", "lost, will be asked again", "–", "–"],
    ]
    assert parts["run-first-loss"]["series"] == [{"name": "loss", "points": [[1.0, 0.5], [2.0, 0.4]]}]
    assert parts["run-first-epsilon"]["limits"] == [{"name": "cap 8", "value": 8.0}]


def test_what_was_noted_long_ago_says_nothing_of_now(home):
    note_online(home, [Node(1, "north", "online", b"")], time.time() - 3600)
    assert ["sites online", "not known: nothing noted lately"] in by_id(page(home).read())["now"]["rows"]


def test_since_when_a_site_is_online_stays_and_changes_with_its_state(home):
    from server.federation.fleet.online import read_online

    for now, status in ((100.0, "online"), (200.0, "online"), (300.0, "offline"), (400.0, "offline")):
        note_online(home, [Node(1, "north", status, b""), Node(9, "gone", "unregistered", b"")], now)
        expected = {"is_online": status == "online", "since": 100.0 if status == "online" else 300.0}
        assert read_online(home) == {"noted": now, "sites": {"north": expected}}


@pytest.mark.parametrize("text", ["", "[]", "{", '{"noted": "x", "sites": {}}', '{"noted": 1}'])
def test_a_damaged_note_of_who_is_online_counts_as_none(home, text):
    from server.federation.fleet.online import ONLINE_FILE, read_online

    (home / ONLINE_FILE).parent.mkdir()
    (home / ONLINE_FILE).write_text(text)
    assert read_online(home) == {"noted": 0.0, "sites": {}}


def test_only_pictures_that_the_page_has_named_are_given(home):
    shown = page(home)
    assert shown.picture("first.2") is None  # nothing was named yet
    (named,) = by_id(shown.read())["run-first-pictures"]["pictures"]
    assert shown.picture(named["name"]) == b"\x89PNG"
    (home / "secret.png").write_bytes(b"secret")
    for name in ("../../secret.png", "/etc/passwd", "first.2/../../..", "", "first.3", "first.2\x00"):
        assert shown.picture(name) is None


def test_hostile_texts_stay_one_printable_line(home):
    log = RunLog(home / "runs" / "first" / "metrics.jsonl")
    hostile = "<img src=x onerror=alert(1)>\u202egnp.exe\n\x1b[2J" + "x" * 5000
    write_round(log, 3, {"north": "refused", hostile: "refused"})
    parts = page(home).read()
    told = [line for line, _ in by_id(parts)["run-first-problems"]["lines"]]
    assert any(line.startswith("round 3: <img src=x onerror=alert(1)> gnp.exe  [2J") for line in told)
    everything = json.dumps(parts, ensure_ascii=False)
    assert "\u202e" not in everything and "\\u001b" not in everything and "x" * 500 not in everything


def test_a_damaged_registry_or_list_of_runs_is_told_and_the_rest_shown(home):
    note_online(home, [Node(1, "north", "online", b"")], time.time())
    (home / "sites.json").write_text("{")
    (home / "wanted.json").write_text("[1]")
    parts = by_id(page(home).read())
    assert "sites.json" in parts["sites"]["lines"][0][0] and "wanted.json" in parts["damaged"]["lines"][0][0]
    assert "run-first-rounds" in parts


def test_an_empty_home_has_a_page(tmp_path):
    parts = by_id(page(tmp_path).read())
    assert parts["sites"]["rows"] == parts["runs"]["rows"] == []


def test_many_runs_are_followed_up_to_a_number(home):
    for number in range(MOST_RUNS + 5):
        create(home / "runs" / f"run-{number}", parse_experiment(EXPERIMENT))
    shown = page(home)
    shown.read()
    assert len(shown._runs) == MOST_RUNS


def test_a_page_of_a_hundred_sites_and_two_thousand_rounds_is_bounded(home):
    log = RunLog(home / "runs" / "first" / "metrics.jsonl")
    sites = [f"site-{number:03d}" for number in range(100)]
    for number in (3, 4, 2000):
        write_round(log, number, dict.fromkeys(sites, "answered"), epsilon=float(number) / 300, epsilon_cap=8.0)
    shown = page(home)
    shown.read()
    figures = shown._runs["first"].figures
    for number in range(5, 2000):  # as if their lines had been read
        figures.rounds[number] = figures.rounds[4]._replace(number=number)
        for each in figures.sites.values():
            each.curve[number] = number / 300
    shown._made.clear()
    parts = shown.read()
    assert max(len(json.dumps(part)) for part in parts) < 150_000
    assert all(len(series["points"]) <= 241 for part in parts for series in part.get("series", []))
    assert len(by_id(parts)["run-first-rounds"]["rows"]) == 25


def test_nothing_is_read_again_that_has_not_changed(home, monkeypatch):
    shown = page(home)
    first = shown.read()
    monkeypatch.setattr("server.live.coordinator_page.run_parts", lambda *_: pytest.fail("nothing has changed"))
    assert shown.read() == first


def test_the_page_holds_no_lock_changes_no_file_and_loads_no_torch(home):
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    code = (
        "import sys, fcntl\nfrom pathlib import Path\n"
        "def refuse(*_): raise AssertionError('a lock')\nfcntl.flock = fcntl.lockf = refuse\n"
        "from server.live.coordinator_page import page\npage(Path(sys.argv[1])).read()\n"
        "assert not {'torch', 'flwr', 'opacus', 'matplotlib'} & sys.modules.keys()\n"
    )
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", code, str(home)], check=True, cwd=root, timeout=60)
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*")} == before


def test_a_question_is_no_run_of_rounds_and_whoever_has_answered_was_seen(home):
    (home / "wanted.json").write_text(json.dumps({"runs": [{"run": "first", "run_id": 1, "status": "completed"}]}))
    audit = create(home / "runs" / "audit-20261126-070110", parse_experiment(EXPERIMENT))
    RunLog(audit.metrics).write("end", status="completed", round=0)
    parts = by_id(page(home).read())
    # The newest folder is the question's; the run is what is told in full.
    told = [each for each in parts if each.startswith("run-")]
    assert told and all(each.startswith("run-first") for each in told)
    assert [row[:3] for row in texts(parts["runs"])] == [
        ["audit-20261126-070110", "completed", "–"],
        ["first", "completed", "2 of 9"],
    ]
    # Nobody is noted as online since this start, but both have answered.
    assert [row[1] for row in texts(parts["sites"])] == ["offline", "offline"]
