"""The rounds of a federated fine-tuning: pick sites, ask, fold, step, checkpoint; any crash costs at most one round."""

import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from server.federation.fleet.registry import Registry
from server.federation.messaging.exchange import Arrival, Exchange
from server.federation.messaging.transport import Grid, Timing
from server.federation.rounds.aggregation import Noise, update_norm
from server.federation.rounds.central_dp import central_epsilon, central_noise, read_secret
from server.federation.rounds.global_model import GlobalModel, load_global, round_folder, save_global
from server.federation.rounds.request import Question
from server.federation.rounds.selection import choose
from server.federation.rounds.server_optimizer import apply_update, average, ema_decay
from server.federation.rounds.tally import TRANSIENT_STATES, SiteRecord, Tally
from shared.errors import InputError
from shared.experiment.config import Experiment
from shared.storage.checkpoint import latest_checkpoint, prune_checkpoints
from shared.storage.runlog import RunLog, read_metrics

log = logging.getLogger("maskfed.server")
ONLINE_POLL_SECONDS = 2.0


class RunFailedError(RuntimeError):
    """The run cannot go on; `is_final` says that trying again will not help."""

    def __init__(self, reason: str, *, is_final: bool) -> None:
        super().__init__(reason)
        self.is_final = is_final


class Observer(Protocol):
    """What the round loop tells while it works."""

    def progress(self, server_round: int, stage: str, sites: dict[str, str]) -> None:
        """The stage of the current round, and each site's state."""

    def round_done(self, server_round: int) -> None:
        """A round's checkpoint is complete."""

    def oldest_needed(self) -> int | None:
        """Round of the oldest checkpoint that somebody still has to read; None: nobody does."""


class Rounds:
    """All rounds of one run, from its last complete checkpoint to the last round."""

    def __init__(
        self,
        grid: Grid,
        experiment: Experiment,
        *,
        run: str,
        run_folder: Path,
        registry: Registry,
        observer: Observer,
        timing: Timing | None = None,
    ) -> None:
        self.experiment, self.run, self.registry, self.observer = experiment, run, registry, observer
        self.config, self.timing = experiment.federation, timing or Timing()
        self.checkpoints = run_folder / "checkpoints"
        self.metrics = RunLog(run_folder / "metrics.jsonl")
        self.exchange = Exchange(grid, self._arrived, self.timing)
        self.tally: Tally | None = None
        self._absent: set[str] = set()

    def finish(self) -> GlobalModel:
        """Run the rounds that are left.

        Raises:
            RunFailedError: too few sites, no usable reply in a round, or no round that changed the weights.
            InputError: there is no checkpoint to start from.
        """
        model = self._resume()
        try:
            while model.server_round < self.config.rounds:
                self._round(model)
        finally:
            self.exchange.close()
        if model.optimizer.steps == 0:
            raise RunFailedError(
                f"no round had {self.config.min_replies} usable replies: the weights never changed", is_final=True
            )
        return model

    def _resume(self) -> GlobalModel:
        folder = latest_checkpoint(self.checkpoints)
        if folder is None:
            raise InputError(f"run {self.run}: no complete checkpoint in {self.checkpoints}; start the run again")
        model = load_global(folder, self.experiment)
        self.exchange.expect(model.weights.nbytes)
        known = [event["round"] for event in read_metrics(self.metrics.path) if event["kind"] == "round"]
        if model.record and model.server_round not in known:
            self.metrics.write("round", **model.record)
        self.metrics.write("start", round=model.server_round, rounds=self.config.rounds, run=self.run)
        log.info("run %s: from round %d of %d (%s)", self.run, model.server_round, self.config.rounds, folder.name)
        return model

    def _round(self, model: GlobalModel) -> None:
        server_round, watch = model.server_round + 1, _Stopwatch()
        here = self._wait_available(server_round)
        registered = [site.alias for site in self.registry.active()]
        sites = [here[site] for site in choose(self.experiment, server_round, registered, here)]
        watch.lap("wait_available")
        tally, bytes_sent = self._ask(model, server_round, sites, watch)
        record: dict[str, Any] = {"round": server_round, **tally.as_json(), "bytes_sent": bytes_sent}
        record |= {"bytes_received": tally.bytes_received, **self._step(model, tally)}
        watch.lap("aggregate")
        model.server_round = server_round
        self.tally = None
        if not tally.sum.count:
            transient = any(tally.in_state(state) for state in TRANSIENT_STATES)
            self.metrics.write("round_failed", **record, seconds=watch.seconds)
            raise RunFailedError(f"round {server_round}: no usable reply: {tally.explain()}", is_final=not transient)
        model.record = record | {"seconds": dict(watch.seconds)}
        self._progress(server_round, "checkpoint", tally)
        folder = round_folder(self.checkpoints, server_round)
        save_global(folder, model, self.experiment)
        watch.lap("checkpoint")
        self.metrics.write("round", **record, seconds={**watch.seconds, "total": watch.total()})
        self.observer.round_done(server_round)
        needed = self.observer.oldest_needed()
        keep_last = max(self.experiment.train.keep_last, 0 if needed is None else server_round - needed + 1)
        prune_checkpoints(self.checkpoints, keep_last, self.experiment.train.keep_every)

    def _wait_available(self, server_round: int) -> dict[str, SiteRecord]:
        """Registered sites that are online, after waiting for `min_available` of them and a little for the rest."""
        start = time.monotonic()
        deadline, next_report = start + self.config.available_deadline_seconds, start
        while True:
            sites, online = self.registry.active(), self.exchange.online()
            here = {
                site.alias: SiteRecord(site.alias, site.node_id, online[site.node_id])
                for site in sites
                if site.node_id is not None and site.node_id in online
            }
            missing = {site.alias for site in sites} - here.keys()
            now, enough = time.monotonic(), len(here) >= self.config.min_available
            if enough and (missing <= self._absent or now - start > self.timing.absent_grace_seconds):
                self._absent = missing
                return here
            if now > deadline:
                raise RunFailedError(
                    f"round {server_round}: {len(here)} of the {self.config.min_available} sites that "
                    f"federation.min_available asks for are online after {now - start:.0f} s; "
                    f"missing: {_names(missing)}",
                    is_final=False,
                )
            self.observer.progress(server_round, "waiting for sites", dict.fromkeys(sorted(missing), "offline"))
            if now >= next_report:
                log.info("round %d: waiting for %s to come online", server_round, _names(missing))
                next_report = now + self.timing.report_seconds
            time.sleep(min(ONLINE_POLL_SECONDS, self.timing.poll_seconds))

    def _ask(
        self, model: GlobalModel, server_round: int, sites: list[SiteRecord], watch: "_Stopwatch"
    ) -> tuple[Tally, int]:
        """Send the round's request and wait until every site's outcome is known or the deadline has come."""
        deadline = time.monotonic() + self.config.round_deadline_seconds
        question = Question(self.exchange, model, self.experiment, self.run, deadline)
        watch.lap("prepare")
        tally = Tally(question.header, question.digest, sites)
        self.tally = tally
        self._progress(server_round, "sending", tally)
        question.push(sites)
        watch.lap("push")
        next_report = time.monotonic() + self.timing.report_seconds
        while waiting := tally.waiting():
            self.exchange.raise_fatal()
            now = time.monotonic()
            if now >= deadline:
                break
            question.revive(tally)
            if now >= next_report:
                names = _names(record.site for record in waiting)
                log.info("round %d: waiting for %s, %.0f s left", server_round, names, deadline - now)
                next_report = now + self.timing.report_seconds
            self._progress(server_round, "training", tally)
            tally.changed.wait(min(self.timing.poll_seconds, max(0.01, deadline - now)))
            tally.changed.clear()
        tally.close()
        watch.lap("train")
        return tally, question.bytes_sent

    def _arrived(self, arrival: Arrival) -> None:
        """Called by pullers: into the tally, or dropped with a record when its round is over."""
        tally = self.tally
        if (tally is None or not tally.arrive(arrival)) and arrival.message is not None:
            log.info("round %d: late reply of %s dropped", arrival.server_round, arrival.site)
            self.metrics.write(
                "late_reply", round=arrival.server_round, site=arrival.site, seconds=round(arrival.seconds, 3)
            )

    def _step(self, model: GlobalModel, tally: Tally) -> dict[str, Any]:
        """Server optimizer and moving average, when there are replies enough; what the record says of it."""
        if tally.sum.count < self.config.min_replies:
            reason = f"{tally.sum.count} usable replies, federation.min_replies asks for {self.config.min_replies}"
            return {"weights_changed": False, "reason": reason, "update_norm": 0.0}
        delta = tally.sum.mean(*self._central(model.server_round + 1))
        tally.sum.clear()
        norm = update_norm(delta)
        model.weights, model.optimizer = apply_update(model.weights, delta, model.optimizer, self.config)
        model.local_steps += self.config.local_steps
        decay = ema_decay(self.experiment.optim.ema_decay, self.config.local_steps, model.local_steps)
        model.ema = average(model.ema, model.weights, decay)
        return {"weights_changed": True, "update_norm": norm, "ema_decay": decay, **self._central_facts(model)}

    def _central(self, server_round: int) -> tuple[int, Noise | None]:
        """Denominator and noise of the mean: the total weight and none, unless client-level DP fixes both."""
        if not self.config.central_noise_multiplier:
            return 0, None
        secret = read_secret(self.registry.path.parent)
        return self.config.sites_per_round, central_noise(secret, self.run, server_round, self.config)

    def _central_facts(self, model: GlobalModel) -> dict[str, Any]:
        if not self.config.central_noise_multiplier:
            return {}
        epsilon = central_epsilon(
            self.config.central_noise_multiplier, model.optimizer.steps, self.config.central_delta
        )
        return {"central_epsilon": epsilon, "central_delta": self.config.central_delta, "central_unit": "site"}

    def _progress(self, server_round: int, stage: str, tally: Tally) -> None:
        self.observer.progress(server_round, stage, {site: record.state for site, record in tally.sites.items()})


class _Stopwatch:
    """Seconds by stage."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self.seconds: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        """The time since the last lap belongs to `stage`."""
        now = time.monotonic()
        self.seconds[stage] = round(now - self._last, 3)
        self._last = now

    def total(self) -> float:
        """Seconds since the start."""
        return round(time.monotonic() - self._start, 3)


def _names(sites: Iterable[str]) -> str:
    return ", ".join(sorted(sites)) or "nobody"
