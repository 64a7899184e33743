import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.storage import room
from shared.storage.room import has_room, patiently, room_problem, wait_for_room


def full(path: str = "/data/file") -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What the next looks at the disk find, in order; then there is room."""
    looks: list[bool] = []
    monkeypatch.setattr(room, "LOOK_SECONDS", 0.001)
    monkeypatch.setattr(room, "has_room", lambda *_: looks.pop(0) if looks else True)
    return looks


def test_room_is_tried_and_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert has_room(tmp_path, 4096)
    assert room_problem(tmp_path) == ""
    asked: list[tuple[int, int]] = []

    def no_room(_: int, offset: int, length: int) -> None:
        asked.append((offset, length))
        raise full()

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    assert not has_room(tmp_path, 4096)
    assert asked == [(0, 4096)]
    assert str(tmp_path) in room_problem(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EACCES, errno.EFBIG])
def test_where_a_disk_cannot_say_nobody_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    def unable(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", unable)
    assert has_room(tmp_path, 4096)
    assert has_room(tmp_path / "missing", 4096)


def test_a_wait_says_so_once_a_minute_and_ends_with_room(tmp_path: Path, disk: list[bool]):
    told: list[str] = []
    attended: list[bool] = []
    disk += [False] * 5
    assert wait_for_room(tmp_path, 3 * 2**20, told.append, attend=lambda: attended.append(True)) > 0
    (line,) = told
    assert str(tmp_path) in line
    assert "3 MiB" in line
    assert len(attended) == 5
    assert wait_for_room(tmp_path, 1, told.append) == 0
    assert len(told) == 1


def test_work_goes_on_when_there_is_room(tmp_path: Path, disk: list[bool]):
    tries: Iterator[OSError | None] = iter([full(), OSError(errno.EDQUOT, "quota"), None])

    def work() -> str:
        disk.append(False)
        if error := next(tries):
            raise error
        return "done"

    assert patiently(work, tmp_path, 1, lambda _: None) == "done"
    assert next(tries, "all used") == "all used"


def test_what_waiting_does_not_cure_is_raised(tmp_path: Path, disk: list[bool], monkeypatch: pytest.MonkeyPatch):
    """Another fault; a full disk with room; patience that is over; somebody who needs the answer no more."""

    def failing(error: OSError) -> None:
        raise error

    with pytest.raises(OSError, match="denied"):
        patiently(lambda: failing(OSError(errno.EACCES, "denied")), tmp_path, 1, lambda _: None)
    with pytest.raises(OSError, match="No space"):
        patiently(lambda: failing(full()), tmp_path, 1, lambda _: None)
    monkeypatch.setattr(room, "has_room", lambda *_: False)
    with pytest.raises(OSError, match="No space"):
        patiently(lambda: failing(full()), tmp_path, 1, lambda _: None, most_seconds=0.005)
    with pytest.raises(KeyError):
        patiently(lambda: failing(full()), tmp_path, 1, lambda _: None, attend=lambda: {}["stopped"])
