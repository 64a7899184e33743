"""Whole rounds with masked updates: the sum of open ones bit by bit, through drop-outs and kills, or a clear reason."""

import re
import shutil

import numpy as np
import pytest
from flwr.app import Error

from server.federation.client_level.release_ledger import NoiseKeys
from server.federation.rounds.giving_up import RunFailedError
from server.federation.secure import masked_sum, unmasking
from server.federation.secure.masked_sum import KeptSum
from server.federation.secure.unmasking import Unmasking
from server.federation.updates import global_model
from shared.messages.secure_sum.key_question import KeysQuery, keys_record
from shared.messages.secure_sum.unmask import read_unmask_answer, unmask_record
from shared.messages.training import TrainReply
from shared.secure_aggregation.roster import Peer
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
from tests.server.secure_sites import SECURE, SecureSite, grid_of, secure_sites
from tests.signing import public_of


class Killed(BaseException):
    """Stands for kill -9: nothing of the code's own handling of errors may matter."""


def gone(*_):
    """A site whose process fails before it answers."""
    return Error(2, "gone")


@pytest.fixture(scope="module")
def open_weights(tmp_path_factory):
    """What a set of sites arrives at in one round, or two, whose updates are not masked."""
    known = {}

    def weights(sites, server_round=1):
        if sites not in known:
            plan = make_experiment(rounds=2 if len(sites) == 5 else 1)
            home = make_home(tmp_path_factory.mktemp("open"), plan, 5)
            absent = {f"site_{number}": gone for number in range(5) if number not in sites}
            run_rounds(home, FakeGrid(honest_sites(5, **absent)), plan)
            known[sites] = home
        return weights_of(known[sites], server_round)

    return weights


ALL = (0, 1, 2, 3, 4)


def federation(folder, *, sites=None, **settings):
    plan = make_experiment(**{"rounds": 1, **SECURE, **settings})
    return plan, make_home(folder, plan, 5), secure_sites(folder / "sites") if sites is None else sites


def test_a_run_with_masked_updates_has_the_weights_of_an_open_one_bit_by_bit(tmp_path, open_weights):
    plan, home, sites = federation(tmp_path, rounds=2)
    run_rounds(home, grid_of(sites), plan)
    for number in (1, 2):
        assert same(weights_of(home, number), open_weights(ALL, number))
    (roster,) = events_of(home, "roster")
    assert (roster["threshold"], len(roster["sites"])) == (3, 5)
    record = rounds_of(home)[0]
    assert all("norm" not in entry and entry["weight"] == 1 for entry in record["answered"])
    assert [path.name for path in (home / "runs/run/secure").iterdir()] == ["roster.json"]


def test_with_thirty_two_bits_the_mean_is_off_by_half_a_step_and_the_wire_is_as_wide_as_an_open_one(
    tmp_path, open_weights
):
    plan, home, sites = federation(tmp_path, secure_bits=32)
    run_rounds(home, grid_of(sites), plan)
    opened = open_weights(ALL)
    errors = [np.abs(weights_of(home, 1)[name] - opened[name]).max() for name in opened]
    assert 0 < max(errors) <= 2.0**-26 + 2.0**-22  # float32 itself rounds weights of about 3 by 2^-23
    sizes = {entry["bytes"] for entry in rounds_of(home)[0]["answered"]}
    assert sizes == {4 * sum(tensor.size for tensor in opened.values())}


@pytest.mark.parametrize("central", [{}, {"central_noise_multiplier": 0.5, "sites_per_round": 5}], ids=["plain", "dp"])
def test_sites_clip_as_the_coordinator_would_and_its_noise_joins_the_open_sum(tmp_path, monkeypatch, central):
    monkeypatch.setattr(NoiseKeys, "key", lambda *_: bytes(32))
    settings = {"max_update_norm": 0.5, "round_deadline_seconds": 2.0, **central}
    plan, home, sites = federation(tmp_path / "masked", **settings)
    run_rounds(home, grid_of(sites), plan)
    clipping = make_experiment(**{"rounds": 1, "update_norm_action": "clip", **settings})
    opened = make_home(tmp_path / "open", clipping, 5)
    run_rounds(opened, FakeGrid(honest_sites(5)), clipping)
    assert same(weights_of(home, 1), weights_of(opened, 1))


def test_under_client_level_dp_a_sum_that_cannot_be_read_is_released_as_noise(tmp_path):
    central = {"max_update_norm": 0.5, "central_noise_multiplier": 0.5, "sites_per_round": 5}
    plan, home, sites = federation(tmp_path, round_deadline_seconds=2.0, **central)
    grid = grid_of(sites)
    for number in (0, 1, 2):
        grid.sites[100 + number].answer = gone
    run_rounds(home, grid, plan)
    (record,) = rounds_of(home)
    assert record["weights_changed"] and record["central_releases"] == 1
    assert "2 masked updates" in record["unmasking"]


@pytest.mark.parametrize(
    ("before", "during"), [((1,), ()), ((0, 4), ()), ((), (2,)), ((), (0, 3)), ((3,), (1,))], ids=str
)
def test_two_of_five_may_drop_out_before_or_after_masking(tmp_path, open_weights, before, during):
    plan, home, sites = federation(tmp_path)
    grid = grid_of(sites)
    for number in before:
        grid.sites[100 + number].answer = gone
    for number in during:
        grid.sites[100 + number].queries["query.unmask"] = gone
    run_rounds(home, grid, plan)
    assert same(weights_of(home, 1), open_weights(tuple(number for number in ALL if number not in before)))


@pytest.mark.parametrize(
    ("before", "during", "reason"),
    [
        ((0, 1, 4), (), "[012] masked updates, a sum of 3 is the smallest that is read"),
        ((0,), (1, 2), r"2 of the 3 answers it takes; site-1 \(.*\); site-2 \("),
    ],
)
def test_with_three_gone_the_round_changes_nothing_and_says_why(tmp_path, before, during, reason):
    plan, home, sites = federation(tmp_path, rounds=1)
    grid = grid_of(sites)
    for number in before:
        grid.sites[100 + number].answer = gone
    for number in during:
        grid.sites[100 + number].queries["query.unmask"] = gone
    with pytest.raises(RunFailedError, match="the weights never changed"):
        run_rounds(home, grid, plan)
    (record,) = rounds_of(home)
    assert not record["weights_changed"]
    assert record["reason"] == record["unmasking"]
    assert re.search(reason, record["reason"])
    assert same(weights_of(home, 1), weights_of(home, 0))


def test_with_one_colluding_site_counted_one_drop_out_is_stood_and_two_are_not(tmp_path, open_weights):
    plan, home, _ = federation(tmp_path, secure_colluding=1, sites=())
    sites = secure_sites(tmp_path / "sites", max_colluding=1)
    grid = grid_of(sites)
    grid.sites[101].answer = gone
    run_rounds(home, grid, plan)
    assert same(weights_of(home, 1), open_weights((0, 2, 3, 4)))

    second = make_home(tmp_path / "second", plan, 5)
    grid = grid_of(secure_sites(tmp_path / "others", max_colluding=1))
    grid.sites[101].answer = grid.sites[102].answer = gone
    with pytest.raises(RunFailedError):
        run_rounds(second, grid, plan)
    assert not any(record["weights_changed"] for record in rounds_of(second))


def kill_once(monkeypatch, place, name, *, is_after):
    """Let the next call of `place.name` be the last thing that a process does, or the thing that it does not do."""
    call = getattr(place, name)

    def killed(*args, **kwargs):
        monkeypatch.setattr(place, name, call)
        if is_after:
            call(*args, **kwargs)
        raise Killed

    monkeypatch.setattr(place, name, killed)


@pytest.mark.parametrize(
    ("place", "name", "is_after"),
    [
        (KeptSum, "keep", False),
        (masked_sum, "_save", True),
        (KeptSum, "keep", True),
        (Unmasking, "ask", True),
        (unmasking, "add_masks", True),
        (global_model, "save_checkpoint", False),
        (global_model, "save_checkpoint", True),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_coordinator_killed_at_any_moment_comes_to_the_same_bits(
    tmp_path, monkeypatch, open_weights, place, name, is_after
):
    """Site 1 is late in the round that is killed, and there when it is repeated: once a list was told it stays out."""
    plan, home, sites = federation(tmp_path, rounds=1)
    first, second = grid_of(sites), grid_of(sites)
    first.sites[101].answer = gone
    kill_once(monkeypatch, place, name, is_after=is_after)
    with pytest.raises(Killed):
        run_rounds(home, first, plan)
    is_told = (place, name, is_after) not in ((KeptSum, "keep", False), (masked_sum, "_save", True))
    run_rounds(home, second, plan)
    assert same(weights_of(home, 1), open_weights((0, 2, 3, 4) if is_told else ALL))
    assert len(events_of(home, "roster")) == 1


def test_a_survivor_that_is_gone_after_a_kill_is_not_missed(tmp_path, monkeypatch, open_weights):
    plan, home, sites = federation(tmp_path, rounds=1)
    kill_once(monkeypatch, Unmasking, "ask", is_after=False)
    with pytest.raises(Killed):
        run_rounds(home, grid_of(sites), plan)
    grid = grid_of(sites)
    grid.sites[100].answer = grid.sites[100].queries["query.unmask"] = gone
    run_rounds(home, grid, plan)
    assert same(weights_of(home, 1), open_weights(ALL))
    assert grid.sites[102].asked == 0


def changed_dealing(**changed):
    def change(reply):
        fields = reply.header.model_dump()
        fields["dealing"] = {**fields["dealing"], **{name: make(fields["dealing"]) for name, make in changed.items()}}
        return TrainReply(type(reply.header).model_validate(fields), reply.update)

    return change


def other_update(reply):
    return TrainReply(reply.header, reply.update + np.array(2**50, reply.update.dtype))


def reversed_seeds(dealing):
    return dealing["seed_digests"][::-1]


def reversed_boxes(dealing):
    return dealing["boxes"][::-1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (changed_dealing(seed_digests=reversed_seeds), "site site-1 has dealt shares of another seed than it says"),
        (changed_dealing(boxes=reversed_boxes), "the shares of site site-1 are not those that it dealt to this site"),
        (other_update, "a site has masked wrongly or sent too long an update, and which one cannot be known"),
    ],
    ids=["seeds", "boxes", "mask"],
)
def test_a_site_that_deals_or_masks_wrongly_costs_the_round_and_is_named_where_it_can_be(tmp_path, change, reason):
    plan, home, sites = federation(tmp_path)
    sites[1].change = change
    with pytest.raises(RunFailedError):
        run_rounds(home, grid_of(sites), plan)
    (record,) = rounds_of(home)
    assert reason in record["reason"]
    assert same(weights_of(home, 1), weights_of(home, 0))


@pytest.mark.parametrize("number_of_liars", [1, 3])
def test_wrong_shares_of_a_minority_do_not_matter_and_those_of_too_many_are_named(
    tmp_path, open_weights, number_of_liars
):
    plan, home, sites = federation(tmp_path)

    class Liar(SecureSite):
        def unmask(self, content):
            answer = read_unmask_answer(super().unmask(content))
            shares = ("00" * 33, *answer.shares[1:])
            return unmask_record(answer.model_copy(update={"shares": shares}))

    for site in sites[:number_of_liars]:
        site.__class__ = Liar
    if number_of_liars == 1:
        run_rounds(home, grid_of(sites), plan)
        assert same(weights_of(home, 1), open_weights(ALL))
    else:
        with pytest.raises(RunFailedError):
            run_rounds(home, grid_of(sites), plan)
        assert "site-2 (its share of site site-0 is not the one that site-0 says" in rounds_of(home)[0]["reason"]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda reply: TrainReply(reply.header.model_copy(update={"dealing": None}), reply.update), "dealing"),
        (lambda reply: TrainReply(reply.header, reply.update.astype(np.float32)), "dtype"),
        (lambda reply: TrainReply(reply.header, reply.update[:-1]), "malformed"),
    ],
    ids=["no shares", "floats", "short"],
)
def test_a_reply_of_another_form_is_rejected_and_the_others_are_added_up(tmp_path, open_weights, change, code):
    plan, home, sites = federation(tmp_path)
    sites[4].change = change
    run_rounds(home, grid_of(sites), plan)
    (rejected,) = rounds_of(home)[0]["rejected"]
    assert (rejected["site"], rejected["code"]) == ("site-4", code)
    assert same(weights_of(home, 1), open_weights((0, 1, 2, 3)))


def test_a_site_that_repeats_anothers_key_is_not_in_the_roster(tmp_path):
    plan, home, others = federation(tmp_path, min_available=4)
    others[2].keys(keys_question())
    copied = others[3].home.secure_sums / "run"
    shutil.copytree(others[2].home.secure_sums / "run", copied)
    with pytest.raises(RunFailedError, match=r"site-2 \(its key is another's\); site-3 \(its key is another's\)"):
        run_rounds(home, grid_of(others), plan)


def keys_question():
    peers = tuple(Peer(alias=f"site-{number}", signing_key=public_of(f"site-{number}")) for number in range(5))
    return keys_record(KeysQuery(run="run", peers=peers))


def test_operators_that_have_not_approved_the_roster_are_told_of_it_and_nobody_is_sent_weights(tmp_path):
    plan, home, _ = federation(tmp_path, sites=())
    sites = secure_sites(tmp_path / "sites", rosters="approved")
    grid = grid_of(sites)
    with pytest.raises(RunFailedError, match=r"roster_not_approved: .*maskfed-client approve roster") as caught:
        run_rounds(home, grid, plan)
    assert caught.value.is_final
    assert [site.asked for site in grid.sites.values()] == [0] * 5


def test_the_roster_stays_who_it_was_and_too_few_of_it_are_not_sent_weights(tmp_path):
    plan, home, sites = federation(tmp_path, available_deadline_seconds=1.0)
    grid = grid_of(sites)
    for number in (3, 4):
        grid.sites[100 + number].is_online = False
    run_rounds(home, grid, plan)
    assert events_of(home, "roster")[0]["sites"] == ["site-0", "site-1", "site-2"]

    longer = make_experiment(**{**SECURE, "rounds": 1})
    second = make_home(tmp_path / "second", longer, 5)
    shutil.copytree(home / "runs/run/secure", second / "runs/run/secure")
    grid = grid_of(sites)
    for number in (1, 2):
        grid.sites[100 + number].is_online = False
    with pytest.raises(RunFailedError, match="1 sites of the roster are here, a sum takes 3") as caught:
        run_rounds(second, grid, longer)
    assert not caught.value.is_final
    assert [site.asked for site in grid.sites.values()] == [0] * 5
