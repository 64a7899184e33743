"""The day's answers: what stands, for how long, and what ends it."""

import datetime as dt

import pytest

from client.home import Home
from client.offers.answered import open_answered, too_many
from client.settings import SitePolicy
from shared.messages.agreement.offer import OfferAnswer, Reason

NOW = dt.datetime(2026, 5, 1, 12, tzinfo=dt.UTC)
ONE, OTHER = "1" * 64, "2" * 64
YES = OfferAnswer(status="accepted")
POLICY = SitePolicy(max_offers_per_day=2)


def no(code: str) -> OfferAnswer:
    return OfferAnswer(status="refused", reasons=(Reason(code=code, text="no"),))


@pytest.fixture
def home(tmp_path) -> Home:
    return Home(tmp_path)


def at(home, later=dt.timedelta(), policy=POLICY, num_entries=3):
    return open_answered(home, policy, NOW + later, num_entries)


def test_an_answer_stands_for_a_day_where_ledger_policy_and_approvals_are_the_same(home):
    with at(home) as answered:
        assert answered.find(ONE) is None
        answered.keep(ONE, YES)
    day, moment = dt.timedelta(days=1), dt.timedelta(microseconds=1)
    for later, found in ((day - moment, YES), (day, None), (-day, YES), (-day - moment, None)):
        with at(home, later) as answered:
            assert (answered.find(ONE), answered.find(OTHER)) == (found, None)
    for changed in ({"num_entries": 4}, {"policy": POLICY.model_copy(update={"epsilon_cap": 1.5})}):
        with at(home, **changed) as answered:
            assert answered.find(ONE) is None
    home.approved.write_text("experiment " + "a" * 64 + "\n")
    with at(home) as answered:
        assert answered.find(ONE) is None


@pytest.mark.parametrize(("code", "stands"), [("clock", False), ("too_many_rounds", False), ("dp_required", True)])
def test_an_answer_that_time_alone_may_change_stands_for_ten_minutes(home, code, stands):
    with at(home) as answered:
        answered.keep(ONE, no(code))
    minutes, moment = dt.timedelta(minutes=10), dt.timedelta(microseconds=1)
    with at(home, minutes - moment) as answered:
        assert answered.find(ONE) == no(code)
    with at(home, minutes) as answered:
        assert (answered.find(ONE) is not None) is stands


def test_offers_are_counted_once_however_often_they_are_worked_on(home):
    with at(home) as answered:
        answered.keep(ONE, YES)
        answered.keep(ONE, no("clock"))
        assert answered.find(ONE) == no("clock")
        assert not answered.is_beyond(OTHER)
        answered.keep(OTHER, YES)
        assert answered.is_beyond("3" * 64) and not answered.is_beyond(ONE)
    assert home.offers.read_text().count('"time"') == 2
    assert too_many(POLICY).reasons[0].text == "the site looks at 2 new offers in 24 hours, not at more"


def test_a_private_no_counts_under_the_policy_that_it_was_said_under(home):
    with at(home) as answered:
        answered.keep(ONE, no("dp_required"))
        assert not answered.has_hidden
        answered.keep(OTHER, no("policy"))
        assert answered.has_hidden
    with at(home, policy=POLICY.model_copy(update={"epsilon_cap": 1.5})) as answered:
        assert not answered.has_hidden
    with at(home, num_entries=9) as answered:
        assert answered.has_hidden


@pytest.mark.parametrize("text", ["", "{", "[]", '{"answered": 3}', "\0"])
def test_a_damaged_file_counts_as_none(home, text):
    home.offers.write_text(text)
    with at(home) as answered:
        assert answered.find(ONE) is None and not answered.is_beyond(ONE)
        answered.keep(ONE, YES)
    with at(home) as answered:
        assert answered.find(ONE) == YES
