"""The parts of a round whose updates are masked: its roster, the sum on disk, and what removes the masks.

Where updates are not masked nothing here does anything.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from server.federation.fleet.registry import Registry
from server.federation.messaging.transport import Grid, Timing
from server.federation.rounds.site_record import SiteRecord
from server.federation.rounds.tally import Tally
from server.federation.secure.masked_sum import KeptRound, KeptSum, MaskedSum
from server.federation.secure.rosters import RosterError, Rosters
from server.federation.secure.unmasking import Unmasking
from server.federation.updates.aggregation import FixedPointSum
from shared.experiment.config import Experiment
from shared.secure_aggregation.roster import Roster, SecureSumError
from shared.storage.runlog import RunLog

FOLDER = "secure"
KEPT_FIELDS = ("site", "state", "code", "reason", "questions", "update_digest", "answer")


class SecureRounds:
    """For one run.

    Args:
        grid: that the run's messages go through.
        experiment: says whether updates are masked.
        run_folder: of the run, which has its name.
        registry: names, keys and addresses of the sites.
        metrics: the run's log.
        timing: deadlines.
    """

    def __init__(
        self, grid: Grid, experiment: Experiment, run_folder: Path, registry: Registry, metrics: RunLog, timing: Timing
    ) -> None:
        self._grid, self._config, self._registry, self._timing = grid, experiment.federation, registry, timing
        folder = run_folder / FOLDER
        self._rosters = Rosters(grid, folder, run_folder.name, registry, self._config, metrics, timing)
        self._kept = KeptSum(folder)
        self.roster: Roster | None = None

    @property
    def is_on(self) -> bool:
        """Whether updates are masked."""
        return self._config.secure

    @property
    def num_needed(self) -> int:
        """Good replies without which a round changes nothing."""
        return max(self._config.min_replies, 0 if self.roster is None else self.roster.threshold)

    def reply_bytes(self, open_bytes: int) -> int:
        """Arrays of one reply, where those of an open one have `open_bytes`."""
        return open_bytes * 2 if self.is_on and self._config.secure_bits == 64 else open_bytes

    def members(self, here: dict[str, SiteRecord], attend: Callable[[], None]) -> dict[str, SiteRecord]:
        """Those of `here` that are in the run's roster, which is made of `here` when there is none yet.

        Under client-level DP nothing may depend on how many there are, so a round goes on with those that are.

        Raises:
            RosterError: too few have given a key, or too few of the roster are here.
            InputError: the roster's file is damaged.
        """
        if not self.is_on:
            return here
        if self.roster is None:
            nodes = {site: record.node_id for site, record in here.items()}
            self.roster = self._rosters.stored() or self._rosters.make(nodes, attend)
        members = {site: record for site, record in here.items() if site in self.roster.aliases}
        if len(members) < self.num_needed and not self._config.central_noise_multiplier:
            missing = ", ".join(sorted(set(self.roster.aliases) - set(members)))
            raise RosterError(
                f"{len(members)} sites of the roster are here, a sum takes {self.num_needed}: nobody was asked or "
                f"charged; missing: {missing}",
                is_final=False,
            )
        return members

    def take_up(self, tally: Tally) -> bool:
        """Whether the updates of this very round are added up already; then the tally has their outcomes."""
        kept = None if tally.masked is None else self._kept.find(tally.request_digest, tally.masked)
        if tally.masked is None or kept is None:
            return False
        tally.masked.elements, tally.masked.dealings = kept.elements, kept.dealings
        records = [SiteRecord(node_id=0, activated_at="", **outcome) for outcome in kept.outcomes]
        tally.sites = {record.site: record for record in records}
        tally.bytes_received = kept.bytes_received
        tally.close()
        return True

    def unmask(self, tally: Tally, attend: Callable[[], None]) -> None:
        """Put the open sum into the tally; an empty one, and the problem, where it cannot be read."""
        masked = tally.masked
        if masked is None:
            return
        count, needed = len(masked.dealings), tally.num_needed
        scale_bits = masked.ring.scale_bits
        try:
            if count < needed:
                raise SecureSumError(f"{count} masked updates, a sum of {needed} is the smallest that is read")
            self._keep(tally, masked)
            header = tally.header
            unmasking = Unmasking(masked, header.run, header.server_round, tally.request_digest)
            nodes = {site.alias: site.node_id for site in self._registry.active() if site.node_id is not None}
            given = unmasking.ask(self._grid, self._timing, nodes, attend)
            tally.sum = FixedPointSum.of(unmasking.open(unmasking.masks(given)), count, scale_bits)
        except SecureSumError as error:
            tally.problem = str(error)
            tally.sum = FixedPointSum(tally.header.manifest.num_elements, scale_bits)
        tally.masked = None

    def clear(self) -> None:
        """The round has its checkpoint."""
        if self.is_on:
            self._kept.clear()

    def _keep(self, tally: Tally, masked: MaskedSum) -> None:
        """Before anybody is told who is in the sum."""
        outcomes = [{name: asdict(record)[name] for name in KEPT_FIELDS} for record in tally.sites.values()]
        kept = KeptRound(masked.elements, masked.dealings, outcomes, tally.bytes_received)
        self._kept.keep(tally.request_digest, kept)
