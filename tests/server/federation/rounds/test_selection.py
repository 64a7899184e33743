"""Whom a round asks, as pure functions of seed, round and who is there."""

import itertools

import pytest

from server.federation.rounds.selection import LONGEST_PAUSE, Attendance, choose
from tests.server.fake_federation import make_experiment

SITES = [f"site-{number}" for number in range(8)]
CENTRAL = {"central_noise_multiplier": 0.7, "max_update_norm": 3.0, "update_norm_action": "clip", "sites_per_round": 4}


def record(server_round, *, answered=(), refused=(), late=(), closed=()):
    ended = [{"site": site, "code": "closed"} for site in closed] + [{"site": site, "code": "late"} for site in late]
    return {
        "round": server_round,
        "answered": [{"site": site} for site in answered],
        "refused": [{"site": site} for site in refused],
        "late": ended,
    }


def test_who_is_absent_is_replaced_and_shifts_nobody_else():
    experiment = make_experiment(sites_per_round=3)
    for server_round in range(1, 9):
        chosen = choose(experiment, server_round, SITES, SITES)
        assert len(chosen) == 3
        for absent in chosen:
            instead = choose(experiment, server_round, SITES, [site for site in SITES if site != absent])
            assert set(chosen) - {absent} < set(instead) and len(instead) == 3


def test_each_round_draws_anew_and_the_order_of_the_lists_does_not_matter():
    experiment = make_experiment(sites_per_round=2)
    drawn = [tuple(choose(experiment, server_round, SITES, SITES)) for server_round in range(1, 13)]
    assert len(set(drawn)) > 4
    assert drawn[0] == tuple(choose(experiment, 1, SITES[::-1], SITES[::-1]))


def test_under_client_level_dp_each_site_is_drawn_by_itself():
    experiment, rounds = make_experiment(**CENTRAL, sites_fraction=0.25), range(1, 401)
    drawn = [set(choose(experiment, server_round, SITES, SITES)) for server_round in rounds]
    for site in SITES:
        assert 0.15 < sum(site in chosen for chosen in drawn) / 400 < 0.35
    assert {len(chosen) for chosen in drawn} > {0, 1, 2, 3}, "not all of them together"
    fewer = [set(choose(experiment, server_round, SITES[1:], SITES[1:])) for server_round in rounds]
    assert fewer == [chosen - {SITES[0]} for chosen in drawn], "one site more changes nothing for the others"
    assert choose(make_experiment(**CENTRAL), 1, SITES, SITES) == SITES


def test_pauses_double_up_to_the_longest_and_an_answer_ends_them():
    attendance, asked = Attendance({}), []
    for server_round in range(1, 140):
        if "a" not in attendance.set_aside(server_round):
            asked.append(server_round)
            attendance.note(record(server_round, refused=["a"]))
    gaps = [after - before - 1 for before, after in itertools.pairwise(asked)]
    assert gaps == [0, 0, 1, 2, 4, 8, 16, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE]
    attendance.note(record(140, answered=["a"]))
    assert attendance.state == {}
    for server_round in (141, 142):
        attendance.note(record(server_round, late=["a"]))
        assert attendance.set_aside(server_round + 1) == set()


def test_what_the_end_of_a_round_cut_short_is_no_miss():
    attendance = Attendance({})
    for server_round in range(1, 6):
        attendance.note(record(server_round, closed=["a"], late=["b"]))
    assert attendance.state.keys() == {"b"}


@pytest.mark.parametrize(("needed", "left"), [(2, ["b", "c"]), (3, ["a", "b", "c"])])
def test_those_set_aside_are_asked_where_too_few_would_be_left(needed, left):
    attendance = Attendance({"a": {"misses": 3, "until": 7}})
    assert sorted(attendance.willing(dict.fromkeys("abc"), 7, needed)) == left
    assert sorted(attendance.willing(dict.fromkeys("abc"), 8, needed)) == ["a", "b", "c"]
