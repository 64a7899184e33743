import errno
import json
import shutil

import pytest

from server.federation import evaluation_queue
from server.federation.messaging import agreement
from server.federation.rounds import loop, request
from server.federation.updates import global_model
from shared.errors import InputError
from shared.storage import room
from shared.storage.runlog import RunLog, read_metrics
from tests.server.fake_federation import (
    events_of,
    honest_sites,
    make_experiment,
    make_home,
    rounds_of,
    run_rounds,
    same,
    weights_of,
)
from tests.server.fake_grid import FakeGrid


class Killed(BaseException):
    """Stands for kill -9: nothing of the code's own handling of errors may matter."""


@pytest.mark.parametrize("optimizer", ["fedavg", "fedavgm", "fedadam"])
@pytest.mark.parametrize("moment", ["before_save", "after_save"])
def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(tmp_path, monkeypatch, optimizer, moment):
    experiment = make_experiment(rounds=4, server_optimizer=optimizer, server_lr=0.5, sites_per_round=2)
    undisturbed = make_home(tmp_path / "undisturbed", experiment)
    run_rounds(undisturbed, FakeGrid(honest_sites()), experiment)

    home = make_home(tmp_path / "killed", experiment)
    save = global_model.save_checkpoint

    def save_and_die(folder, groups, meta):
        if meta["round"] == 3:
            monkeypatch.setattr(global_model, "save_checkpoint", save)
            if moment == "after_save":
                save(folder, groups, meta)
            raise Killed
        save(folder, groups, meta)

    monkeypatch.setattr(global_model, "save_checkpoint", save_and_die)
    with pytest.raises(Killed):
        run_rounds(home, FakeGrid(honest_sites()), experiment)
    run_rounds(home, FakeGrid(honest_sites()), experiment)

    for group in ("model", "ema"):
        assert same(weights_of(undisturbed, 4, group=group), weights_of(home, 4, group=group))
    assert [record["round"] for record in rounds_of(home)] == [1, 2, 3, 4]


def test_an_incomplete_newest_checkpoint_is_skipped_with_a_warning(tmp_path, caplog):
    experiment = make_experiment(rounds=3)
    home = make_home(tmp_path, experiment)
    run_rounds(home, FakeGrid(honest_sites()), experiment)
    expected = weights_of(home, 3)
    (home / "runs" / "run" / "checkpoints" / "round-000003" / "model.safetensors").unlink()
    run_rounds(home, FakeGrid(honest_sites()), experiment)
    assert "round-000003" in caplog.text
    assert same(weights_of(home, 3), expected)


WRITERS = {
    "a checkpoint": (global_model, "save_checkpoint"),
    "the record of a round": (RunLog, "_append"),
    "the progress": (evaluation_queue, "write_json"),
    "what sites accepted": (agreement, "write_atomically"),
    "who closed a round": (request, "write_atomically"),
    "old checkpoints that go": (loop, "prune_checkpoints"),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("moment", [1, 3])
def test_a_full_disk_is_waited_for_whoever_meets_it(tmp_path, monkeypatch, caplog, writer, moment):
    """The run says so, goes on when there is room, and has the weights of an undisturbed one."""
    plan = make_experiment(rounds=3, quorum=2, quorum_grace_seconds=5.0)
    undisturbed, home = make_home(tmp_path / "undisturbed", plan), make_home(tmp_path / "full", plan)
    run_rounds(undisturbed, FakeGrid(honest_sites()), plan)
    place, name = WRITERS[writer]
    write, calls, looks = getattr(place, name), [], []

    def full_once(*args, **kwargs):
        calls.append(True)
        if len(calls) == moment:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*args, **kwargs)

    def has_room(folder, num_bytes):
        looks.append((folder, num_bytes))
        return len(looks) > 2

    monkeypatch.setattr(room, "has_room", has_room)
    monkeypatch.setattr(room, "LOOK_SECONDS", 0.001)
    monkeypatch.setattr(place, name, full_once)
    run_rounds(home, FakeGrid(honest_sites()), plan)
    assert len(calls) >= moment
    assert [message for message in caplog.messages if "the disk is full; waiting" in message] != []
    assert looks[0][0] == home / "runs" / "run"
    assert looks[0][1] > sum(file.stat().st_size for file in (home / "runs/run/checkpoints/round-000003").iterdir())
    assert [record["round"] for record in rounds_of(home)] == [1, 2, 3]
    assert [event["status"] for event in events_of(home, "end")] == ["completed"]
    assert same(weights_of(home, 3), weights_of(undisturbed, 3))


def test_a_run_whose_process_has_no_memory_left_says_so_and_may_be_submitted_again(tmp_path, monkeypatch, caplog):
    experiment = make_experiment()
    home = make_home(tmp_path, experiment)

    def too_much(*_):
        raise MemoryError

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(global_model, "save_checkpoint", too_much)
        run_rounds(home, FakeGrid(honest_sites()), experiment)
    (end,) = events_of(home, "end")
    assert "MASKFED_PARAMETERS" in end["reason"]
    assert not end["is_final"]
    assert caplog.text.count("Traceback") == 0
    run_rounds(home, FakeGrid(honest_sites()), experiment)
    assert [record["round"] for record in rounds_of(home)] == [1, 2]


def test_a_run_that_waits_for_a_disk_can_be_stopped(tmp_path, monkeypatch):
    class RunNotRunningException(BaseException):
        """What Flower raises in a ServerApp whose run was stopped."""

    class Stopping(FakeGrid):
        is_stopped = False

        def get_nodes(self):
            if self.is_stopped:
                raise RunNotRunningException
            return super().get_nodes()

    grid, experiment = Stopping(honest_sites()), make_experiment()
    home = make_home(tmp_path, experiment)

    def full(*_):
        grid.is_stopped = True
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(global_model, "save_checkpoint", full)
    monkeypatch.setattr(room, "has_room", lambda *_: False)
    with pytest.raises(RunNotRunningException):
        run_rounds(home, grid, experiment)
    assert events_of(home, "end")[-1]["status"] == "stopped"


def test_a_changed_experiment_is_refused_by_the_serverapp(tmp_path):
    home = make_home(tmp_path, make_experiment(rounds=2))
    with pytest.raises(InputError, match="not the one in its directory"):
        run_rounds(home, FakeGrid(honest_sites()), make_experiment(rounds=3))


def test_a_run_without_any_checkpoint_says_so(tmp_path):
    experiment = make_experiment()
    home = make_home(tmp_path, experiment)
    shutil.rmtree(home / "runs" / "run" / "checkpoints")
    with pytest.raises(InputError, match="no complete checkpoint"):
        run_rounds(home, FakeGrid(honest_sites()), experiment)


def test_a_stopped_run_is_recorded_as_stopped(tmp_path):
    class RunNotRunningException(BaseException):
        """What Flower raises in a ServerApp whose run was stopped."""

    class StoppedGrid(FakeGrid):
        def pull_messages(self, message_ids):
            raise RunNotRunningException

    experiment = make_experiment()
    home = make_home(tmp_path, experiment)
    with pytest.raises(RunNotRunningException):
        run_rounds(home, StoppedGrid(honest_sites()), experiment)
    assert events_of(home, "end")[-1]["status"] == "stopped"


def test_every_line_of_the_metrics_is_json_and_has_a_time_and_a_kind(tmp_path):
    experiment = make_experiment()
    home = make_home(tmp_path, experiment)
    run_rounds(home, FakeGrid(honest_sites()), experiment)
    events = read_metrics(home / "runs" / "run" / "metrics.jsonl")
    assert [event["kind"] for event in events] == ["start", *["offer"] * 3, "round", "round", "end"]
    assert all("time" in event for event in events)
    assert json.loads((home / "runs" / "run" / "progress.json").read_text())["round"] == 2
