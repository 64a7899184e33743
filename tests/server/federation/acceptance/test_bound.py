import math

import pytest

from server.federation.acceptance.bound import Rise, worst_rise


def test_the_group_that_rose_most_decides_and_others_may_fall():
    before = {"all": 2.0, "t 0-249": 0.5, "label 3": 8.0}
    assert worst_rise(before, {"all": 1.9, "t 0-249": 0.6, "label 3": 8.8}) == Rise("t 0-249", pytest.approx(0.2))


def test_a_loss_that_is_not_finite_has_risen_beyond_any_bound():
    for bad in (math.nan, math.inf):
        assert worst_rise({"all": 1.0, "t": 1.0}, {"all": 0.5, "t": bad}) == Rise("t", math.inf)


def test_groups_that_only_one_round_has_are_not_compared():
    assert worst_rise({"all": 1.0, "old": 1.0}, {"all": 1.5, "new": 9.0}) == Rise("all", 0.5)
    assert worst_rise({}, {"all": 1.0}).ratio == 0.0


def test_where_there_was_no_loss_to_compare_with_nothing_has_risen():
    for none in (0.0, -1.0, math.nan, math.inf):
        assert worst_rise({"all": none}, {"all": 3.0}) == Rise("all", 0.0)
    assert worst_rise({"all": 2.0, "t": 2.0}, {"all": 1.0, "t": 1.5}) == Rise("t", -0.25)
    assert worst_rise({"b": 1.0, "a": 1.0}, {"a": 2.0, "b": 2.0}) == Rise("a", 1.0), "one name whatever the order"
