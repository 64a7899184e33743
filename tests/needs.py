"""What tests need from the system: missing, a test skips with a counted reason; in CI it fails instead."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest


class Program(NamedTuple):
    """A line of `programs.txt`."""

    name: str
    package: str
    used_for: str


PROGRAMS = [
    Program(*line.split(maxsplit=2))
    for line in (Path(__file__).parent / "programs.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
]


def missing_programs() -> str:
    """One line: which system programs are missing, what that leaves out, what brings them; empty if none is."""
    missing = [program for program in PROGRAMS if _find(program.name) is None]
    if not missing:
        return ""
    told = ", ".join(f"{program.name} ({program.used_for})" for program in missing)
    command = f"apt-get install --no-install-recommends {' '.join(program.package for program in missing)}"
    return f"missing programs, which leaves out: {told}; to get them: {command}"


def _find(name: str) -> str | None:
    """Path of a program, or of a file that is named with its path; Debian keeps some where only root's PATH looks."""
    return shutil.which(
        name, os.F_OK if name.startswith("/") else os.X_OK, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    )


def need_binary(name: str) -> str:
    """Path of the program `name`; without it the test is skipped, or fails where MASKFED_REQUIRE_ALL is set."""
    assert name in {program.name for program in PROGRAMS}, f"list {name} in programs.txt"
    path = _find(name)
    if path is None:
        need(False, f"the program {name!r} is not installed")
    return str(path)


def need(is_there: bool, reason: str) -> None:
    """Skip with `reason` unless `is_there`; fail instead where MASKFED_REQUIRE_ALL is set."""
    if is_there:
        return
    if os.environ.get("MASKFED_REQUIRE_ALL") == "1":
        pytest.fail(f"MASKFED_REQUIRE_ALL is set, but {reason}")
    pytest.skip(reason)
