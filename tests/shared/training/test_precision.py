import pytest
import torch

from shared.experiment.config import parse_experiment
from shared.training import precision
from shared.training.precision import cpu_flags, decide_precision, speed_up_float32


@pytest.mark.parametrize(
    ("flags", "expected"), [({"avx512_bf16"}, "bfloat16"), ({"amx_bf16"}, "bfloat16"), ({"avx2"}, "float32")]
)
def test_auto_is_bfloat16_only_where_the_cpu_has_units_for_it(monkeypatch, flags, expected):
    monkeypatch.setattr(precision, "cpu_flags", lambda: frozenset(flags))
    assert decide_precision(parse_experiment(""), "cpu") == expected


def test_auto_is_float32_under_dp_sgd(monkeypatch):
    monkeypatch.setattr(precision, "cpu_flags", lambda: frozenset({"avx512_bf16"}))
    assert decide_precision(parse_experiment("", ["privacy.mechanism=dp-sgd"]), "cpu") == "float32"


@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
def test_what_the_experiment_asks_for_is_taken(asked):
    assert decide_precision(parse_experiment("", [f"train.precision={asked}"]), "cpu") == asked


def test_cpu_flags_are_read_as_linux_lists_them(monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu avx2\n\nprocessor\t: 1\nflags\t\t: fpu avx2\n")
    monkeypatch.setattr(precision, "_CPU_INFO", tmp_path / "cpuinfo")
    assert cpu_flags() == {"fpu", "avx2"}
    monkeypatch.setattr(precision, "_CPU_INFO", tmp_path / "none")
    assert cpu_flags() == frozenset()


def test_faster_float32_is_kept_only_when_it_is_accurate(monkeypatch):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        if speed_up_float32():
            assert torch.get_float32_matmul_precision() == "medium"
        monkeypatch.setattr(precision, "_MATMUL_TOLERANCE", 0.0)
        torch.set_float32_matmul_precision("highest")
        assert not speed_up_float32()
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)
