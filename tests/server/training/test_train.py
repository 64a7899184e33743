import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from server.alignment.aligned_images import align_images
from server.alignment.mean_images import MeanImage
from server.cli import models as cli_models
from server.cli.main import app, main
from server.federation.starting_point import initial_model
from server.federation.updates.global_model import load_global, save_global
from server.runs.lineage import MeanImageCharge, charges_of_weights
from server.training.train import train
from server.training.watch import Watch
from shared.data.image_cache import open_images
from shared.errors import InputError
from shared.experiment import recipes
from shared.experiment.config import parse_experiment
from shared.storage.checkpoint import load_group, load_meta
from shared.storage.runlog import read_metrics
from shared.storage.synthetic_mark import SyntheticMark, read_mark
from shared.training.engine import NonFiniteLossError
from tests import forked

TOML = """
[train]
steps = 12
batch = 4
precision = "float32"
checkpoint_every = 5
sample_every = 100
[model]
image_size = 16
"""
DATA = Path("synthetic:public:12")


def experiment(*overrides):
    return parse_experiment(TOML, list(overrides))


@pytest.fixture(autouse=True, scope="module")
def _small_grids():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.training.watch.GRID_IMAGES", 4)
        patch.setattr("server.training.watch.GRID_COLUMNS", 2)
        yield


@pytest.fixture(autouse=True)
def _process_settings():
    # Training chooses the process's matrix products; other tests must not see that.
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def weights(run):
    return {group: load_group(run.latest, group) for group in ("model", "ema", "optimizer")}


def assert_same(ours, theirs):
    for group, arrays in ours.items():
        assert all(array.tobytes() == theirs[group][name].tobytes() for name, array in arrays.items()), group


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train(experiment(), DATA, tmp_path_factory.mktemp("train") / "run")


def test_run_leaves_checkpoints_grid_log_and_curves(finished):
    assert [path.name for path in sorted(finished.checkpoints.iterdir())] == [
        "step-000000005",
        "step-000000010",
        "step-000000012",
    ]
    with Image.open(finished.samples / "step-000000012.png") as grid:
        assert grid.size == (2 * 18 - 2, 2 * 18 - 2)
    digest = load_meta(finished.latest).digest
    assert read_mark(finished.samples / "step-000000012.png") == SyntheticMark(digest, "0 to 3")
    kinds = [event["kind"] for event in read_metrics(finished.metrics)]
    assert kinds == ["start", "checkpoint", "train", "checkpoint", "train", "checkpoint", "end"]
    events = EventAccumulator(str(finished.tensorboard)).Reload()
    assert [scalar.step for scalar in events.Scalars("train/loss")] == [10, 12]


def test_log_tells_figures_and_provenance(finished):
    events = read_metrics(finished.metrics)
    start, last = events[0], [event for event in events if event["kind"] == "train"][-1]
    assert start["num_images"] == 12 and start["precision"] == "float32" and start["threads"] >= 1
    assert last["step"] == 12 and last["images"] == 48 and 0 < last["loss"] < 5 and last["lr"] == 2e-4
    assert last["images_per_second"] > 0 and last["grad_norm"] > 0
    assert events[-1]["status"] == "finished"
    meta = load_meta(finished.latest)
    assert meta.experiment == experiment() and meta.step == 12 and meta.provenance["data"] == str(DATA)


def test_run_in_two_parts_equals_the_run_in_one(finished, tmp_path):
    train(experiment("train.steps=7"), DATA, tmp_path / "run")
    run = train(experiment(), DATA, tmp_path / "run")
    assert_same(weights(finished), weights(run))


def test_intervals_and_pruning_follow_the_experiment(tmp_path):
    options = ("train.checkpoint_every=2", "train.keep_last=1", "train.keep_every=4", "train.sample_every=3")
    run = train(experiment("train.steps=7", *options), DATA, tmp_path / "run")
    assert sorted(int(path.name[5:]) for path in run.checkpoints.iterdir()) == [4, 7]
    assert sorted(int(path.stem[5:]) for path in run.samples.iterdir()) == [3, 6, 7]


def test_seed_decides_weights_and_losses(tmp_path):
    run = train(experiment("train.seed=1", "train.steps=1"), DATA, tmp_path / "run")
    same = train(experiment("train.steps=1"), DATA, tmp_path / "same")
    first, other = ({e["loss"] for e in read_metrics(r.metrics) if e["kind"] == "train"} for r in (run, same))
    assert first.isdisjoint(other)
    assert not np.array_equal(weights(run)["model"]["norm.weight"], weights(same)["model"]["norm.weight"])


def test_resume_of_another_experiment_is_refused_before_anything_changes(finished):
    def times():
        return sorted(path.stat().st_mtime_ns for path in finished.path.rglob("*") if path.name != ".writer.lock")

    before = times()
    with pytest.raises(InputError, match=r"optim\.lr = 0\.0002, not 0\.1"):
        train(experiment("optim.lr=0.1"), DATA, finished.path)
    assert before == times()


def test_stage_starts_from_the_averaged_weights_of_another(finished, tmp_path):
    run = train(experiment("train.steps=0"), DATA, tmp_path / "run", init=finished.path)
    start = load_group(finished.latest, "ema")
    assert_same({"model": start, "ema": start}, weights(run))
    assert load_meta(run.latest).parents == (load_meta(finished.latest).digest,)


def test_init_that_does_not_fit_is_refused_and_leaves_no_run(finished, tmp_path):
    with pytest.raises(InputError, match=r"--init .*positions\.weight"):
        train(experiment("model.image_size=24"), DATA, tmp_path / "run", init=finished.path)
    assert not (tmp_path / "run").exists()


def test_auto_precision_is_decided_once_and_written_down(tmp_path, monkeypatch):
    monkeypatch.setattr("server.training.train.decide_precision", lambda *_: "bfloat16")
    run = train(experiment("train.precision=auto", "train.steps=1"), DATA, tmp_path / "run")
    assert run.experiment.train.precision == "bfloat16"
    monkeypatch.setattr("server.training.train.decide_precision", lambda *_: "float32")
    train(experiment("train.precision=auto", "train.steps=2"), DATA, tmp_path / "run")
    assert run.experiment.train.precision == "bfloat16"


def test_divergence_ends_the_run_and_says_so(tmp_path):
    with pytest.raises(NonFiniteLossError):
        train(experiment("optim.lr=1e30", "optim.grad_clip=0"), DATA, tmp_path / "run")
    end = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert end["status"] == "failed" and "NonFiniteLossError" in end["reason"]


def start(tmp_path):
    (tmp_path / "e.toml").write_text(TOML)
    command = ["train", str(tmp_path / "e.toml"), "--data", str(DATA), "--out", str(tmp_path / "run")]
    return forked.start(main, [*command, "--set", "train.steps=100000"], tmp_path / "said")


def wait_for(is_true):
    deadline = time.monotonic() + 240
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_interrupt_writes_a_checkpoint_and_kill_loses_only_what_came_after_one(tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    process = start(tmp_path)
    wait_for(lambda: list(checkpoints.glob("step-*")))
    os.kill(process.pid, signal.SIGINT)
    process.join(240)
    errors = (tmp_path / "said").read_text()
    assert process.exitcode == 0, errors
    assert "run the same command again to continue" in errors
    events = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert events[-1]["status"] == "stopped" and events[-2]["kind"] == "checkpoint"
    stopped = events[-1]["step"]

    process = start(tmp_path)
    wait_for(lambda: any(int(path.name[5:]) > stopped + 5 for path in checkpoints.glob("step-*")))
    process.kill()
    process.join()
    done = max(int(path.name[5:]) for path in checkpoints.glob("step-*")) + 3
    run = train(experiment(f"train.steps={done}"), DATA, tmp_path / "run")
    whole = train(experiment(f"train.steps={done}"), DATA, tmp_path / "whole")
    assert_same(weights(whole), weights(run))


def test_command_line_trains_from_a_recipe_name(tmp_path, monkeypatch):
    (tmp_path / "tiny.toml").write_text(TOML)
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    arguments = ["train", "tiny", "--data", str(DATA), "--out", str(tmp_path / "run"), "--set", "train.steps=1"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert "step-000000001" in done.output.replace("\n", "")
    assert recipes.recipe_names() == ["tiny"]
    with pytest.raises(InputError, match="experiments list"):
        recipes.find_experiment("tinny")


def test_bad_images_are_told_before_the_machine_is_probed(tmp_path, monkeypatch):
    (tmp_path / "tiny.toml").write_text(TOML)
    probed = []
    monkeypatch.setattr(cli_models, "training_plan", lambda experiment: probed.append(experiment.train.steps) or [])
    arguments = ["train", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "run"), "--set", "train.steps=2"]
    done = CliRunner().invoke(app, [*arguments, "--data", str(tmp_path / "nowhere")])
    assert isinstance(done.exception, InputError) and probed == []
    assert CliRunner().invoke(app, [*arguments, "--data", str(DATA)]).exit_code == 0
    assert probed == [2]


def test_command_line_caches_images(tmp_path):
    folder = tmp_path / "faces"
    for person in "ab":
        (folder / person).mkdir(parents=True)
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / person / "1.png")
    (folder / "b" / "2.png").write_bytes(b"broken")
    done = CliRunner().invoke(
        app, ["data", "cache", str(folder), "--size", "8", "--allow-unreadable"], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert "2 images of 2 persons, 1 unreadable" in done.output.replace("\n", "")
    assert (tmp_path / "faces-8.cache" / "cache.json").exists()
    assert cli_models.register


def test_a_run_goes_on_with_other_images_only_when_told_so_and_says_it(tmp_path):
    run = train(experiment("train.steps=2"), DATA, tmp_path / "run")
    other = Path("synthetic:public:5")
    with pytest.raises(InputError, match=r"12 images of synthetic:public:12 before, 5 other ones"):
        train(experiment("train.steps=3"), other, run.path)
    assert load_meta(run.latest).step == 2
    train(experiment("train.steps=3"), other, run.path, accept_other_data=True)
    assert load_meta(run.latest).step == 3
    (event,) = [event for event in read_metrics(run.metrics) if event["kind"] == "data_changed"]
    assert event["step"] == 2 and "5 other ones" in event["reason"]


def test_a_stop_while_samples_are_drawn_is_answered_at_once_and_leaves_no_half_made_grid(tmp_path, monkeypatch):
    def draw(*_, **__):
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the drawing went on")

    monkeypatch.setattr("shared.evaluation.generate.sample_images", draw)
    run = train(experiment("train.steps=2"), DATA, tmp_path / "run")
    assert list(run.samples.iterdir()) == []
    assert load_meta(run.latest).step == 2


def test_stopped_at_once_after_a_checkpoint_is_stopped_and_before_it_failed(tmp_path, monkeypatch):
    for name, every, status in (("whole", 1, "stopped"), ("half", 10, "failed")):

        def interrupt(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(Watch, "sample", interrupt)
            settings = ("train.steps=3", f"train.checkpoint_every={every}", "train.sample_every=1")
            with pytest.raises(KeyboardInterrupt):
                train(experiment(*settings), DATA, tmp_path / name)
        assert read_metrics(tmp_path / name / "metrics.jsonl")[-1]["status"] == status


def test_the_plan_of_a_training_is_said_in_days_with_what_else_there_is(monkeypatch):
    monkeypatch.setattr("shared.planning.speed_probe.images_per_second", lambda *_: 1.8)
    told = cli_models.training_plan(experiment("train.steps=200000", "train.batch=256"))
    assert told[0] == "200,000 steps of 256 images: 51,200,000 images at 1.8 per second, 329 days here"
    assert "reproduce32-T" in told[1]
    assert len(cli_models.training_plan(experiment("train.steps=10"))) == 1
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert cli_models.training_plan(experiment("train.steps=10")) == []


def test_what_sites_were_charged_for_images_stays_with_the_weights(tmp_path):
    charge = MeanImageCharge(run="a", num_sites=2, unit="person", noise_multiplier=3.5, delta=1e-5, epsilon=1.1)
    aligned = tmp_path / "aligned"
    align_images(open_images(str(DATA), 16), [MeanImage("s", np.zeros((3, 16, 16)), 0.01)], [charge], aligned)
    few = ("train.steps=1", "train.checkpoint_every=1")
    first = train(experiment(*few), aligned, tmp_path / "first")
    more = train(experiment(*few), DATA, tmp_path / "more", init=first.path)
    # The same run goes on with ordinary images: what it has seen stays seen.
    train(experiment("train.steps=2", *few[1:]), DATA, tmp_path / "first", accept_other_data=True)
    other = train(experiment(*few), DATA, tmp_path / "other")
    told = [charges_of_weights(load_meta(run.latest).provenance) for run in (first, more, other)]
    assert told == [(charge,), (charge,), ()]
    assert charges_of_weights(load_meta(tmp_path / "first" / "checkpoints" / "step-000000002").provenance) == (charge,)
    model = initial_model(more.latest, parse_experiment(TOML, []))
    save_global(tmp_path / "round-000001", replace(model, server_round=1), parse_experiment(TOML, []))
    again = load_global(tmp_path / "round-000001", parse_experiment(TOML, []))
    assert again.lineage == model.lineage and charges_of_weights(again.lineage) == (charge,)
