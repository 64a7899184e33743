"""The site's rules on training, as pure functions: a request and a few facts in, a refusal or nothing out.

What the coordinator is told follows from policy and from its own requests. Rules that look at private facts come last
and all say the same to it: `policy`; their reason is for the operator's log. Nothing here touches files or torch.
Each rule yields what it has against a request, so that one walk gives the first reason to a round and all to an offer.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from client.settings import SitePolicy, Unit
from shared.errors import InputError
from shared.experiment.config import Experiment
from shared.messages.agreement.plan import plan_digest
from shared.messages.training import RefusalCode, RequestHeader, experiment_digest
from shared.updates.trainable import select_trainable

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
    refused_experiments: frozenset[str] = frozenset()
    run_plan: str | None = None
    """Digest of the plan that the run's first charge has fixed."""
    committed_rounds: int = 0
    """Completed rounds of the run."""
    rounds_last_day: int = 0
    own_unit: Unit | None = None
    """Unit of the DP charges on this very data set; None before the first."""
    has_dp_releases: bool = False
    """Whether rounds or other releases with DP were made of this very data set; audits are none."""
    spent_unit: Unit | None = None
    """The unit of DP charges over every data set that shares records with it, private."""
    has_linked_dp_releases: bool = False
    """As above, over every data set that shares records with it, private."""
    is_clock_behind: bool = False


def review(header: RequestHeader, policy: SitePolicy, facts: Facts) -> Refusal | None:
    """Decide on a training request; the epsilon cap is checked by `Ledger.reserve`, in the step that charges it."""
    return next(all_refusals(header, policy, facts), None)


def all_refusals(header: RequestHeader, policy: SitePolicy, facts: Facts) -> Iterator[Refusal]:
    """Everything that stands against a request, each reason once; sizes before anything that they bound."""
    experiment = header.experiment
    yield from _ranges(experiment, policy)
    yield from _task(experiment, policy, facts)
    yield from _meaning(header)
    yield from _size(header, policy)
    yield from _plan(header, facts)
    yield from _constants(experiment, policy, facts)


def experiment_refusals(experiment: Experiment, policy: SitePolicy, facts: Facts) -> Iterator[Refusal]:
    """What the policy would refuse of a new run of an experiment, before anybody has asked for it."""
    yield from _task(experiment, policy, facts)
    yield from _ranges(experiment, policy)
    yield from _constants(experiment, policy, facts)


def refusal_by_policy(experiment: Experiment, policy: SitePolicy) -> Refusal | None:
    """What the policy of this moment says against an experiment, whatever the site's images, ledger and approvals are.

    For answers that were kept: they were charged under the policy of their day, and leave under today's.
    """
    nothing_known = Facts(
        num_images=policy.min_images_train,
        has_persons=True,
        image_size=experiment.model.image_size,
        approved_experiments=frozenset({experiment_digest(experiment)}),
    )
    return next(experiment_refusals(experiment, policy, nothing_known), None)


def mean_image_refusals(experiment: Experiment, policy: SitePolicy, facts: Facts) -> Iterator[Refusal]:
    """What stands against a mean image for an experiment, whose rounds must be acceptable, too."""
    if "mean_image" not in policy.tasks:
        yield Refusal("task_not_allowed", "this site releases no mean image: policy.tasks has no 'mean_image'")
    if not experiment.privacy.mean_image_noise:
        yield Refusal("task_not_allowed", "the experiment has no mean image: privacy.mean_image_noise is 0")
    yield from experiment_refusals(experiment, policy, facts)
    if facts.num_images < policy.min_images_statistics:
        yield hidden(f"{facts.num_images} images, policy.min_images_statistics is {policy.min_images_statistics}")


def _constants(experiment: Experiment, policy: SitePolicy, facts: Facts) -> Iterator[Refusal]:
    yield from _secure(experiment, policy)
    yield from _privacy(experiment, policy, facts)
    yield from _limits(experiment, policy, facts)
    yield from _data(experiment, facts)
    yield from _private_facts(experiment, policy, facts)


def _task(experiment: Experiment, policy: SitePolicy, facts: Facts) -> Iterator[Refusal]:
    """Whether the site trains at all, this experiment, now."""
    if "train" not in policy.tasks:
        yield Refusal("task_not_allowed", "this site does not train: policy.tasks has no 'train'")
    is_open = is_any_allowed(policy, facts.refused_experiments)
    if not is_open and experiment_digest(experiment) not in facts.approved_experiments:
        yield Refusal("experiment_not_approved", "the site's operator has not approved this experiment yet")
    if facts.is_clock_behind:
        yield Refusal("clock", "the site's clock stands before its newest ledger entry")


def is_any_allowed(policy: SitePolicy, refused: frozenset[str]) -> bool:
    """Whether experiments run without an approval of their own: by policy, and while the operator has refused none.

    What was refused comes back under another digest as soon as its seed is another one, so the first refusal ends it.
    """
    return policy.experiments == "any" and not refused


def _meaning(header: RequestHeader) -> Iterator[Refusal]:
    """What is approved is the experiment: it fixes the trained tensors and the precision, the request may not."""
    experiment = header.experiment
    if (header.precision == "bfloat16") != (experiment.train.precision == "bfloat16"):
        yield Refusal(
            "malformed", f"precision {header.precision} is not that of the experiment, {experiment.train.precision}"
        )
    trained = [tensor.name for tensor in header.manifest.tensors]
    names = trained + [tensor.name for tensor in header.base_manifest.tensors]
    try:
        expected = select_trainable(names, experiment.federation.trainable)
    except InputError:
        expected = []
    if sorted(trained) != expected or len(set(names)) < len(names):
        yield Refusal("malformed", "the request's trained tensors are not those of federation.trainable")


def _size(header: RequestHeader, policy: SitePolicy) -> Iterator[Refusal]:
    num_parameters = header.manifest.num_elements + header.base_manifest.num_elements
    if text := policy.ranges.outside("parameters", num_parameters):
        yield Refusal("out_of_range", text)


def _ranges(experiment: Experiment, policy: SitePolicy) -> Iterator[Refusal]:
    for text in policy.ranges.all_outside(experiment):
        yield Refusal("out_of_range", text)


def _plan(header: RequestHeader, facts: Facts) -> Iterator[Refusal]:
    if facts.run_plan not in (None, plan_digest(header)):
        yield Refusal("plan_changed", "the request differs from the plan that this run began with")
    rounds = header.experiment.federation.rounds
    if header.server_round > rounds or facts.committed_rounds >= rounds:
        yield Refusal("plan_changed", f"the plan of this run has {rounds} rounds, and they are over")


def _secure(experiment: Experiment, policy: SitePolicy) -> Iterator[Refusal]:
    federation, secure = experiment.federation, policy.secure
    if secure.require and not federation.secure:
        yield Refusal("secure_sum", "this site trains only where its update is masked: federation.secure")
    if federation.secure and federation.secure_colluding < secure.max_colluding:
        text = f"this site counts with {secure.max_colluding} sites that work together with the coordinator"
        yield Refusal("secure_sum", f"{text}: raise federation.secure_colluding {federation.secure_colluding}")
    if federation.secure and federation.min_replies < secure.min_peers:
        text = f"this site asks for {secure.min_peers} updates in a sum"
        yield Refusal("secure_sum", f"{text}: raise federation.min_replies {federation.min_replies}")


def _privacy(experiment: Experiment, policy: SitePolicy, facts: Facts) -> Iterator[Refusal]:
    privacy = experiment.privacy
    if privacy.mechanism == "none":
        yield from _non_private(policy, facts)
        return
    if privacy.unit != policy.unit:
        yield Refusal("unit_mismatch", f"this site protects the unit {policy.unit!r}, asked is {privacy.unit!r}")
    if facts.own_unit not in (None, privacy.unit):
        yield Refusal("unit_mismatch", f"spending of this data set is counted per {facts.own_unit}")
    if experiment.model.backbone != "uvit":
        yield Refusal("task_not_allowed", f"DP training knows the backbone 'uvit', not {experiment.model.backbone!r}")
    for noise in filter(None, (privacy.noise_multiplier, privacy.mean_image_noise)):
        if noise < policy.min_noise_multiplier:
            text = f"noise multiplier {noise:g} is below the site's {policy.min_noise_multiplier:g}"
            yield Refusal("noise_too_small", text)
    if privacy.delta > policy.delta:
        # The ledger counts at the site's delta anyway; a plan that promises less must not look agreed to.
        yield Refusal("budget_exceeded", f"the plan's delta {privacy.delta:g} is above the site's {policy.delta:g}")


def _non_private(policy: SitePolicy, facts: Facts) -> Iterator[Refusal]:
    if policy.require_dp:
        yield Refusal("dp_required", "this site releases with differential privacy only")
    if facts.has_dp_releases and not policy.non_private_after_dp:
        yield Refusal("non_private_forbidden", "this data set has releases with DP, no round without may follow")


def _limits(experiment: Experiment, policy: SitePolicy, facts: Facts) -> Iterator[Refusal]:
    steps = experiment.federation.local_steps
    if steps > policy.max_steps_per_round:
        yield Refusal("too_many_steps", f"{steps} steps per round, the site allows {policy.max_steps_per_round}")
    if facts.rounds_last_day >= policy.max_rounds_per_day:
        yield Refusal("too_many_rounds", f"the site starts at most {policy.max_rounds_per_day} rounds in 24 hours")


def _data(experiment: Experiment, facts: Facts) -> Iterator[Refusal]:
    if experiment.model.image_size != facts.image_size:
        yield Refusal("data_not_ready", f"the site's images are {facts.image_size} pixels wide")
    if experiment.privacy.mechanism != "none" and experiment.privacy.unit == "person" and not facts.has_persons:
        yield Refusal("data_not_ready", "the site's images are not sorted by person")


def _private_facts(experiment: Experiment, policy: SitePolicy, facts: Facts) -> Iterator[Refusal]:
    privacy, spent = experiment.privacy, facts.spent_unit
    if facts.num_images < policy.min_images_train:
        yield hidden(f"{facts.num_images} training images, policy.min_images_train is {policy.min_images_train}")
    if privacy.mechanism != "none" and spent not in (None, privacy.unit):
        yield hidden(f"spending of data that shares records with this set is counted per {spent}")
    if privacy.mechanism == "none" and facts.has_linked_dp_releases and not policy.non_private_after_dp:
        yield hidden("data that shares records with this set has DP releases: policy.non_private_after_dp is false")
