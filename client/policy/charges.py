"""What a round is charged, and the numbers beside its update: pure functions of public constants."""

from client.records.spending import Charge
from client.settings import SitePolicy
from shared.experiment.config import Experiment
from shared.messages.agreement.plan import plan_digest
from shared.messages.statistics import MeanImageQuery
from shared.messages.training import RequestHeader


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


def mean_image_charge(query: MeanImageQuery, dataset_id: str, fingerprint: str) -> Charge:
    """What a mean image costs: one step of the Gaussian mechanism on all units."""
    privacy = query.experiment.privacy
    return Charge(
        dataset_id=dataset_id,
        fingerprint=fingerprint,
        task="mean_image",
        run=query.run,
        server_round=0,
        request_digest=query.digest,
        plan_digest=query.digest,
        mechanism="gaussian",
        noise_multiplier=privacy.mean_image_noise,
        sample_rate=1.0,
        steps=1,
        unit=privacy.unit,
        remarks="mean image",
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
    """The numbers beside the update that policy lists; under DP or masks time alone, in whole minutes, rounded up."""
    if experiment.privacy.mechanism == "none" and not experiment.federation.secure:
        return {name: value for name, value in scalars.items() if name in policy.release_scalars}
    if "seconds" not in policy.release_scalars:
        return {}
    return {"seconds": float(-(-scalars["seconds"] // 60) * 60)}
