import pytest

from server.federation.fleet.superlink_types import ControlError, SubmittedRun
from server.federation.resubmission import MAX_SUBMISSIONS, Wanted
from shared.errors import InputError
from shared.storage.checkpoint import save_checkpoint
from shared.storage.runlog import RunLog
from tests.server.fake_federation import make_experiment, make_home


class FakeControl:
    """Runs by id, with the status that the test gives them."""

    def __init__(self):
        self.states, self.submitted, self.stopped = {}, [], []

    def submit(self, experiment, run):
        self.submitted.append(run)
        run_id = len(self.submitted)
        self.states[run_id] = "running"
        return run_id

    def run_state(self, run_id):
        return SubmittedRun(run_id, self.states.get(run_id, "unknown"), "details", 0, 0)

    def nodes(self):
        return []

    def stop(self, run_id):
        self.stopped.append(run_id)
        return True


@pytest.fixture
def setting(tmp_path):
    home = make_home(tmp_path, make_experiment())
    control, wanted = FakeControl(), Wanted(home)
    wanted.submit(control, "run")
    return home, control, wanted


def log_of(home):
    return RunLog(home / "runs" / "run" / "metrics.jsonl")


def tick_until_submitted(wanted, control, monkeypatch):
    """Two ticks, the second after any wait between submissions."""
    count = len(control.submitted)
    wanted.tick(control)
    monkeypatch.setattr("server.federation.resubmission.time.time", lambda: 1e12)
    wanted.tick(control)
    monkeypatch.undo()
    return len(control.submitted) - count


def test_a_running_run_is_left_alone_and_not_submitted_twice(setting):
    _home, control, wanted = setting
    wanted.tick(control)
    assert control.submitted == ["run"]
    with pytest.raises(InputError, match="running already"):
        wanted.submit(control, "run")


@pytest.mark.parametrize("status", ["finished:failed", "unknown", "finished:completed"])
def test_a_run_that_died_without_a_word_is_submitted_again(setting, status):
    _home, control, wanted = setting
    control.states[1] = status
    wanted.tick(control)
    assert control.submitted == ["run", "run"]
    assert wanted.runs()["run"].run_id == 2


def test_while_the_disk_is_full_nothing_is_submitted_nor_counted(setting, monkeypatch):
    """With Flower's state on that disk each attempt would die; a long full disk must not give the run up."""
    _home, control, wanted = setting
    control.states[1] = "finished:failed"
    with monkeypatch.context() as patched:
        patched.setattr("server.federation.resubmission.has_room", lambda *_: False)
        for _ in range(3 * MAX_SUBMISSIONS):
            assert tick_until_submitted(wanted, control, patched) == 0
            patched.setattr("server.federation.resubmission.has_room", lambda *_: False)
    entry = wanted.runs()["run"]
    assert (entry.status, entry.submissions, control.submitted) == ("running", 0, ["run"])
    assert tick_until_submitted(wanted, control, monkeypatch) == 1


@pytest.mark.parametrize("status", ["finished:completed", "unknown"])
def test_what_the_run_itself_wrote_of_its_end_counts(setting, status):
    home, control, wanted = setting
    log_of(home).write("end", status="completed")
    control.states[1] = status
    wanted.tick(control)
    assert wanted.runs()["run"].status == "completed"
    assert not wanted.has_running()


def test_a_final_failure_is_not_tried_again(setting):
    home, control, wanted = setting
    log_of(home).write("end", status="failed", reason="all refused", is_final=True)
    control.states[1] = "finished:failed"
    wanted.tick(control)
    assert (wanted.runs()["run"].status, wanted.runs()["run"].reason) == ("failed", "all refused")


def test_an_end_of_an_earlier_attempt_does_not_count(setting):
    home, control, wanted = setting
    log_of(home).write("end", status="failed", reason="gone", is_final=False)
    control.states[1] = "finished:failed"
    wanted.tick(control)
    control.states[2] = "finished:failed"
    log_of(home).write("start", round=0)
    assert wanted.runs()["run"].events_before == 2
    assert wanted.runs()["run"].status == "running"


def test_five_resubmissions_without_a_new_checkpoint_are_the_end(setting, monkeypatch):
    _home, control, wanted = setting
    for _ in range(MAX_SUBMISSIONS + 1):
        control.states = dict.fromkeys(control.states, "finished:failed")
        tick_until_submitted(wanted, control, monkeypatch)
    assert len(control.submitted) == 1 + MAX_SUBMISSIONS
    assert wanted.runs()["run"].status == "failed"
    assert "5 resubmissions" in wanted.runs()["run"].reason


def test_a_new_checkpoint_starts_the_count_again(setting, monkeypatch):
    home, control, wanted = setting
    for server_round in range(1, 9):
        folder = home / "runs" / "run" / "checkpoints" / f"round-{server_round:06d}"
        save_checkpoint(folder, {}, {"experiment": make_experiment(), "round": server_round})
        control.states = dict.fromkeys(control.states, "finished:failed")
        assert tick_until_submitted(wanted, control, monkeypatch) == 1
    assert wanted.runs()["run"].status == "running"


def test_a_stopped_run_is_wanted_no_longer(setting):
    _home, control, wanted = setting
    assert wanted.stop(control, "run")
    control.states[1] = "finished:stopped"
    wanted.tick(control)
    assert wanted.runs()["run"].status == "stopped"
    assert not wanted.stop(control, "run")
    with pytest.raises(InputError, match="unknown"):
        wanted.stop(control, "other")


def test_a_stop_names_the_runs_process_even_when_the_superlink_hangs(setting, monkeypatch):
    """The superexec ends whatever run has a file there, also a process that is only starting and hears of no stop."""
    home, control, wanted = setting
    stopped = home / "flwr" / "superexec" / "stopped"
    stopped.parent.mkdir(parents=True)
    order = []

    def hang(run_id):
        order.append((run_id, [file.name for file in stopped.iterdir()]))
        raise ControlError("stopping run 1: the SuperLink cannot be reached")

    monkeypatch.setattr(control, "stop", hang)
    with pytest.raises(ControlError):
        wanted.stop(control, "run")
    assert order == [(1, ["1"])]
    assert wanted.runs()["run"].status == "stopped"
    wanted.tick(control)
    assert control.submitted == ["run"]


def test_what_is_left_of_a_run_that_died_is_ended_before_it_is_submitted_again(setting, monkeypatch):
    """A process that hangs is dead for the SuperLink, but it holds the run's folder."""
    home, control, wanted = setting
    stopped = home / "flwr" / "superexec" / "stopped"
    stopped.parent.mkdir(parents=True)
    control.states[1] = "finished:failed"
    assert tick_until_submitted(wanted, control, monkeypatch) == 1
    assert [(file.name, file.stat().st_mtime) for file in stopped.iterdir()] == [("1", 0.0)]


def test_a_superlink_that_is_away_changes_nothing(setting, monkeypatch):
    _home, control, wanted = setting

    def away(run_id):
        raise ControlError("away")

    monkeypatch.setattr(control, "run_state", away)
    wanted.tick(control)
    assert wanted.runs()["run"].status == "running"


def test_a_damaged_run_directory_fails_that_run_only(setting):
    home, control, wanted = setting
    (home / "runs" / "run" / "experiment.toml").write_text("[federation")
    control.states[1] = "finished:failed"
    wanted.tick(control)
    assert wanted.runs()["run"].status == "failed"
    assert "TOML" in wanted.runs()["run"].reason
