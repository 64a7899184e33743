"""Whom a round asks: drawn by seed, so that a repeated round asks the same sites."""

import math
import random
from collections.abc import Collection, Sequence

from server.federation.rounds.aggregation import check_total_weight
from shared.experiment.config import Experiment
from shared.experiment.sections import FederationConfig
from shared.seeding import derive_seed


def num_asked(config: FederationConfig, num_sites: int) -> int:
    """Sites that a round asks, of `num_sites` registered ones."""
    if config.sites_fraction:
        return math.ceil(config.sites_fraction * num_sites)
    return config.sites_per_round or num_sites


def choose(experiment: Experiment, server_round: int, registered: Sequence[str], here: Collection[str]) -> list[str]:
    """The sites of a round, by alias.

    The order of ALL registered sites is drawn, and the first of them that are online are taken: who is absent is
    replaced and shifts nobody else.

    Args:
        experiment: seed and numbers.
        server_round: each round draws anew.
        registered: aliases of all active sites.
        here: aliases of those that are online.

    Raises:
        InputError: so many sites that their weights could overflow the sum.
    """
    order = sorted(registered)
    random.Random(derive_seed(experiment.train.seed, "selection", server_round)).shuffle(order)
    chosen = [site for site in order if site in here][: num_asked(experiment.federation, len(order))]
    check_total_weight(len(chosen), experiment.federation)
    return sorted(chosen)
