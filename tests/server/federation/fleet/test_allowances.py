"""What is granted is read again, whatever a full disk or a kill has left in between."""

from pathlib import Path

import pytest

from deploy.guards.web.pushes import Allowance, AllowanceFiles
from server.federation.fleet.allowances import FOLDER, Allowances
from tests.full_disk import room_for

RUN = 5


def test_a_full_disk_grants_nothing_and_takes_nothing_that_was_granted(tmp_path: Path):
    granting, reading = Allowances(tmp_path, RUN), AllowanceFiles(tmp_path / FOLDER)
    granting.grant({"a": 1}, 1000)
    file = tmp_path / FOLDER / f"{RUN}.jsonl"
    before = file.read_bytes()
    for spare in (0, 20, len(before) + 5):
        with room_for(len(before) + spare), pytest.raises(OSError, match="too large"):
            granting.grant({"b": 2, "c": 3}, 1000)
        assert file.read_bytes() == before
        assert reading.find("b") is None
    granting.grant({"b": 2, "c": 3}, 2000)
    assert [reading.find(message) for message in "abc"] == [
        Allowance(node, size, most) for node, size, most in ((1, 1000, 64), (2, 2000, 64), (3, 2000, 64))
    ]


def test_a_line_that_a_kill_has_torn_costs_that_line_alone(tmp_path: Path):
    granting, reading = Allowances(tmp_path, RUN), AllowanceFiles(tmp_path / FOLDER)
    granting.grant({"a": 1}, 1000)
    with (tmp_path / FOLDER / f"{RUN}.jsonl").open("ab") as file:
        file.write(b'{"message": "torn", "no')
    granting.grant({"b": 2}, 1000)
    for damaged in (b"[]\n", b'"text"\n', b'{"message": "d"}\n', b"\xff\n", b"[" * 5000 + b"\n"):
        with (tmp_path / FOLDER / f"{RUN}.jsonl").open("ab") as file:
            file.write(damaged)
    granting.grant({"c": 3}, 1000)
    found = [reading.find(message) for message in ("a", "torn", "b", "d", "c")]
    assert [each and each.node for each in found] == [1, None, 2, None, 3]
