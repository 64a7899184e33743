from types import SimpleNamespace

from server.runs import stages
from server.runs.stages import Stages


def test_each_stage_gets_the_seconds_spent_in_it_and_the_total_is_that_of_the_round(monkeypatch):
    clock = iter([10.0, 11.0, 13.5, 14.0, 14.25, 20.0])
    monkeypatch.setattr(stages, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    spent = Stages()
    with spent.stage("train"):
        pass
    with spent.stage("check"):
        pass
    assert spent.seconds == {"train": 2.5, "check": 0.25}
    assert spent.total() == 10.0
