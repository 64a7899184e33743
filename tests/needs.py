"""What tests need from the system: missing, a test skips with a counted reason; in CI it fails instead."""

import os
import shutil

import pytest


def need_binary(name: str) -> str:
    """Path of the program `name`; without it the test is skipped, or fails where MASKFED_REQUIRE_ALL is set."""
    path = shutil.which(name)
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
