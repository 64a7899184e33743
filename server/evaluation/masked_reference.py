"""A question for feature statistics whose answers are added up masked: a roster of its own, one sum, its opening."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
from flwr.app import Message, MessageType

from server.evaluation.federated_reference import DEADLINE_SECONDS, POOLED_FILE, REFUSED_EVENT, read_question
from server.federation.fleet.registry import Registry
from server.federation.messaging.exchange import Exchange
from server.federation.messaging.question import collect
from server.federation.messaging.transport import Grid, Timing
from server.federation.secure.masked_sum import MaskedSum
from server.federation.secure.rosters import RosterError, Rosters
from server.federation.secure.unmasking import Unmasking
from server.federation.updates.aggregation import UpdateError
from shared.errors import InputError
from shared.evaluation.feature_statistics import Statistics, save_statistics
from shared.experiment.config import Experiment
from shared.experiment.federation import FederationConfig
from shared.messages.envelope import read_bytes, read_header, validated
from shared.messages.statistics import StatisticsAnswer
from shared.messages.text import one_line
from shared.secure_aggregation.roster import MIN_SITES, Roster, SecureSumError
from shared.secure_aggregation.summed_statistics import (
    RING,
    STATISTICS_ROUND,
    num_elements,
    opened_statistics,
    smallest_sum,
)
from shared.storage.runlog import RunLog

FOLDER = "secure"


def gather_sum(
    grid: Grid,
    home: Path,
    folder: Path,
    experiment: Experiment,
    timing: Timing | None = None,
    deadline_seconds: float = DEADLINE_SECONDS,
) -> None:
    """As `gather` for an experiment with `federation.secure`: the pooled statistics are written, or why there are none.

    Raises:
        ExchangeError: the SuperLink does not answer, or does not take the question.
    """
    masked = MaskedStatistics(grid, home, folder, experiment.federation, timing or Timing())
    try:
        save_statistics(masked.pool(deadline_seconds), folder / POOLED_FILE)
    except (RosterError, SecureSumError) as error:
        RunLog(folder / "metrics.jsonl").write_durably(REFUSED_EVENT, reason=one_line(str(error)))


class MaskedStatistics:
    """One run's."""

    def __init__(self, grid: Grid, home: Path, folder: Path, config: FederationConfig, timing: Timing) -> None:
        self._grid, self._home, self._config, self._timing = grid, home, config, timing
        self._run, self._metrics = folder.name, RunLog(folder / "metrics.jsonl")
        self._question, self._registry = read_question(folder), Registry(home / "sites.json")
        self._rosters = Rosters(grid, folder / FOLDER, self._run, self._registry, config, self._metrics, timing)
        self._answers: dict[str, StatisticsAnswer] = {}

    def pool(self, deadline_seconds: float) -> Statistics:
        """The statistics of all sites of the roster together.

        Raises:
            RosterError: too few sites have given a key.
            SecureSumError: too few have given statistics, or what removes their masks; names why.
        """
        roster = self._rosters.make(self._online(), lambda: None)
        record = self._question.record(self._question.query.model_copy(update={"roster": roster}))
        total = MaskedSum(RING, roster, num_elements(len(self._question.nothing.total_D)))
        collect(
            self._grid,
            self._home,
            record,
            MessageType.QUERY,
            lambda message, alias: self._take(message, alias, total),
            self._metrics,
            "statistics",
            only=roster.aliases,
            timing=self._timing,
            deadline_seconds=deadline_seconds,
            reply_bytes=total.elements.nbytes,
        )
        # As sites know their question by.
        digest = hashlib.sha256(str(record.config_records["header"]["json"]).encode()).hexdigest()
        return self._open(total, roster, digest)

    def _online(self) -> dict[str, int]:
        exchange = Exchange(self._grid, lambda _: None, self._timing)
        try:
            online = exchange.online()
        finally:
            exchange.close()
        return {alias: node_id for alias, node_id in self._nodes().items() if node_id in online}

    def _nodes(self) -> dict[str, int]:
        return {site.alias: site.node_id for site in self._registry.active() if site.node_id is not None}

    def _take(self, message: Message, alias: str, total: MaskedSum) -> tuple[str, str]:
        """Add an answer; nothing of it can be checked but its form.

        Raises:
            InputError: the answer does not follow the protocol.
        """
        answer = validated(StatisticsAnswer, read_header(message.content))
        if answer.status == "refused":
            return "refused", answer.reason
        data = read_bytes(message.content, "file", total.elements.nbytes)
        if len(data) != total.elements.nbytes:
            raise InputError(f"{len(data)} bytes of masked statistics, {total.elements.nbytes} were asked for")
        try:
            total.fold(alias, np.frombuffer(data, RING.dtype), answer.dealing)
        except UpdateError as error:
            raise InputError(str(error)) from error
        self._answers[alias] = answer
        return "released", ""

    def _open(self, total: MaskedSum, roster: Roster, digest: str) -> Statistics:
        nothing, projection, count = self._question.nothing, self._question.projection, len(total.dealings)
        needed = max(MIN_SITES, roster.threshold, smallest_sum(nothing.release, len(roster.members)))
        if count < needed:
            absent = ", ".join(sorted(set(roster.aliases) - set(total.dealings)))
            raise SecureSumError(
                f"{count} of the {needed} sites whose {nothing.release} statistics make a sum have answered; "
                f"missing: {absent}"
            )
        unmasking = Unmasking(total, self._run, STATISTICS_ROUND, digest)
        given = unmasking.ask(self._grid, self._timing, self._nodes(), lambda: None)
        sums = unmasking.open(unmasking.masks(given))
        radius = 1.0 if projection is None else projection.radius
        n, total_D, outer_DD = opened_statistics(sums, len(nothing.total_D), radius)  # noqa: N806
        most = count * self._config.max_examples
        if not 0 < n <= most:
            raise SecureSumError(f"{n:g} images of {count} sites, federation.max_examples allows {most}")
        epsilons = [each.epsilon for each in self._answers.values() if each.epsilon is not None]
        deltas = [each.delta for each in self._answers.values() if each.delta is not None]
        return replace(
            nothing,
            n=n,
            total_D=total_D,
            outer_DD=outer_DD,
            site="+".join(unmasking.survivors),
            epsilon=max(epsilons, default=None),
            delta=max(deltas, default=None),
            source=f"masked sum of {count} sites",
            images={**nothing.images, **({"parts": str(count)} if nothing.release == "dp" else {})},
        )
