"""The site's rules on training, as pure functions: a request and a few facts in, a refusal or nothing out.

What the coordinator is told follows from policy and from its own requests. Rules that look at private facts come last
and all say the same to it: `policy`; their reason is for the operator's log. Nothing here touches files or torch.
"""

import hashlib
from dataclasses import dataclass

from client.settings import SitePolicy, Unit
from shared.errors import InputError
from shared.experiment.config import Experiment
from shared.experiment.trainable import select_trainable
from shared.messages.envelope import canonical_json
from shared.messages.training import RefusalCode, RequestHeader, experiment_digest

HIDDEN = "the site's policy refuses this; its operator finds the reason in the site's log"


@dataclass(frozen=True)
class Refusal:
    """A typed no. The reason is fixed text and public numbers, never anything computed from images."""

    code: RefusalCode
    reason: str
    note: str = ""
    """For the operator's log, where the reason must not say it."""


def hidden(note: str) -> Refusal:
    """A no whose reason is private: the coordinator is told `policy`, the operator the note."""
    return Refusal("policy", HIDDEN, note)


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
    own_unit: Unit | None = None
    """Unit of the DP charges on this very data set; None before the first."""
    spent_unit: Unit | None = None
    """The same over every data set that shares records with it, private."""
    is_clock_behind: bool = False


def plan_digest(header: RequestHeader) -> str:
    """SHA-256 of all that must stay as it was in a run's first request: experiment, precision, tensors."""
    fixed = header.model_dump(mode="json", include={"experiment", "precision", "manifest", "base_digest"})
    return hashlib.sha256(canonical_json(fixed)).hexdigest()


def review(header: RequestHeader, policy: SitePolicy, facts: Facts) -> Refusal | None:
    """Decide on a training request; the epsilon cap is checked by `Ledger.reserve`, in the step that charges it."""
    return (
        _review_ranges(header.experiment, policy)
        or review_task(header.experiment, policy, facts)
        or _review_meaning(header)
        or _review_size(header, policy)
        or _review_plan(header, facts)
        or review_experiment(header.experiment, policy, facts)
    )


def review_experiment(experiment: Experiment, policy: SitePolicy, facts: Facts) -> Refusal | None:
    """Whether the policy would refuse a new run of an experiment, before anybody has asked for it."""
    return (
        review_task(experiment, policy, facts)
        or _review_ranges(experiment, policy)
        or _review_privacy(experiment, policy, facts)
        or _review_limits(experiment, policy, facts)
        or _review_data(experiment, facts)
        or _review_private_facts(experiment, policy, facts)
    )


def review_mean_image(experiment: Experiment, policy: SitePolicy, facts: Facts) -> Refusal | None:
    """Decide on a question for the mean image that belongs to an experiment, whose rounds must be acceptable, too."""
    if "mean_image" not in policy.tasks:
        return Refusal("task_not_allowed", "this site releases no mean image: policy.tasks has no 'mean_image'")
    if not experiment.privacy.mean_image_noise:
        return Refusal("task_not_allowed", "the experiment has no mean image: privacy.mean_image_noise is 0")
    if refusal := review_experiment(experiment, policy, facts):
        return refusal
    if facts.num_images < policy.min_images_statistics:
        return hidden(f"{facts.num_images} images, policy.min_images_statistics is {policy.min_images_statistics}")
    return None


def review_task(experiment: Experiment, policy: SitePolicy, facts: Facts) -> Refusal | None:
    """Whether the site trains at all, this experiment, now."""
    if "train" not in policy.tasks:
        return Refusal("task_not_allowed", "this site does not train: policy.tasks has no 'train'")
    if policy.experiments == "approved" and experiment_digest(experiment) not in facts.approved_experiments:
        return Refusal("experiment_not_approved", "the site's operator has not approved this experiment yet")
    if facts.is_clock_behind:
        return Refusal("clock", "the site's clock stands before its newest ledger entry")
    return None


def _review_meaning(header: RequestHeader) -> Refusal | None:
    """What is approved is the experiment: it fixes the trained tensors and the precision, the request may not."""
    experiment = header.experiment
    if (header.precision == "bfloat16") != (experiment.train.precision == "bfloat16"):
        return Refusal(
            "malformed", f"precision {header.precision} is not that of the experiment, {experiment.train.precision}"
        )
    trained = [tensor.name for tensor in header.manifest.tensors]
    names = trained + [tensor.name for tensor in header.base_manifest.tensors]
    try:
        expected = select_trainable(names, experiment.federation.trainable)
    except InputError:
        expected = []
    if sorted(trained) != expected or len(set(names)) < len(names):
        return Refusal("malformed", "the request's trained tensors are not those of federation.trainable")
    return None


def _review_size(header: RequestHeader, policy: SitePolicy) -> Refusal | None:
    num_parameters = header.manifest.num_elements + header.base_manifest.num_elements
    return _out_of_range(policy.ranges.outside("parameters", num_parameters))


def _review_ranges(experiment: Experiment, policy: SitePolicy) -> Refusal | None:
    return _out_of_range(policy.ranges.first_outside(experiment))


def _out_of_range(text: str) -> Refusal | None:
    return Refusal("out_of_range", text) if text else None


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
        return _review_non_private(policy, facts.own_unit)
    if privacy.unit != policy.unit:
        return Refusal("unit_mismatch", f"this site protects the unit {policy.unit!r}, asked is {privacy.unit!r}")
    if facts.own_unit not in (None, privacy.unit):
        return Refusal("unit_mismatch", f"spending of this data set is counted per {facts.own_unit}")
    if experiment.model.backbone != "uvit":
        return Refusal("task_not_allowed", f"DP training knows the backbone 'uvit', not {experiment.model.backbone!r}")
    return _review_constants(experiment, policy)


def _review_constants(experiment: Experiment, policy: SitePolicy) -> Refusal | None:
    privacy = experiment.privacy
    for noise in filter(None, (privacy.noise_multiplier, privacy.mean_image_noise)):
        if noise < policy.min_noise_multiplier:
            return Refusal(
                "noise_too_small", f"noise multiplier {noise:g} is below the site's {policy.min_noise_multiplier:g}"
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


def _review_data(experiment: Experiment, facts: Facts) -> Refusal | None:
    if experiment.model.image_size != facts.image_size:
        return Refusal("data_not_ready", f"the site's images are {facts.image_size} pixels wide")
    if experiment.privacy.mechanism != "none" and experiment.privacy.unit == "person" and not facts.has_persons:
        return Refusal("data_not_ready", "the site's images are not sorted by person")
    return None


def _review_private_facts(experiment: Experiment, policy: SitePolicy, facts: Facts) -> Refusal | None:
    privacy, spent = experiment.privacy, facts.spent_unit
    if facts.num_images < policy.min_images_train:
        return hidden(f"{facts.num_images} training images, policy.min_images_train is {policy.min_images_train}")
    if privacy.mechanism != "none" and spent not in (None, privacy.unit):
        return hidden(f"spending of data that shares records with this set is counted per {spent}")
    if privacy.mechanism == "none" and spent is not None and not policy.non_private_after_dp:
        return hidden("data that shares records with this set has DP rounds: policy.non_private_after_dp is false")
    return None
