"""How far a round is, told from one process to another."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from client.home import Home
from client.training.progress import FILE, Progress, read_progress, told

ROOT = Path(__file__).parents[3]


def test_progress_is_seen_while_the_round_runs_and_not_after(tmp_path: Path):
    home = Home(tmp_path)
    assert read_progress(home) is None
    with told(home, "run", 2, 40) as tell:
        assert read_progress(home) == Progress("run", 2, 0, 40)
        tell(7)
        assert read_progress(home) == Progress("run", 2, 7, 40)
        assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600
    assert read_progress(home) is None


def test_progress_of_a_killed_round_is_not_shown(tmp_path: Path):
    code = """
import os, sys
from pathlib import Path
from client.training.progress import told
from client.home import Home
with told(Home(Path(sys.argv[1])), "run", 2, 40) as tell:
    tell(7)
    os._exit(9)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, cwd=ROOT, timeout=60)
    assert done.returncode == 9
    assert b'"run", 2, 7, 40' in (tmp_path / FILE).read_bytes()
    assert read_progress(Home(tmp_path)) is None


def test_file_that_cannot_be_written_stops_no_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with told(Home(tmp_path / "missing"), "run", 2, 40) as tell:
        tell(7)

    def full(*_: object) -> int:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with told(Home(tmp_path), "run", 2, 40) as tell:
        tell(7)
        assert read_progress(Home(tmp_path)) is None, "a file without a record is no progress"


def test_second_writer_goes_on_silently(tmp_path: Path):
    home = Home(tmp_path)
    with told(home, "run", 2, 40) as tell, told(home, "other", 1, 5) as silent:
        silent(5)
        tell(8)
        assert read_progress(home) == Progress("run", 2, 8, 40)
