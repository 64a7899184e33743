"""The roster of a run: each site is asked for its key once, and who has answered is in the run's sums to its end."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from flwr.app import Message, MessageType

from server.federation.fleet.registry import Registry
from server.federation.messaging.asking import Asking, SiteAnswer, SiteQuestion
from server.federation.messaging.transport import Grid, Timing
from shared.errors import InputError
from shared.experiment.federation import FederationConfig
from shared.messages.secure_sum.key_question import KEYS_ACTION, KeysQuery, keys_record, read_keys_answer
from shared.secure_aggregation.roster import (
    MIN_SITES,
    Member,
    Peer,
    Roster,
    SecureSumError,
    choice_in_words,
    fewest_sites,
    threshold_for,
)
from shared.storage.files import write_atomically
from shared.storage.runlog import RunLog

ROSTER_FILE = "roster.json"
log = logging.getLogger("maskfed.server")


class RosterError(RuntimeError):
    """Too few sites have given a key; `is_final`: somebody has to act first."""

    def __init__(self, reason: str, *, is_final: bool) -> None:
        super().__init__(reason)
        self.is_final = is_final


class Rosters:
    """The roster of one run, made before its first round and kept in the run's folder.

    Args:
        grid: that the run's messages go through.
        folder: of the run's secure sums.
        run: its name.
        registry: names and signing keys.
        config: how many are needed.
        metrics: the run's log.
        timing: deadlines.
    """

    def __init__(
        self,
        grid: Grid,
        folder: Path,
        run: str,
        registry: Registry,
        config: FederationConfig,
        metrics: RunLog,
        timing: Timing,
    ) -> None:
        self._grid, self._path, self._run, self._registry = grid, folder / ROSTER_FILE, run, registry
        self._config, self._metrics, self._timing = config, metrics, timing

    def stored(self) -> Roster | None:
        """The run's roster, once it was made.

        Raises:
            InputError: the file is damaged.
        """
        try:
            return Roster.model_validate(json.loads(self._path.read_bytes()))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise InputError(
                f"{self._path} is damaged: without it this run's sums cannot be read; start a new run"
            ) from error

    def make(self, nodes: Mapping[str, int], attend: Callable[[], None]) -> Roster:
        """Ask the sites of `nodes` (site to node id) for their keys.

        Raises:
            RosterError: too few have given one; names why.
        """
        keys = {site.alias: site.signing_key for site in self._registry.active()}
        peers = tuple(Peer(alias=site, signing_key=keys[site]) for site in sorted(nodes))
        if len(peers) < MIN_SITES:
            raise RosterError(f"{len(peers)} sites for a secure sum, at least {MIN_SITES} are needed", is_final=False)
        record = keys_record(KeysQuery(run=self._run, peers=peers))
        asking = Asking(
            self._grid,
            self._timing,
            {site: SiteQuestion(node_id, record) for site, node_id in nodes.items()},
            f"{MessageType.QUERY}.{KEYS_ACTION}",
            0,
            lambda site, message: self._member(message, site, keys[site]),
        )
        found = asking.answers(self._timing.question_seconds(len(nodes)), attend)
        roster = self._of(found)
        self._keep(roster)
        return roster

    def _member(self, message: Message, site: str, signing_key: str) -> Member:
        answer = read_keys_answer(message.content)
        if answer.member is None:
            raise SecureSumError(f"{answer.refusal}: {answer.reason}")
        if (answer.member.alias, answer.member.signing_key) != (site, signing_key):
            raise SecureSumError("it gave the key of another site")
        answer.member.check(self._run)
        return answer.member

    def _of(self, found: Mapping[str, SiteAnswer[Member]]) -> Roster:
        given = {site: answer.value for site, answer in found.items() if answer.value is not None}
        times = Counter(member.public_key for member in given.values())
        # Whoever repeats another's key knows no key of its own.
        members = [given[site] for site in sorted(given) if times[given[site].public_key] == 1]
        missing = {site: answer.problem or "its key is another's" for site, answer in found.items()}
        for member in members:
            del missing[member.alias]
        needed = max(MIN_SITES, self._config.min_available, self._config.min_replies)
        told = "; ".join(f"{site} ({problem})" for site, problem in sorted(missing.items()))
        if len(members) < needed:
            raise RosterError(
                f"{len(members)} of the {needed} sites that a roster needs have given a key for it: {told}",
                is_final=all(answer.status == "rejected" for answer in found.values() if answer.value is None),
            )
        if len(members) < fewest_sites(self._config.secure_colluding):
            raise RosterError(choice_in_words(len(members), self._config.secure_colluding), is_final=True)
        if told:
            log.warning("not in the roster, so not in this run: %s", told)
        return Roster(members=tuple(members), threshold=threshold_for(len(members), self._config.secure_colluding))

    def _keep(self, roster: Roster) -> None:
        self._path.parent.mkdir(mode=0o700, exist_ok=True)
        write_atomically(self._path, roster.model_dump_json() + "\n")
        self._metrics.write_durably("roster", sites=list(roster.aliases), threshold=roster.threshold)
        log.info("%s", choice_in_words(len(roster.members), self._config.secure_colluding))
