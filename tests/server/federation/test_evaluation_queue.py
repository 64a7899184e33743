import json
import sys
import time

import numpy as np
import pytest

from server.federation import evaluation_queue
from server.federation.evaluation_queue import Evaluations, evaluate_command
from server.federation.updates.global_model import round_folder
from shared.storage.checkpoint import save_checkpoint
from shared.storage.runlog import RunLog
from tests.server.fake_federation import events_of, honest_sites, make_experiment, make_home, run_rounds
from tests.server.fake_grid import FakeGrid

WRITES_RESULT = """
import json, pathlib, sys, time
time.sleep(float(sys.argv[2]))
folder = pathlib.Path(sys.argv[1]).parent.parent / "evaluation" / pathlib.Path(sys.argv[1]).name
folder.mkdir(parents=True)
(folder / "result.json").write_text(json.dumps({"metrics": {"fid": 1.0}}))
"""

WAITS_FOR_ROUND_1 = """
import pathlib, sys, time
metrics = pathlib.Path(sys.argv[1]).parent.parent / "metrics.jsonl"
end = time.monotonic() + 60
while '"kind": "round"' not in metrics.read_text():
    if time.monotonic() > end:
        sys.exit("the rounds wait for the evaluation")
    time.sleep(0.05)
"""


@pytest.fixture
def home(tmp_path):
    home = make_home(tmp_path, make_experiment(rounds=3))
    (home / "runs" / "run" / "finetune.json").write_text(json.dumps({"reference": "synthetic:public:10"}))
    return home


def use_command(monkeypatch, code, *arguments):
    monkeypatch.setattr(
        evaluation_queue, "evaluate_command", lambda path, *_: [sys.executable, "-S", "-c", code, str(path), *arguments]
    )


def results_of(home):
    return sorted(path.parent.name for path in (home / "runs" / "run" / "evaluation").glob("*/result.json"))


def test_round_zero_and_every_round_are_evaluated_without_blocking_the_rounds(tmp_path, monkeypatch):
    use_command(monkeypatch, WAITS_FOR_ROUND_1 + WRITES_RESULT, "0")
    experiment = make_experiment(rounds=1)
    home = make_home(tmp_path, experiment)
    (home / "runs" / "run" / "finetune.json").write_text(json.dumps({"reference": "synthetic:public:10"}))
    run_rounds(home, FakeGrid(honest_sites()), experiment)
    assert results_of(home) == ["round-000000", "round-000001"]
    assert events_of(home, "evaluation_failed") == []


def test_one_evaluation_runs_at_a_time_and_its_checkpoint_is_kept(home, monkeypatch):
    use_command(monkeypatch, "import time; time.sleep(30)")
    run = home / "runs" / "run"
    beside = Evaluations(run, 1, RunLog(run / "metrics.jsonl"))
    for server_round in (1, 2):
        beside.round_done(server_round)
    assert beside.oldest_needed() == 0
    beside.progress(3, "training", {})
    assert json.loads((run / "progress.json").read_text())["evaluating"] is None
    beside.attend()
    beside.progress(3, "training", {})
    assert json.loads((run / "progress.json").read_text())["evaluating"] == 0
    beside.close()
    assert events_of(home, "evaluation_failed")[0]["round"] == 0


def test_a_failed_evaluation_is_recorded_and_fails_no_run(home, monkeypatch):
    use_command(monkeypatch, "import sys; sys.exit('error: no such extractor')")
    run_rounds(home, FakeGrid(honest_sites()), make_experiment(rounds=3))
    assert [event["round"] for event in events_of(home, "evaluation_failed")] == [0, 1, 2, 3]
    assert "no such extractor" in events_of(home, "evaluation_failed")[0]["reason"]
    assert events_of(home, "end")[-1]["status"] == "completed"


def test_evaluations_that_never_end_are_given_up_at_the_deadline(home, monkeypatch):
    use_command(monkeypatch, "import time; time.sleep(30)")
    run = home / "runs" / "run"
    beside = Evaluations(run, 1, RunLog(run / "metrics.jsonl"))
    start = time.monotonic()
    beside.attend()
    beside.finish(deadline_seconds=0.3)
    beside.close()
    assert time.monotonic() - start < 5
    assert len(events_of(home, "evaluation_failed")) == 1


def test_a_resumed_run_evaluates_what_has_no_result_yet(home, monkeypatch):
    use_command(monkeypatch, "import sys; sys.exit(1)")
    run_rounds(home, FakeGrid(honest_sites()), make_experiment(rounds=3))
    use_command(monkeypatch, WRITES_RESULT, "0")
    run = home / "runs" / "run"
    beside = Evaluations(run, 2, RunLog(run / "metrics.jsonl"))
    beside.finish()
    beside.close()
    # Round 0 is there or gone: its checkpoint is kept only as long as the first evaluations needed it.
    assert set(results_of(home)) - {"round-000000"} == {"round-000002"}


def test_without_a_reference_nothing_is_evaluated(tmp_path, monkeypatch):
    use_command(monkeypatch, "raise SystemExit(1)")
    home = make_home(tmp_path, make_experiment())
    run_rounds(home, FakeGrid(honest_sites()), make_experiment())
    assert events_of(home, "evaluation_failed") == []


def test_the_command_is_the_operators_own(tmp_path):
    command = evaluate_command(tmp_path / "round-000004", "faces.zip", ["--num", "100"])
    assert command[:5] == [sys.executable, "-m", "server.cli.main", "evaluate", str(tmp_path / "round-000004")]
    assert command[5:] == ["--reference", "faces.zip", "--name", "round-000004", "--num", "100"]


def test_weights_of_an_earlier_round_are_not_measured_again(tmp_path, monkeypatch):
    use_command(monkeypatch, "import time; time.sleep(30)")
    home = make_home(tmp_path, make_experiment(rounds=3))
    run = home / "runs" / "run"
    (run / "finetune.json").write_text(json.dumps({"reference": "synthetic:public:10"}))
    start, other = {"a": np.zeros(2, np.float32)}, {"a": np.ones(2, np.float32)}
    for number, weights in enumerate((start, start, other, other, start)):
        meta = {"experiment": make_experiment(), "round": number}
        save_checkpoint(round_folder(run / "checkpoints", number), {"ema": weights, "model": weights}, meta)
    beside = Evaluations(run, 1, RunLog(run / "metrics.jsonl"))
    beside.finish(0)
    assert [event["round"] for event in events_of(home, "evaluation_failed")] == [0, 2]
    beside.round_done(1)  # Nothing was measured: the next round with the weights may be.
    assert beside.oldest_needed() == 1
