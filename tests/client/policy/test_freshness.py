"""Old questions: by their time, by the newest of their run, and what is remembered of them."""

import json

import pytest

from client.policy import freshness
from client.policy.freshness import ReplayError, check_fresh
from shared.messages.signature import Statement


def asked(issued, expires=10_000, run="run", purpose="train"):
    return Statement(purpose, "request", run, 1, "site-0", "a" * 64, "b" * 64, "c" * 64, issued, expires)


@pytest.fixture
def file(tmp_path, monkeypatch):
    clock(monkeypatch, 5.0)
    return tmp_path / "asked.json"


def clock(monkeypatch, seconds):
    monkeypatch.setattr(freshness.time, "time", lambda: seconds)


def test_a_question_stands_until_its_time_is_over(file, monkeypatch):
    check_fresh(file, asked(1, expires=5000))
    clock(monkeypatch, 5.001)
    with pytest.raises(ReplayError, match="time was over 0 s ago"):
        check_fresh(file, asked(2, expires=5000))


def test_questions_of_a_kind_and_run_are_taken_in_the_order_in_which_they_were_asked(file):
    for issued in (10, 10, 11):
        check_fresh(file, asked(issued))
    with pytest.raises(ReplayError, match="a newer train request of run run"):
        check_fresh(file, asked(10))
    check_fresh(file, asked(9, run="other"))
    for purpose in ("audit", "statistics", "offer"):
        check_fresh(file, asked(9, purpose=purpose))
        with pytest.raises(ReplayError, match=f"the same {purpose} request"):
            check_fresh(file, asked(9, purpose=purpose))


def test_only_questions_that_still_stand_are_remembered(file, monkeypatch):
    for number in range(5):
        check_fresh(file, asked(number, expires=6000 + number, run=f"run-{number}"))
    clock(monkeypatch, 6.003)
    check_fresh(file, asked(1, run="last"))
    assert set(json.loads(file.read_text())) == {"train run-3", "train run-4", "train last"}


def test_an_earlier_question_with_more_time_is_not_taken_once_the_later_one_is_over(file, monkeypatch):
    check_fresh(file, asked(1, expires=9000))
    check_fresh(file, asked(2, expires=6000))
    clock(monkeypatch, 7.0)
    check_fresh(file, asked(1, run="other"))  # what is over is forgotten with each new question
    with pytest.raises(ReplayError, match="a newer train request"):
        check_fresh(file, asked(1, expires=9000))
    check_fresh(file, asked(3, expires=8000))
    clock(monkeypatch, 9.001)
    check_fresh(file, asked(1, run="third"))
    assert set(json.loads(file.read_text())) == {"train other", "train third"}


def test_what_is_remembered_has_a_limit_and_nothing_that_stands_is_forgotten_for_it(file, monkeypatch):
    monkeypatch.setattr(freshness, "MOST_STANDING", 3)
    for number in range(3):
        check_fresh(file, asked(5, expires=6000 + number, run=f"run-{number}"))
    with pytest.raises(ReplayError, match="3 questions stand already"):
        check_fresh(file, asked(5, run="more"))
    check_fresh(file, asked(6, expires=6000, run="run-0"))
    for number in range(3):
        with pytest.raises(ReplayError, match="a newer"):
            check_fresh(file, asked(4, run=f"run-{number}"))
    clock(monkeypatch, 6.001)
    check_fresh(file, asked(5, run="more"))


@pytest.mark.parametrize("text", ["", "[]", '{"train run": 3}', '{"train run": ["x", 1]}', "\0"])
def test_a_file_that_cannot_be_read_refuses_and_says_what_to_do(file, text):
    file.write_text(text)
    with pytest.raises(ReplayError, match="remove it"):
        check_fresh(file, asked(1))
