"""What waits for the operator: who asked, what differs from a recipe, and a decision by number, prefix or digest."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from client.cli.approvals import approve_experiment, approve_list, approve_refuse
from client.offers.answer import answer_offer
from client.offers.waiting import Waiting, differences_to_recipe, length_in_words, waiting
from client.policy import approval
from client.policy.approval import keep_pending, pending, read_approved
from client.records.journal import Journal
from shared.errors import InputError
from shared.experiment.config import load_experiment
from shared.experiment.recipes import find_experiment
from shared.messages.agreement.offer import offer_record, read_answer
from shared.messages.agreement.plan import resolve
from shared.messages.training import experiment_digest
from tests.client.conftest import DP, MakeSite, experiment, request_for

FIRST = resolve(experiment(privacy=DP))
SECOND = resolve(experiment(privacy=DP, federation={"rounds": 7}))


def offered(home, *plans):
    return [read_answer(answer_offer(offer_record(request_for(plan).header), home)) for plan in plans]


def test_each_is_listed_with_its_number_run_time_and_cost(make_site: MakeSite, capsys: pytest.CaptureFixture[str]):
    home, _ = make_site(experiments="approved")
    offered(home, FIRST, SECOND)
    found = waiting(home)
    assert [each.digest for each in found] == [experiment_digest(FIRST), experiment_digest(SECOND)]
    assert [each.number for each in found] == [1, 2]
    assert {each.run for each in found} == {"run"}
    approve_list(home.path, 0.1)
    told = capsys.readouterr().out
    assert f"1: experiment {experiment_digest(FIRST)}" in told
    assert "asked for by run 'run' on 20" in told
    assert "after all 7" in told and "MB for each site and round" in told and "time at this machine's speed" in told


def test_a_number_a_prefix_and_the_digest_mean_the_same(make_site: MakeSite):
    home, _ = make_site(experiments="approved")
    offered(home, FIRST, SECOND)
    approve_experiment("2", home.path, None)
    assert read_approved(home).experiments == {experiment_digest(SECOND)}
    assert [each.number for each in waiting(home)] == [1]
    approve_experiment(experiment_digest(FIRST)[:8], home.path, None)
    assert waiting(home) == []
    with pytest.raises(InputError, match="64 hexadecimal"):
        approve_experiment("3", home.path, None)


def test_a_number_that_was_read_never_means_another_experiment(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch):
    """Not when an earlier one is decided on, nor when a coordinator asks until the oldest is dropped."""
    home, _ = make_site(experiments="approved")
    monkeypatch.setattr(approval, "MOST_PENDING", 3)
    plans = [resolve(experiment(privacy=DP, federation={"rounds": rounds})) for rounds in range(3, 9)]
    for place, plan in enumerate(plans[:3]):
        keep_pending(home, plan, "run")
        os.utime(approval.pending_file(home, experiment_digest(plan)), (place, place))
    listed = {each.number: each.digest for each in waiting(home)}
    assert listed == {place + 1: experiment_digest(plan) for place, plan in enumerate(plans[:3])}
    keep_pending(home, plans[3], "run")
    assert [each.number for each in waiting(home)] == [2, 3, 4]
    with pytest.raises(InputError):
        approve_experiment("1", home.path, None)
    approve_refuse("2", "", home.path)
    approve_experiment("3", home.path, None)
    assert read_approved(home).experiments == {listed[3]}
    approve_experiment("4", home.path, None)
    keep_pending(home, plans[4], "run")
    assert [each.number for each in waiting(home)] == [5], "although nothing waited any more"


@pytest.mark.parametrize("damage", ["", "x", "-5", "9" * 400, "\u0663", None])
def test_a_lost_count_goes_on_behind_what_waits(make_site: MakeSite, damage: str | None):
    home, _ = make_site(experiments="approved")
    offered(home, FIRST)
    count = home.pending / approval.NUMBER_FILE
    count.unlink() if damage is None else count.write_text(damage)
    offered(home, SECOND)
    first, second = sorted(each.number for each in waiting(home))
    assert first == 1 < second < 10**10
    assert count.stat().st_mode & 0o077 == 0


def test_plans_that_are_asked_for_at_once_have_numbers_of_their_own(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
):
    home, _ = make_site()
    plans = [resolve(experiment(privacy=DP, federation={"rounds": rounds})) for rounds in (2, 3, 5, 7)]
    real = approval.write_private

    def slow_write(path: Path, data: bytes) -> None:
        time.sleep(0.05)
        real(path, data)

    monkeypatch.setattr(approval, "write_private", slow_write)
    with ThreadPoolExecutor(len(plans)) as pool:
        list(pool.map(lambda plan: keep_pending(home, plan, "run"), plans))
    assert sorted(each.number for each in waiting(home)) == [1, 2, 3, 4]


def test_what_an_older_version_kept_or_two_with_one_number_are_named_by_digest(make_site: MakeSite):
    home, _ = make_site(experiments="approved")
    offered(home, FIRST, SECOND)
    for path, number in zip(pending(home), ("", ', "number": 7'), strict=True):
        _, _, body = path.read_text().partition("\n")
        path.write_text(f'# {{"run": "old", "asked": "2026-01-01 00:00"{number}}}\n{body}')
    assert sorted(each.number for each in waiting(home)) == [0, 7]
    for name in ("0", "1", ""):
        with pytest.raises(InputError):
            approve_experiment(name, home.path, None)
    for path in pending(home):
        path.write_text(path.read_text().replace('00:00"}', '00:00", "number": 7}'))
    assert [each.number for each in waiting(home)] == [7, 7]
    with pytest.raises(InputError):
        approve_experiment("7", home.path, None)
    approve_experiment(experiment_digest(FIRST)[:12], home.path, None)
    assert read_approved(home).experiments == {experiment_digest(FIRST)}


def test_a_refused_plan_waits_no_more_and_may_be_approved_later(make_site: MakeSite):
    home, _ = make_site(experiments="approved")
    offered(home, FIRST)
    approve_refuse("1", "the study has ended", home.path)
    assert waiting(home) == []
    assert read_approved(home).refused == {experiment_digest(FIRST)}
    entry = Journal(home.journal).entries()[-1]
    assert (entry.fields["what"], entry.fields["reason"]) == ("refused", "the study has ended")
    (answer,) = offered(home, resolve(experiment(privacy=DP, federation={"rounds": 4})))
    assert answer.status == "refused" and len(waiting(home)) == 1
    keep_pending(home, FIRST, "again")
    assert [each.digest for each in waiting(home)] != [experiment_digest(FIRST)]
    approve_experiment(experiment_digest(FIRST), home.path, None)
    assert read_approved(home).refused == frozenset()
    assert experiment_digest(FIRST) in read_approved(home).experiments


def test_an_approved_plan_is_refused_too(make_site: MakeSite):
    home, _ = make_site(experiments="approved")
    offered(home, FIRST)
    approve_experiment("1", home.path, None)
    approve_refuse(experiment_digest(FIRST), "", home.path)
    assert read_approved(home).experiments == frozenset()
    (answer,) = offered(home, resolve(experiment(privacy=DP, federation={"rounds": 5})))
    assert answer.reasons[0].code == "experiment_not_approved"
    with pytest.raises(InputError, match="no experiment of that number or digest"):
        approve_refuse("17", "", home.path)


def test_differences_are_those_to_the_nearest_recipe():
    recipe = resolve(load_experiment(find_experiment("federated_private_faces64-S")))
    assert differences_to_recipe(recipe) == ("federated_private_faces64-S", [])
    federation = recipe.federation.model_copy(update={"rounds": recipe.federation.rounds + 11})
    name, lines = differences_to_recipe(recipe.model_copy(update={"federation": federation}))
    assert name == "federated_private_faces64-S"
    assert lines == [f"federation.rounds = {recipe.federation.rounds + 11}, there {recipe.federation.rounds}"]


def test_a_file_that_was_changed_by_hand_is_left_out_and_told(make_site: MakeSite, caplog: pytest.LogCaptureFixture):
    home, _ = make_site(experiments="approved")
    offered(home, FIRST)
    (path,) = pending(home)
    path.write_text(path.read_text().replace("rounds = 3", "rounds = 30"))
    assert waiting(home) == []
    assert "is not the experiment of its name" in caplog.text
    path.write_text("\x00[")
    assert waiting(home) == []


def test_who_asked_cannot_write_into_the_experiment(make_site: MakeSite):
    home, _ = make_site(experiments="approved")
    keep_pending(home, FIRST, 'x"\n[federation]\nrounds = 99\n#')
    (found,) = waiting(home)
    assert isinstance(found, Waiting)
    assert found.experiment == FIRST


@pytest.mark.parametrize(
    ("rounds", "steps", "words"),
    [(1, 2, "1 round of 2 steps"), (3, 1, "3 rounds of 1 step"), (1, 1, "1 round of 1 step")],
)
def test_a_plans_length_is_counted_in_words(rounds: int, steps: int, words: str):
    assert length_in_words(rounds, steps) == words
