"""The site's rules, as pure functions: a request and a few facts in, a refusal or nothing out.

Order matters only for which reason is named first. Nothing here touches files, torch or the network.
"""

import hashlib
from dataclasses import dataclass

from client.records.spending import Charge
from client.settings import SitePolicy, Unit
from shared.experiment.config import Experiment
from shared.messages.audit import MIN_HELD_OUT, AuditQuery
from shared.messages.envelope import canonical_json
from shared.messages.training import RefusalCode, RequestHeader, experiment_digest


@dataclass(frozen=True)
class Refusal:
    """A typed no. The reason is fixed text and public numbers, never anything computed from images."""

    code: RefusalCode
    reason: str


@dataclass(frozen=True)
class Facts:
    """What the rules need to know of the site at this moment."""

    num_images: int
    """Training images of the data set, private."""
    has_persons: bool
    image_size: int
    approved_experiments: frozenset[str]
    run_plan: str | None = None
    """Digest of the plan that the run's first charge has fixed."""
    committed_rounds: int = 0
    """Completed rounds of the run."""
    rounds_last_day: int = 0
    spent_unit: Unit | None = None
    """Unit of the DP charges so far; None before the first."""
    is_clock_behind: bool = False


def plan_digest(header: RequestHeader) -> str:
    """SHA-256 of all that must stay as it was in a run's first request: experiment, precision, tensors."""
    fixed = header.model_dump(mode="json", include={"experiment", "precision", "manifest", "base_digest"})
    return hashlib.sha256(canonical_json(fixed)).hexdigest()


def review(header: RequestHeader, policy: SitePolicy, facts: Facts) -> Refusal | None:
    """Decide on a training request; the epsilon cap is checked by `Ledger.reserve`, in the step that charges it."""
    return (
        _review_task(header.experiment, policy, facts)
        or _review_plan(header, facts)
        or review_experiment(header.experiment, policy, facts)
    )


def review_experiment(experiment: Experiment, policy: SitePolicy, facts: Facts) -> Refusal | None:
    """Whether the policy would refuse a new run of an experiment, before anybody has asked for it."""
    return (
        _review_task(experiment, policy, facts)
        or _review_privacy(experiment, policy, facts)
        or _review_limits(experiment, policy, facts)
        or _review_data(experiment, policy, facts)
    )


@dataclass(frozen=True)
class AuditFacts:
    """What the rules on audits need to know of the site at this moment."""

    image_size: int
    num_held_out: int
    """Images that were never trained on, private."""
    audits_last_day: int = 0
    spent_unit: Unit | None = None
    """Unit of the DP charges so far; None before the first."""
    is_clock_behind: bool = False


def review_audit(query: AuditQuery, policy: SitePolicy, facts: AuditFacts) -> Refusal | None:
    """Decide on a request for audits; whose extractor is allowed is checked when its file has been read."""
    return _review_audit_task(query, policy, facts) or _review_audit_data(query, facts)


def review_figures(policy: SitePolicy, spent_unit: Unit | None) -> Refusal | None:
    """Whether figures of audits may leave at the coordinator's request."""
    if not policy.audit_figures:
        return Refusal("non_private_forbidden", "this site releases verdicts only: policy.audit_figures is false")
    return _review_non_private(policy, spent_unit)


def _review_audit_task(query: AuditQuery, policy: SitePolicy, facts: AuditFacts) -> Refusal | None:
    if "audit" not in policy.tasks:
        return Refusal("task_not_allowed", "this site audits nothing on request: policy.tasks has no 'audit'")
    if facts.is_clock_behind:
        return Refusal("clock", "the site's clock stands before its newest ledger entry")
    if facts.audits_last_day >= policy.max_audits_per_day:
        return Refusal("too_many_rounds", f"the site answers at most {policy.max_audits_per_day} audits in 24 hours")
    if query.control_steps > policy.max_steps_per_round:
        return Refusal(
            "too_many_steps",
            f"{query.control_steps} steps of a control model, the site allows {policy.max_steps_per_round}",
        )
    return review_figures(policy, facts.spent_unit) if query.figures else None


def _review_audit_data(query: AuditQuery, facts: AuditFacts) -> Refusal | None:
    if query.experiment.model.image_size != facts.image_size:
        return Refusal("data_not_ready", f"the site's images are {facts.image_size} pixels wide")
    if facts.num_held_out < MIN_HELD_OUT:
        return Refusal("too_few_images", f"an audit needs {MIN_HELD_OUT} images that were never trained on")
    return None


def charge_for(header: RequestHeader, dataset_id: str, fingerprint: str, request_digest: str) -> Charge:
    """What a round of this request costs: its whole length at the plan's public constants."""
    experiment, privacy = header.experiment, header.experiment.privacy
    charge = Charge(
        dataset_id=dataset_id,
        fingerprint=fingerprint,
        task="train",
        run=header.run,
        server_round=header.server_round,
        request_digest=request_digest,
        plan_digest=plan_digest(header),
        mechanism=privacy.mechanism,
        steps=experiment.federation.local_steps,
    )
    if privacy.mechanism == "none":
        return charge
    return charge.model_copy(
        update={
            "noise_multiplier": privacy.noise_multiplier,
            "sample_rate": privacy.sample_rate,
            "unit": privacy.unit,
        }
    )


def released_count(num_images: int, experiment: Experiment, policy: SitePolicy) -> int:
    """The weight a reply carries: 1 under DP and where counts are hidden, else the count, rounded up if policy says."""
    if experiment.privacy.mechanism != "none" or experiment.federation.weighting == "equal":
        return 1
    match policy.image_count:
        case "hidden":
            return 1
        case "rounded":
            return -(-num_images // policy.image_count_grid) * policy.image_count_grid
        case "exact":
            return num_images


def released_scalars(scalars: dict[str, float], experiment: Experiment, policy: SitePolicy) -> dict[str, float]:
    """The numbers beside the update that policy lists; under DP time alone, in whole minutes, rounded up."""
    if experiment.privacy.mechanism == "none":
        return {name: value for name, value in scalars.items() if name in policy.release_scalars}
    if "seconds" not in policy.release_scalars:
        return {}
    return {"seconds": float(-(-scalars["seconds"] // 60) * 60)}


def _review_task(experiment: Experiment, policy: SitePolicy, facts: Facts) -> Refusal | None:
    if "train" not in policy.tasks:
        return Refusal("task_not_allowed", "this site does not train: policy.tasks has no 'train'")
    if policy.experiments == "approved" and experiment_digest(experiment) not in facts.approved_experiments:
        return Refusal("experiment_not_approved", "the site's operator has not approved this experiment yet")
    if facts.is_clock_behind:
        return Refusal("clock", "the site's clock stands before its newest ledger entry")
    return None


def _review_plan(header: RequestHeader, facts: Facts) -> Refusal | None:
    if facts.run_plan not in (None, plan_digest(header)):
        return Refusal("plan_changed", "the request differs from the plan that this run began with")
    rounds = header.experiment.federation.rounds
    if header.server_round > rounds or facts.committed_rounds >= rounds:
        return Refusal("plan_changed", f"the plan of this run has {rounds} rounds, and they are over")
    return None


def _review_privacy(experiment: Experiment, policy: SitePolicy, facts: Facts) -> Refusal | None:
    privacy = experiment.privacy
    if privacy.mechanism == "none":
        return _review_non_private(policy, facts.spent_unit)
    if privacy.unit != policy.unit:
        return Refusal("unit_mismatch", f"this site protects the unit {policy.unit!r}, asked is {privacy.unit!r}")
    if facts.spent_unit not in (None, privacy.unit):
        return Refusal("unit_mismatch", f"spending of this data set is counted per {facts.spent_unit}")
    if experiment.model.backbone != "uvit":
        return Refusal("task_not_allowed", f"DP training knows the backbone 'uvit', not {experiment.model.backbone!r}")
    return _review_constants(experiment, policy)


def _review_constants(experiment: Experiment, policy: SitePolicy) -> Refusal | None:
    privacy = experiment.privacy
    if privacy.noise_multiplier < policy.min_noise_multiplier:
        return Refusal(
            "noise_too_small",
            f"noise multiplier {privacy.noise_multiplier:g} is below the site's {policy.min_noise_multiplier:g}",
        )
    if privacy.delta > policy.delta:
        # The ledger counts at the site's delta anyway; a plan that promises less must not look agreed to.
        return Refusal("budget_exceeded", f"the plan's delta {privacy.delta:g} is above the site's {policy.delta:g}")
    return None


def _review_non_private(policy: SitePolicy, spent_unit: Unit | None) -> Refusal | None:
    if policy.require_dp:
        return Refusal("dp_required", "this site releases with differential privacy only")
    if spent_unit is not None and not policy.non_private_after_dp:
        return Refusal("non_private_forbidden", "this data set has DP rounds, none without DP may follow")
    return None


def _review_limits(experiment: Experiment, policy: SitePolicy, facts: Facts) -> Refusal | None:
    steps = experiment.federation.local_steps
    if steps > policy.max_steps_per_round:
        return Refusal("too_many_steps", f"{steps} steps per round, the site allows {policy.max_steps_per_round}")
    if facts.rounds_last_day >= policy.max_rounds_per_day:
        return Refusal("too_many_rounds", f"the site starts at most {policy.max_rounds_per_day} rounds in 24 hours")
    return None


def _review_data(experiment: Experiment, policy: SitePolicy, facts: Facts) -> Refusal | None:
    if experiment.model.image_size != facts.image_size:
        return Refusal("data_not_ready", f"the site's images are {facts.image_size} pixels wide")
    if facts.num_images < policy.min_images_train:
        return Refusal("too_few_images", "the site has fewer images than its policy asks for")
    if experiment.privacy.mechanism != "none" and experiment.privacy.unit == "person" and not facts.has_persons:
        return Refusal("data_not_ready", "the site's images are not sorted by person")
    return None
