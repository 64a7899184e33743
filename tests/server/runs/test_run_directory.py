import os
import subprocess
import sys

import pytest

from server.runs.run_directory import RunDir, create, differences
from shared.errors import InputError
from shared.experiment.config import parse_experiment
from shared.storage.checkpoint import save_checkpoint

EXPERIMENT = parse_experiment("[train]\nsteps = 5\nseed = 1")


def test_new_run_holds_the_resolved_experiment_and_its_folders(tmp_path):
    run = create(tmp_path / "a" / "run", EXPERIMENT)
    assert run.experiment == EXPERIMENT
    assert "warmup_steps" in run.experiment_file.read_text()
    assert run.checkpoints.is_dir() and run.samples.is_dir()


def test_same_experiment_opens_the_run_again(tmp_path):
    create(tmp_path, EXPERIMENT)
    (tmp_path / "metrics.jsonl").write_text("kept")
    create(tmp_path, EXPERIMENT)
    assert (tmp_path / "metrics.jsonl").read_text() == "kept"


def test_settings_that_change_no_number_may_change(tmp_path):
    create(tmp_path, EXPERIMENT)
    changed = parse_experiment(
        EXPERIMENT.to_toml(), ["train.steps=9", "train.keep_last=7", "train.sample_every=2", "evaluation.steps=20"]
    )
    assert create(tmp_path, changed).experiment == changed


def test_other_settings_are_listed_and_refused(tmp_path):
    create(tmp_path, EXPERIMENT)
    changed = parse_experiment(EXPERIMENT.to_toml(), ["train.seed=2", "optim.lr=0.5"])
    with pytest.raises(InputError, match=r"train\.seed = 1, not 2; optim\.lr = 0\.0002, not 0\.5: name a new folder"):
        create(tmp_path, changed)
    assert RunDir(tmp_path).experiment == EXPERIMENT
    assert len(differences(EXPERIMENT, changed)) == 2


def test_foreign_folder_and_file_are_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="not empty and holds no run"):
        create(tmp_path, EXPERIMENT)
    with pytest.raises(InputError, match="is a file"):
        create(tmp_path / "thesis.txt", EXPERIMENT)
    with pytest.raises(InputError, match=r"no experiment\.toml"):
        _ = RunDir(tmp_path).experiment


def test_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="Not a directory; name a folder"):
        create(tmp_path / "file" / "run", EXPERIMENT)


def test_paths_follow_the_documented_layout(tmp_path):
    run = RunDir(tmp_path)
    assert run.step_checkpoint(10_000) == tmp_path / "checkpoints" / "step-000010000"
    assert run.round_checkpoint(5) == tmp_path / "checkpoints" / "round-000005"
    assert run.evaluation("fid").parent.name == "evaluation"
    assert run.latest is None
    save_checkpoint(run.step_checkpoint(3), {}, {"experiment": EXPERIMENT, "step": 3})
    assert run.latest == run.step_checkpoint(3)


def test_a_run_has_one_writer_who_is_named(tmp_path):
    run = RunDir(tmp_path / "run")
    with run.hold():
        create(run.path, EXPERIMENT)
        with (
            pytest.raises(
                InputError, match=rf"is being written by process {os.getpid()} on .*: wait for it or stop it"
            ),
            RunDir(tmp_path / "run").hold(),
        ):
            raise AssertionError("two writers")
    with run.hold():
        assert create(run.path, EXPERIMENT).experiment == EXPERIMENT


def test_a_writer_that_was_killed_holds_nothing(tmp_path):
    script = "import sys, os; from pathlib import Path; from server.runs.run_directory import RunDir\n"
    script += "with RunDir(Path(sys.argv[1])).hold(): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], check=False)
    with RunDir(tmp_path / "run").hold():
        pass


def test_a_folder_of_something_else_gets_no_lock(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(InputError, match="holds no run"), RunDir(tmp_path).hold():
        raise AssertionError("a foreign folder was taken")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
