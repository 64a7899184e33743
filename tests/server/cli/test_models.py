import sys

import numpy as np
import pytest
from PIL import Image

from server.cli import main as cli


def run(monkeypatch, *words):
    """Exit code of the coordinator's command line."""
    monkeypatch.setattr(sys, "argv", ["maskfed-server", *map(str, words)])
    try:
        cli.main()
    except SystemExit as end:
        return end.code
    raise AssertionError("the command line always exits")


def fill(folder, count, value):
    folder.mkdir(parents=True)
    for number in range(count):
        Image.fromarray(np.full((9, 9, 3), value, np.uint8)).save(folder / f"{number}.png")
    return folder


def test_every_source_size_and_crop_has_a_cache_of_its_own(tmp_path, monkeypatch, capsys):
    for name, value in (("faces.train", 10), ("faces.val", 20), ("faces", 30)):
        fill(tmp_path / name, 2, value)
        assert run(monkeypatch, "data", "cache", tmp_path / name, "--size", "8", "--workers", "1") == 0
    assert run(monkeypatch, "data", "cache", tmp_path / "faces", "--size", "8", "--crop", "4") == 0
    made = sorted(path.name for path in tmp_path.iterdir() if path.name.endswith(".cache"))
    assert made == ["faces-8-crop4.cache", "faces-8.cache", "faces.train-8.cache", "faces.val-8.cache"]
    assert run(monkeypatch, "data", "cache", tmp_path / "faces", "--size", "8", "--out", tmp_path / made[3]) == 2
    assert "is of " in capsys.readouterr().err


@pytest.mark.parametrize("words", [".", "../faces", "../faces/."])
def test_a_folder_named_by_dots_has_its_cache_beside_it(tmp_path, monkeypatch, words):
    fill(tmp_path / "faces", 2, 7)
    monkeypatch.chdir(tmp_path / "faces")
    assert run(monkeypatch, "data", "cache", words, "--size", "8") == 0
    assert (tmp_path / "faces-8.cache" / "cache.json").exists()


def test_the_root_has_nothing_beside_it(monkeypatch, capsys):
    assert run(monkeypatch, "data", "cache", "/", "--size", "8") == 2
    assert "nothing lies beside it; name the folder of the cache with --out" in capsys.readouterr().err


def test_what_was_left_out_is_told(tmp_path, monkeypatch, capsys):
    folder = fill(tmp_path / "faces", 3, 7)
    for name in ("a.raw", "b.raw", "c.xcf"):
        (folder / name).touch()
    (folder / "broken.png").write_bytes(b"broken")
    words = ("data", "cache", folder, "--size", "8")
    assert run(monkeypatch, *words) == 2
    assert "1 of 4 files are unreadable (25.0%, more than 1%)" in capsys.readouterr().err
    assert run(monkeypatch, *words, "--allow-unreadable") == 0
    assert "3 images, 1 unreadable files left out, 2 .raw, 1 .xcf ignored" in capsys.readouterr().out
