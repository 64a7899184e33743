import os

import numpy as np
import pytest

from shared.errors import InputError
from shared.storage import chunks
from shared.storage.chunks import ChunkedJob, Rank, open_job, rank_from_environment

NUM = 600


def make(items):
    return {"value": np.array(items) ** 2}


def values(job):
    return np.concatenate([part["value"] for part in job.parts()])


def test_parts_hold_all_items_in_order(tmp_path):
    job = ChunkedJob(tmp_path / "job", {"a": 1}, NUM, Rank())
    job.run(make)
    assert (values(job) == np.arange(NUM) ** 2).all()
    job.remove()
    assert not (tmp_path / "job").exists()


def test_two_ranks_make_the_same_parts_as_one(tmp_path):
    alone = ChunkedJob(tmp_path / "alone", {}, NUM, Rank())
    alone.run(make)
    ranks = [ChunkedJob(tmp_path / "shared", {}, NUM, Rank(index, 2)) for index in (0, 1)]
    for job in ranks:
        job.run(make)
    ranks[0].wait(1)
    assert (values(ranks[0]) == values(alone)).all()


def test_a_restart_makes_only_what_is_missing(tmp_path):
    def stop_at_second(items):
        if items.start == chunks.CHUNK_ITEMS:
            raise KeyboardInterrupt
        return make(items)

    with pytest.raises(KeyboardInterrupt):
        ChunkedJob(tmp_path, {"a": 1}, NUM, Rank()).run(stop_at_second)
    made, found = [], []
    job = ChunkedJob(tmp_path, {"a": 1}, NUM, Rank())
    job.run(lambda items: made.append(items.start) or make(items), found.append)
    assert made == [256, 512] and found == [256]
    assert len(values(job)) == NUM


def test_a_torn_part_is_made_again(tmp_path):
    job = ChunkedJob(tmp_path, {}, 10, Rank())
    job.run(make)
    part = tmp_path / "part-000000.npz"
    part.write_bytes(part.read_bytes()[:50])
    job.run(make)
    assert len(values(job)) == 10


def test_parts_of_another_job_are_refused(tmp_path):
    ChunkedJob(tmp_path, {"seed": 1}, NUM, Rank())
    with pytest.raises(InputError, match="seed is 1, not 2"):
        ChunkedJob(tmp_path, {"seed": 2}, NUM, Rank())
    with pytest.raises(InputError, match="num_items"):
        ChunkedJob(tmp_path, {"seed": 1}, NUM + 1, Rank())


def test_waiting_for_ranks_that_never_come_has_an_end(tmp_path):
    job = ChunkedJob(tmp_path, {}, NUM, Rank(0, 2))
    job.run(make)
    with pytest.raises(InputError, match="1 of 3 parts are missing"):
        job.wait(0)


def test_rank_is_torchruns(monkeypatch):
    assert rank_from_environment() == Rank(0, 1, 0)
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert rank_from_environment() == Rank(5, 8, 1)
    assert not rank_from_environment().is_first


def test_one_command_at_a_time_works_on_a_job_and_is_named(tmp_path):
    with open_job(tmp_path / "job", {"a": 1}, NUM, Rank()) as job:
        job.run(make)
        with (
            pytest.raises(InputError, match=rf"is being written by process {os.getpid()} on .*: wait for it"),
            open_job(tmp_path / "job", {"a": 1}, NUM, Rank()),
        ):
            pass
        with open_job(tmp_path / "job", {"a": 1}, NUM, Rank(1, 2)) as other_rank:
            assert (values(other_rank) == np.arange(NUM) ** 2).all()


def test_a_job_that_made_nothing_leaves_nothing_and_one_that_made_parts_keeps_them(tmp_path):
    for makes_parts in (False, True):
        with pytest.raises(KeyboardInterrupt), open_job(tmp_path / "job", {}, NUM, Rank()) as job:
            if makes_parts:
                job.run(make)
            raise KeyboardInterrupt
        assert (tmp_path / "job").exists() == makes_parts


def test_a_folder_of_somebody_else_is_neither_used_nor_deleted(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "thesis.tex").write_text("years")
    with (
        pytest.raises(InputError, match=r"holds other files \('thesis.tex'\)"),
        open_job(tmp_path / "parts", {}, 9, Rank()),
    ):
        pass
    assert (tmp_path / "parts" / "thesis.tex").read_text() == "years"


@pytest.mark.parametrize("content", ["", "{", "[1]", "null"])
def test_a_damaged_job_is_one_line(tmp_path, content):
    (tmp_path / chunks.JOB_FILE).write_text(content)
    with pytest.raises(InputError, match="is damaged: delete the folder"):
        ChunkedJob(tmp_path, {}, NUM, Rank())
