"""A run that was ended goes on after the attacks it has finished; those of another call are run again."""

from unittest import mock

from benchmarks.privacy_attacks import __main__ as command
from benchmarks.privacy_attacks.outcome import Outcome


def test_finished_attacks_are_not_run_again_and_other_numbers_of_trials_are(tmp_path, capsys):
    runs = []

    def attack(trials, is_guarded, seed):
        runs.append((trials, is_guarded))
        return Outcome("one", trials, 0, 0.0, "remark")

    file = ["--keep", str(tmp_path / "kept")]
    with mock.patch.object(command, "collect", return_value={"one": attack}):
        assert command.main(["--trials", "4", *file]) == 0
        first = capsys.readouterr().out
        assert command.main(["--trials", "4", *file]) == 0
        assert capsys.readouterr().out == first
        assert command.main(["--trials", "4", "--off", *file]) == 1
        assert command.main(["--trials", "5", *file]) == 0
    assert runs == [(4, True), (4, False), (5, True)]


def test_an_attack_of_another_commit_is_run_again(tmp_path):
    attack = mock.Mock(return_value=Outcome("one", 4, 0, 0.0))
    with mock.patch.object(command, "collect", return_value={"one": attack}):
        for commit in ("a", "a", "b"):
            with mock.patch.object(command, "git_commit", return_value=commit):
                command.main(["--trials", "4", "--keep", str(tmp_path / "kept")])
    assert attack.call_count == 2
