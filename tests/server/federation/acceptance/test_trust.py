"""Whom a run doubts, and how the operator trusts a site all the same."""

import pytest

from server.federation.acceptance.trust import TRUSTED_FILE, doubted_by, trust, trusted
from shared.errors import InputError
from shared.storage.runlog import OUTCOMES, RunLog


@pytest.mark.parametrize("damaged", ["{", '{"b": 1}', "3", ""])
def test_a_damaged_file_trusts_nobody_and_can_be_written_anew(tmp_path, damaged):
    (tmp_path / TRUSTED_FILE).write_text(damaged)
    assert trusted(tmp_path) == set()
    trust(tmp_path, "c")
    trust(tmp_path, "a")
    assert trusted(tmp_path) == {"a", "c"}


def test_the_newest_round_says_who_is_doubted(tmp_path):
    lists = {state: [] for state in OUTCOMES}
    log = RunLog(tmp_path / "run" / "metrics.jsonl")
    assert doubted_by(tmp_path / "run") == []
    doubt = {"round": 2, "persistence": 0.9, "share": 0.4}
    for number, doubted in ((1, {"a": doubt}), (2, {"b": doubt, "c": doubt})):
        log.write("round", round=number, doubted=doubted, **lists)
    assert doubted_by(tmp_path / "run") == ["b", "c"]
    trust(tmp_path / "run", "b")
    assert doubted_by(tmp_path / "run") == ["c"]
    with pytest.raises(InputError, match="'other' is unknown"):
        doubted_by(tmp_path / "other")
