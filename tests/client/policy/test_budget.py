"""What the coordinator is told of spending follows from its own requests; the cap holds for everything."""

import datetime as dt
from pathlib import Path

import pytest

from client.data.dataset import open_dataset
from client.policy.budget import (
    budget_refusal,
    has_dp_releases,
    has_hidden,
    own_unit,
    reserve,
    told_fields,
    told_head,
    told_total,
)
from client.policy.refusals import RefusedError, note_refusal, refusal_of
from client.records.data_registry import Identity, Records, existing_registry
from client.records.journal import Journal
from client.records.ledger import ClockError, open_ledger
from client.records.spending import Charge, Total
from client.settings import save_settings
from shared.messages.agreement.plan import offer_digest


def charge(dataset_id: str, **fields: object) -> Charge:
    base = Charge(
        dataset_id=dataset_id, fingerprint="f", task="train", run="run", server_round=1, request_digest="0" * 64,
        plan_digest="0" * 64, mechanism="dp-sgd", noise_multiplier=1.0, sample_rate=0.1, steps=3,
    )  # fmt: skip
    return base.model_copy(update=fields)


def steps(history, _delta: float) -> float:
    """A ledger that counts steps: easy to see through."""
    return float(sum(row.steps for row in history))


def test_a_clock_that_is_behind_is_told_in_fixed_words():
    code, reason = refusal_of(ClockError("the clock says 2026-11-26 09:00 UTC"))
    assert (code, "2026" in reason) == ("clock", False)


@pytest.mark.parametrize("is_linked", [False, True])
def test_replies_are_the_same_whether_data_sets_share_records_or_not(make_site, is_linked: bool):
    home, settings = make_site()
    data = open_dataset(home, 16)
    with open_ledger(home.ledger, Path(settings.head_file)) as ledger:
        ledger.register("older", [data.dataset_id] if is_linked else [], "f")
        reserve(ledger, charge("older"), settings.policy, steps, home)
        reserve(ledger, charge(data.dataset_id, fingerprint=data.fingerprint, steps=4), settings.policy, steps, home)
        assert ledger.total(data.dataset_id, 1e-5, steps).epsilon == (7 if is_linked else 4)
        assert told_total(ledger, settings.policy, steps).epsilon == 7
        assert own_unit(ledger, data.dataset_id) == "image" and own_unit(ledger, "another") is None


def test_a_verdict_keeps_no_run_without_dp_from_going_on(make_site):
    home, settings = make_site()
    data = open_dataset(home, 16)
    with open_ledger(home.ledger, Path(settings.head_file)) as ledger:
        own = charge(data.dataset_id, fingerprint=data.fingerprint)
        for found, task, mechanism in (False, "train", "none"), (False, "audit", "gaussian"), (True, "train", "dp-sgd"):
            each = own.model_copy(update={"task": task, "mechanism": mechanism, "run": f"{task}-{mechanism}"})
            reserve(ledger, each, settings.policy, steps, home)
            assert has_dp_releases(ledger.own_charges(data.dataset_id)) is found, task
            assert has_dp_releases(ledger.charges_of(data.dataset_id)) is found, task
        assert not has_dp_releases(ledger.own_charges("another"))


@pytest.mark.parametrize("is_shared", [False, True])
def test_replies_do_not_count_what_another_home_has_charged_on_a_shared_image(make_site, is_shared: bool):
    home, settings = make_site()
    data, registry = open_dataset(home, 16), existing_registry()
    other = Identity(
        dataset_id="c" * 32, ledger_id="d" * 32, home="/other", key_id="k", fingerprint="f",
        linked=(data.dataset_id,) if is_shared else (),
    )  # fmt: skip
    assert registry is not None
    with registry.locked():
        registry.publish(other, Records(key_id="k", records={}))
        registry.publish_charges(other.ledger_id, [(1, charge(other.dataset_id))])
    with open_ledger(home.ledger, Path(settings.head_file)) as ledger:
        asked = charge(data.dataset_id, fingerprint=data.fingerprint)
        ledger.commit(reserve(ledger, asked, settings.policy, steps, home))
        assert len(ledger.inherited) == is_shared
        assert told_head(ledger) == {"ledger_sequence": 2, "ledger_hash": ledger.head.hash}


def test_a_cap_that_shared_records_pass_is_refused_as_policy_and_nothing_is_charged(make_site, caplog):
    home, settings = make_site()
    data = open_dataset(home, 16)
    with open_ledger(home.ledger, Path(settings.head_file)) as ledger:
        ledger.register("older", [data.dataset_id], "f")
        reserve(ledger, charge("older", steps=8), settings.policy, steps, home)
        with pytest.raises(RefusedError) as refused:
            reserve(ledger, charge(data.dataset_id, fingerprint=data.fingerprint), settings.policy, steps, home)
        assert (refused.value.code, "11" in refused.value.reason) == ("policy", False)
        assert "11.000" in refused.value.note and len(ledger.charges) == 1


@pytest.mark.parametrize("task", ["train", "mean_image", "statistics"])
def test_after_one_private_no_every_further_plan_gets_it_so_that_free_refusals_measure_nothing(make_site, task: str):
    home, settings = make_site()
    data = open_dataset(home, 16)
    own = {"fingerprint": data.fingerprint, "steps": 1}
    with open_ledger(home.ledger, Path(settings.head_file)) as ledger:
        ledger.register("older", [data.dataset_id], "f")
        reserve(ledger, charge("older", run="before", steps=5), settings.policy, steps, home)
        reserve(ledger, charge(data.dataset_id, run="going on", plan_digest="a", **own), settings.policy, steps, home)

        def code(**fields: object) -> str | None:
            try:
                reserve(ledger, charge(data.dataset_id, **{**own, **fields}), settings.policy, steps, home)
            except RefusedError as refused:
                note_refusal(Journal(home.journal), refused.code, refused.reason, "0" * 64)
                return refused.code
            return None

        assert code(run="large", task=task, steps=5) == "policy", "5 + 1 + 5 pass the cap of 10"
        assert code(run="small", task=task) == "policy", "it would fit"
        assert code(run="going on", task=task, plan_digest="b") == "policy", "another plan under an old name"
        assert code(run="huge", task=task, steps=11) == "budget_exceeded", "own charges explain it"
        assert code(run="going on", plan_digest="a") is None, "the plan was fixed before"
        Journal(home.journal).write("accepted", run="offered", request_digest=offer_digest("offered", "c"))
        assert code(run="offered", plan_digest="d") == "policy"
        assert code(run="offered", plan_digest="c") is None, "its offer was accepted before"
        assert code(run="going on", task="audit", mechanism="gaussian") is None, "its cost is the site's choice"
        save_settings(home, settings)
        assert code(run="small", task=task) is None, "the operator has changed something"


@pytest.mark.parametrize("standing", ["accepted", "begun"])
def test_plans_of_many_costs_that_were_agreed_to_before_measure_nothing_after_the_first_private_no(
    make_site, standing: str
):
    """Each costs as many steps as its name; others then spend on shared records, and the dearest is asked for first."""
    home, settings = make_site()
    data, journal = open_dataset(home, 16), Journal(home.journal)
    with open_ledger(home.ledger, Path(settings.head_file)) as ledger:

        def code(number: int) -> str | None:
            asked = charge(
                data.dataset_id, fingerprint=data.fingerprint, run=f"run{number}", plan_digest=f"plan{number}",
                steps=number, request_digest=f"{len(journal.entries()):064d}",
            )  # fmt: skip
            journal.write("request", task="train", run=asked.run, request_digest=asked.request_digest)
            try:
                reserve(ledger, asked, settings.policy, steps, home)
            except RefusedError as refused:
                note_refusal(journal, refused.code, refused.reason, asked.request_digest)
                return refused.code
            return None

        for number in (1, 2, 3):
            journal.write("accepted", run=f"run{number}", request_digest=offer_digest(f"run{number}", f"plan{number}"))
        if standing == "begun":
            assert [code(number) for number in (1, 2)] == [None, None]
        ledger.register("older", [data.dataset_id], "f")
        dearest, elsewhere = {"accepted": (3, 8), "begun": (2, 6)}[standing]
        reserve(ledger, charge("older", run="elsewhere", steps=elsewhere), settings.policy, steps, home)
        assert code(dearest) == "policy", "8 + 3, or 1 + 2 + 6 + 2, pass the cap of 10"
        assert code(1) == "policy", "it would fit, and an answer of its own would tell where the room ends"
        save_settings(home, settings)
        assert code(1) is None, "the operator has changed something"


def test_a_private_no_of_yesterday_and_public_ones_count_no_more(make_site, monkeypatch):
    home, _ = make_site()
    note_refusal(Journal(home.journal), "budget_exceeded", "reason", "0" * 64)
    assert not has_hidden(home)
    note_refusal(Journal(home.journal), "policy", "reason", "0" * 64)
    assert has_hidden(home)
    Journal(home.journal).write("scan")
    assert not has_hidden(home), "the operator has scanned: a private reason may be gone"
    note_refusal(Journal(home.journal), "policy", "reason", "0" * 64)
    assert has_hidden(home)
    monkeypatch.setattr("client.policy.budget.DAY", dt.timedelta(0))
    assert not has_hidden(home)


def test_a_cap_that_own_requests_pass_is_named(make_site):
    home, settings = make_site()
    data = open_dataset(home, 16)
    with open_ledger(home.ledger, Path(settings.head_file)) as ledger:
        reserve(ledger, charge(data.dataset_id, fingerprint=data.fingerprint, steps=8), settings.policy, steps, home)
        with pytest.raises(RefusedError, match=r"would be 11.000, the cap is 10") as refused:
            reserve(ledger, charge(data.dataset_id, fingerprint=data.fingerprint), settings.policy, steps, home)
        assert refused.value.code == "budget_exceeded"


def test_offer_says_what_the_charge_would_meet(make_site):
    home, settings = make_site()
    data = open_dataset(home, 16)
    asked = charge(data.dataset_id, fingerprint=data.fingerprint, steps=4)
    with open_ledger(home.ledger, Path(settings.head_file)) as ledger:
        ledger.register("older", [data.dataset_id], "f")
        reserve(ledger, charge("stranger", steps=9), settings.policy, steps, home)
        assert budget_refusal(ledger, asked, settings.policy, steps) is None, "nothing is shared with a stranger"
        reserve(ledger, charge("older", steps=6), settings.policy, steps, home)
        assert budget_refusal(ledger, asked, settings.policy, steps) is None, "6 + 4 are within the cap of 10"
        one_more = asked.model_copy(update={"steps": 5})
        refusal = budget_refusal(ledger, one_more, settings.policy, steps)
        assert refusal is not None and (refusal.code, "11.000" in refusal.note) == ("policy", True)
        own = budget_refusal(ledger, asked.model_copy(update={"steps": 11}), settings.policy, steps)
        assert own is not None and own.code == "budget_exceeded"
        free = asked.model_copy(update={"mechanism": "none", "steps": 99})
        assert budget_refusal(ledger, free, settings.policy, steps) is None, "no cap bounds training without DP"
        reserve(ledger, asked, settings.policy, steps, home)
        lowered = settings.policy.model_copy(update={"epsilon_cap": 1.0})
        assert budget_refusal(ledger, free, lowered, steps) is None, "nor one that was lowered later"


def test_charges_are_counted_at_the_sites_delta(make_site):
    home, settings = make_site()
    policy, seen = settings.policy.model_copy(update={"delta": 3e-7}), set()
    with open_ledger(home.ledger, Path(settings.head_file)) as ledger:
        reserve(ledger, charge("x"), policy, lambda _, delta: seen.add(delta) or 1.0, home)
        told_total(ledger, policy, lambda _, delta: seen.add(delta) or 1.0)
    assert seen == {3e-7}


def test_epsilon_is_never_negative_and_infinity_is_unbounded(make_site):
    _, settings = make_site()
    low, none = (
        told_fields(Total(value, False, 1e-5, "image", 1, 0), settings.policy) for value in (-0.3, float("inf"))
    )
    assert (low["epsilon"], low["is_unbounded"]) == (0.0, False)
    assert (none["epsilon"], none["is_unbounded"]) == (None, True)
