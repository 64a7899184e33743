import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import conftest, needs

ROOT = Path(__file__).parents[1]


def test_one_line_says_what_is_missing_what_for_and_what_brings_it(monkeypatch):
    there = {"ip", "systemd-analyze", "unshare"}
    monkeypatch.setattr(shutil, "which", lambda name, *_, **__: f"/bin/{name}" if name in there else None)
    line = needs.missing_programs()
    assert "\n" not in line
    assert "nginx (the door in front of the SuperLink), /usr/lib/" in line
    assert ", chromium (the report page in a browser)" in line
    assert line.endswith("install --no-install-recommends nginx-light libnginx-mod-stream chromium")


def test_nothing_is_said_where_nothing_is_missing(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name, *_, **__: f"/bin/{name}")
    assert needs.missing_programs() == ""


def test_ci_installs_the_packages_of_the_same_list(tmp_path):
    """The head of .ci/run, with an empty PATH but for a stand-in for apt-get that says what it was asked for."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").split("# Nothing is skipped here")[0]
    script = script.replace(":/usr/sbin:/sbin", "")
    for name, body in {"apt-get": 'echo "asked $*"', "id": "echo 0", "dirname": "echo .ci", "nginx": ":"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    bash = shutil.which("bash")
    assert bash is not None
    done = subprocess.run(
        [bash, "-c", script], cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    asked = done.stdout.splitlines()[-1].split()
    expected = [each.package for each in needs.PROGRAMS if each.name != "nginx" and not Path(each.name).exists()]
    assert asked[-len(expected) :] == expected


def test_what_is_called_slow_is_there():
    assert [name for name in conftest.SLOW if not (ROOT / name).exists() and not list(ROOT.glob(f"{name}*"))] == []


def test_files_stay_in_one_process(request: pytest.FixtureRequest):
    """pytest-xdist says so in the name; a version that does not would run what shares ports and set-up side by side."""
    is_distributed = "PYTEST_XDIST_WORKER" in os.environ
    assert request.node.nodeid.endswith("@tests/test_needs.py") is is_distributed
