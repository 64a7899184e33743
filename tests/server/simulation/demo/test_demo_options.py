"""The demo's own folder: an interrupted demo's is taken, nobody else's is touched."""

import subprocess
import sys
from pathlib import Path

import pytest

from server.simulation.demo.demo_options import MARK, REPORT, own_folder
from shared.errors import InputError


def test_what_an_interrupted_demo_has_left_is_removed(tmp_path: Path):
    out, said = tmp_path / "demo", []
    with pytest.raises(KeyboardInterrupt), own_folder(out, said.append):
        (out / "images" / "site-0").mkdir(parents=True)
        (out / "plan.toml").touch()
        raise KeyboardInterrupt
    with own_folder(out, said.append):
        assert [path.name for path in out.iterdir()] == [MARK]
    assert said == [f"folder {out} holds an interrupted demo, which is removed"]


def test_a_finished_demo_and_any_other_folder_are_left_alone(tmp_path: Path):
    with own_folder(tmp_path / "done", print):
        (tmp_path / "done" / REPORT).touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").touch()
    for folder in ("done", "mine"):
        before = sorted((tmp_path / folder).iterdir())
        with pytest.raises(InputError, match="is not empty"), own_folder(tmp_path / folder, print):
            pass
        assert sorted((tmp_path / folder).iterdir()) == before


def test_a_running_demos_folder_is_refused(tmp_path: Path):
    with own_folder(tmp_path, print):
        (tmp_path / "images").mkdir()
        code = (
            "import sys; from pathlib import Path; from server.simulation.demo.demo_options import own_folder\n"
            "with own_folder(Path(sys.argv[1]), print): pass"
        )
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
        assert done.returncode and "is in use by process" in done.stderr
        assert (tmp_path / "images").is_dir()
