"""Feature statistics of this site's images, exact or with differential privacy, for a pooled distance.

Statistics of sites add up to those of the union, so the coordinator's distance to all sites' images needs none of them.
A release is charged before the first feature is computed: exact ones make the site's total unbounded, private ones are
one step of the Gaussian mechanism.
"""

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from client.data.dataset import Dataset, open_dataset
from client.home import Home
from client.policy.budget import has_dp_releases, reserve, told_total
from client.policy.refusals import PolicyError, RefusedError
from client.policy.rules import HIDDEN
from client.records.journal import Journal
from client.records.ledger import Ledger, open_ledger
from client.records.spending import Charge, EpsilonOf, Total
from client.secure.masked_statistics import MASKED_EXACT, check_earlier_sums
from client.settings import SiteConfig, SitePolicy
from shared.evaluation.extractor import Extractor
from shared.evaluation.feature_statistics import FeatureSpace, Statistics, accumulate, check_same_space
from shared.evaluation.private_statistics import Projection, check_projection, private_statistics
from shared.secure_aggregation.roster import Roster

BATCH = 64
MASKED = "masked statistics, of no use alone"


@dataclass(frozen=True)
class StatisticsPlan:
    """What is asked for; public constants only.

    Attributes:
        kind: `exact`, or `dp` in the public projection.
        space: feature space that the statistics must be in.
        projection: for `dp`.
        noise_multiplier: sigma over sensitivity, for `dp`.
        run: name of the request, for the ledger.
        request_digest: of the request, for the ledger.
        roster: of the masked sum that the statistics go into; None: they leave as they are.
    """

    kind: Literal["exact", "dp"]
    space: FeatureSpace
    projection: Projection | None = None
    noise_multiplier: float = 0.0
    run: str = ""
    request_digest: str = ""
    roster: Roster | None = None


def release_statistics(
    home: Home,
    settings: SiteConfig,
    plan: StatisticsPlan,
    load: Callable[[], Extractor],
    epsilon_of: EpsilonOf,
) -> Statistics:
    """Check policy, charge the ledger, compute, and note the release.

    Args:
        home: the site.
        settings: its configuration and policy.
        plan: what is asked for.
        load: gives the feature network; called after the charge is on disk.
        epsilon_of: the accountant.

    Returns:
        Statistics of the training images, as they may leave.

    Raises:
        InputError: forbidden by policy, or another extractor than asked for.
        RefusedError: too few images, or the charge would pass the cap.
        BusyError: a round is running.
    """
    policy = settings.policy
    with open_ledger(home.ledger, Path(settings.head_file)) as ledger:
        data = open_dataset(home, settings.image_size)
        check_policy(policy, plan)
        check_private_facts(policy, plan, data, ledger)
        entry = reserve(ledger, _charge(plan, data, policy), policy, epsilon_of, home)
        extractor = load()
        check_same_space(plan.space, extractor.space)
        found = _compute(plan, data, extractor, settings, told_total(ledger, policy, epsilon_of))
        ledger.commit(entry)
    journal = Journal(home.journal)
    numbers = ["n", "total", "outer"] if plan.kind == "exact" else ["noisy n", "noisy total", "noisy outer"]
    numbers = numbers if plan.roster is None else [MASKED]
    journal.write("release", task="statistics", release=plan.kind, extractor=plan.space.sha256, numbers=numbers)
    return found


def check_policy(policy: SitePolicy, plan: StatisticsPlan) -> None:
    """The site's rules on statistics that need to know no more than the question.

    Raises:
        PolicyError: naming the rule.
    """
    if "statistics" not in policy.tasks:
        raise PolicyError("policy.tasks does not list `statistics`: this site releases none")
    if plan.kind == "exact":
        if policy.require_dp:
            raise PolicyError("exact statistics are a release without DP: policy.require_dp forbids it")
        if policy.secure.require and plan.roster is None:
            raise PolicyError("exact statistics are this site's own, in no sum: policy.secure.require forbids them")
        return
    if plan.projection is None or not plan.noise_multiplier >= policy.min_noise_multiplier:
        raise PolicyError(
            f"noise multiplier {plan.noise_multiplier:g} is below policy.min_noise_multiplier "
            f"{policy.min_noise_multiplier:g}, or the projection is missing"
        )
    if policy.unit != "image":
        raise PolicyError("private statistics protect images, policy.unit is `person`: they would promise too much")
    constants = {"noise_multiplier": plan.noise_multiplier, "projection_radius": plan.projection.radius}
    for name, value in constants.items():
        if text := policy.ranges.outside(name, value):
            raise PolicyError(text)
    check_projection(plan.projection)


def check_private_facts(policy: SitePolicy, plan: StatisticsPlan, data: Dataset, ledger: Ledger) -> None:
    """The rules that look at private facts: their reason is the operator's to know.

    Raises:
        RefusedError: with the reason `policy`.
        SecureSumError: the data set was in an exact sum of another roster.
    """
    note, is_dp = "", has_dp_releases(ledger.charges_of(data.dataset_id))
    if len(data.train) < policy.min_images_statistics:
        note = f"{len(data.train)} images, policy.min_images_statistics is {policy.min_images_statistics}"
    elif plan.kind == "exact" and is_dp and not policy.non_private_after_dp:
        note = "exact statistics after DP rounds: policy.non_private_after_dp forbids it"
    if note:
        raise RefusedError("policy", HIDDEN, note)
    if plan.kind == "exact" and plan.roster is not None:
        check_earlier_sums(ledger, data.dataset_id, data.fingerprint, plan.roster)


def _charge(plan: StatisticsPlan, data: Dataset, policy: SitePolicy) -> Charge:
    digest = plan.request_digest or secrets.token_hex(32)
    charge = Charge(
        dataset_id=data.dataset_id,
        fingerprint=data.fingerprint,
        task="statistics",
        run=plan.run or f"statistics-{secrets.token_hex(4)}",
        server_round=0,
        request_digest=digest,
        plan_digest=digest,
        mechanism="none" if plan.kind == "exact" else "gaussian",
        remarks=f"{plan.kind} feature statistics",
    )
    if plan.kind == "exact" and plan.roster is not None:
        return charge.model_copy(update={"plan_digest": plan.roster.identity, "remarks": MASKED_EXACT})
    if plan.kind == "exact":
        return charge
    gaussian = {"noise_multiplier": plan.noise_multiplier, "sample_rate": 1.0, "steps": 1, "unit": policy.unit}
    return charge.model_copy(update=gaussian)


def _compute(
    plan: StatisticsPlan, data: Dataset, extractor: Extractor, settings: SiteConfig, total: Total
) -> Statistics:
    """Statistics of the training images, a batch in memory at a time."""
    from client.privacy.arithmetic import one_by_one

    # One image less must not move the last bits of all others' features: their sum is what the noise is made for.
    features_of = one_by_one(extractor, BATCH, data.size)
    batches = (
        features_of(data.images.batch(data.train[start : start + BATCH])) for start in range(0, len(data.train), BATCH)
    )
    size = {"size": str(settings.image_size)}
    source = f"images of {settings.alias}"
    if plan.kind == "exact":
        plain = accumulate(batches, plan.space, source)
        return replace(plain, site=settings.alias, release="exact", images=size)
    from client.privacy.grid_noise import noised

    assert plan.projection is not None
    features = np.concatenate(list(batches))
    noisy = private_statistics(plan.projection, features, plan.noise_multiplier, noised)
    facts = {**noisy.images, **size}
    epsilon = None if total.is_unbounded or not math.isfinite(total.epsilon) else max(0.0, total.epsilon)
    return replace(noisy, site=settings.alias, source=source, epsilon=epsilon, delta=total.delta, images=facts)
