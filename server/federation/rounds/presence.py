"""Who is there for a round: it waits for enough sites, a little for the rest, and takes those that accept its plan."""

import logging
import time
from collections.abc import Callable, Iterable

from server.federation.fleet.registry import Registry
from server.federation.messaging.agreement import Agreement
from server.federation.messaging.exchange import Exchange
from server.federation.rounds.site_record import SiteRecord
from shared.experiment.federation import FederationConfig
from shared.messages.training import RequestHeader

log = logging.getLogger("maskfed.server")
ONLINE_POLL_SECONDS = 2.0


class TooFewSitesError(RuntimeError):
    """Not as many sites are online, or have accepted, as a round needs; `is_final`: somebody has to act first."""

    def __init__(self, reason: str, *, is_final: bool = False) -> None:
        super().__init__(reason)
        self.is_final = is_final


class Presence:
    """Waits for sites to be online, and offers them the plan."""

    def __init__(self, exchange: Exchange, registry: Registry, config: FederationConfig, agreement: Agreement) -> None:
        self.exchange, self.registry, self.config, self.agreement = exchange, registry, config, agreement
        self._absent: set[str] = set()

    def wait(self, server_round: int, tell: Callable[[set[str]], None]) -> dict[str, SiteRecord]:
        """Registered sites that are online, after waiting for `min_available` of them and a little for the rest.

        Under client-level DP the deadline ends the wait however few are there: a round that is not released would tell
        who was missing.

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
            if waited > self.config.available_deadline_seconds and self.config.central_noise_multiplier:
                log.warning("round %d: released without %s, who were not online", server_round, _names(missing))
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

    def agreeing(
        self, header: RequestHeader, here: dict[str, SiteRecord], attend: Callable[[], None]
    ) -> dict[str, SiteRecord]:
        """Those of `here` that have accepted the plan: before enough have, nobody is sent weights or charged.

        Under client-level DP nothing may depend on how many there are, so the rounds go on with those that have.

        Raises:
            TooFewSitesError: fewer than `min_replies` have; names what became of each offer.
        """
        self.agreement.ask(header, {site: record.node_id for site, record in here.items()}, attend)
        accepted, needed = self.agreement.accepted(here), self.config.min_replies
        if len(accepted) < needed and not self.config.central_noise_multiplier:
            raise TooFewSitesError(
                f"round {header.server_round} was not begun and nothing was charged for it: {len(accepted)} of the "
                f"{needed} sites that federation.min_replies asks for have accepted the plan; "
                f"{self.agreement.explain() or 'the others are not online'}",
                is_final=self.agreement.is_refused,
            )
        return {site: here[site] for site in accepted}

    def _look(self) -> tuple[dict[str, SiteRecord], set[str]]:
        sites, online = self.registry.active(), self.exchange.online()
        here = {
            site.alias: SiteRecord(site.alias, site.node_id, online[site.node_id])
            for site in sites
            if site.node_id is not None and site.node_id in online
        }
        return here, {site.alias for site in sites} - here.keys()


def _names(sites: Iterable[str]) -> str:
    return ", ".join(sorted(sites)) or "nobody"
