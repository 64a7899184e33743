"""One test for each rule that can refuse, and what the numbers beside an update become."""

from typing import Any

import pytest

from client.limits import Ranges
from client.policy.charges import charge_for, released_count, released_scalars
from client.policy.rules import Facts, experiment_refusals, review
from client.settings import SitePolicy
from shared.experiment.config import Experiment
from shared.messages.agreement.plan import plan_digest
from shared.messages.packing import Manifest, TensorSpec
from shared.messages.training import RequestHeader, experiment_digest
from tests.client.conftest import DP, OPEN_POLICY, SIZE, experiment

MANIFEST = Manifest(tensors=(TensorSpec(name="w", shape=(2,)),))
PRIVATE = experiment(privacy=DP)
PLAIN = experiment()


def header(plan: Experiment, **changed: Any) -> RequestHeader:
    fields = {"run": "run", "server_round": 1, "experiment": plan, "precision": "float32", "manifest": MANIFEST}
    return RequestHeader(**{**fields, **changed})


def decide(plan: Experiment = PRIVATE, facts: dict[str, Any] | None = None, head: Any = None, **policy: Any) -> str:
    known = {"num_images": 10, "has_persons": True, "image_size": SIZE, "approved_experiments": frozenset()}
    refusal = review(head or header(plan), SitePolicy(**{**OPEN_POLICY, **policy}), Facts(**{**known, **(facts or {})}))
    return "accepted" if refusal is None else refusal.code


def test_open_policy_accepts():
    assert decide(PRIVATE) == decide(PLAIN) == "accepted"


def test_default_policy_denies_everything():
    known = Facts(num_images=10, has_persons=True, image_size=SIZE, approved_experiments=frozenset())
    for plan in (PRIVATE, PLAIN):
        assert review(header(plan), SitePolicy(), known) is not None


def test_task_must_be_allowed():
    assert decide(tasks=("statistics",)) == "task_not_allowed"


def test_experiment_must_be_approved_by_its_digest():
    assert decide(experiments="approved") == "experiment_not_approved"
    approved = {"approved_experiments": frozenset({experiment_digest(PRIVATE)})}
    assert decide(experiments="approved", facts=approved) == "accepted"
    assert decide(PLAIN, experiments="approved", facts=approved) == "experiment_not_approved"


def test_a_refusal_ends_that_any_experiment_may_run():
    refused = {"refused_experiments": frozenset({experiment_digest(PRIVATE)})}
    other_seed = PRIVATE.model_copy(update={"train": PRIVATE.train.model_copy(update={"seed": 17})})
    assert decide(other_seed, experiments="any") == "accepted"
    for plan in (PRIVATE, other_seed):
        assert decide(plan, experiments="any", facts=refused) == "experiment_not_approved"
    approved = {"approved_experiments": frozenset({experiment_digest(other_seed)}), **refused}
    assert decide(other_seed, experiments="any", facts=approved) == "accepted"


def test_training_without_dp_can_be_forbidden():
    assert decide(PLAIN, require_dp=True) == "dp_required"
    assert decide(PRIVATE, require_dp=True) == "accepted"


def test_masked_updates_can_be_required_and_have_to_be_enough_of_them():
    federation = {**PLAIN.federation.model_dump(), "secure": True, "update_norm_action": "clip", "min_replies": 3}
    masked = experiment(federation=federation)
    assert decide(masked, secure={"require": True}) == decide(masked) == "accepted"
    assert decide(PLAIN, secure={"require": True}) == "secure_sum"
    assert decide(masked, secure={"min_peers": 4}) == "secure_sum"
    assert decide(masked, secure={"max_colluding": 1}) == "secure_sum"
    counting = experiment(federation={**federation, "secure_colluding": 1, "min_replies": 4})
    assert decide(counting, secure={"max_colluding": 1, "min_peers": 4}) == "accepted"


def test_no_release_without_dp_after_the_first_dp_round():
    spent = {"own_unit": "image", "has_dp_releases": True, "spent_unit": "image"}
    assert decide(PLAIN, facts=spent) == "non_private_forbidden"
    assert decide(PLAIN, facts=spent, non_private_after_dp=True) == "accepted"
    assert decide(PLAIN, facts={**spent, "has_dp_releases": False}) == "accepted", "an audit alone was charged"
    assert decide(PLAIN, facts={"has_linked_dp_releases": True}) == "policy"
    assert decide(PLAIN, facts={"has_linked_dp_releases": True}, non_private_after_dp=True) == "accepted"


def test_unit_must_be_the_sites():
    assert decide(unit="person") == "unit_mismatch"
    person = experiment(privacy={**DP, "unit": "person"})
    assert decide(person, unit="person") == "accepted"
    assert decide(person, unit="person", facts={"own_unit": "image"}) == "unit_mismatch"
    assert decide(person, unit="image", facts={"own_unit": "person"}) == "unit_mismatch", "an earlier policy's unit"


def test_persons_must_be_known_for_person_level_privacy():
    person = experiment(privacy={**DP, "unit": "person"})
    assert decide(person, unit="person", facts={"has_persons": False}) == "data_not_ready"


def test_noise_must_be_large_enough():
    assert decide(min_noise_multiplier=1.1) == "noise_too_small"
    assert decide(min_noise_multiplier=1.0) == "accepted"


def test_delta_of_the_plan_must_not_pass_the_sites():
    assert decide(delta=1e-6) == decide(delta=9e-6) == "budget_exceeded"
    assert decide(delta=1e-5) == decide(delta=1e-4) == "accepted"


def test_backbone_must_be_one_that_dp_knows():
    unet = experiment(privacy=DP, model={"backbone": "unet"})
    assert decide(unet) == "task_not_allowed"
    assert decide(experiment(model={"backbone": "unet"})) == "accepted"


def test_steps_per_round_are_limited():
    assert decide(max_steps_per_round=1) == "too_many_steps"
    assert decide(max_steps_per_round=2) == "accepted"


def test_rounds_per_day_are_limited():
    assert decide(max_rounds_per_day=3, facts={"rounds_last_day": 3}) == "too_many_rounds"
    assert decide(max_rounds_per_day=3, facts={"rounds_last_day": 2}) == "accepted"


def test_changed_plan_is_refused():
    first = plan_digest(header(PRIVATE))
    assert decide(facts={"run_plan": first}) == "accepted"
    weaker = experiment(privacy={**DP, "noise_multiplier": 0.9})
    assert decide(weaker, facts={"run_plan": first}) == "plan_changed"
    longer = experiment(privacy=DP, federation={"rounds": 4})
    assert decide(longer, facts={"run_plan": first}) == "plan_changed"


def test_plan_covers_precision_and_tensors_but_not_the_round():
    first = plan_digest(header(PRIVATE))
    assert plan_digest(header(PRIVATE, server_round=2)) == first
    assert plan_digest(header(PRIVATE, precision="bfloat16")) != first
    other = Manifest(tensors=(TensorSpec(name="w", shape=(3,)),))
    assert plan_digest(header(PRIVATE, manifest=other)) != first


def test_run_ends_with_its_plan():
    assert decide(head=header(PRIVATE, server_round=4)) == "plan_changed"
    assert decide(facts={"committed_rounds": 3}) == "plan_changed"
    assert decide(head=header(PRIVATE, server_round=3), facts={"committed_rounds": 2}) == "accepted"


def test_images_must_have_the_planned_size():
    assert decide(facts={"image_size": 2 * SIZE}) == "data_not_ready"


def test_fewer_images_than_the_minimum_are_refused():
    assert decide(min_images_train=11) == "policy"
    assert decide(min_images_train=10) == "accepted"


def test_clock_that_went_back_stops_rounds():
    assert decide(facts={"is_clock_behind": True}) == "clock"


def test_reasons_name_no_private_number():
    known = Facts(num_images=4711, has_persons=False, image_size=SIZE, approved_experiments=frozenset())
    for policy in ({"min_images_train": 5000}, {"unit": "person"}, {"tasks": ()}):
        refusal = review(header(PRIVATE), SitePolicy(**{**OPEN_POLICY, **policy}), known)
        assert refusal is not None
        assert "4711" not in refusal.reason


@pytest.mark.parametrize(("mode", "expected"), [("hidden", 1), ("rounded", 4800), ("exact", 4711)])
def test_image_count_is_released_as_policy_says(mode: str, expected: int):
    by_count = experiment(federation={"weighting": "examples"})
    policy = SitePolicy(**{**OPEN_POLICY, "image_count": mode})
    assert released_count(4711, by_count, policy) == expected
    assert released_count(4711, PLAIN, policy) == 1, "nobody asked for counts"
    # Such an experiment is refused when it is parsed; the rule holds here too.
    private = by_count.model_copy(update={"privacy": PRIVATE.privacy})
    assert released_count(4711, private, policy) == 1, "never under DP"


def test_scalars_are_released_as_policy_says():
    scalars = {"loss": 0.25, "grad_norm": 3.0, "seconds": 61.3}
    every = SitePolicy(**{**OPEN_POLICY, "release_scalars": ("loss", "grad_norm", "seconds")})
    assert released_scalars(scalars, PLAIN, every) == scalars
    assert released_scalars(scalars, PLAIN, SitePolicy(**OPEN_POLICY)) == {}
    assert released_scalars(scalars, PRIVATE, every) == {"seconds": 120.0}
    federation = PLAIN.federation.model_copy(update={"secure": True})
    masked = PLAIN.model_copy(update={"federation": federation})
    assert released_scalars(scalars, masked, every) == {"seconds": 120.0}, "a loss says much of one update"
    assert released_scalars(scalars, PRIVATE, SitePolicy(**OPEN_POLICY)) == {}


def test_charge_holds_the_plans_constants():
    charge = charge_for(header(PRIVATE), "d", "f", "r")
    assert (charge.noise_multiplier, charge.sample_rate, charge.steps) == (1.0, 0.2, 2)
    plain = charge_for(header(PLAIN), "d", "f", "r")
    assert (plain.mechanism, plain.steps) == ("none", 2)
    person = charge_for(header(experiment(privacy={**DP, "unit": "person"})), "d", "f", "r")
    assert (charge.unit, person.unit) == ("image", "person")


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("optim", "lr", 1.0),
        ("optim", "betas", (0.0, 0.0)),
        ("optim", "weight_decay", 1e30),
        ("federation", "proximal_mu", 1e9),
        ("privacy", "max_grad_norm", 1.4e-45),
        ("privacy", "noise_multiplier", 1e30),
        ("privacy", "delta", 1e-11),
        ("privacy", "draws", 100_000),
        ("privacy", "micro_batch", 10**9),
        ("privacy", "expected_batch", 10**9),
        ("train", "batch", 10**9),
        ("diffusion", "timesteps", 50_000),
    ],
)
def test_constants_are_the_sites(section: str, field: str, value: Any):
    private = {**DP, field: value} if section == "privacy" else DP
    changed = {} if section == "privacy" else {section: {field: value}}
    assert decide(experiment(privacy=private, **changed)) == "out_of_range"


def test_the_images_of_a_round_are_bounded_together():
    plan = experiment(privacy={**DP, "draws": 60, "expected_batch": 60_000})
    assert decide(plan) == "out_of_range"
    assert decide(plan, ranges=Ranges(images_per_round=(1, 1e9))) == "accepted"


def test_a_model_larger_than_the_site_allows_is_refused():
    assert decide(ranges=Ranges(parameters=(1, 1))) == "out_of_range"
    frozen = Manifest(tensors=(TensorSpec(name="frozen", shape=(3,)),))
    some = header(experiment(privacy=DP, federation={"trainable": ("w",)}), base_manifest=frozen)
    assert decide(head=some, ranges=Ranges(parameters=(1, 5))) == "accepted"
    assert decide(head=some, ranges=Ranges(parameters=(1, 4))) == "out_of_range", "frozen tensors take room, too"


def test_an_experiment_is_judged_before_anybody_asks_for_it():
    known = Facts(num_images=10, has_persons=True, image_size=SIZE, approved_experiments=frozenset())
    for bad, code in (({"draws": 100_000}, "out_of_range"), ({"noise_multiplier": 0.6}, "noise_too_small")):
        policy = SitePolicy(**{**OPEN_POLICY, "min_noise_multiplier": 1.0})
        found = experiment_refusals(experiment(privacy={**DP, **bad}), policy, known)
        assert [each.code for each in found] == [code]


@pytest.mark.parametrize(
    "bad", [{"lr": (2, 1)}, {"lr": (0, float("inf"))}, {"delta": (1e-12, 1e-3)}, {"delta": (0, 1)}]
)
def test_ranges_are_finite_ordered_and_inside_what_accounting_holds_for(bad: dict[str, Any]):
    with pytest.raises(ValueError, match=r"finite|accounting"):
        Ranges(**bad)


def test_trained_tensors_are_those_of_the_approved_experiment():
    bias, weight = TensorSpec(name="output.bias", shape=(2,)), TensorSpec(name="output.weight", shape=(2, 2))
    one, both = Manifest(tensors=(bias,)), Manifest(tensors=(bias, weight))
    assert decide(head=header(PRIVATE, manifest=both)) == "accepted"
    assert decide(head=header(PRIVATE, manifest=one, base_manifest=Manifest(tensors=(weight,)))) == "malformed"
    assert decide(head=header(PRIVATE, manifest=both, base_manifest=Manifest(tensors=(weight,)))) == "malformed"
    some = experiment(privacy=DP, federation={"trainable": ("*.bias",)})
    assert decide(head=header(some, manifest=one, base_manifest=Manifest(tensors=(weight,)))) == "accepted"
    assert decide(head=header(some, manifest=both)) == "malformed"


def test_precision_is_that_of_the_approved_experiment():
    assert decide(head=header(PRIVATE, precision="bfloat16")) == "malformed"
    half = experiment(privacy=DP, train={"precision": "bfloat16"})
    assert decide(head=header(half, precision="bfloat16")) == "accepted"
    assert decide(head=header(half)) == "malformed"


def test_what_other_data_has_spent_is_told_to_the_operator_alone():
    linked = {"spent_unit": "image", "has_linked_dp_releases": True}
    person = experiment(privacy={**DP, "unit": "person"})
    assert decide(PLAIN, facts=linked) == "policy"
    assert decide(person, unit="person", facts=linked) == "policy"
