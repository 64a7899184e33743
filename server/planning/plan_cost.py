"""What a federated plan costs at a site, and what a site with the default policy would refuse of it."""

from server.planning.epsilon_forecast import Steps, epsilon
from shared.experiment.config import Experiment
from shared.messages.agreement import defaults


def epsilon_after(experiment: Experiment, rounds: int) -> float | None:
    """Epsilon of a plan's mean image, where it has one, and so many rounds, at the plan's delta; None without DP."""
    privacy = experiment.privacy
    if privacy.mechanism == "none":
        return None
    steps = Steps(privacy.noise_multiplier, privacy.sample_rate, rounds * experiment.federation.local_steps)
    mean_image = [Steps(privacy.mean_image_noise, 1.0, 1)] if privacy.mean_image_noise else []
    return epsilon([*mean_image, steps], privacy.delta)


def default_refusals(experiment: Experiment) -> list[str]:
    """What a site whose policy `join` wrote without options refuses, in words; it may have reasons of its own."""
    privacy, federation = experiment.privacy, experiment.federation
    if privacy.mechanism == "none":
        return ["it has no DP"]
    found = []
    for noise in filter(None, (privacy.noise_multiplier, privacy.mean_image_noise)):
        if noise < defaults.MIN_NOISE:
            found.append(f"noise multiplier {noise:g} is below {defaults.MIN_NOISE:g}")
    if privacy.delta > defaults.DELTA:
        found.append(f"delta {privacy.delta:g} is above {defaults.DELTA:g}")
    if federation.local_steps > defaults.MAX_STEPS:
        found.append(f"{federation.local_steps} steps a round are more than {defaults.MAX_STEPS}")
    if experiment.model.backbone != "uvit":
        found.append(f"DP training knows the backbone 'uvit', not {experiment.model.backbone!r}")
    return [*found, *_over_the_cap(experiment)]


def _over_the_cap(experiment: Experiment) -> list[str]:
    cap, rounds = defaults.EPSILON_CAP, experiment.federation.rounds
    one, whole = epsilon_after(experiment, 1) or 0.0, epsilon_after(experiment, rounds) or 0.0
    if one > cap:
        return [f"epsilon {one:.3g} of one round is above the cap {cap:g}"]
    return [f"epsilon {whole:.3g} of all {rounds} rounds: the cap {cap:g} ends the plan early"] if whole > cap else []
