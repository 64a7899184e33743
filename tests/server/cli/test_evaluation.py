import sys

import numpy as np
from PIL import Image

from server.cli import main as cli
from shared.storage.synthetic_mark import SyntheticMark, marked_png


def run(monkeypatch, *words):
    """Exit code of the coordinator's command line."""
    monkeypatch.setattr(sys, "argv", ["maskfed-server", *map(str, words)])
    try:
        cli.main()
    except SystemExit as end:
        return end.code
    raise AssertionError("the command line always exits")


def test_check_tells_generated_pictures_from_others_by_its_exit_code(tmp_path, monkeypatch, capsys):
    marked, plain, broken = (tmp_path / name for name in ("marked.png", "plain.png", "broken.png"))
    marked.write_bytes(marked_png(np.zeros((4, 4, 3), np.uint8), SyntheticMark("ab" * 32, "7")))
    Image.new("RGB", (4, 4)).save(plain)
    broken.write_bytes(b"<html>")
    assert run(monkeypatch, "check", marked) == 0
    assert capsys.readouterr().out == f"{marked}: generated (trainedAlgorithmicMedia), model {'ab' * 32}, seed 7\n"
    assert run(monkeypatch, "check", marked, plain) == 3
    assert capsys.readouterr().out.splitlines()[1] == f"{plain}: no mark of a generated picture"
    assert run(monkeypatch, "check", broken) == 2
    assert capsys.readouterr().err.count("\n") == 1
