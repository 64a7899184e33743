"""A plan in words, for the operator who decides: what it does, what it costs, what the policy still refuses."""

from collections.abc import Iterator

from client.data.dataset import open_dataset
from client.home import Home
from client.offers.answer import NOT_COMPUTED, plan_costs
from client.offers.waiting import Waiting, differences_to_recipe, length_in_words
from client.policy.facts import gather_facts
from client.policy.rules import Refusal, experiment_refusals
from client.privacy.epsilon import epsilon_of
from client.records.ledger import read_ledger
from client.settings import SiteConfig, SitePolicy, load_settings
from shared.errors import InputError
from shared.experiment.config import Experiment
from shared.messages.training import experiment_digest


def in_words(home: Home, settings: SiteConfig, experiment: Experiment, probe_seconds: float = 0.0) -> Iterator[str]:
    """One fact a line; nothing is charged, and no picture is opened.

    Args:
        home: the site.
        settings: its settings.
        experiment: what is asked for.
        probe_seconds: how long to measure this machine's speed; 0 says nothing of bytes and time.
    """
    model, federation = experiment.model, experiment.federation
    yield f"experiment {experiment_digest(experiment)}"
    if noise := experiment.privacy.mean_image_noise:
        is_allowed = "mean_image" in settings.policy.tasks
        without = "" if is_allowed else "; policy.tasks has no mean_image, so none is released"
        yield f"one mean image of all training images, with noise multiplier {noise:g}{without}"
    yield (
        f"{length_in_words(federation.rounds, federation.local_steps)}, model {model.size} at {model.image_size} "
        f"pixels, learning rate {experiment.optim.lr:g}, trains {', '.join(federation.trainable)}"
    )
    if federation.keep_moments:
        yield "the optimizer's moments of each round stay on this machine, for the next round of the run"
    if federation.secure:
        yield (
            "updates are masked: the coordinator sees sums only, of at least "
            f"{max(federation.min_replies, settings.policy.secure.min_peers)} sites"
        )
    refusals = _other_refusals(home, settings, experiment)
    if experiment.privacy.mechanism == "none":
        yield "WITHOUT differential privacy: images can be reconstructed from such updates, the total is `unbounded`"
    else:
        yield _constants(experiment)
        if not NOT_COMPUTED & {each.code for each in refusals}:
            yield _cost(experiment, settings.policy)
    if probe_seconds > 0 and not NOT_COMPUTED & {each.code for each in refusals}:
        yield from _work(home, settings, experiment, probe_seconds)
    for each in refusals:
        yield f"your policy refuses it as it stands: {each.code}, {each.note or each.reason}"


def _work(home: Home, settings: SiteConfig, experiment: Experiment, probe_seconds: float) -> Iterator[str]:
    """Bytes and time; both are inside the policy's ranges, so that building the model harms nobody."""
    from shared.planning.speed_probe import images_per_second, num_values
    from shared.planning.workload import lines, workload

    try:
        data = open_dataset(home, settings.image_size)
    except InputError:
        return
    is_by_person = experiment.privacy.unit == "person" and data.persons is not None
    units = len(data.units("person" if is_by_person else "image"))
    work = workload(experiment, 1, units, num_values(experiment), images_per_second(experiment, probe_seconds))
    yield from lines(experiment, work, 1)


def _other_refusals(home: Home, settings: SiteConfig, experiment: Experiment) -> list[Refusal]:
    """What stands against the plan beside that it is not approved; images that are not scanned stand against none."""
    try:
        data = open_dataset(home, settings.image_size)
    except InputError:
        data = None
    facts = gather_facts(home, settings, "", data, read_ledger(home.ledger))
    found = experiment_refusals(experiment, settings.policy, facts)
    return [each for each in found if each.code != "experiment_not_approved"]


def waiting_facts(home: Home, each: Waiting, probe_seconds: float) -> dict[str, object]:
    """An experiment that waits, for a program: who asked, what differs from its recipe, and `in_words`."""
    recipe, differing = differences_to_recipe(each.experiment)
    told = {"number": each.number, "digest": each.digest, "run": each.run, "asked": each.asked, "recipe": recipe}
    words = list(in_words(home, load_settings(home), each.experiment, probe_seconds))
    return {**told, "differences": differing, "in_words": words}


def _constants(experiment: Experiment) -> str:
    privacy = experiment.privacy
    return (
        f"DP-SGD per {privacy.unit}: noise multiplier {privacy.noise_multiplier:g}, sampling rate "
        f"{privacy.sample_rate:g}, expected batch {privacy.expected_batch}, clipping norm "
        f"{privacy.max_grad_norm:g}, {privacy.draws} noise draws"
    )


def _cost(experiment: Experiment, policy: SitePolicy) -> str:
    costs, rounds = plan_costs(experiment, policy, epsilon_of), experiment.federation.rounds
    whole = costs["epsilon_run"]
    fits = isinstance(whole, float) and whole <= policy.epsilon_cap
    image = f"{_bound(costs['epsilon_mean_image'])} for its mean image, " if experiment.privacy.mean_image_noise else ""
    return (
        f"epsilon of this plan alone at delta {policy.delta:g}: {image}{_bound(costs['epsilon_round'])} after one "
        f"round, {_bound(whole)} after all {rounds}; your cap over all plans is {policy.epsilon_cap:g}"
        + ("" if fits else ": ALL ROUNDS DO NOT FIT UNDER IT")
    )


def _bound(epsilon: object) -> str:
    return f"{epsilon:.3f}" if isinstance(epsilon, float) else "no bound"
