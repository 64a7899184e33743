"""Rounds of a tiny federation, with a held-out loss that can be worked out by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from server.evaluation.held_out.measure import weights_after
from server.evaluation.held_out.suspects import find_suspects
from server.federation.acceptance.acceptance import in_words
from server.federation.acceptance.bound import Rise, worst_rise
from server.federation.acceptance.check import Answer, CheckError, HeldOutCheck
from server.federation.acceptance.kept_replies import StoredReplies
from server.federation.client_level.release_ledger import CentralLedger
from server.federation.rounds.giving_up import RunFailedError
from server.federation.updates import global_model
from server.federation.updates.global_model import load_global, round_folder
from shared.messages.training import TrainRequest
from shared.storage.checkpoint import load_group, load_meta
from shared.storage.runlog import RunLog
from tests.server.fake_federation import (
    events_of,
    honest_sites,
    make_experiment,
    make_home,
    reply,
    rounds_of,
    run_rounds,
    same,
    trained,
    weights_of,
)
from tests.server.fake_grid import FakeGrid

CENTRAL = {"central_noise_multiplier": 0.5, "max_update_norm": 1.0, "update_norm_action": "clip", "sites_per_round": 3}


class Killed(BaseException):
    """Stands for kill -9."""


def loss_of(tensors):
    """10 for weights of 0; an honest round changes it by some percent, a poisoned one several times over."""
    total = sum(float(np.square(tensor.astype(np.float64)).sum()) for tensor in tensors.values())
    return {"all": 50.0 + total, "t 0-249": 50.0}


def answer_here(_check, question, _attend):
    """What the process of the check does, with the loss of this file."""
    losses, suspects = loss_of(load_group(Path(question.checkpoint), "model")), []
    if question.before and question.replies and worst_rise(question.before, losses).ratio > question.bound:
        experiment = load_meta(Path(question.checkpoint)).experiment
        start = load_global(Path(question.start), experiment)
        suspects = find_suspects(
            StoredReplies(Path(question.replies), experiment.federation.wire_dtype),
            len(start.weights),
            lambda total: loss_of(weights_after(start, total, experiment)),
            question.before,
            question.bound,
        )
    return Answer(losses, tuple(suspects))


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """A function that makes a home whose run has held-out images."""
    monkeypatch.setattr(HeldOutCheck, "ask", answer_here)

    def make(experiment, name="watched"):
        home = make_home(tmp_path / name, experiment)
        (home / "runs" / "run" / "finetune.json").write_text(json.dumps({"held_out": "synthetic:public:8"}))
        return home

    return make


def poisons(*rounds):
    """A site that is honest but in some rounds."""

    def answer(content, _asked):
        request = TrainRequest.from_record(content)
        if request.header.server_round in rounds:
            return reply(request, np.full(request.weights.shape, 3.5, np.float32))
        return trained("site-1", content)

    return answer


def checked(**federation):
    return make_experiment(**{"rounds": 3, "max_held_out_rise": 0.5, "max_update_norm": 0.0} | federation)


@pytest.mark.parametrize("optimizer", ["fedavg", "fedavgm"])
def test_a_round_that_does_damage_is_undone_bit_by_bit_and_names_who_did_it(watched, optimizer):
    experiment = checked(server_optimizer=optimizer, server_lr=1.0)
    home = watched(experiment)
    run_rounds(home, FakeGrid(honest_sites(site_1=poisons(2))), experiment)
    first, second, third = rounds_of(home)
    for group in ("model", "ema"):
        assert same(weights_of(home, 1, group=group), weights_of(home, 2, group=group))
    before, after = (
        load_global(round_folder(home / "runs" / "run" / "checkpoints", number), experiment) for number in (1, 2)
    )
    assert (before.optimizer.steps, before.local_steps) == (after.optimizer.steps, after.local_steps)
    assert same(before.optimizer.buffers, after.optimizer.buffers)
    assert second["rolled_back"]["suspects"] == ["site-1"]
    assert second["rolled_back"]["rise"] > 0.5 == second["rolled_back"]["bound"]
    assert not second["weights_changed"] and "it would not have without site-1" in second["reason"]
    assert second["held_out"] == first["held_out"] == loss_of(weights_of(home, 1))
    assert third["weights_changed"] and third["roll_backs"] == 1
    assert third["held_out"] == loss_of(weights_of(home, 3))
    assert not same(weights_of(home, 2), weights_of(home, 3))


def test_honest_rounds_are_kept_and_come_to_what_they_come_to_without_a_check(watched, tmp_path):
    experiment = checked(rounds=2)
    home = watched(experiment)
    run_rounds(home, FakeGrid(honest_sites()), experiment)
    alone = make_home(tmp_path / "alone", experiment)
    run_rounds(alone, FakeGrid(honest_sites()), experiment)
    assert same(weights_of(home, 2), weights_of(alone, 2))
    assert all("rolled_back" not in record and "held_out" in record for record in rounds_of(home))
    assert all("held_out" not in record for record in rounds_of(alone))


def test_the_second_round_that_is_undone_ends_the_run_and_a_resumed_one_ends_at_the_next(watched):
    experiment = checked(rounds=6)
    home = watched(experiment)
    start = weights_of(home, 0)
    for last in (2, 3):
        with pytest.raises(RunFailedError, match=r"rolled back: .* without site-1") as caught:
            run_rounds(home, FakeGrid(honest_sites(site_1=poisons(1, 2, 3, 4))), experiment)
        assert caught.value.is_final
        assert [record["round"] for record in rounds_of(home)] == list(range(1, last + 1))
        RunLog(home / "runs" / "run" / "metrics.jsonl").write("evaluation", round=0, metrics={})  # ends after the run
    assert same(start, weights_of(home, 3))
    run_rounds(home, FakeGrid(honest_sites()), experiment)
    assert len(rounds_of(home)) == 6


@pytest.mark.parametrize("moment", ["before the check", "after the check", "after the checkpoint"])
@pytest.mark.parametrize("doomed", [2, 3])
def test_a_run_killed_at_any_moment_ends_as_one_that_was_not(watched, monkeypatch, moment, doomed):
    experiment = checked(rounds=4)
    sites = lambda: FakeGrid(honest_sites(site_1=poisons(2)))  # noqa: E731
    undisturbed = watched(experiment, "undisturbed")
    run_rounds(undisturbed, sites(), experiment)
    home = watched(experiment, "killed")
    save = global_model.save_checkpoint

    def ask(check, question, attend):
        is_doomed = load_meta(Path(question.checkpoint)).round == doomed
        if is_doomed and moment == "before the check":
            raise Killed
        answer = answer_here(check, question, attend)
        if is_doomed and moment == "after the check":
            raise Killed
        return answer

    def save_and_die(folder, groups, meta):
        save(folder, groups, meta)
        if moment == "after the checkpoint" and meta["round"] == doomed and "ema" in groups:
            raise Killed

    monkeypatch.setattr(HeldOutCheck, "ask", ask)
    monkeypatch.setattr(global_model, "save_checkpoint", save_and_die)
    with pytest.raises(Killed):
        run_rounds(home, sites(), experiment)
    monkeypatch.setattr(HeldOutCheck, "ask", answer_here)
    monkeypatch.setattr(global_model, "save_checkpoint", save)
    run_rounds(home, sites(), experiment)
    for group in ("model", "ema"):
        assert same(weights_of(undisturbed, 4, group=group), weights_of(home, 4, group=group))
    own, other = ([record.get("rolled_back") for record in rounds_of(each)] for each in (home, undisturbed))
    assert own == other and own[1] is not None


def test_a_run_killed_between_its_second_undone_round_and_its_end_does_not_go_on(watched, monkeypatch):
    experiment = checked(rounds=5)
    home = watched(experiment)
    save = global_model.save_checkpoint

    def save_and_die(folder, groups, meta):
        save(folder, groups, meta)
        if meta["round"] == 2 and "ema" in groups:
            raise Killed

    monkeypatch.setattr(global_model, "save_checkpoint", save_and_die)
    monkeypatch.setattr("server.app._write_end", lambda *_: None)
    grid = FakeGrid(honest_sites(site_1=poisons(1, 2)))
    with pytest.raises(Killed):
        run_rounds(home, grid, experiment)
    monkeypatch.undo()
    monkeypatch.setattr(HeldOutCheck, "ask", answer_here)
    with pytest.raises(RunFailedError, match="round 2 was undone, 2 in this run"):
        run_rounds(home, FakeGrid(honest_sites()), experiment)


def test_under_client_level_dp_an_undone_round_is_counted_and_nobody_is_named(watched, monkeypatch):
    experiment, asked = checked(rounds=3, **CENTRAL), []

    def rises(_check, question, _attend):
        asked.append(question)
        return Answer({"all": float(len(asked))})

    home = watched(experiment)
    monkeypatch.setattr(HeldOutCheck, "ask", rises)
    with pytest.raises(RunFailedError, match="updates are not kept"):
        run_rounds(home, FakeGrid(honest_sites()), experiment)
    undone = rounds_of(home)
    assert [record["rolled_back"]["suspects"] for record in undone] == [[], []]
    assert len(CentralLedger(home).releases()) == undone[-1]["central_releases"] == 2
    assert not any(question.replies for question in asked)


def test_updates_are_private_while_they_are_kept_and_gone_after_the_round(watched, monkeypatch):
    experiment, seen = checked(rounds=1), []

    def look(check, question, attend):
        if question.replies:
            folder = Path(question.replies)
            files = sorted(path.name for path in folder.iterdir())
            seen.append((folder.stat().st_mode & 0o777, files))
        return answer_here(check, question, attend)

    home = watched(experiment)
    monkeypatch.setattr(HeldOutCheck, "ask", look)
    run_rounds(home, FakeGrid(honest_sites()), experiment)
    assert seen == [(0o700, ["000000.npy", "000001.npy", "000002.npy", "replies.json"])]
    assert not (home / "runs" / "run" / "held-out" / "replies").exists()


def test_without_keep_replies_a_round_is_undone_and_nobody_is_named(watched):
    experiment = checked(rounds=2, keep_replies=False)
    home = watched(experiment)
    run_rounds(home, FakeGrid(honest_sites(site_1=poisons(1))), experiment)
    assert rounds_of(home)[0]["rolled_back"]["suspects"] == []
    assert "is not known, for updates are not kept" in rounds_of(home)[0]["reason"]


def test_an_undone_round_is_no_round_in_vain(watched):
    experiment = checked(rounds=2, max_unchanged_rounds=1)
    home = watched(experiment)
    run_rounds(home, FakeGrid(honest_sites(site_1=poisons(1))), experiment)
    assert [record["weights_changed"] for record in rounds_of(home)] == [False, True]


@pytest.mark.parametrize("is_final", [False, True])
def test_a_check_that_cannot_run_accepts_nothing(watched, monkeypatch, is_final):
    experiment = checked(rounds=2)
    home = watched(experiment)

    def fails(check, question, attend):
        if question.start:
            raise CheckError("no such images", is_final=is_final)
        return answer_here(check, question, attend)

    monkeypatch.setattr(HeldOutCheck, "ask", fails)
    with pytest.raises(RunFailedError, match="no such images") as caught:
        run_rounds(home, FakeGrid(honest_sites()), experiment)
    assert caught.value.is_final == is_final
    assert rounds_of(home) == []
    assert events_of(home, "end")[-1]["is_final"] == is_final


def test_a_loss_that_is_not_finite_is_said_in_words():
    text = in_words(Rise("t 0-249", float("inf")), 0.1, ("site-3", "site-5"), are_kept=True)
    assert "held-out loss (t 0-249) is not finite" in text and "without site-3, site-5" in text
    assert "no minority of the sites was found behind it" in in_words(Rise("all", 0.25), 0.1, (), are_kept=True)
    assert "rose by 25.0%" in in_words(Rise("all", 0.25), 0.1, (), are_kept=True)
