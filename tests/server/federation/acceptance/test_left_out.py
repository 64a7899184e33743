"""Who is left out, for how long, and how the operator takes a site back."""

import json

import pytest

from server.federation.acceptance.left_out import READMITTED_FILE, LeftOut, left_out_of, readmit, readmitted
from shared.errors import InputError
from shared.storage.runlog import OUTCOMES, RunLog


def test_the_clearest_are_left_out_first_and_never_half_of_the_sites(tmp_path):
    left_out = LeftOut(tmp_path)
    assert left_out.name({"a": 0.4, "b": 0.9, "c": 0.6}, 3, 5) == ["b", "c"]
    assert left_out.others({"a": 1, "b": 2, "d": 3}) == {"a": 1, "d": 3}
    assert left_out.name({"a": 0.4}, 4, 3) == []
    assert left_out.as_json() == {"b": {"round": 3, "persistence": 0.9}, "c": {"round": 3, "persistence": 0.6}}


def test_nobody_is_named_twice_and_the_state_survives_in_the_record(tmp_path):
    first = LeftOut(tmp_path)
    first.name({"b": 0.9}, 3, 9)
    again = LeftOut(tmp_path, json.loads(json.dumps(first.as_json())))
    assert again.sites() == {"b"} and again.name({"b": 0.95}, 4, 9) == [] and again.as_json()["b"]["round"] == 3


def test_a_site_that_was_taken_back_stays(tmp_path):
    left_out = LeftOut(tmp_path, {"b": {"round": 3, "persistence": 0.9}})
    readmit(tmp_path, "b")
    assert left_out.sites() == set() and left_out.as_json() == {} and left_out.others({"b": 1}) == {"b": 1}
    assert left_out.name({"b": 0.99, "c": 0.5}, 9, 9) == ["c"]


@pytest.mark.parametrize("damaged", ["{", '{"b": 1}', "3", ""])
def test_a_damaged_file_takes_nobody_back_and_can_be_written_anew(tmp_path, damaged):
    (tmp_path / READMITTED_FILE).write_text(damaged)
    assert readmitted(tmp_path) == set()
    readmit(tmp_path, "c")
    assert readmitted(tmp_path) == {"c"}


def test_the_newest_round_says_who_is_left_out(tmp_path):
    lists = {state: [] for state in OUTCOMES}
    log = RunLog(tmp_path / "run" / "metrics.jsonl")
    assert left_out_of(tmp_path / "run") == []
    for number, left_out in ((1, {}), (2, {"b": {"round": 2, "persistence": 0.9}})):
        log.write("round", round=number, weights_changed=True, seconds={}, left_out=left_out, **lists)
    assert left_out_of(tmp_path / "run") == ["b"]
    with pytest.raises(InputError, match="'other' is unknown"):
        left_out_of(tmp_path / "other")
