"""When a round ends before all have answered, and what is kept of its end."""

from types import SimpleNamespace

import numpy as np
import pytest

from server.federation.messaging.transport import Timing
from server.federation.rounds import request
from server.federation.rounds.request import CLOSING_FILE, Closings, Question, _End, header_of
from shared.messages.packing import Manifest
from tests.server.fake_federation import make_experiment

CENTRAL = {"central_noise_multiplier": 0.7, "max_update_norm": 3.0, "update_norm_action": "clip", "sites_per_round": 3}


def tally(answered, possible, num_needed=2):
    return SimpleNamespace(
        in_state=lambda _: [None] * answered, can_reach=lambda needed: possible >= needed, num_needed=num_needed
    )


def make_end(*, is_repeated=False, **federation):
    return _End(make_experiment(**federation).federation, 100.0, is_repeated)


def test_the_deadline_ends_every_round():
    for settings in ({}, CENTRAL):
        end = make_end(min_replies=2, **settings)
        assert end.reason(tally(0, 3), 99.9) is None
        assert end.reason(tally(0, 3), 100.0) == ""


def test_a_round_that_cannot_reach_min_replies_ends_at_once_but_not_under_client_level_dp():
    assert "min_replies 2 cannot be reached" in (make_end(min_replies=2).reason(tally(1, 1), 1.0) or "")
    assert "the roster's threshold 3 cannot be reached" in (make_end(min_replies=2).reason(tally(1, 2, 3), 1.0) or "")
    assert make_end(min_replies=2, **CENTRAL).reason(tally(1, 1), 1.0) is None


def test_quorum_ends_a_round_after_its_grace_and_never_a_repeated_one():
    settings = {"min_replies": 1, "quorum": 2, "quorum_grace_seconds": 5.0}
    end = make_end(**settings)
    assert end.reason(tally(1, 3), 10.0) is None
    assert end.reason(tally(2, 3), 20.0) is None
    assert end.reason(tally(2, 3), 24.9) is None
    assert "5 s after federation.quorum 2" in (end.reason(tally(2, 3), 25.0) or "")
    repeated = make_end(is_repeated=True, **settings)
    assert [repeated.reason(tally(2, 3), now) for now in (20.0, 30.0)] == [None, None]


def test_who_closed_a_round_is_known_for_that_very_request(tmp_path):
    closings = Closings(tmp_path)
    assert closings.known("a") is None
    closings.keep("a", ["site-2", "site-0"])
    assert closings.known("a") == ["site-0", "site-2"] and closings.known("b") is None
    (tmp_path / CLOSING_FILE).write_text("{")
    assert closings.known("a") is None


@pytest.mark.parametrize("answered", [0, 1])
def test_without_a_quorum_a_round_waits(answered):
    assert make_end(min_replies=1).reason(tally(answered, 3), 50.0) is None


def test_whom_a_round_waits_for_is_told_now_and_then_and_it_ends_at_its_deadline(monkeypatch, caplog):
    """The clock goes on by 4 s at each look; from 0 to a deadline of 35 s it is told every 10 s."""
    clock, closed = [0.0], []
    monkeypatch.setattr(request, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    question = object.__new__(Question)
    experiment = make_experiment(min_replies=1)
    vars(question).update(
        exchange=SimpleNamespace(timing=Timing(report_seconds=10.0), raise_fatal=lambda: None),
        header=SimpleNamespace(server_round=3, experiment=experiment),
        deadline=35.0,
        revive=lambda _: None,
    )
    wait = lambda _: clock.__setitem__(0, clock[0] + 4)  # noqa: E731
    open_ones = SimpleNamespace(
        waiting=lambda: [SimpleNamespace(site="b"), SimpleNamespace(site="a")],
        changed=SimpleNamespace(wait=wait, clear=lambda: None),
        close=lambda *given: closed.append((clock[0], given)),
        in_state=lambda _: [],
        can_reach=lambda _: True,
        num_needed=1,
    )
    with caplog.at_level("INFO"):
        question.wait(open_ones, lambda: None, is_repeated=False)
    assert [line for line in caplog.messages if "waiting" in line] == [
        "round 3: waiting for a, b, 23 s left",
        "round 3: waiting for a, b, 11 s left",
    ]
    assert closed == [(36.0, ())]


@pytest.mark.parametrize(("asked", "told"), [("bfloat16", "bfloat16"), ("float32", "float32"), ("auto", "float32")])
def test_sites_compute_in_bfloat16_only_where_the_experiment_says_so(asked, told):
    experiment = make_experiment()
    experiment = experiment.model_copy(update={"train": experiment.train.model_copy(update={"precision": asked})})
    tensors = Manifest.of({"w": np.zeros(2, np.float32)})
    model = SimpleNamespace(server_round=4, manifest=tensors, base_manifest=tensors, base=np.zeros(2, np.float32))
    header = header_of(model, experiment, "run")
    assert (header.precision, header.server_round, header.run) == (told, 5, "run")
