"""Compiling only where it can work."""

import os
from pathlib import Path

import torch

from shared.experiment.config import Experiment, parse_experiment
from shared.training.compiling import has_compiler, should_compile


def test_networks_are_compiled_on_gpus_unless_forbidden(monkeypatch):
    monkeypatch.setattr("shared.training.compiling.has_compiler", lambda: True)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert should_compile(Experiment(), gpu)
    assert not should_compile(parse_experiment("", ["train.compile=never"]), gpu)
    assert not should_compile(Experiment(), cpu)
    monkeypatch.setattr("shared.training.compiling.has_compiler", lambda: False)
    assert not should_compile(Experiment(), gpu), "without a C compiler the first step would fail"


def test_what_is_compiled_lies_in_the_users_own_folder_or_where_the_environment_says(monkeypatch):
    monkeypatch.setattr("shared.training.compiling.has_compiler", lambda: True)
    monkeypatch.setattr(os, "environ", {"XDG_CACHE_HOME": "/home/x/cache", "TRITON_CACHE_DIR": "/site/triton"})
    assert should_compile(Experiment(), torch.device("cuda", 0))
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).is_relative_to("/home/x/cache")
    assert os.environ["TRITON_CACHE_DIR"] == "/site/triton"


def test_compiling_needs_a_c_compiler_and_pythons_headers(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("sysconfig.get_paths", lambda _: {"include": str(tmp_path)})
    monkeypatch.setattr("shutil.which", lambda program: "/usr/bin/gcc" if program == "gcc" else None)
    assert not has_compiler()
    (tmp_path / "Python.h").touch()
    assert has_compiler()
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert not has_compiler()
