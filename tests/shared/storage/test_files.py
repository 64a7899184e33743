import errno
import os
from pathlib import Path

import pytest

from shared.storage.files import append_whole
from shared.storage.runlog import RunLog, read_metrics
from tests.full_disk import room_for


def append(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        append_whole(descriptor, data, is_durable=True)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("spare", [0, 1, 4])
def test_all_is_appended_or_nothing(tmp_path: Path, spare: int):
    """The kernel takes what fits without a word."""
    path = tmp_path / "file"
    append(path, b"first\n")
    with room_for(6 + spare), pytest.raises(OSError, match="too large"):
        append(path, b"other\n")
    assert path.read_bytes() == b"first\n"
    append(path, b"other\n")
    assert path.read_bytes() == b"first\nother\n"


def test_what_is_not_on_disk_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A full disk may show as late as that; what was promised to be durable is taken back."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "file"
    append(path, b"first\n")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        append(path, b"other\n")
    assert path.read_bytes() == b"first\n"


def test_an_event_that_does_not_fit_damages_no_other(tmp_path: Path):
    log = RunLog(tmp_path / "metrics.jsonl")
    log.write("train", step=1)
    size = log.path.stat().st_size
    with room_for(size + 10), pytest.raises(OSError, match="too large"):
        log.write_durably("train", step=2)
    log.write("train", step=3)
    assert [event["step"] for event in read_metrics(log.path)] == [1, 3]
