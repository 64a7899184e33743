import random

import pytest

from benchmarks import wild
from benchmarks.wild import run
from benchmarks.wild_pictures import Case
from shared.errors import InputError


def test_a_case_of_each_kind_comes_out_right(capsys):
    assert wild.main(["--cases", "44", "--seed", "1"]) == 0
    told = capsys.readouterr().out
    assert "44 of 44 right (seed 1)" in told and "traceback" in told


def raising(error):
    def act(_):
        raise error

    return act


@pytest.mark.parametrize(
    ("case", "outcome"),
    [
        (Case("x", lambda _: 3, 3), "value"),
        (Case("x", lambda _: 2, 3), "wrong"),
        (Case("x", raising(InputError("too large: 9")), line="too large"), "line"),
        (Case("x", raising(InputError("something else")), line="too large"), "wrong"),
        (Case("x", raising(InputError("too large")), 3), "wrong"),
        (Case("x", lambda _: 3, 3, line="too large"), "wrong"),
        (Case("x", raising(KeyError("too large")), line="too large"), "traceback"),
    ],
)
def test_what_is_lost_wrong_or_a_traceback_counts_as_such(tmp_path, case, outcome):
    assert run(case, tmp_path)[0] == outcome


def test_the_same_seed_draws_the_same_cases():
    kinds = [[case.kind for case in wild.draw(random.Random(4), 25)] for _ in range(2)]
    assert kinds[0] == kinds[1] and len(set(kinds[0])) == 22
