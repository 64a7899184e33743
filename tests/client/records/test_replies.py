"""Stored replies: unchanged, private, and few."""

import os
import tracemalloc
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from client.records.replies import MOST_RUNS, find_reply, keep_reply
from shared.errors import InputError
from shared.messages.training import ReplyHeader, TrainReply


def reply(digest: str, size: int = 3) -> TrainReply:
    header = ReplyHeader(request_digest=digest * 64, status="trained", epsilon=1.25)
    return TrainReply(header, np.arange(size, dtype=np.uint16))


def test_reply_comes_back_unchanged(tmp_path: Path):
    keep_reply(tmp_path, "run", reply("a"))
    found = find_reply(tmp_path, "run", "a" * 64)
    assert found is not None
    assert found.header == reply("a").header
    assert found.update is not None
    assert found.update.dtype == np.uint16
    np.testing.assert_array_equal(found.update, np.arange(3))
    assert find_reply(tmp_path, "run", "b" * 64) is None
    assert find_reply(tmp_path, "other", "a" * 64) is None


def test_an_array_is_stored_and_read_without_a_second_one(tmp_path: Path):
    large = reply("a", 2**20)
    tracemalloc.start()
    keep_reply(tmp_path, "run", large)
    stored = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    found = find_reply(tmp_path, "run", "a" * 64)
    read = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found is not None and found.update is not None and large.update is not None
    assert found.update.tobytes() == large.update.tobytes()
    assert stored < large.update.nbytes / 4
    assert read < large.update.nbytes * 1.25
    empty = TrainReply(reply("b").header, np.zeros(0, np.float32))
    keep_reply(tmp_path, "run", empty)
    found = find_reply(tmp_path, "run", "b" * 64)
    assert found is not None and found.update is not None and found.update.shape == (0,)


def test_only_the_last_reply_of_a_run_is_kept(tmp_path: Path):
    keep_reply(tmp_path, "run", reply("a"))
    (tmp_path / "run" / ".incomplete-x").touch()
    keep_reply(tmp_path, "run", reply("b"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["b" * 64 + ".reply"]


def test_old_runs_make_room(tmp_path: Path):
    for number in range(MOST_RUNS + 2):
        keep_reply(tmp_path, f"run{number}", reply("a"))
        (tmp_path / f"run{number}").touch()
    assert len(list(tmp_path.iterdir())) == MOST_RUNS
    assert (tmp_path / f"run{MOST_RUNS + 1}").exists()


def test_run_that_has_just_answered_is_not_the_one_that_makes_room(tmp_path: Path):
    for number in range(MOST_RUNS):
        keep_reply(tmp_path, f"run{number}", reply("a"))
        os.utime(tmp_path / f"run{number}", (number, number))
    # A reply written over one of the same name leaves the folder's time as it was.
    with mock.patch("client.records.replies.write_private", lambda path, data, tail: path.write_bytes(data + tail)):
        keep_reply(tmp_path, "run0", reply("a"))
    keep_reply(tmp_path, "new", reply("a"))
    assert (tmp_path / "run0").exists()
    assert not (tmp_path / "run1").exists()


def test_damaged_reply_is_named(tmp_path: Path):
    keep_reply(tmp_path, "run", reply("a"))
    path = next(tmp_path.rglob("*.reply"))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match="damaged"):
        find_reply(tmp_path, "run", "a" * 64)
