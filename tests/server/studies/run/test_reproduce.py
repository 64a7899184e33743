import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from server.cli import main as cli
from server.evaluation.measures.held_out_loss import held_out_loss
from server.federation.starting_point import initial_model
from server.federation.updates.global_model import save_global
from server.runs.run_directory import create
from server.simulation.simulation_folder import RUN
from server.studies.run import arm_training, reproduce
from server.studies.run.arm_settings import ArmSettings
from server.studies.run.reproduce import run_arm
from server.studies.stored_results import HELD_OUT_LOSS, read_result, result_file
from shared.data.synthetic import write_folder
from shared.errors import InputError
from shared.experiment.config import load_experiment
from shared.storage.checkpoint import load_group, resolve_checkpoint
from shared.storage.runlog import RunLog
from shared.storage.synthetic_mark import read_mark
from shared.training.flops import train_flops

RECIPE = """
[train]
objective = "{objective}"
steps = 4
batch = 4
precision = "float32"
[model]
image_size = 16
patch_size = {patch}
{mask}
[evaluation]
sampler = "dpm++"
steps = 2
batch = 10
"""
STUDY = """
title = "Tiny"
question = "?"
[splits]
train = {{ source = "private", share = 0.5 }}
test = {{ source = "private", share = 0.3 }}
validation = {{ source = "private", share = 0.2 }}
[scales.cpu]
generated = 10
synthetic = 80
[arms.pretrain]
title = "masked"
split = "train"
scales.cpu = {{ recipe = "{masked}" }}
[arms.after]
title = "after"
split = "train"
share = 0.5
init = "pretrain"
test = "test"
validation = "validation"
scales.cpu = {{ recipe = "{whole}", images = 16, at = [7], settings = {{ "optim.lr" = 1e-3 }} }}
[arms.sites]
title = "sites"
split = "train"
init = "pretrain"
sites = 2
test = "test"
validation = "validation"
scales.cpu = {{ recipe = "{whole}", images = 40, at = [20], settings = {{ "federation.local_steps" = 2 }} }}
"""


@pytest.fixture(autouse=True)
def _small_and_alone(monkeypatch):
    monkeypatch.setattr("server.training.watch.GRID_IMAGES", 4)
    monkeypatch.setattr("server.training.watch.GRID_COLUMNS", 2)
    # How good intervals are is shown by `test_scores.py` and `test_frechet.py`.
    monkeypatch.setattr("shared.evaluation.frechet.JACKKNIFE_GROUPS", 4)
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def study(tmp_path):
    return write_study(tmp_path)


def write_study(tmp_path):
    mask = '[mask]\nkind = "block"\nratio = 0.75\nblock_size = 1'
    files = {"masked": tmp_path / "masked.toml", "whole": tmp_path / "whole.toml"}
    files["masked"].write_text(RECIPE.format(objective="msm", patch=4, mask=mask))
    files["whole"].write_text(RECIPE.format(objective="dsm", patch=4, mask=""))
    file = tmp_path / "tiny.toml"
    file.write_text(STUDY.format(**files))
    return str(file)


def settings(tmp_path, name="out", **changes):
    values = {
        "public": "",
        "private": "",
        "extractors": ("random-inception",),
        "weights": None,
        "root": tmp_path / name,
        "results": tmp_path / name / "results",
    }
    return ArmSettings(**{**values, **changes})


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Runs in which the masked pre-training is done already: a copy of the folder for each."""
    place = tmp_path_factory.mktemp("pretrained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.training.watch.GRID_IMAGES", 4)
        run_arm(write_study(place), "pretrain", "cpu", settings(place))
    return place / "out"


def weights(root, arm):
    return load_group(resolve_checkpoint(root / "tiny-cpu" / arm / "training"), "model")


def test_an_arm_says_what_it_measured_where_and_from_what(study, pretrained, tmp_path):
    wanted = settings(tmp_path)
    shutil.copytree(pretrained, wanted.root)
    stored = run_arm(study, "after", "cpu", wanted)
    assert stored == result_file(wanted.results / "synthetic", "tiny", "cpu", "after")
    with Image.open(stored.with_suffix(".png")) as picture:
        # Two points, places for twelve images of 16 x 16 pixels, gaps of 2.
        assert picture.size == (12 * 18 - 2, 2 * 18 - 2)
    mark = read_mark(stored.with_suffix(".png"))
    assert mark is not None and mark.seeds.startswith("0 to ") and len(mark.model.split(", ")) == 2
    result, before = read_result(stored), read_result(stored.with_name("tiny-cpu-pretrain.json"))
    # 7 images are two steps of 4; flops are those of the recipe's network.
    assert [(point.images, point.steps) for point in result.curve] == [(8, 2), (16, 4)]
    experiment = load_experiment(tmp_path / "whole.toml")
    assert [point.flops for point in result.curve] == [count * train_flops(experiment) for count in (8, 16)]
    for point in result.curve:
        assert set(point.metrics) == {"test", "validation"}
        found = point.metrics["test"]["fd_random_inception_192"]
        ends = {f"{name}_{end}" for name in ("distance", "kernel") for end in ("low", "high")}
        assert set(found) == {"distance", "kernel", "precision", "recall", *ends}
        assert found["distance"] > 0
    # The loss stands beside the distances, and never chooses among points.
    assert list(result.extractors) == ["fd_random_inception_192", HELD_OUT_LOSS]
    loss = result.last.metrics["test"][HELD_OUT_LOSS]
    own = held_out_loss(
        wanted.root / "tiny-cpu" / "after" / "training", str(next(wanted.root.rglob("test-16.cache"))), in_v=True
    )
    assert loss["distance"] == own.mean and loss["distance_low"] < own.mean < loss["distance_high"]
    # Eight persons are too few for the test for copies.
    assert result.curve[0].copied == {}
    assert result.training_images["test"]["fd_random_inception_192"]["distance"] > 0
    assert (before.last.images, before.last.metrics, before.extractors) == (16, {}, {})
    assert result.init is not None
    assert (result.init.arm, result.init.images, result.init.steps) == ("tiny/pretrain", 16, 4)
    assert result.total_flops == result.last.flops + before.last.flops
    assert result.experiment["optim"]["lr"] == 1e-3
    assert result.data["train"]["images"] == 20
    assert result.data["test"]["images"] == 24
    assert result.measured["num_images"] == 10
    assert result.training_seconds > 0
    assert result.command == "maskfed-server reproduce tiny --scale cpu --arm after --extractor random-inception"
    assert str(tmp_path) not in stored.read_text()
    end_is_measured_once_more(study, wanted, result)


def end_is_measured_once_more(study, wanted, before):
    """After the arm is done nothing but its end is measured, with as many images as are asked for, and stays."""
    asked = replace(wanted, end_extractors=("random-inception",), end_images=14)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arm_training, "train", None)
        result = read_result(run_arm(study, "after", "cpu", asked))
        patch.setattr(reproduce.Measure, "__call__", _kill)
        assert read_result(run_arm(study, "after", "cpu", asked)) == result
        assert read_result(run_arm(study, "after", "cpu", wanted)).end == result.end
    assert (result.curve, result.end.num_images) == (before.curve, 14)
    assert result.end.extractors == {"fd_random_inception_192": before.extractors["fd_random_inception_192"]}
    found, few = (each["fd_random_inception_192"] for each in (result.end.metrics, before.last.metrics["test"]))
    assert found["distance"] != few["distance"] and found["distance_low"] < found["distance_high"]
    assert result.command.endswith("--end-extractor random-inception --end-images 14")


def test_an_arm_that_was_killed_or_asked_for_more_goes_on_and_ends_like_one_that_was_not(
    study, pretrained, tmp_path, monkeypatch
):
    whole, broken = settings(tmp_path, "whole"), settings(tmp_path, "broken")
    for wanted in (whole, broken):
        shutil.copytree(pretrained, wanted.root)
    expected = read_result(run_arm(study, "after", "cpu", whole))
    # Stopped by a signal on the way to the second point.
    real = arm_training.train
    with monkeypatch.context() as patch:
        patch.setattr(arm_training, "train", lambda experiment, *rest: real(_at_most(experiment, 3), *rest))
        assert run_arm(study, "after", "cpu", broken) is None
    # Killed while that is measured.
    with monkeypatch.context() as patch:
        patch.setattr(reproduce.Measure, "__call__", _kill)
        with pytest.raises(KeyboardInterrupt):
            run_arm(study, "after", "cpu", broken)
    folder = broken.root / "tiny-cpu" / "after"
    assert [path.name for path in (folder / "points").glob("*.json")] == ["0000000008.json"]
    assert not (folder / "result.json").exists()
    assert not broken.results.exists() or not list(broken.results.rglob("tiny-cpu-after.*"))
    shorter = Path(study).read_text()
    Path(study).write_text(shorter.replace("images = 16, at = [7]", "images = 7"))
    assert read_result(run_arm(study, "after", "cpu", broken)).curve == expected.curve[:1]
    # Asked for more than it was at first.
    Path(study).write_text(shorter)
    found = read_result(run_arm(study, "after", "cpu", broken))
    assert found.curve == expected.curve
    Path(study).write_text(shorter.replace("at = [7]", "at = [7, 12]"))
    (folder / "training" / "checkpoints" / "step-000000003").rename(tmp_path / "lost")
    with pytest.raises(InputError, match="has gone beyond 12 images and kept no checkpoint"):
        run_arm(study, "after", "cpu", broken)
    ours, theirs = weights(broken.root, "after"), weights(whole.root, "after")
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def _kill(_measure, _checkpoint):
    raise KeyboardInterrupt


def _at_most(experiment, steps):
    train = experiment.train.model_copy(update={"steps": min(steps, experiment.train.steps)})
    return experiment.model_copy(update={"train": train})


def test_a_finished_arm_is_stored_again_without_training(pretrained, tmp_path, monkeypatch):
    study = str(pretrained.parent / "tiny.toml")
    monkeypatch.setattr(arm_training, "train", None)
    again = ArmSettings(**{**vars(settings(pretrained.parent)), "results": tmp_path})
    assert (
        run_arm(study, "pretrain", "cpu", again).read_text()
        == (pretrained / "results" / "synthetic" / "tiny-cpu-pretrain.json").read_text()
    )


def test_another_question_in_the_folder_of_an_arm_is_refused(study, pretrained, tmp_path):
    shutil.copytree(pretrained, tmp_path / "out")
    with pytest.raises(InputError, match="was started with another stage: give another --out"):
        run_arm(study, "pretrain", "cpu", settings(tmp_path))


def test_an_arm_whose_start_has_not_run_names_the_command(study, tmp_path):
    with pytest.raises(InputError, match="first `maskfed-server reproduce tiny --scale cpu --arm pretrain`"):
        run_arm(study, "after", "cpu", settings(tmp_path))


def test_another_seed_is_another_training_with_a_folder_result_and_start_of_its_own(study, pretrained, tmp_path):
    shutil.copytree(pretrained, tmp_path / "out")
    with pytest.raises(InputError, match=r"--arm pretrain --seed 3` with the same images"):
        run_arm(study, "after", "cpu", settings(tmp_path, seed=3))
    stored = run_arm(study, "pretrain", "cpu", settings(tmp_path, seed=3))
    assert stored is not None
    assert stored.name == "tiny-cpu-pretrain-seed-3.json"
    result = read_result(stored)
    assert (result.seed, result.command.endswith("--seed 3")) == (3, True)
    first, other = (weights(tmp_path / "out", arm) for arm in ("pretrain", "pretrain-seed-3"))
    assert any((first[name] != other[name]).any() for name in first)


def test_real_faces_leave_no_picture(study, tmp_path):
    write_folder(tmp_path / "faces", 80, 16, 3)
    wanted = settings(tmp_path, private=str(tmp_path / "faces"))
    assert run_arm(study, "pretrain", "cpu", wanted) == result_file(wanted.results, "tiny", "cpu", "pretrain")
    stored = run_arm(study, "after", "cpu", wanted)
    assert stored == result_file(wanted.results, "tiny", "cpu", "after")
    assert not list((wanted.root / "tiny-cpu" / "after" / "points").glob("*.png"))
    assert not list(wanted.results.rglob("*.png"))


def test_weights_that_no_extractor_takes_are_refused(study, tmp_path):
    with pytest.raises(InputError, match=r"--weights file.pth: no extractor takes it"):
        run_arm(study, "pretrain", "cpu", settings(tmp_path, weights=Path("file.pth")))


def test_a_digest_is_of_the_weights_and_stands_in_the_command(study, tmp_path):
    weights = tmp_path / "inception.pth"
    weights.write_bytes(b"no weights")
    specs = ("random-inception", "inception-v3-compat")
    wanted = settings(tmp_path, weights=weights, weights_sha256="ab" * 32, extractors=specs)
    with pytest.raises(InputError, match=r"inception\.pth.*--weights-sha256"):
        run_arm(study, "pretrain", "cpu", wanted)
    command = wanted.command("tiny", "cpu", "after")
    assert command.endswith(f"--weights inception.pth --weights-sha256 {'ab' * 32}")


def test_an_arm_may_start_elsewhere_at_one_scale(study, pretrained, tmp_path):
    shutil.copytree(pretrained, tmp_path / "out")
    text = Path(study).read_text()
    Path(study).write_text(text.replace("images = 16, at = [7]", 'images = 16, init = "sites"'))
    with pytest.raises(InputError, match="starts from tiny/sites, which has not run"):
        run_arm(study, "after", "cpu", settings(tmp_path))


def test_a_missing_extractor_is_refused_before_anything_is_written(study, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        run_arm(study, "pretrain", "cpu", settings(tmp_path, extractors=("onnx:nowhere.onnx",)))
    assert not (tmp_path / "out").exists()


def test_a_federated_arm_goes_through_the_simulation_and_is_measured_at_its_rounds(
    study, pretrained, tmp_path, monkeypatch
):
    wanted, asked = settings(tmp_path), []
    shutil.copytree(pretrained, wanted.root)

    def simulate(options, _console):
        asked.append(options)
        experiment = load_experiment(Path(options.experiment))
        run = create(options.out / "runs" / RUN, experiment)
        if len(asked) == 1:
            return 1
        for number in range(experiment.federation.rounds + 1):
            save_global(run.round_checkpoint(number), initial_model(Path(options.init), experiment), experiment)
        log = RunLog(run.metrics)
        log.write("round", round=1, seconds={"total": 2.5})
        log.write("end", status="completed", round=3)
        return 0

    monkeypatch.setattr(arm_training, "simulate", simulate)
    assert run_arm(study, "sites", "cpu", wanted) is None
    result = read_result(run_arm(study, "sites", "cpu", wanted))
    # 2 sites x 2 steps x 4 images a round: 40 images are 2.5, so 3 rounds.
    assert [(point.images, point.steps) for point in result.curve] == [(32, 4), (48, 6)]
    experiment = load_experiment(Path(asked[1].experiment)).federation
    assert (experiment.rounds, experiment.min_replies, asked[1].num_sites) == (3, 2, 2)
    assert Path(asked[1].data).name == "train"
    assert (result.sites, result.training_seconds) == (2, 2.5)


def test_the_command_runs_arms_in_order_and_wrong_input_is_one_line(study, tmp_path, monkeypatch, capsys):
    out = ["--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    done = CliRunner().invoke(cli.app, ["reproduce", study, "--arm", "pretrain", *out])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "results" / "synthetic" / "tiny-cpu-pretrain.json").read_text())["arm"] == "pretrain"
    for words in (["none"], [study, "--scale", "gpu"], [study, "--arm", "none"], [study, "--end-images", "100"]):
        monkeypatch.setattr("sys.argv", ["maskfed-server", "reproduce", *words, *out])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
