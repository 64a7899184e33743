"""Whom a round asks: drawn by seed, so that a repeated round asks the same sites; who stays away is asked less."""

import logging
import math
import random
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from server.federation.fleet.registry import Registry
from server.federation.messaging.exchange import Exchange
from server.federation.rounds.aggregation import check_total_weight
from server.federation.rounds.tally import SiteRecord
from shared.experiment.config import Experiment
from shared.experiment.sections import FederationConfig
from shared.seeding import derive_seed

log = logging.getLogger("maskfed.server")
ONLINE_POLL_SECONDS = 2.0
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

    def willing(self, here: dict[str, SiteRecord], server_round: int, needed: int) -> dict[str, SiteRecord]:
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


class TooFewSitesError(RuntimeError):
    """Not as many sites are online as a round needs."""


class Presence:
    """Waits for sites to be online."""

    def __init__(self, exchange: Exchange, registry: Registry, config: FederationConfig) -> None:
        self.exchange, self.registry, self.config = exchange, registry, config
        self._absent: set[str] = set()

    def wait(self, server_round: int, tell: Callable[[set[str]], None]) -> dict[str, SiteRecord]:
        """Registered sites that are online, after waiting for `min_available` of them and a little for the rest.

        Args:
            server_round: for the log.
            tell: called with the missing ones, again and again.

        Raises:
            TooFewSitesError: not enough within `available_deadline_seconds`; names who is missing.
        """
        timing, start = self.exchange.timing, time.monotonic()
        next_report = start
        while True:
            here, missing = self._look()
            waited, enough = time.monotonic() - start, len(here) >= self.config.min_available
            if enough and (missing <= self._absent or waited > timing.absent_grace_seconds):
                self._absent = missing
                return here
            if waited > self.config.available_deadline_seconds:
                raise TooFewSitesError(
                    f"round {server_round}: {len(here)} of the {self.config.min_available} sites that "
                    f"federation.min_available asks for are online after {waited:.0f} s; missing: {_names(missing)}"
                )
            tell(missing)
            if time.monotonic() >= next_report:
                log.info("round %d: waiting for %s to come online", server_round, _names(missing))
                next_report = time.monotonic() + timing.report_seconds
            time.sleep(min(ONLINE_POLL_SECONDS, timing.poll_seconds))

    def _look(self) -> tuple[dict[str, SiteRecord], set[str]]:
        sites, online = self.registry.active(), self.exchange.online()
        here = {
            site.alias: SiteRecord(site.alias, site.node_id, online[site.node_id])
            for site in sites
            if site.node_id is not None and site.node_id in online
        }
        return here, {site.alias for site in sites} - here.keys()


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


def _names(sites: Iterable[str]) -> str:
    return ", ".join(sorted(sites)) or "nobody"
