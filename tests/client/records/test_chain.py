"""Hash-chained files under damage, tears and competition."""

import datetime as dt
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from client.records import chain
from client.records.chain import BusyError, ChainError, open_chain, parse_chain, read_chain
from shared.errors import InputError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "chain.jsonl"
    with open_chain(target, wait=False) as opened:
        for number in range(3):
            opened.append("event", number=number)
    return target


def test_entries_come_back_in_order_with_times(path: Path):
    entries = read_chain(path)
    assert [entry.fields["number"] for entry in entries] == [0, 1, 2]
    assert [entry.sequence for entry in entries] == [0, 1, 2]
    assert all(entry.time.utcoffset() is not None for entry in entries)


def test_lines_are_json_and_private(path: Path):
    assert all(json.loads(line)["schema"] == 1 for line in path.read_text().splitlines())
    assert path.stat().st_mode & 0o777 == 0o600


def test_appending_goes_on_after_reopening(path: Path):
    with open_chain(path, wait=False) as opened:
        opened.append("event", number=3)
    assert len(read_chain(path)) == 4


@pytest.mark.parametrize("line", [0, 1, 2])
def test_every_changed_byte_is_noticed(path: Path, line: int):
    good = path.read_bytes()
    start = sum(len(each) + 1 for each in good.split(b"\n")[:line])
    for offset in range(0, len(good.split(b"\n")[line]), 7):
        damaged = bytearray(good)
        damaged[start + offset] ^= 1
        with pytest.raises(ChainError):
            parse_chain(bytes(damaged), "x")


@pytest.mark.parametrize("order", [[1, 2], [0, 2], [1, 0, 2], [0, 1, 1, 2], [0, 1, 2, 2]])
def test_missing_moved_or_repeated_lines_are_noticed(path: Path, order: list[int]):
    lines = path.read_bytes().splitlines(keepends=True)
    with pytest.raises(ChainError, match="does not follow"):
        parse_chain(b"".join(lines[index] for index in order), "x")


def test_line_of_another_chain_is_noticed(path: Path, tmp_path: Path):
    with open_chain(tmp_path / "other.jsonl", wait=False) as other:
        for number in range(3):
            other.append("event", number=number + 10)
    lines, others = (each.read_bytes().splitlines(keepends=True) for each in (path, tmp_path / "other.jsonl"))
    with pytest.raises(ChainError, match="line 2 does not follow"):
        parse_chain(lines[0] + others[1] + others[2], "x")


def test_same_entry_at_the_same_moment_ends_two_chains_differently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    moment = dt.datetime(2026, 1, 2, tzinfo=dt.UTC)
    monkeypatch.setattr(chain, "dt", SimpleNamespace(UTC=dt.UTC, datetime=SimpleNamespace(now=lambda _zone: moment)))
    heads = []
    for name in "ab":
        with open_chain(tmp_path / name, wait=False) as opened:
            opened.append("event", number=1)
            heads.append(opened.head)
    assert heads[0] != heads[1]


def test_entry_is_forced_to_disk_before_append_returns(path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[str, int]] = []
    write, fsync = os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda file, data: calls.append(("write", file)) or write(file, data))
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(("fsync", file)) or fsync(file))
    with open_chain(path, wait=False) as opened:
        calls.clear()
        opened.append("event", number=3)
        (first, file), *_, last = calls
    assert (first, last) == ("write", ("fsync", file))


@pytest.mark.parametrize("cut", [1, 10, 100])
def test_torn_last_line_is_set_aside_and_recorded(path: Path, cut: int):
    with open_chain(path, wait=False) as opened:
        opened.append("event", number=99)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert len(read_chain(path)) == 3, "reading does not repair"
    with open_chain(path, wait=False) as opened:
        assert [entry.kind for entry in opened.entries] == ["event"] * 3 + ["recovered"]
    assert len(read_chain(path)) == 4
    (torn,) = path.parent.glob("*.torn-*")
    assert whole.endswith(torn.read_bytes() + whole[len(whole) - cut :])


def test_other_schema_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chain, "SCHEMA_VERSION", 2)
    with pytest.raises(ChainError, match="schema 1, this version reads 2"):
        read_chain(path)


def test_second_writer_is_told_that_it_is_busy(path: Path):
    with open_chain(path, wait=False), pytest.raises(BusyError, match="in use"), open_chain(path, wait=False):
        pass


def test_readable_by_others_is_refused(path: Path):
    path.chmod(0o644)
    with pytest.raises(InputError, match="chmod 600"), open_chain(path, wait=False):
        pass


def test_full_disk_leaves_the_chain_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch):
    before, write = path.read_bytes(), os.write

    def half(descriptor: int, data: bytes) -> int:
        if len(data) < 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[: len(data) - 50])

    with open_chain(path, wait=False) as opened:
        monkeypatch.setattr(os, "write", half)
        with pytest.raises(OSError, match="No space"):
            opened.append("event", text="x" * 20)
        monkeypatch.undo()
        assert path.read_bytes() == before
        opened.append("event", number=3)
    assert len(read_chain(path)) == 4


def test_processes_that_wait_for_each_other_lose_nothing(tmp_path: Path):
    target = tmp_path / "chain.jsonl"
    code = (
        "import sys; from pathlib import Path; from client.records.chain import open_chain\n"
        "for number in range(10):\n"
        "    with open_chain(Path(sys.argv[1]), wait=True) as opened: opened.append('event', number=number)\n"
    )
    workers = [subprocess.Popen([sys.executable, "-c", code, str(target)], cwd=ROOT) for _ in range(2)]
    assert [worker.wait(60) for worker in workers] == [0, 0]
    assert len(read_chain(target)) == 20


def test_an_entry_that_fails_takes_no_earlier_one_with_it(path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with open_chain(path, wait=False) as opened:
        opened.append("event", number=3)
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            opened.append("event", number=4)
        monkeypatch.undo()
    assert [entry.fields["number"] for entry in read_chain(path)] == [0, 1, 2, 3]
