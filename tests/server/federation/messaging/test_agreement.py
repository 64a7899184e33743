"""Weights travel to sites that have accepted the plan; nobody is charged before enough have."""

import json

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, RecordDict

from server.federation.messaging.agreement import ANSWERS_FILE
from server.federation.messaging.asking import MOST_QUESTIONS
from server.federation.rounds.giving_up import RunFailedError
from shared.messages.agreement.offer import OfferAnswer, Reason
from shared.messages.training import ReplyHeader, TrainReply, TrainRequest
from tests.server.fake_federation import (
    events_of,
    honest_sites,
    make_experiment,
    make_home,
    rounds_of,
    run_rounds,
    trained,
)
from tests.server.fake_grid import FakeGrid, answer_record
from tests.signing import key_of, signed_reply


def no(*codes):
    reasons = tuple(Reason(code=code, text=f"because of {code}") for code in codes)
    return lambda _: answer_record(OfferAnswer(status="refused", reasons=reasons))


def offers_of(home):
    return {event["site"]: event for event in events_of(home, "offer")}


def federation(tmp_path, **settings):
    experiment = make_experiment(**settings)
    return experiment, make_home(tmp_path, experiment), honest_sites()


def test_weights_travel_to_accepting_sites_alone_and_every_reason_is_recorded(tmp_path):
    experiment, home, sites = federation(tmp_path, rounds=1)
    sites[101].offer = no("dp_required", "too_many_steps")
    run_rounds(home, FakeGrid(sites), experiment)
    assert sites[101].asked == 0
    assert [entry["site"] for entry in rounds_of(home)[0]["answered"]] == ["site-0", "site-2"]
    refused = offers_of(home)["site-1"]
    assert refused["status"] == "refused"
    assert [each["code"] for each in refused["reasons"]] == ["dp_required", "too_many_steps"]
    assert "because of dp_required" in refused["reason"]
    assert "because of too_many_steps" in refused["reason"]


def test_with_too_few_acceptances_nobody_is_sent_weights_and_the_reason_is_one_line(tmp_path):
    experiment, home, sites = federation(tmp_path, min_replies=3)
    sites[101].offer = no("budget_exceeded")
    with pytest.raises(RunFailedError, match=r"2 of the 3 .*site-1 refused \(budget_exceeded") as caught:
        run_rounds(home, FakeGrid(sites), experiment)
    assert caught.value.is_final
    assert "\n" not in str(caught.value)
    assert [site.asked for site in sites.values()] == [0, 0, 0]
    assert rounds_of(home) == []


def test_what_a_site_would_spend_is_recorded(tmp_path):
    experiment, home, sites = federation(tmp_path, rounds=1)
    told = {"unit": "person", "epsilon_round": 1.5, "epsilon_run": 4.0, "delta": 1e-6, "epsilon_cap": 8.0}
    sites[100].offer = lambda _: answer_record(OfferAnswer(status="accepted", **told))
    run_rounds(home, FakeGrid(sites), experiment)
    event = offers_of(home)["site-0"]
    assert {name: event[name] for name in told} == told


def test_an_offer_that_never_comes_costs_its_site_the_round_and_one_line(tmp_path):
    experiment, home, sites = federation(tmp_path, rounds=1)
    sites[101].offer = lambda _: None
    run_rounds(home, FakeGrid(sites), experiment)
    event = offers_of(home)["site-1"]
    assert (event["status"], event["reason"]) == ("late", "no answer within 3 s")
    assert sites[101].asked == 0
    assert len(rounds_of(home)[0]["answered"]) == 2


def test_missing_answers_alone_do_not_end_a_run_for_good(tmp_path):
    experiment, home, sites = federation(tmp_path, min_replies=3)
    sites[101].offer = lambda _: None
    with pytest.raises(RunFailedError) as caught:
        run_rounds(home, FakeGrid(sites), experiment)
    assert not caught.value.is_final


def test_a_site_that_is_lost_while_it_answers_is_asked_again_and_not_for_ever(tmp_path):
    experiment, home, sites = federation(tmp_path, rounds=1)
    sites[101].offer = lambda _: Error(8, "ClientApp stopped responding.")
    run_rounds(home, FakeGrid(sites), experiment)
    assert sites[101].offered == MOST_QUESTIONS
    assert offers_of(home)["site-1"]["status"] == "failed"


def test_code_that_is_not_approved_is_a_refusal_that_ends_the_run(tmp_path):
    experiment, home, sites = federation(tmp_path, min_replies=3)
    sites[101].offer = lambda _: Error(2, "code_not_approved: the site's operator has not approved this code")
    with pytest.raises(RunFailedError, match="code_not_approved") as caught:
        run_rounds(home, FakeGrid(sites), experiment)
    assert caught.value.is_final


def test_a_run_that_goes_on_asks_only_those_who_have_not_accepted(tmp_path):
    experiment, home, sites = federation(tmp_path, rounds=1)
    sites[101].offer = no("experiment_not_approved")
    run_rounds(home, FakeGrid(sites), experiment)
    longer = experiment.model_copy(update={"evaluation": experiment.evaluation})
    again = honest_sites()
    home_experiment = home / "runs" / "run" / "experiment.toml"
    assert home_experiment.exists()
    run_rounds(home, FakeGrid(again), longer)
    assert [site.offered for site in again.values()] == [0, 0, 0]


def test_anything_that_changes_in_the_plan_is_offered_anew(tmp_path):
    experiment, home, sites = federation(tmp_path, rounds=1)
    run_rounds(home, FakeGrid(sites), experiment)
    longer = make_experiment(rounds=2)
    (home / "runs" / "run" / "experiment.toml").write_text(longer.to_toml())
    sites = honest_sites()
    sites[100].offer = no("plan_changed")
    run_rounds(home, FakeGrid(sites), longer)
    assert [site.offered for site in sites.values()] == [1, 1, 1]
    assert [entry["site"] for entry in rounds_of(home)[1]["asked"]] == ["site-1", "site-2"]


def test_damaged_answers_are_asked_for_again(tmp_path):
    experiment, home, sites = federation(tmp_path, rounds=1)
    (home / "runs" / "run" / ANSWERS_FILE).write_text('{"plan": 3, "sites"')
    run_rounds(home, FakeGrid(sites), experiment)
    assert [site.offered for site in sites.values()] == [1, 1, 1]
    kept = json.loads((home / "runs" / "run" / ANSWERS_FILE).read_text())
    assert {site: each["status"] for site, each in kept["sites"].items()} == dict.fromkeys(
        ("site-0", "site-1", "site-2"), "accepted"
    )


def refuses(content, _asked):
    request = TrainRequest.from_record(content)
    header = ReplyHeader(request_digest=request.digest, status="refused", refusal="budget_exceeded", reason="cap 3")
    return TrainReply(header).to_record()


def test_a_site_that_accepts_and_then_refuses_is_recorded_as_such_and_the_others_are_not_charged_again(tmp_path):
    """It is offered the plan anew before round 2; it says no now, so no round begins that could not count."""
    experiment, home, sites = federation(tmp_path, rounds=5, min_replies=3)
    answers = [
        OfferAnswer(status="accepted"),
        OfferAnswer(status="refused", reasons=(Reason(code="policy", text="-"),)),
    ]
    sites[101].offer = lambda _: answer_record(answers[min(sites[101].offered, 2) - 1])
    sites[101].answer = refuses
    with pytest.raises(RunFailedError, match="round 2 was not begun"):
        run_rounds(home, FakeGrid(sites), experiment)
    events = [event for event in events_of(home, "offer") if event["site"] == "site-1"]
    assert [event["status"] for event in events] == ["accepted", "withdrawn", "refused"]
    assert "accepted the offer and refused round 1: budget_exceeded: cap 3" in events[1]["reason"]
    assert [sites[node].asked for node in (100, 102)] == [1, 1]


def test_who_has_refused_is_asked_again_after_ever_longer_pauses(tmp_path):
    experiment, home, sites = federation(tmp_path, rounds=8)
    sites[101].offer = no("experiment_not_approved")
    run_rounds(home, FakeGrid(sites), experiment)
    assert [event["round"] for event in events_of(home, "offer") if event["site"] == "site-1"] == [1, 2, 4, 8]


# Attacks


def forged(content):
    """The answer that another site's key has signed."""
    return signed_reply(answer_record(OfferAnswer(status="accepted")), content, "offer", key_of("site-0"))


def other_purpose(content):
    """The site's own signature, made for an answer of another kind."""
    return signed_reply(answer_record(OfferAnswer(status="accepted")), content, "statistics", key_of("site-1"))


def other_round(content):
    """The site's own answer to an offer in another round."""
    answer = answer_record(OfferAnswer(status="accepted"))
    return signed_reply(answer, content, "offer", key_of("site-1"), server_round=9)


def unsigned(content):
    record = forged(content)
    del record["signature"]
    record["signature"] = ConfigRecord({"signature": b"\0" * 64})
    return record


@pytest.mark.parametrize("answer", [forged, other_purpose, other_round, unsigned])
def test_a_forged_answer_accepts_nothing(tmp_path, answer):
    experiment, home, sites = federation(tmp_path, rounds=1)
    sites[101].offer = answer
    run_rounds(home, FakeGrid(sites), experiment)
    assert sites[101].asked == 0
    assert offers_of(home)["site-1"]["status"] == "late"
    assert "forged" in offers_of(home)["site-1"]["reason"]


@pytest.mark.parametrize(
    "text",
    [
        '{"schema_version": 1, "status": "accepted", "epsilon_round": 1e300}',
        '{"schema_version": 1, "status": "accepted", "epsilon_round": NaN}',
        '{"schema_version": 1, "status": "accepted", "reasons": [{"code": "policy", "text": ""}]}',
        '{"schema_version": 1, "status": "refused"}',
        '{"schema_version": 1, "status": "accepted", "epsilon_round": 3.0, "epsilon_run": 2.0}',
        '{"schema_version": 1, "status": "accepted", "num_images": 3}',
        "[" * 50_000,
        "null",
    ],
)
def test_a_hostile_answer_costs_its_site_only(tmp_path, text):
    experiment, home, sites = federation(tmp_path, rounds=1)
    header = ConfigRecord({"json": text})
    sites[101].offer = lambda _: RecordDict({"arrays": ArrayRecord(), "header": header})
    run_rounds(home, FakeGrid(sites), experiment)
    event = offers_of(home)["site-1"]
    assert event["status"] == "rejected"
    assert event["reason"].isprintable()
    assert sites[101].asked == 0
    assert len(rounds_of(home)[0]["answered"]) == 2


def test_an_answer_for_another_site_is_not_believed(tmp_path):
    """Site 0 answers with site 1's words; what it says is about itself, whatever it claims."""
    experiment, home, sites = federation(tmp_path, rounds=1, min_replies=2)
    seen = {}

    def steal(content):
        seen["site-1"] = signed_reply(answer_record(OfferAnswer(status="accepted")), content, "offer", key_of("site-1"))
        return seen["site-1"]

    sites[100].offer = steal
    run_rounds(home, FakeGrid(sites), experiment)
    assert offers_of(home)["site-0"]["status"] == "late"
    assert sites[100].asked == 0


def test_reasons_with_escapes_are_printable_everywhere(tmp_path):
    experiment, home, sites = federation(tmp_path, rounds=1)
    sites[101].offer = lambda _: RecordDict({
        "arrays": ArrayRecord(),
        "header": ConfigRecord({
            "json": '{"schema_version": 1, "status": "refused", "reasons": [{"code": "policy", "text": "\\u001b[2Jx"}]}'
        }),
    })  # fmt: skip
    run_rounds(home, FakeGrid(sites), experiment)
    assert offers_of(home)["site-1"]["reason"].isprintable()


def test_the_honest_answer_of_these_tests_counts(tmp_path):
    experiment, home, sites = federation(tmp_path, rounds=1)
    sites[101].answer = lambda content, _: trained("site-1", content)
    run_rounds(home, FakeGrid(sites), experiment)
    assert {event["status"] for event in offers_of(home).values()} == {"accepted"}
