from pathlib import Path

from server.federation.alerts import RunAlerts
from shared.storage.runlog import OUTCOMES, RunLog


def record(number: int, **changes: object) -> dict[str, object]:
    lists: dict[str, object] = {state: [] for state in OUTCOMES}
    return {**lists, "round": number, "weights_changed": True, "seconds": {}, **changes}


def texts(found: list[tuple[str, str, str]]) -> list[str]:
    return sorted(text for _, _, text in found)


def test_refusals_losses_caps_and_runs_given_up_are_told_once_per_site_and_run(tmp_path: Path):
    alerts, log = RunAlerts(tmp_path), RunLog(tmp_path / "runs" / "first" / "metrics.jsonl")
    assert alerts(0.0) == []
    near = {"site": "c", "epsilon": 6.5, "epsilon_cap": 8.0}
    far = {"site": "d", "epsilon": 6.3, "epsilon_cap": 8.0}
    unbounded = {"site": "e", "epsilon": "unbounded", "dp_epsilon": 7.9, "epsilon_cap": 9.0}
    plain = {"site": "f", "epsilon": "unbounded", "epsilon_cap": 0.0}
    log.write("round", **record(1, refused=[{"site": "a", "reason": "epsilon 7.21 of 8"}], lost=[{"site": "b"}]))
    log.write(
        "round", **record(2, refused=[{"site": "a"}], late=[{"site": "b"}], answered=[near, far, unbounded, plain])
    )
    log.write("end", status="failed", reason="7 of 9", is_final=False)
    assert texts(alerts(0.0)) == [
        "site a refuses run first: `status first` says why",
        "site b came too late in run first",
        "site b was lost in run first",
        "site c has spent 80% of its cap or more: few rounds are left",
        "site e has spent 80% of its cap or more: few rounds are left",
    ]
    before = len(alerts(0.0))
    log.write("end", status="failed", reason="given up", is_final=True)
    found = alerts(0.0)
    assert len(found) == before + 1 and found[-1][0] == "given_up"
    assert len({key for _, key, _ in found}) == len(found)


def test_a_site_that_is_doubted_is_told_once(tmp_path: Path):
    log = RunLog(tmp_path / "runs" / "r" / "metrics.jsonl")
    doubted = {"a": {"round": 3, "persistence": 0.77, "share": 0.5}}
    log.write("round", **record(3, named=["a"], doubted=doubted))
    log.write("round", **record(4, doubted=doubted))
    assert texts(RunAlerts(tmp_path)(0.0)) == ["run r doubts site a, which counts less: `report` says why"]


def test_what_was_before_the_webhook_is_not_told(tmp_path: Path):
    log = RunLog(tmp_path / "runs" / "old" / "metrics.jsonl")
    log.write("round", **record(1, lost=[{"site": "b"}]))
    assert RunAlerts(tmp_path)(4e9) == [] and len(RunAlerts(tmp_path)(0.0)) == 1


def test_no_text_of_a_site_and_no_epsilon_is_in_an_alert(tmp_path: Path):
    log = RunLog(tmp_path / "runs" / "r" / "metrics.jsonl")
    entry = {"site": "a", "reason": "SECRET 7.77", "code": "SECRET", "epsilon": 7.77, "epsilon_cap": 8.11}
    log.write("round", **record(1, refused=[entry], failed=[entry], answered=[entry]))
    found = RunAlerts(tmp_path)(0.0)
    assert len(found) == 3
    for _, _, text in found:
        assert "SECRET" not in text and "7.77" not in text and "8.11" not in text


def test_a_damaged_log_tells_what_can_be_read(tmp_path: Path):
    path = tmp_path / "runs" / "r" / "metrics.jsonl"
    log = RunLog(path)
    log.write("round", **record(1, lost=[{"site": "a"}]))
    with path.open("a") as file:
        file.write('{"kind": "round", "time": 5}\nnot json\n')
    log.write("round", **record(2, lost=[{"site": "b"}]))
    assert len(RunAlerts(tmp_path)(0.0)) == 2
