"""Whom a round asks: drawn by seed, so that a repeated round asks the same sites; who stays away is asked less."""

import math
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

from server.federation.updates.aggregation import check_total_weight
from shared.experiment.config import Experiment
from shared.experiment.federation import FederationConfig
from shared.seeding import SEED_BITS, derive_seed

T = TypeVar("T")
MAX_MISSES = 3
"""Rounds in a row that a site may be late or refuse before it is set aside."""
LONGEST_PAUSE = 32
"""Rounds."""


class Attendance:
    """Sites that were late or refused three times in a row are left out for 1 round, then for 2, 4, 8, ...

    Its state travels in the round's record, and so in the checkpoint: a run that goes on asks whom it would have asked.
    """

    def __init__(self, state: Mapping[str, Mapping[str, int]]) -> None:
        self.state = {site: dict(entry) for site, entry in state.items()}

    def set_aside(self, server_round: int) -> set[str]:
        """Sites that this round does not ask."""
        return {site for site, entry in self.state.items() if entry["until"] >= server_round}

    def willing(self, here: dict[str, T], server_round: int, needed: int) -> dict[str, T]:
        """Those of `here` that are not set aside; all of them where fewer than `needed` would be left."""
        aside = self.set_aside(server_round)
        left = {site: record for site, record in here.items() if site not in aside}
        return left if len(left) >= needed else here

    def note(self, record: Mapping[str, Any]) -> None:
        """Take in a round's record; what was cut short by the end of the round is no fault of the site."""
        for entry in record["answered"]:
            self.state.pop(entry["site"], None)
        missed = [*record["refused"], *(entry for entry in record["late"] if entry["code"] != "closed")]
        for entry in missed:
            known = self.state.setdefault(entry["site"], {"misses": 0, "until": 0})
            known["misses"] += 1
            if known["misses"] >= MAX_MISSES:
                known["until"] = record["round"] + min(2 ** (known["misses"] - MAX_MISSES), LONGEST_PAUSE)


def num_asked(config: FederationConfig, num_sites: int) -> int:
    """Sites that a round asks, of `num_sites` registered ones."""
    if config.sites_fraction:
        return math.ceil(config.sites_fraction * num_sites)
    return config.sites_per_round or num_sites


def choose(experiment: Experiment, server_round: int, registered: Sequence[str], here: Collection[str]) -> list[str]:
    """The sites of a round, by alias.

    The order of ALL registered sites is drawn, and the first of them that are online are taken: who is absent is
    replaced and shifts nobody else. Under client-level DP each site is drawn by itself, with probability
    `sites_fraction` (0: all are asked): one site more or less, registered or online, changes nothing for any other.

    Args:
        experiment: seed and numbers.
        server_round: each round draws anew.
        registered: aliases of all active sites.
        here: aliases of those that are online.

    Raises:
        InputError: so many sites that their weights could overflow the sum.
    """
    if experiment.federation.central_noise_multiplier:
        chosen = [site for site in sorted(here) if site in registered and _is_drawn(experiment, server_round, site)]
        check_total_weight(len(chosen), experiment.federation)
        return chosen
    order = sorted(registered)
    random.Random(derive_seed(experiment.train.seed, "selection", server_round)).shuffle(order)
    chosen = [site for site in order if site in here][: num_asked(experiment.federation, len(order))]
    check_total_weight(len(chosen), experiment.federation)
    return sorted(chosen)


def _is_drawn(experiment: Experiment, server_round: int, site: str) -> bool:
    draw: float = derive_seed(experiment.train.seed, "selection", server_round, site) / 2**SEED_BITS
    return draw < (experiment.federation.sites_fraction or 1.0)
