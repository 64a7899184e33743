"""The one command for a GPU: without one, a hanging part, the table, and the parts that a CPU can run."""

import subprocess

import pytest
import torch

from benchmarks import device
from tests.small_network import install


@pytest.fixture(autouse=True)
def small(monkeypatch):
    install(monkeypatch)


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert device.main([]) == 77
    assert capsys.readouterr().out == "device: not measured: no GPU here\n"


def test_all_parts_fit_the_call():
    assert sum(limit for _, limit in device.PARTS.values()) <= 540


def test_the_table_has_every_part_and_the_status_follows_the_worst(monkeypatch, capsys):
    outcomes = {"step": (0, "fast", 3.0), "round": (77, "no flwr", 1.0), "ddp": (1, "no result in 60 s", 60.0)}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    monkeypatch.setattr(device, "hardware", lambda: "a machine")
    monkeypatch.setattr(device, "run_part", lambda name, _limit: outcomes.get(name, (0, "fine", 2.0)))
    assert device.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "| step | reached | fast | 3 |" in lines
    assert "| round | not measured | no flwr | 1 |" in lines
    assert "| ddp | NOT reached | no result in 60 s | 60 |" in lines
    assert lines[-1] == "device: 4 of 6 parts on a GPU, not ddp, round: NOT reached"


def test_a_part_that_hangs_or_dies_is_a_row(monkeypatch):
    def hangs(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(device.subprocess, "run", hangs)
    assert device.run_part("step", 7)[:2] == (1, "no result in 7 s")
    died = subprocess.CompletedProcess([], 134, "", "Traceback\nRuntimeError: a|b\n")
    monkeypatch.setattr(device.subprocess, "run", lambda *_, **__: died)
    assert device.run_part("step", 7)[:2] == (134, "RuntimeError: a/b")


def test_a_network_is_compared_with_itself_on_the_cpu(capsys):
    assert device.equality() == 0
    assert "pixels 0.0e+00, two sequences 0.0e+00 relative" in capsys.readouterr().out


def test_other_numbers_than_the_cpus_fall_short(monkeypatch):
    found = iter([1.0, 1.1, 1.0, 1.0])
    monkeypatch.setattr(device, "outcome_of", lambda *_: [torch.tensor([next(found)])])
    assert device.equality() == 1


def test_compiling_without_a_compiler_is_not_measured(monkeypatch):
    monkeypatch.setattr(device, "has_compiler", lambda: False)
    assert device.compiling() == 77


def test_a_round_without_its_packages_is_not_measured(monkeypatch, capsys):
    def absent(_):
        raise ModuleNotFoundError(name="opacus")

    monkeypatch.setattr(device.gpu, "main", absent)
    assert device.site_round() == 77
    assert capsys.readouterr().out == "client round: not measured: opacus is not installed\n"
