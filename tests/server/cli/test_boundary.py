"""Whatever stands in an argument: one line and an exit code, never a traceback, and nothing half-made stays."""

import os
import random
import resource
import shutil
import sys

import pytest
import torch
from PIL import Image

from server.cli import main as cli
from shared.diffusion.uvit import build_model
from shared.experiment.config import parse_experiment
from shared.storage.checkpoint import save_checkpoint

RNG = random.Random(7)
ODD_PATHS = [
    ".",
    "..",
    "",
    " ",
    "-",
    "\udcff\udcfe.png",
    "x" * 300,
    "a/" * 2000 + "b",
    "/dev/null",
    "~",
    "a\nb",
]


def call(monkeypatch, capsys, *words):
    """Exit code and standard error of the coordinator's command line; any exception but the exit is a traceback."""
    monkeypatch.setattr(sys, "argv", ["maskfed-server", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    code = ended.value.code
    return code if isinstance(code, int) else int(code is not None), capsys.readouterr().err


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    experiment = parse_experiment("[model]\nimage_size = 16\n[evaluation]\nsteps = 2\n")
    torch.manual_seed(0)
    weights = {name: tensor.numpy() for name, tensor in build_model(experiment).state_dict().items()}
    folder = tmp_path_factory.mktemp("model") / "step-000000001"
    save_checkpoint(folder, {"model": weights, "ema": weights}, {"experiment": experiment, "step": 1})
    return folder


def odd_files(tmp_path):
    """Files and folders that are something else than what a command wants."""
    made = []
    for name, content in (
        ("empty", b""),
        ("noise.png", RNG.randbytes(300)),
        ("noise.toml", RNG.randbytes(300)),
        ("deep.toml", b"x = " + b"[" * 5000),
        ("text.zip", b"PK\3\4" + RNG.randbytes(200)),
        ("page.pt", b"<html>"),
        ("noise.safetensors", RNG.randbytes(64)),
        ("huge.safetensors", (2**62).to_bytes(8, "little") + b"{}"),
        ("noise.npy", b"\x93NUMPY\1\0" + RNG.randbytes(50)),
        ("noise.onnx", RNG.randbytes(99)),
    ):
        (tmp_path / name).write_bytes(content)
        made.append(tmp_path / name)
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "meta.json").write_bytes(RNG.randbytes(50))
    return [*made, tmp_path / "loop", tmp_path / "folder"]


SMALL = [word for each in ("train.steps=1", "train.batch=2", "model.image_size=16") for word in ("--set", each)]
COMMANDS = {
    "check": ["check", "ODD"],
    "cache": ["data", "cache", "ODD", "--size", "16", "--out", "OUT"],
    "identities": ["data", "cache", "FACES", "--size", "16", "--identities", "ODD", "--out", "OUT"],
    # An empty file is an experiment, of defaults: one small step of it will do.
    "train": ["train", "ODD", "--data", "synthetic:public:4", "--out", "OUT", *SMALL],
    "train-data": ["train", "EXPERIMENT", "--data", "ODD", "--out", "OUT", "--set", "train.steps=1"],
    "import": ["import-checkpoint", "ODD", "--out", "OUT", "--schedule", "linear"],
    "export": ["export", "ODD", "--out", "OUT.pt"],
    "sample": ["sample", "ODD", "--num", "1", "--out", "OUT"],
    "evaluate": ["evaluate", "ODD", "--reference", "synthetic:public:4", "--out", "OUT"],
    "report": ["report", "ODD"],
    "release": ["release", "ODD", "--out", "OUT"],
    "show": ["experiments", "show", "ODD"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_odd_files_and_paths_are_one_line(name, tmp_path, monkeypatch, capsys):
    tmp_path = tmp_path / "a" / "b"
    tmp_path.mkdir(parents=True)  # "..": the test's own folder, or it would read the pictures of all other tests
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faces").mkdir()
    (tmp_path / "experiment.toml").write_text("[model]\nimage_size = 16\n")
    stand_ins = {"FACES": tmp_path / "faces", "EXPERIMENT": tmp_path / "experiment.toml", "OUT": tmp_path / "out"}
    for odd in [*odd_files(tmp_path), *ODD_PATHS]:
        words = [odd if word == "ODD" else stand_ins.get(word, word) for word in COMMANDS[name]]
        code, told = call(monkeypatch, capsys, *words)
        last = told.splitlines()[-1:] or [""]
        assert code in (0, 2, 3), (odd, told)
        assert "Traceback" not in told, (odd, told)
        assert code == 0 or name == "check" or last[0].startswith("error: "), (odd, told)
        assert code == 0 or not (tmp_path / "out").exists() or name in ("cache", "identities"), odd
        if code == 0 and name in ("train", "train-data"):
            shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--device", "cuda:99"], "device 'cuda:99'"),
        (["--device", "foo"], "device 'foo' is unknown: give cpu, cuda or cuda:<index>"),
        (["--device", "mps"], "is unknown"),
        (["--device", "meta"], "is unknown"),
        (["--set", "evaluation.eta=inf"], "evaluation.eta = inf"),
        (["--set", "optim.lr=nan"], "optim.lr = nan"),
        (["--set", "optim.betas=[1.0, 2.0]"], "optim.betas.0 = 1.0"),
        (["--set", "optim.betas=[-1, 0.9]"], "optim.betas.0 = -1"),
        (["--set", "optim.weight_decay=inf"], "optim.weight_decay = inf"),
        (
            ["--set", "diffusion.schedule=linear", "--set", "diffusion.timesteps=20", "--set", "evaluation.steps=2"],
            "0.82",
        ),
        (["--precision", "float16"], "--precision 'float16'"),
    ],
)
def test_unusable_settings_are_named_before_anything_is_made(checkpoint, tmp_path, monkeypatch, capsys, words, told):
    code, line = call(monkeypatch, capsys, "sample", checkpoint, "--num", "1", "--out", tmp_path / "out", *words)
    assert code == 2 and told in line and line.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "one"), ("WORLD_SIZE", "-1"), ("LOCAL_RANK", "1e3"), ("RANK", "7"), ("WORLD_SIZE", "9" * 30)],
)
def test_variables_that_no_torchrun_sets_are_named(checkpoint, tmp_path, monkeypatch, capsys, name, value):
    monkeypatch.setenv(name, value)
    code, line = call(monkeypatch, capsys, "sample", checkpoint, "--num", "1", "--out", tmp_path / "out")
    assert code == 2 and name in line and line.count("\n") == 1


def test_samples_fit_into_an_empty_folder_that_is_named_by_a_dot(checkpoint, tmp_path, monkeypatch, capsys):
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    assert call(monkeypatch, capsys, "sample", checkpoint, "--num", "1", "--out", ".")[0] == 0
    assert [path.name for path in place.iterdir()] == ["00000000.png"]


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "MODEL", "--num", "2", "--out", "OUT/a.npy"],
        ["sample", "MODEL", "--num", "2", "--out", "OUT/a.png"],
        ["sample", "MODEL", "--num", "2", "--out", "OUT/folder"],
        ["export", "MODEL", "--out", "OUT/a.pt"],
        ["export", "MODEL", "--out", "OUT/a.safetensors"],
        ["data", "cache", "FACES", "--size", "16", "--out", "OUT/cache"],
        ["projection", "--data", "FACES", "--size", "16", "--extractor", "random-inception", "--out", "OUT/p"],
        ["init", "--home", "OUT/home"],
        ["train", "EXPERIMENT", "--data", "synthetic:public:4", "--out", "OUT/run", *SMALL],
        ["evaluate", "--samples", "FACES", "--reference", "synthetic:public:4", "--extractor", "random-inception",
         "--out", "OUT/evaluation"],
    ],
    ids=lambda words: " ".join(words[:2] + words[-1:]),
)  # fmt: skip
def test_files_that_may_not_grow_are_one_line_and_leave_nothing(checkpoint, tmp_path, monkeypatch, capsys, words):
    monkeypatch.setenv("MASKFED_CACHE", str(tmp_path / "cache"))
    (tmp_path / "out").mkdir()
    (tmp_path / "faces").mkdir()
    for number in range(4):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / "faces" / f"{number}.png")
    (tmp_path / "e.toml").write_text("[model]\nimage_size = 16\n")
    places = {"MODEL": checkpoint, "FACES": tmp_path / "faces", "EXPERIMENT": tmp_path / "e.toml"}
    given = [str(places.get(word, word)).replace("OUT", str(tmp_path / "out")) for word in words]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        code, told = call(monkeypatch, capsys, *given)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (
        code == 2
        and told.splitlines()[-1].startswith("error: ")
        and ("File too large" in told or "disk is full" in told)
    ), told
    assert list((tmp_path / "out").iterdir()) == []


def test_a_photograph_is_never_replaced_by_samples(checkpoint, tmp_path, monkeypatch, capsys):
    for content in (b"my photograph", b""):
        (tmp_path / "me.png").write_bytes(content)
        code, line = call(monkeypatch, capsys, "sample", checkpoint, "--num", "1", "--out", tmp_path / "me.png")
        assert code == 2 and "name a new file" in line and (tmp_path / "me.png").read_bytes() == content


@pytest.mark.parametrize(
    ("error", "cure"),
    [
        (OSError(28, "No space left on device", "/a/b"), "free some space there"),
        (FileNotFoundError(2, "gone", "/a/b"), "give a path that exists"),
    ],
)
def test_a_full_disk_is_one_line_with_the_place(checkpoint, tmp_path, monkeypatch, capsys, error, cure):
    def fail(*_):
        raise error

    monkeypatch.setattr("server.evaluation.sample.open_job", fail)
    code, line = call(monkeypatch, capsys, "sample", checkpoint, "--num", "1", "--out", tmp_path / "out")
    assert code == 2 and line.startswith(f"error: /a/b: {error.strerror}; {cure}") and line.count("\n") == 1
