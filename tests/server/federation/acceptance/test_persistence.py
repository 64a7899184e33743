"""The mean cosine between rounds of what sets a site apart, held against the sum over pairs that it stands for."""

import numpy as np
import pytest

from server.federation.acceptance.persistence import (
    FORGETTING,
    LEAST_ROUNDS,
    LEAST_SITES,
    Comparison,
    Course,
    compare,
    deviations,
)


def course_of(rounds):
    found = Course(np.zeros(len(rounds[0])))
    for deviation in rounds:
        found = found.after(deviation)
    return found


def test_persistence_is_the_weighted_mean_of_cosines_between_rounds():
    rounds = np.random.default_rng(3).normal(size=(5, 4)) * [[1], [3], [0.5], [2], [7]]
    weights, lengths = FORGETTING ** np.arange(5)[::-1], np.linalg.norm(rounds, axis=1)
    above = below = 0.0
    for r in range(5):
        for s in range(5):
            if r != s:
                above += weights[r] * weights[s] * rounds[r] @ rounds[s]
                below += weights[r] * weights[s] * lengths[r] * lengths[s]
    assert course_of(rounds).persistence == pytest.approx(above / below)


def test_the_same_way_every_time_is_1_and_back_and_forth_is_below_0():
    way = np.array([1.0, -2.0, 0.5])
    assert course_of([way, 3 * way, 0.1 * way]).persistence == pytest.approx(1)
    assert course_of([way, -way]).persistence == pytest.approx(-1)
    assert course_of([way]).persistence == course_of([0 * way, 0 * way]).persistence == 0


def test_what_a_site_did_long_ago_does_not_excuse_it():
    random = np.random.default_rng(4)
    honest, way = random.normal(size=(40, 500)), random.normal(size=500)
    late = course_of([*honest, *[way] * 6])
    assert course_of(honest).persistence < 0.05 and late.persistence > 0.15


def test_a_deviation_is_from_the_mean_of_the_others_and_the_same_in_any_order():
    sketches = {"b": np.array([1.0, 5.0]), "c": np.array([4.0, -1.0]), "a": np.array([2.5, 0.1])}
    found = deviations(sketches)
    assert found["a"] == pytest.approx(np.array([0.0, -1.9])) and found["b"] == pytest.approx(np.array([-2.25, 5.45]))
    backwards = deviations(dict(reversed(sketches.items())))
    assert all(np.array_equal(found[site], backwards[site]) for site in sketches)


def test_who_is_further_above_the_median_than_the_bound_is_shortened_to_what_the_bound_allows():
    comparison = Comparison({"a": 0.1, "b": 0.05, "c": 0.9, "d": 0.36, "e": 0.0})
    assert comparison.shares(0.2) == pytest.approx({"c": 0.5, "d": (0.2 / 0.26) ** 0.5})
    assert comparison.shares(0.3).keys() == {"c"} and comparison.shares(0.8) == {}
    assert comparison.as_json() == {"median": 0.1, "largest": 0.9, "site": "c"}
    assert Comparison({}).shares(0.1) == comparison.shares(0) == {}


def test_nobody_is_compared_among_too_few_or_before_enough_rounds():
    way = np.ones(3)
    old, young = course_of([way] * LEAST_ROUNDS), course_of([way] * (LEAST_ROUNDS - 1))
    courses = {f"site-{number}": old for number in range(LEAST_SITES)}
    assert set(compare(courses, courses).persistence) == courses.keys()
    assert compare(courses, ["site-0", "site-1"]).persistence == {}
    assert compare(courses | {"site-0": young}, courses).persistence == {}
