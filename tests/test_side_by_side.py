"""A suite of its own, run in two processes: nothing of it may be lost, whatever its tests do to their process."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFTEST = f"""
import pathlib, pytest, sys
sys.path.insert(0, {str(ROOT)!r})
from tests import side_by_side
def pytest_runtestloop(session):
    groups = {{}}
    for item in session.items:
        groups.setdefault(item.path, []).append(item)
    side_by_side.run(session, list(groups.values()), 2)
    return True
@pytest.fixture(scope="session")
def kept():
    with pathlib.Path("kept").open("a") as file:
        file.write("set up, ")
    yield
    with pathlib.Path("kept").open("a") as file:
        file.write("torn down, ")
"""
ENDS = """
import os, pytest
@pytest.fixture(scope="module")
def shared():
    yield os.getpid()
    print("torn down")
def test_first(shared): assert shared != os.getppid()
def test_ends_its_process(): print("never told"); os._exit(3)
def test_after_the_end(shared): print("heard of"); assert shared != os.getpid(), "a failure"
def test_left_out(): pytest.skip("a reason")
"""
WAITS = """
import os, pathlib, time
def test_names_its_parent(kept):
    pathlib.Path("pids").write_text(str(os.getppid()))
    time.sleep(60)
"""


def _start(folder: Path, *options: str) -> subprocess.Popen[str]:
    (folder / "conftest.py").write_text(CONFTEST)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", ".", "--basetemp", "base", "-ra"]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.Popen([*command, *options, "."], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)


def test_every_result_is_told_also_of_a_process_that_ends(tmp_path):
    (tmp_path / "test_ends.py").write_text(ENDS)
    for name in "abc":
        (tmp_path / f"test_{name}.py").write_text(
            "import os, pytest\n@pytest.mark.parametrize('k', range(3))\n"
            f"def test_many(k, kept, tmp_path): (tmp_path / '{name}').write_text(str(os.getpid()))\n"
        )
    process = _start(tmp_path)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "2 failed, 10 passed, 1 skipped" in told
    assert "test_ends.py::test_ends_its_process - its process ended with 3" in told
    assert "test_ends.py::test_after_the_end - AssertionError: a failure" in told
    assert "heard of" in told and "a reason" in told
    assert (tmp_path / "kept").read_text().count("set up") <= 2
    for name in "abc":  # One process for a file, whose folders no other process has.
        files = list((tmp_path / "base").glob(f"*/*[0-9]/{name}"))
        assert len(files) == 3 and Counter(file.read_text() for file in files).most_common(1)[0][1] == 3
    assert len({file.parent.parent for file in (tmp_path / "base").glob("*/*[0-9]/?")}) > 1


def test_the_first_failure_ends_the_others_where_that_is_asked_for(tmp_path):
    (tmp_path / "test_ends.py").write_text(ENDS)
    (tmp_path / "test_waits.py").write_text(WAITS)
    process = _start(tmp_path, "-x")
    told, _ = process.communicate(timeout=50)
    assert "stopping after 1 failures" in told and "1 failed, 1 passed" in told


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_one_that_started_it(tmp_path, number):
    (tmp_path / "test_waits.py").write_text(WAITS.replace("sleep(60)", "sleep(3)"))
    process = _start(tmp_path)
    pids = tmp_path / "pids"
    while not (pids.exists() and pids.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    assert int(pids.read_text()) == process.pid
    process.send_signal(number)
    process.communicate(timeout=50)  # Returns when the last process that holds the output has ended.
    assert (tmp_path / "kept").read_text() == ("set up, torn down, " if number == signal.SIGINT else "set up, ")
