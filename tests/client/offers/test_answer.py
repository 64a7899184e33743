"""Offers are answered free of charge, with every reason at once, and tell nothing that the coordinator may not know."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, RecordDict

from client.home import Home
from client.offers import answer as answer_module
from client.offers.answer import answer_offer
from client.policy.approval import approve, pending
from client.privacy.epsilon import epsilon_of
from client.records.chain import read_chain
from client.records.ledger import open_ledger, read_ledger
from client.records.spending import Charge, Spending
from client.settings import save_settings
from client.training_request import handle
from shared.messages.agreement.offer import OfferAnswer, offer_record, read_answer
from shared.messages.envelope import header_record
from shared.messages.training import TrainReply, experiment_digest
from tests.client.conftest import DP, MakeSite, experiment, request_for

PRIVATE = experiment(privacy=DP)
PLAIN = experiment()


def ask(home: Home, plan: Any = PRIVATE, **header: Any) -> OfferAnswer:
    return read_answer(answer_offer(offer_record(request_for(plan, **header).header), home))


def codes(answer: OfferAnswer) -> list[str]:
    return [reason.code for reason in answer.reasons]


def kinds(home: Home) -> list[str]:
    return [entry.kind for entry in read_chain(home.journal)]


@pytest.fixture
def no_accountant(monkeypatch: pytest.MonkeyPatch) -> None:
    def runs(*_: object) -> float:
        raise AssertionError("the accountant ran")

    monkeypatch.setattr(answer_module, "epsilon_of", runs)


def test_only_a_site_that_has_accepted_a_plan_expects_its_rounds(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(answer_module, "EXPECTED", expected := set[str]())
    home, _ = make_site(min_noise_multiplier=1.5)
    assert ask(home).status == "refused" and not expected
    home, _ = make_site()
    assert ask(home, PLAIN).status == "accepted" and expected == {"torch"}
    expected.clear()
    for _ in range(2):  # the second answer is a stored one
        assert ask(home).status == "accepted" and expected == {"torch", "opacus"}
        expected.clear()


def test_an_accepted_plan_is_told_with_unit_and_cost_and_charges_nothing(make_site: MakeSite):
    home, settings = make_site(delta=1e-4)
    answer = ask(home)
    assert answer.status == "accepted"
    steps = PRIVATE.federation.local_steps
    assert answer.epsilon_round == epsilon_of([Spending(1.0, 0.2, steps)], 1e-4)
    assert answer.epsilon_run == epsilon_of([Spending(1.0, 0.2, 3 * steps)], 1e-4)
    assert (answer.unit, answer.delta, answer.epsilon_cap) == ("image", 1e-4, settings.policy.epsilon_cap)
    assert read_ledger(home.ledger).charges == []
    assert kinds(home) == ["request", "accepted"]


def test_an_accepted_offer_is_an_accepted_round(make_site: MakeSite):
    home, _ = make_site()
    assert ask(home).status == "accepted"
    reply = handle(request_for(PRIVATE).to_record(), home)
    assert isinstance(reply, TrainReply)
    assert reply.header.status == "trained"


def test_every_refusal_of_the_policy_comes_at_once(make_site: MakeSite):
    home, _ = make_site(experiments="approved", require_dp=True, max_steps_per_round=1)
    plan = experiment(optim={"lr": 0.5, "weight_decay": 3.0})
    answer = ask(home, plan)
    assert codes(answer) == ["out_of_range", "out_of_range", "experiment_not_approved", "dp_required", "too_many_steps"]
    assert "lr 0.5" in answer.reasons[0].text
    assert "weight_decay 3" in answer.reasons[1].text
    assert [path.stem for path in pending(home)] == [experiment_digest(plan)]


def test_a_cap_below_one_round_is_refused_and_one_below_the_whole_plan_is_not(make_site: MakeSite):
    one, whole = (epsilon_of([Spending(1.0, 0.2, steps)], 1e-5) for steps in (2, 6))
    home, settings = make_site(epsilon_cap=(one + whole) / 2)
    answer = ask(home)
    assert answer.status == "accepted"
    assert answer.epsilon_run is not None
    assert answer.epsilon_run > settings.policy.epsilon_cap
    small = settings.policy.model_copy(update={"epsilon_cap": one / 2})
    save_settings(home, settings.model_copy(update={"policy": small}))
    answer = ask(home)
    assert codes(answer) == ["budget_exceeded"]
    assert f"cap is {one / 2:g}" in answer.reasons[0].text


def test_images_that_are_not_scanned_do_not_hide_the_other_reasons(make_site: MakeSite):
    home, settings = make_site(require_dp=True)
    save_settings(home, settings.model_copy(update={"image_size": 24}))
    assert codes(ask(home, PLAIN)) == ["data_not_ready", "dp_required", "data_not_ready"]


def test_approval_changes_the_answer_at_once(make_site: MakeSite):
    home, _ = make_site(experiments="approved")
    assert codes(ask(home)) == ["experiment_not_approved"]
    approve(home, "experiment", experiment_digest(PRIVATE))
    assert ask(home).status == "accepted"


def test_the_same_offer_again_costs_no_second_look(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch):
    home, _ = make_site()
    first = ask(home)
    monkeypatch.setattr(answer_module, "epsilon_of", lambda *_: pytest.fail("the accountant ran again"))
    assert ask(home) == first
    assert kinds(home) == ["request", "accepted"]


def test_the_next_round_of_a_plan_is_no_new_offer(make_site: MakeSite):
    home, _ = make_site(max_offers_per_day=1)
    assert [ask(home, server_round=number).status for number in (1, 2, 3)] == ["accepted"] * 3
    assert codes(ask(home, server_round=4)) == ["too_many_offers"]
    handle(request_for(PRIVATE).to_record(), home)
    assert ask(home, server_round=2).status == "accepted"
    assert codes(ask(home, run="other")) == ["too_many_offers"]


def test_an_older_copy_of_the_ledger_is_refused_before_weights_travel(make_site: MakeSite):
    home, _ = make_site()
    before = home.ledger.read_bytes()
    handle(request_for(PRIVATE).to_record(), home)
    home.ledger.write_bytes(before)
    assert codes(ask(home)) == ["ledger_damaged"]


def test_after_a_charge_the_same_offer_is_looked_at_again(make_site: MakeSite):
    one = epsilon_of([Spending(1.0, 0.2, 2)], 1e-5)
    home, _ = make_site(epsilon_cap=one * 1.01)
    assert ask(home).status == "accepted"
    handle(request_for(PRIVATE, run="other").to_record(), home)
    assert codes(ask(home)) == ["budget_exceeded"]


# Attacks


@pytest.mark.usefixtures("no_accountant")
@pytest.mark.parametrize(
    ("section", "values", "code"),
    [
        ("federation", {"rounds": 2**62}, "out_of_range"),
        ("federation", {"local_steps": 2**62}, "out_of_range"),
        ("privacy", {"noise_multiplier": 1e-300}, "out_of_range"),
        ("privacy", {"noise_multiplier": 1e300}, "out_of_range"),
        ("privacy", {"noise_multiplier": 0.02}, "noise_too_small"),
        ("federation", {"local_steps": 101}, "too_many_steps"),
    ],
)
def test_hostile_numbers_are_refused_before_any_accountant_runs(
    make_site: MakeSite, section: str, values: dict[str, Any], code: str
):
    home, _ = make_site()
    base = {"privacy": DP, "federation": {}}
    answer = ask(home, experiment(**{**base, section: {**base[section], **values}}))
    assert code in codes(answer)
    assert answer.epsilon_round is None
    assert answer.epsilon_run is None


@pytest.mark.usefixtures("no_accountant")
def test_a_request_for_other_tensors_than_the_experiments_is_no_plan(make_site: MakeSite):
    home, _ = make_site()
    plan = experiment(privacy=DP, federation={"trainable": ("attention",)})
    assert codes(ask(home, plan)) == ["malformed"]


@pytest.mark.usefixtures("no_accountant")
def test_an_offer_with_weights_is_not_read(make_site: MakeSite):
    home, _ = make_site()
    record = request_for(PRIVATE).to_record()
    assert codes(read_answer(answer_offer(record, home))) == ["malformed"]


@pytest.mark.parametrize("text", ["", "{}", '{"schema_version": 2}', "[" * 100_000, '{"schema_version": 1, "run": 3}'])
def test_an_offer_that_is_none_gets_a_typed_refusal(make_site: MakeSite, text: str):
    home, _ = make_site()
    record = RecordDict({"arrays": ArrayRecord(), "header": header_record(request_for(PRIVATE).header)})
    record.config_records["header"]["json"] = text
    assert codes(read_answer(answer_offer(record, home)))[0] in ("malformed", "schema")


def test_a_flood_of_offers_is_looked_at_so_often_a_day_and_no_more(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
):
    home, _ = make_site(max_offers_per_day=2)
    plans = [experiment(privacy=DP, train={"seed": seed}) for seed in range(6)]
    assert [ask(home, plan).status for plan in plans[:2]] == ["accepted", "accepted"]
    size = home.journal.stat().st_size
    monkeypatch.setattr(answer_module, "epsilon_of", lambda *_: pytest.fail("the accountant ran"))
    assert [codes(ask(home, plan)) for plan in plans[2:]] == [["too_many_offers"]] * 4
    assert home.journal.stat().st_size == size
    assert len(json.loads(home.offers.read_bytes())["answered"]) == 2
    assert home.offers.stat().st_mode & 0o777 == 0o600
    assert ask(home, plans[1]).status == "accepted"


def test_counts_are_the_operators_to_know(make_site: MakeSite, caplog: pytest.LogCaptureFixture):
    home, _ = make_site(min_images_train=10_000)
    answer = ask(home)
    assert codes(answer) == ["policy"]
    assert not any(letter.isdigit() for letter in answer.reasons[0].text)
    assert "policy.min_images_train is 10000" in caplog.text


def test_a_private_reason_is_not_told_while_a_public_one_refuses_anyway(make_site: MakeSite):
    home, _ = make_site(min_images_train=10_000, experiments="approved")
    assert codes(ask(home)) == ["experiment_not_approved"]


def spend_elsewhere(home: Home, settings: Any, sigma: float) -> None:
    """Spending of another home on shared records, as the registry hands it over."""
    dataset_id = next(iter(read_ledger(home.ledger).dataset_ids))
    charge = Charge(
        dataset_id=dataset_id, fingerprint="f", task="train", run="theirs", server_round=1, request_digest="r",
        plan_digest="p", mechanism="dp-sgd", noise_multiplier=sigma, sample_rate=0.2, steps=20,
    )  # fmt: skip
    with open_ledger(home.ledger, Path(settings.head_file)) as ledger:
        ledger._append("inherited", charge=charge.model_dump(mode="json"), ledger_id="other", sequence=1)


def test_offers_cannot_measure_what_was_spent_elsewhere(make_site: MakeSite):
    """A bisection over plans of different length gets one no; from then on all plans get the same one."""
    home, settings = make_site(epsilon_cap=6.0)
    spend_elsewhere(home, settings, sigma=1.5)
    long, short = (experiment(privacy=DP, federation={"local_steps": steps}) for steps in (15, 1))
    assert ask(home, short).status == "accepted"
    assert codes(ask(home, long)) == ["policy"]
    for steps in (2, 8, 11):
        assert codes(ask(home, experiment(privacy=DP, federation={"local_steps": steps}))) == ["policy"]
    wider = settings.policy.model_copy(update={"epsilon_cap": 7.0})
    save_settings(home, settings.model_copy(update={"policy": wider}))
    assert ask(home, experiment(privacy=DP, federation={"local_steps": 2})).status == "accepted"


def test_two_sites_that_differ_in_private_facts_only_answer_alike(make_site: MakeSite, photos: Any, tmp_path: Any):
    home, settings = make_site()
    first = ask(home)
    few = tmp_path / "few"
    for source in sorted(photos.rglob("*.png"))[:8]:
        target = few / source.relative_to(photos)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    for name in ("ledger.jsonl", "offers.json"):
        (home.path / name).unlink()
    Path(settings.head_file).unlink()
    other, _ = make_site(data=few)
    assert ask(other) == first


def test_a_refusing_site_loads_neither_torch_nor_opacus(make_site: MakeSite):
    home, _ = make_site(require_dp=True)
    code = (
        "import sys; from pathlib import Path; from client.offers.answer import answer_offer\n"
        "from client.settings import Home; from shared.messages.agreement.offer import offer_record, read_answer\n"
        "from shared.messages.training import RequestHeader\n"
        f"header = RequestHeader.model_validate_json({request_for(PLAIN).header.model_dump_json()!r})\n"
        f"answer = read_answer(answer_offer(offer_record(header), Home(Path({str(home.path)!r}))))\n"
        "assert answer.reasons[0].code == 'dp_required', answer\n"
        "sys.exit(bool({'torch', 'opacus'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_bad_array_record_is_no_offer(make_site: MakeSite):
    home, _ = make_site()
    record = offer_record(request_for(PRIVATE).header)
    record["arrays"] = ArrayRecord({"weights": Array("float32", (2**40,), "numpy.ndarray", b"")})
    assert codes(read_answer(answer_offer(record, home))) == ["malformed"]


def test_a_plans_mean_image_is_told_alone_and_counts_in_what_follows(make_site: MakeSite):
    home, _ = make_site()
    plan = experiment(privacy={**DP, "mean_image_noise": 2.5})
    answer = ask(home, plan)
    image, steps = Spending(2.5, 1.0, 1), plan.federation.local_steps
    sigma, rate = plan.privacy.noise_multiplier, plan.privacy.sample_rate
    assert answer.epsilon_mean_image == epsilon_of([image], 1e-5)
    assert answer.epsilon_round == epsilon_of([image, Spending(sigma, rate, steps)], 1e-5)
    assert ask(home, experiment(privacy=DP)).epsilon_mean_image is None
    assert read_ledger(home.ledger).charges == []
