"""An approval shows what is approved, and what it will cost, before anybody has asked for it."""

import pytest

from client.cli.approvals import approve_experiment
from client.cli.policy import describe
from client.offers.answer import answer_offer
from client.offers.in_words import in_words
from client.policy.approval import pending, read_approved
from client.privacy.epsilon import epsilon_of
from client.records.spending import Spending
from shared.errors import InputError
from shared.messages.agreement.offer import offer_record, read_answer
from shared.messages.agreement.plan import resolve
from shared.messages.training import experiment_digest
from tests.client.conftest import DP, MakeSite, experiment, request_for

PRIVATE = resolve(experiment(privacy=DP))


def test_cost_constants_and_what_the_policy_refuses_are_said(make_site: MakeSite):
    home, settings = make_site(max_steps_per_round=100, require_dp=True, experiments="approved")
    text = "\n".join(in_words(home, settings, PRIVATE))
    whole = epsilon_of([Spending(1.0, 0.2, 6)], 1e-5)
    assert experiment_digest(PRIVATE) in text
    assert f"{whole:.3f} after all 3" in text
    assert "noise multiplier 1, sampling rate 0.2" in text
    assert "refuses" not in text and "DO NOT FIT" not in text
    home, settings = make_site(epsilon_cap=whole * 0.999)
    assert "DO NOT FIT" in "\n".join(in_words(home, settings, PRIVATE))
    home, settings = make_site(max_steps_per_round=100, require_dp=True, experiments="approved")
    plain = "\n".join(in_words(home, settings, experiment()))
    assert "dp_required" in plain
    assert "WITHOUT differential privacy" in plain


def test_masked_updates_and_how_many_are_in_a_sum_are_said(make_site: MakeSite):
    home, settings = make_site(secure={"min_peers": 4, "require": True})
    masked = experiment(privacy=DP, federation={"secure": True, "update_norm_action": "clip", "min_replies": 3})
    assert "sums only, of at least 4 sites" in "\n".join(in_words(home, settings, masked))
    assert "masked" not in "\n".join(in_words(home, make_site()[1], PRIVATE))
    assert describe(settings.policy).endswith("updates leave masked only")


def test_that_moments_stay_at_the_site_is_said(make_site: MakeSite):
    home, settings = make_site()
    kept = experiment(federation={"keep_moments": True})
    assert "moments of each round stay on this machine" in "\n".join(in_words(home, settings, kept))
    assert "moments" not in "\n".join(in_words(home, settings, experiment()))


def test_a_file_is_approved_before_any_request_and_its_offer_is_then_accepted(
    make_site: MakeSite, tmp_path, capsys: pytest.CaptureFixture[str]
):
    home, _ = make_site(experiments="approved")
    file = tmp_path / "plan.toml"
    file.write_text(experiment(privacy=DP).to_toml())
    approve_experiment(str(file), home.path, ["federation.rounds=2"])
    plan = resolve(experiment(privacy=DP, federation={"rounds": 2}))
    assert read_approved(home).experiments == {experiment_digest(plan)}
    assert "after all 2" in capsys.readouterr().out
    assert read_answer(answer_offer(offer_record(request_for(plan).header), home)).status == "accepted"


def test_what_waits_is_approved_by_the_beginning_of_its_digest_with_the_facts(
    make_site: MakeSite, capsys: pytest.CaptureFixture[str]
):
    home, _ = make_site(experiments="approved")
    answer_offer(offer_record(request_for(PRIVATE).header), home)
    digest = experiment_digest(PRIVATE)
    approve_experiment(digest[:8], home.path, None)
    assert "after one round" in capsys.readouterr().out
    assert pending(home) == []
    assert read_approved(home).experiments == {digest}


@pytest.mark.parametrize(
    ("name", "override", "words"),
    [("no-such-recipe", None, "64 hexadecimal"), ("ab", ["train.seed=1"], "goes with an experiment file")],
)
def test_what_is_neither_file_nor_digest_is_one_line(make_site: MakeSite, name, override, words):
    home, _ = make_site(experiments="approved")
    with pytest.raises(InputError, match=words):
        approve_experiment(name, home.path, override)
    assert read_approved(home).experiments == frozenset()
