from pathlib import Path

from server.federation.fleet.metrics import coordinator_gauges
from shared.storage.runlog import OUTCOMES, RunLog


def record(number: int, **changes: object) -> dict[str, object]:
    lists: dict[str, object] = {state: [] for state in OUTCOMES}
    seconds = {"train": 2.0, "total": 3.0}
    fixed = {"round": number, "bytes_sent": 10, "bytes_received": 5, "weights_changed": True, "seconds": seconds}
    return {**lists, **fixed, **changes}


def values(home: Path, name: str) -> dict[str, float]:
    found = [(labels, value) for each, _, _, labels, value in coordinator_gauges(home) if each == name]
    return {",".join(text for key, text in labels.items() if key != "run"): value for labels, value in found}


def test_rounds_participants_bytes_and_seconds_are_counted_once_each(tmp_path: Path):
    log = RunLog(tmp_path / "runs" / "one" / "metrics.jsonl")
    log.write("round", **record(1, answered=[{"site": "a"}, {"site": "b"}]))
    log.write("round", **record(2, answered=[{"site": "a"}]))
    log.write("round", **record(2, answered=[{"site": "a"}], lost=[{"site": "b"}], weights_changed=False))
    assert values(tmp_path, "maskfed_rounds_total") == {"": 2}
    assert values(tmp_path, "maskfed_rounds_without_change_total") == {"": 1}
    assert values(tmp_path, "maskfed_participations_total") == {
        **dict.fromkeys(OUTCOMES, 0),
        "answered": 3,
        "lost": 1,
    }
    assert values(tmp_path, "maskfed_bytes_total") == {"sent": 20, "received": 10}
    assert values(tmp_path, "maskfed_stage_seconds_total") == {"train": 4.0}


def test_epsilon_is_shown_as_released_and_unbounded_is_infinite(tmp_path: Path):
    log = RunLog(tmp_path / "runs" / "one" / "metrics.jsonl")
    answered = [{"site": "a", "epsilon": 1.5}, {"site": "b", "epsilon": "unbounded", "dp_epsilon": 2.5}, {"site": "c"}]
    log.write("round", **record(1, answered=answered))
    log.write("evaluation", round=1, name="r", metrics={"fd_x": 3.5, "note": "text"})
    assert values(tmp_path, "maskfed_site_epsilon") == {"a": 1.5, "b": float("inf")}
    assert values(tmp_path, "maskfed_site_dp_epsilon") == {"b": 2.5}
    assert values(tmp_path, "maskfed_distance") == {"fd_x": 3.5}


def test_a_home_without_runs_has_its_sites_only(tmp_path: Path):
    assert values(tmp_path, "maskfed_sites") == {"": 0}


def test_a_run_is_given_up_until_it_is_started_again(tmp_path: Path):
    log = RunLog(tmp_path / "runs" / "one" / "metrics.jsonl")
    log.write("start")
    assert values(tmp_path, "maskfed_run_given_up") == {"": 0}
    log.write("end", status="failed", is_final=False)
    assert values(tmp_path, "maskfed_run_given_up") == {"": 0}
    log.write("end", status="failed", is_final=True)
    log.write("evaluation", round=1, metrics={})
    assert values(tmp_path, "maskfed_run_given_up") == {"": 1}
    log.write("start")
    assert values(tmp_path, "maskfed_run_given_up") == {"": 0}


def test_caps_are_those_that_sites_report(tmp_path: Path):
    log = RunLog(tmp_path / "runs" / "one" / "metrics.jsonl")
    answered = [{"site": "a", "epsilon": 1.5, "epsilon_cap": 8.0}, {"site": "b", "epsilon_cap": "none"}]
    log.write("round", **record(1, answered=answered))
    assert values(tmp_path, "maskfed_site_epsilon_cap") == {"a": 8.0}
