import json

from server.runs.history import read_run
from shared.storage.round_records import rounds_of
from shared.storage.runlog import read_metrics
from tests.server.fake_federation import events_of, honest_sites, make_experiment, make_home, run_rounds
from tests.server.fake_federation import rounds_of as logged
from tests.server.fake_grid import FakeGrid


def damaged_run(tmp_path):
    """Three rounds, the second's line cut, the third's overwritten by zeros as after a power cut."""
    experiment = make_experiment(rounds=3)
    home = make_home(tmp_path, experiment)
    run_rounds(home, FakeGrid(honest_sites()), experiment)
    log = home / "runs" / "run" / "metrics.jsonl"
    lines = log.read_bytes().split(b"\n")
    _, second, third = (number for number, line in enumerate(lines) if line and json.loads(line)["kind"] == "round")
    lines[second], lines[third] = lines[second][:40], b"\0" * len(lines[third])
    log.write_bytes(b"\n".join(lines))
    return home, experiment


def test_rounds_that_the_log_has_lost_come_from_their_checkpoints(tmp_path):
    home, _ = damaged_run(tmp_path)
    folder = home / "runs" / "run"
    events = read_metrics(folder / "metrics.jsonl")
    assert [event["round"] for event in events if event["kind"] == "round"] == [1]
    found = rounds_of(events, folder / "checkpoints")
    assert [record["round"] for record in found] == [1, 2, 3]
    assert [len(record["answered"]) for record in found] == [3, 3, 3]
    data = read_run(folder)
    assert data.sites == ["site-0", "site-1", "site-2"]
    assert data.damage == "2 damaged lines skipped (6, 7)"


def test_a_run_with_a_damaged_log_goes_on_and_says_what_was_lost(tmp_path):
    home, _ = damaged_run(tmp_path)
    longer = make_experiment(rounds=4)
    (home / "runs" / "run" / "experiment.toml").write_text(longer.to_toml())
    run_rounds(home, FakeGrid(honest_sites()), longer)
    assert [record["round"] for record in logged(home)] == [1, 3, 4]
    assert events_of(home, "end")[-1]["status"] == "completed"
