import contextlib
import io
import re

import numpy as np
import pytest
from rich.console import Console

from server.federation import finetune
from server.federation.finetune import Start, resume_run, start_run
from server.federation.fleet.superlink_types import ControlError
from server.federation.resubmission import Wanted
from server.federation.starting_point import find_held_out
from server.federation.status import EXIT_CODES, summarise, table
from server.runs.run_directory import RunDir
from shared.errors import InputError
from shared.experiment.config import parse_experiment
from shared.storage.checkpoint import load_group, load_meta, save_checkpoint
from shared.storage.runlog import RunLog
from tests.server.fake_federation import honest_sites, make_experiment, make_home, run_rounds
from tests.server.fake_grid import FakeGrid
from tests.server.federation.test_resubmission import FakeControl


@pytest.fixture
def control(monkeypatch):
    fake = FakeControl()
    monkeypatch.setattr(finetune, "connect", lambda _home: contextlib.nullcontext(fake))
    return fake


@pytest.fixture
def home(tmp_path):
    return make_home(tmp_path, make_experiment())


def make_start(tmp_path, text="[federation]\nrounds = 2\n", **changes):
    file = tmp_path / "faces.toml"
    file.write_text(text)
    return Start(**({"experiment": str(file), "init": str(tmp_path / "source"), "run": "new"} | changes))


def test_round_zero_is_the_moving_average_of_the_checkpoint(tmp_path, home, control):
    ema = load_group(tmp_path / "source", "ema")
    changed = {name: tensor + 1 for name, tensor in ema.items()}
    save_checkpoint(tmp_path / "other", {"model": ema, "ema": changed}, {"experiment": make_experiment(), "step": 5})
    run = start_run(home, make_start(tmp_path, init=str(tmp_path / "other")))
    zero = RunDir(home / "runs" / run).round_checkpoint(0)
    for group in ("model", "ema"):
        assert all(np.array_equal(changed[name], tensor) for name, tensor in load_group(zero, group).items())
    assert load_meta(zero).parents == (load_meta(tmp_path / "other").digest,)
    assert control.submitted == ["new"]


def test_automatic_precision_is_decided_and_written_down(tmp_path, home, control):
    run = start_run(home, make_start(tmp_path))
    assert RunDir(home / "runs" / run).experiment.train.precision == "float32"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[federation]\nsites_per_round = 4\n", "sites_per_round 4 is above the 3 registered"),
        ("[federation]\nmin_replies = 4\n", "min_replies 4 is above the 3 registered"),
        ("[federation]\nmin_replies = 3\nsites_per_round = 2\n", "min_replies 3 is above sites_per_round 2"),
        ("[federation]\nsites_fraction = 0.1\nmin_replies = 2\n", "above the 1 sites asked"),
        ("[federation]\nsites_fraction = 0.1\nsites_per_round = 2\n", "give one"),
        ("[federation]\nmin_available = 9\n", "min_available 9"),
        ("[federation]\ntrainable = ['decoder*']\n", "matches none"),
        ("[model]\npatch_size = 2\n", "model.patch_size 4"),
        ("[diffusion]\nschedule = 'linear'\n", "diffusion.schedule 'cosine'"),
        ("[privacy]\nmechanism = 'dp-sgd'\n[federation]\nweighting = 'examples'\n", "weighting"),
        ("[optim]\nema_warmup = 'power'\n", "are of a central training: rounds average by 'ratio' and 1"),
        ("[optim]\nema_every = 2\n", "are of a central training"),
        ("[model]\nqkv_bias = true\n", "model.qkv_bias False"),
        ("[federation]\nround = 2\n", "unknown key 'federation.round'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(tmp_path, home, control, text, words):
    with pytest.raises(InputError) as caught:
        start_run(home, make_start(tmp_path, text))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (home / "runs" / "new").exists()
    assert control.submitted == []


def test_a_superlink_that_is_away_leaves_nothing_behind(tmp_path, home, control, monkeypatch):
    def away(experiment, run):
        raise ControlError("away")

    monkeypatch.setattr(control, "submit", away)
    with pytest.raises(ControlError):
        start_run(home, make_start(tmp_path))
    assert not (home / "runs" / "new").exists()


def test_a_used_name_and_a_missing_reference_are_refused(tmp_path, home, control):
    with pytest.raises(InputError, match="--resume run"):
        start_run(home, make_start(tmp_path, run="run"))
    with pytest.raises(InputError, match="does not exist"):
        start_run(home, make_start(tmp_path, reference=str(tmp_path / "nowhere")))
    with pytest.raises(InputError, match="give --init"):
        start_run(home, make_start(tmp_path, init=""))


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "", "x" * 101, "line\nbreak"])
def test_a_run_name_is_one_plain_folder_name(tmp_path, home, control, name):
    with pytest.raises(InputError, match="run name"):
        resume_run(home, name)
    if name:
        with pytest.raises(InputError, match="run name"):
            start_run(home, make_start(tmp_path, run=name))


def test_resume_lists_what_differs_and_force_never_changes_seeds_or_privacy(home, control):
    stored = make_experiment()
    changed = parse_experiment(stored.to_toml(), ["federation.rounds=5", "optim.lr=1e-5"])
    with pytest.raises(InputError, match=r"optim.lr = 0.0002, not 1e-05; federation.rounds = 2, not 5"):
        resume_run(home, "run", changed)
    resume_run(home, "run", changed, force=True)
    assert RunDir(home / "runs" / "run").experiment.federation.rounds == 5
    for override in ("train.seed=1", "privacy.noise_multiplier=0.1", "privacy.mechanism='dp-sgd'"):
        control.states = {}
        with pytest.raises(InputError, match="--force does not change"):
            resume_run(home, "run", parse_experiment(changed.to_toml(), [override]), force=True)


def test_resume_of_unknown_and_complete_runs_is_refused(home, control):
    with pytest.raises(InputError, match="known are run"):
        resume_run(home, "nothing")
    run_rounds(home, FakeGrid(honest_sites()), make_experiment())
    with pytest.raises(InputError, match="all 2 rounds"):
        resume_run(home, "run")


def test_resuming_a_run_that_has_not_ended_submits_nothing(home, control):
    assert resume_run(home, "run") is True
    assert resume_run(home, "run") is False
    assert control.submitted == ["run"]


def test_a_run_is_summarised_as_a_table_and_as_json(home, control):
    resume_run(home, "run")
    run_rounds(home, FakeGrid(honest_sites()), make_experiment())
    control.states[1] = "finished:completed"
    Wanted(home).tick(control)
    entry = Wanted(home).runs()["run"]
    summary = summarise(home, entry)
    assert (summary["status"], summary["rounds_done"]) == ("completed", 2)
    assert [len(line["answered"]) for line in summary["history"]] == [3, 3]
    assert summary["history"][0]["loss"] == 0.5
    assert table(summary).row_count == 2
    metrics = {"fd_random_inception_192": 94.3, "kd_random_inception_192_interval": [5.4, 5.8], "precision": 0.0}
    RunLog(home / "runs" / "run" / "metrics.jsonl").write("evaluation", round=0, metrics=metrics)
    assert table(summarise(home, entry)).row_count == 3
    # As wide as a telephone, and narrower: the figures of each round are whole in one line.
    for width in (120, 80, 40, 24):
        console = Console(width=width, file=io.StringIO(), force_terminal=False)
        console.print(table(summarise(home, entry), width))
        text = console.file.getvalue()
        assert max(map(len, text.splitlines())) <= width
        assert all(re.search(rf"\b{number}\b.*\b0\.5", text) for number in (1, 2)), text
        assert "94.3" in text
    assert EXIT_CODES == {"completed": 0, "failed": 1, "stopped": 1}


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ('{"run_id": 1, "seconds": 31, "is_frozen": false}', "did not start within 31 s"),
        ('{"run_id": 1, "seconds": 31, "is_frozen": true}', "was frozen and was started again"),
        ('{"run_id": 2, "seconds": 31, "is_frozen": true}', ""),
        *((damaged, "") for damaged in ("", "{", "{}", "[]", "null", '{"run_id": 1}')),
    ],
)
def test_a_run_that_does_not_begin_says_what_its_superexec_has_noted(home, control, told, said):
    resume_run(home, "run")
    place = home / "flwr" / "superexec"
    place.mkdir(parents=True)
    (place / "slow-start.json").write_text(told)
    reason = summarise(home, Wanted(home).runs()["run"])["reason"]
    assert said in reason and bool(said) is bool(reason)


def test_a_round_that_was_undone_is_told_as_such_with_the_reason(home, control):
    resume_run(home, "run")
    told = {"group": "all", "rise": 0.4, "bound": 0.25, "suspects": ["site-1"]}
    reason = "rolled back: held-out loss (all) rose by 40.0%"
    log = RunLog(home / "runs" / "run" / "metrics.jsonl")
    log.write("round", round=1, weights_changed=False, reason=reason, rolled_back=told, seconds={"total": 1.0})
    log.write("round", round=2, weights_changed=False, reason="too few replies", seconds={"total": 1.0})
    summary = summarise(home, Wanted(home).runs()["run"])
    assert [(line["undone"], line["reason"]) for line in summary["history"]] == [
        (told, reason),
        (None, "too few replies"),
    ]
    console = Console(width=120, file=io.StringIO())
    console.print(table(summary, 120))
    assert re.search(r"1 .* undone .*\n.* 2 .* unchanged ", console.file.getvalue())


def test_rounds_are_checked_with_the_images_of_the_reference_unless_said_otherwise(tmp_path):
    (tmp_path / "faces").mkdir()
    (tmp_path / "faces.zip").touch()
    (tmp_path / "statistics.npz").touch()
    faces, archive, statistics = (str(tmp_path / name) for name in ("faces", "faces.zip", "statistics.npz"))
    assert [find_held_out("", reference) for reference in (faces, archive)] == [faces, archive]
    assert find_held_out("", "synthetic:public:9") == "synthetic:public:9"
    assert [find_held_out("", reference) for reference in ("", "federated", statistics)] == ["", "", ""]
    assert find_held_out(archive, faces) == archive
    assert find_held_out("none", faces) == ""
    with pytest.raises(InputError, match=r"--held-out .*nowhere does not exist"):
        find_held_out(str(tmp_path / "nowhere"), faces)


def test_a_run_that_the_disk_does_not_hold_is_refused_before_anything_is_written(tmp_path, home, control, monkeypatch):
    from server.federation import starting_point

    monkeypatch.setattr(starting_point.shutil, "disk_usage", lambda _path: type("Usage", (), {"free": 1000}))
    with pytest.raises(InputError, match=r"GB free: make room, or lower train\.keep_last"):
        start_run(home, make_start(tmp_path))
    assert not (home / "runs" / "new").exists() and control.submitted == []
