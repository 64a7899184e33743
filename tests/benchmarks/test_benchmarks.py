"""The benchmark runner and its arithmetic; the figures themselves are not tests."""

import os
import re
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks import __main__ as runner
from benchmarks import client_round, gpu
from benchmarks.measure import cpu_seconds, medians, paired_ratio, train_flops, verdict
from shared.experiment.config import parse_experiment
from tests import forked

ROOT = Path(__file__).parents[2]
REST = [
    "PIL",
    "tomli_w",
    "flwr",
    "opacus",
    "typer",
    "rich",
    "torchvision",
    "diffusers",
    "matplotlib",
    "scipy",
    "cryptography",
]


def test_operations_of_two_sequences_are_counted_by_hand():
    text = '[model]\nsize = "L"\nimage_size = 256\n[data]\nwavelet = "haar"\nwavelet_tokens = "split"\n'
    tokens, width = 2049, 1024
    linear = 17 * 12 * width**2 + 8 * 2 * width**2 + 2 * 96 * width
    expected = 3 * (2 * tokens * linear + 4 * 17 * tokens**2 * width)
    assert train_flops(parse_experiment(text)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("size", "mask", "gigaflops"),
    [("S", "", 73.3), ("S", 'kind = "block"\nratio = 0.9', 8.8), ("B", "", 160.8), ("L", "", 369.7)],
)
def test_operations_of_a_training_image_match_the_hand_count(size, mask, gigaflops):
    objective = "msm" if mask else "dsm"
    text = f'[train]\nobjective = "{objective}"\n[model]\nsize = "{size}"\nimage_size = 64\n[mask]\n{mask}\n'
    assert train_flops(parse_experiment(text)) / 1e9 == pytest.approx(gigaflops, abs=0.06)


def test_actions_take_turns_and_ratios_are_paired():
    calls = []
    times = cpu_seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, warm_up=1)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}
    assert paired_ratio({"a": [2.0, 6.0, 9.0], "b": [1.0, 2.0, 1.0]}, "a", "b") == 3.0
    assert medians({"a": [3.0, 1.0, 2.0]}) == {"a": 2.0}


def test_verdict_is_the_exit_status(capsys):
    assert verdict("x", "3x", reached=True) == 0
    assert verdict("x", "1x", reached=False) == 1
    assert capsys.readouterr().out == "x: 3x: reached\nx: 1x: NOT reached\n"


def test_every_benchmark_is_found_and_none_runs_on_import():
    assert {"train_step", "optimizer", "gpu", "privacy_attacks"} <= set(runner.discover())
    assert not {"measure", "nodes", "local", "stranger", "unguarded", "open_door"} & set(runner.discover())


def test_page_keeps_rows_that_are_not_run_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "PAGE", tmp_path / "BENCHMARKS.md")
    modules = {"one": object(), "two": object(), "three": object()}
    monkeypatch.setattr(runner, "discover", lambda: modules)
    monkeypatch.setattr(runner, "run", lambda name: (int(name == "two"), f"{name} is 3 | 4"))
    assert runner.main(["one"]) == 0
    assert runner.main(["two"]) == 1
    rows = runner.read_rows(tmp_path / "BENCHMARKS.md")
    assert rows["one"][1] == "one is 3 / 4"
    assert rows["two"][2] == "`python -m benchmarks.two`"
    assert rows["three"][1] == "not measured"
    assert "short: two" in capsys.readouterr().out
    assert runner.main(["four"]) == 2


def test_what_cannot_run_here_has_a_status_of_its_own_and_keeps_the_stored_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "PAGE", tmp_path / "BENCHMARKS.md")
    monkeypatch.setattr(runner, "discover", lambda: {"one": object(), "two": object()})
    outcomes = {"one": (0, "one is 3"), "two": (0, "two is 4")}
    monkeypatch.setattr(runner, "run", lambda name: outcomes[name])
    assert runner.main(["one", "two"]) == 0
    outcomes["one"] = 77, "one: not measured: no GPU here"
    assert runner.main(["one", "two"]) == 77
    assert runner.read_rows(runner.PAGE)["one"][1] == "one is 3"
    assert capsys.readouterr().out.endswith("1 of 2 figures reached; not measured here: one\n")
    assert runner.main(["one"]) == 77
    monkeypatch.setattr(runner, "PAGE", tmp_path / "new.md")
    assert runner.main(["one"]) == 77
    assert runner.read_rows(runner.PAGE)["one"][1] == "not measured", "a page that never had a figure says so"
    monkeypatch.setattr(runner, "PAGE", tmp_path / "BENCHMARKS.md")
    capsys.readouterr()
    outcomes["two"] = 1, "two is 1"
    assert runner.main(["one", "two"]) == 1
    assert runner.read_rows(runner.PAGE)["two"][1] == "two is 1"


def test_no_benchmark_calls_a_skip_a_success():
    texts = {path.name: path.read_text() for path in Path(runner.__file__).parent.rglob("*.py")}
    skips = re.compile(r"print\([^\n]*not measured[^\n]*\n\s*return 0")
    assert [name for name, text in texts.items() if skips.search(text)] == []


def test_page_says_not_measured_only_where_nothing_of_a_module_is():
    rows = {
        "one": ("one", "not measured"),
        "one --all": ("one --all", "3 s"),
        "two --all": ("two --all", "not measured"),
        "gone": ("gone", "3 s"),
    }
    assert runner.row_names(["one", "two"], rows) == ["one --all", "two", "two --all"]


def test_options_make_a_row_of_their_own_without_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "PAGE", tmp_path / "BENCHMARKS.md")
    monkeypatch.setattr(runner, "discover", lambda: {"one": object()})
    ran = []
    monkeypatch.setattr(runner, "run", lambda name: (ran.append(name), (0, "figure"))[1])
    assert runner.main(["one --faces /home/me/faces.zip", "one"]) == 0
    assert ran == ["one --faces /home/me/faces.zip", "one"]
    assert "/home" not in (tmp_path / "BENCHMARKS.md").read_text(encoding="utf-8")
    assert set(runner.read_rows(tmp_path / "BENCHMARKS.md")) == {"one", "one --faces faces.zip"}


def test_run_passes_output_on_and_returns_the_last_line(tmp_path, capfd, monkeypatch):
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "quick.py").write_text("import sys\nprint('a line')\nprint('7 of', sys.argv[1:])\nsys.exit(3)\n")
    monkeypatch.setattr(runner, "PAGE", folder / "BENCHMARKS.md")
    assert runner.run("quick --rounds 9") == (3, "7 of ['--rounds', '9']")
    assert capfd.readouterr().out == "== quick --rounds 9\na line\n7 of ['--rounds', '9']\n"


def test_a_benchmark_ends_with_the_command_that_runs_it(tmp_path, monkeypatch):
    folder, told = tmp_path / "benchmarks", tmp_path / "told"
    folder.mkdir()
    (folder / "__init__.py").touch()
    code = f"import os, pathlib, time\npathlib.Path({str(told)!r}).write_text(str(os.getpid()))\ntime.sleep(60)\n"
    (folder / "slow.py").write_text(code)
    monkeypatch.setattr(runner, "PAGE", folder / "BENCHMARKS.md")
    command = os.fork()
    if command == 0:
        runner.run("slow")
        os._exit(0)
    eventually(lambda: told.exists() and told.read_text())
    benchmark = psutil.Process(int(told.read_text()))
    os.kill(command, signal.SIGKILL)
    os.waitpid(command, 0)
    eventually(lambda: not benchmark.is_running() or benchmark.status() == psutil.STATUS_ZOMBIE)


def eventually(holds):
    deadline = time.monotonic() + 50
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_benchmark_runs_in_the_environment_of_the_command_whatever_modules_set(monkeypatch):
    given = []
    monkeypatch.setattr(runner.subprocess, "Popen", lambda *_, **options: given.append(options["env"]) or nullcontext())
    monkeypatch.setenv("OMP_NUM_THREADS", "of another module")
    with pytest.raises(AttributeError):  # nothing ran
        runner.run("gpu")
    assert given[0].get("OMP_NUM_THREADS") != "of another module"


def test_round_of_a_gpu_is_never_guessed(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main(["--round"]) == 77
    assert capsys.readouterr().out == "client round: not measured: no GPU here\n"
    with pytest.raises(SystemExit):
        gpu.main(["--rounds"])


def test_round_on_a_device_is_compared_with_the_cpu(monkeypatch, capsys):
    monkeypatch.setattr(client_round, "BATCH", 4)
    monkeypatch.setattr(client_round, "NUM_IMAGES", 16)
    monkeypatch.setattr(client_round, "IMAGE_SIZE", 16)
    monkeypatch.setattr(client_round, "NUM_WORDS", 64)
    options = ["--round", "--device", "cpu", "--size", "T", "--steps", "2"]
    assert gpu.main(options) == 0
    figure = capsys.readouterr().out.splitlines()[-1]
    assert "DP gradients differ by 0.0e+00" in figure and "DP noise of the same bits" in figure
    assert figure.endswith(": reached")


@pytest.mark.parametrize(
    ("losses", "gradients", "noise"),
    [((1.0, 1.1), (1.0, 1.0), (1, 1)), ((1.0, 1.0), (1.0, 1.1), (1, 1)), ((1.0, 1.0), (1.0, 1.0), (1, 2))],
)
def test_round_with_other_numbers_than_the_cpus_falls_short(monkeypatch, losses, gradients, noise):
    numbers = iter(noise)
    monkeypatch.setattr(client_round, "NUM_WORDS", 4)
    monkeypatch.setattr(client_round, "rounded_pairs", lambda *_: torch.tensor(next(numbers)))
    monkeypatch.setattr(client_round, "make_site", lambda _: (Path(), None))
    for name in ("open_dataset", "with_device", "make_request"):
        monkeypatch.setattr(client_round, name, lambda *_, **__: None)
    monkeypatch.setattr(client_round, "images_per_second", lambda *_: 1.0)
    found = {"round_loss": iter(losses), "clipped_sum": map(torch.tensor, gradients)}
    for name, values in found.items():
        monkeypatch.setattr(client_round, name, lambda *_, values=values: next(values))
    assert gpu.main(["--round", "--device", "cpu"]) == 1


def test_gpu_rows_import_and_step_with_the_packages_of_a_gpu_image_only(tmp_path):
    code = f"""
import sys, warnings
warnings.simplefilter("error")
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {REST}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
torch.set_num_threads(1)
from benchmarks.gpu import sample_x_0
from benchmarks.train_step import make_experiment, make_step
experiment = make_experiment(0.9, 2, "T")
print(experiment.realised_mask_ratio)
make_step(experiment)()
"""
    assert forked.run_code(code, tmp_path / "said") == 0, (tmp_path / "said").read_text()
