"""The rounds of a federated fine-tuning: pick sites, ask, fold, step, checkpoint; any crash costs at most one round."""

import logging
import time
from pathlib import Path
from typing import Any, NoReturn

from server.federation.acceptance.acceptance import Acceptance
from server.federation.acceptance.check import CheckError
from server.federation.fleet.registry import Registry
from server.federation.messaging.agreement import Agreement
from server.federation.messaging.exchange import Arrival, Exchange
from server.federation.messaging.sender import Forgeries
from server.federation.messaging.transport import Grid, Timing
from server.federation.rounds.giving_up import GivingUp, RunFailedError
from server.federation.rounds.observer import Observer
from server.federation.rounds.presence import Presence, TooFewSitesError
from server.federation.rounds.request import Closings, Question, header_of
from server.federation.rounds.secure_round import SecureRounds
from server.federation.rounds.selection import Attendance, choose
from server.federation.rounds.site_record import TRANSIENT_STATES, SiteRecord
from server.federation.rounds.tally import Tally
from server.federation.secure.rosters import RosterError
from server.federation.updates.global_model import GlobalModel, load_global, round_folder, save_global
from server.federation.updates.step import ServerStep
from server.runs.stages import Stages
from shared.errors import InputError
from shared.experiment.config import Experiment
from shared.storage.checkpoint import latest_checkpoint, prune_checkpoints
from shared.storage.runlog import RunLog, read_metrics

log = logging.getLogger("maskfed.server")


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
        self._forgeries = Forgeries()
        self.exchange = Exchange(grid, self._arrived, self.timing)
        self.tally: Tally | None = None
        self._agreement = Agreement(grid, run_folder, self.metrics, self.timing)
        self._presence = Presence(self.exchange, registry, self.config, self._agreement)
        self._secure = SecureRounds(grid, experiment, run_folder, registry, self.metrics, self.timing)
        self._step = ServerStep(experiment, run, registry.path.parent)
        self._stages = Stages()
        self._closings = Closings(run_folder)
        self._attendance = Attendance({})
        self._acceptance = Acceptance(run_folder, experiment)
        self._giving_up = GivingUp(experiment, self._acceptance)

    def finish(self) -> GlobalModel:
        """Run the rounds that are left.

        Raises:
            RunFailedError: too few sites, no usable reply in a round, or rounds that do not change the weights.
            InputError: there is no checkpoint to start from.
        """
        try:
            model = self._resume()
            while model.server_round < self.config.rounds:
                self._round(model)
                self._giving_up.after_round(model)
        except CheckError as error:
            raise RunFailedError(str(error), is_final=error.is_final) from error
        finally:
            self.exchange.close()
        if model.optimizer.steps == 0:
            wanted = f"federation.min_replies ({self.config.min_replies}) usable replies"
            raise RunFailedError(f"no round had {wanted}: the weights never changed", is_final=True)
        return model

    def _resume(self) -> GlobalModel:
        folder = latest_checkpoint(self.checkpoints)
        if folder is None:
            raise InputError(f"run {self.run}: no complete checkpoint in {self.checkpoints}; start the run again")
        model = load_global(folder, self.experiment)
        self.exchange.expect(self._secure.reply_bytes(model.weights.nbytes))
        self._attendance = Attendance(model.record.get("attendance", {}))
        events = read_metrics(self.metrics.path)
        if model.record and model.server_round not in {each["round"] for each in events if each["kind"] == "round"}:
            self.metrics.write_durably("round", **model.record)
        self._acceptance.begin(model, self.observer.attend)
        # Killed before it could stop, unless its end is told after its last round: then an operator has resumed it.
        if [each["kind"] for each in events if each["kind"] in ("round", "end")][-1:] != ["end"]:
            self._giving_up.after_roll_back(model)
        self.metrics.write("start", round=model.server_round, rounds=self.config.rounds, run=self.run)
        log.info("run %s: from round %d of %d (%s)", self.run, model.server_round, self.config.rounds, folder.name)
        return model

    def _round(self, model: GlobalModel) -> None:
        self._stages = Stages()
        tally, bytes_sent = self._ask(model, self._choose(model))
        self._agreement.withdraw(tally.in_state("refused"), model.server_round + 1)
        changes = self._change(model, tally)
        record: dict[str, Any] = {"round": model.server_round, **tally.as_json(), **self._forgeries.take(), **changes}
        record |= {"bytes_sent": bytes_sent, "bytes_received": tally.bytes_received}
        if self._is_vain(tally):
            self._fail(record, tally)
        self._attendance.note(record)
        if self._attendance.state:
            record["attendance"] = self._attendance.state
        self._progress(model.server_round, "checkpoint", tally)
        self._keep(model, record)
        self._close(model.server_round)

    def _change(self, model: GlobalModel, tally: Tally) -> dict[str, Any]:
        """Take the step, and take it back where it does damage; what the record says of that."""
        with self._stages.stage("aggregate"):
            changes = self._step.apply(model, tally.sum, tally.inputs_digest())
        model.server_round += 1
        with self._stages.stage("check"):
            self._progress(model.server_round, "checking", tally)
            changes |= self._acceptance.judge(model, changes, self.observer.attend)
        if tally.problem:
            changes["unmasking"] = tally.problem
            changes |= {} if changes["weights_changed"] else {"reason": tally.problem}
        return changes

    def _is_vain(self, tally: Tally) -> bool:
        """Whether nobody has answered, so that the run ends: not where late ones were told that the round is closed."""
        if tally.in_state("answered") or self.config.central_noise_multiplier:
            return False
        return not any(each.code == "closed" for each in tally.in_state("late"))

    def _close(self, server_round: int) -> None:
        self._secure.clear()
        self.observer.round_done(server_round)
        self.observer.attend()
        self._prune(server_round)

    def _fail(self, record: dict[str, Any], tally: Tally) -> NoReturn:
        self.metrics.write_durably("round_failed", **record, seconds=self._stages.seconds)
        is_final = not any(tally.in_state(state) for state in TRANSIENT_STATES)
        raise RunFailedError(f"round {record['round']}: no usable reply: {tally.explain()}", is_final=is_final)

    def _keep(self, model: GlobalModel, record: dict[str, Any]) -> None:
        """Checkpoint first, then the log: a crash between both loses nothing."""
        model.record = record | {"seconds": dict(self._stages.seconds)}
        with self._stages.stage("checkpoint"):
            save_global(round_folder(self.checkpoints, model.server_round), model, self.experiment)
        self.metrics.write_durably("round", **record, seconds={**self._stages.seconds, "total": self._stages.total()})

    def _prune(self, server_round: int) -> None:
        """Delete old checkpoints, but none that an observer still has to read."""
        needed = self.observer.oldest_needed()
        keep_last = max(self.experiment.train.keep_last, 0 if needed is None else server_round - needed + 1)
        prune_checkpoints(self.checkpoints, keep_last, self.experiment.train.keep_every)

    def _choose(self, model: GlobalModel) -> list[SiteRecord]:
        server_round = model.server_round + 1
        with self._stages.stage("wait_available"):
            try:
                here = self._presence.wait(server_round, lambda missing: self._tell_missing(server_round, missing))
                self.observer.progress(server_round, "offering the plan", dict.fromkeys(here, "asked"))
                with self._stages.stage("offers"):
                    here = self._presence.agreeing(
                        header_of(model, self.experiment, self.run), here, self.observer.attend
                    )
                    here = self._secure.members(here, self.observer.attend)
                    self.exchange.expect(self._secure.reply_bytes(model.weights.nbytes))
            except (TooFewSitesError, RosterError) as error:
                raise RunFailedError(str(error), is_final=error.is_final) from error
        if not self.config.central_noise_multiplier:
            here = self._attendance.willing(here, server_round, max(self.config.min_available, self._secure.num_needed))
        registered = [site.alias for site in self.registry.active()]
        return [here[site] for site in choose(self.experiment, server_round, registered, here)]

    def _tell_missing(self, server_round: int, missing: set[str]) -> None:
        self.observer.progress(server_round, "waiting for sites", dict.fromkeys(sorted(missing), "offline"))
        self.observer.attend()

    def _ask(self, model: GlobalModel, sites: list[SiteRecord]) -> tuple[Tally, int]:
        """Send the round's request and wait for the outcomes; they, and how many bytes were sent."""
        with self._stages.stage("prepare"):
            deadline = time.monotonic() + self.config.round_deadline_seconds
            question = Question(self.exchange, model, self.experiment, self.run, deadline, self._secure.roster)
            known = self._closings.known(question.digest)
            sites = sites if known is None else [record for record in sites if record.site in known]
            tally = Tally(question.header, question.digest, sites, self._acceptance.replies, self._acceptance.crowd)
        if not self._secure.take_up(tally):
            self.tally = tally
            self._progress(question.header.server_round, "sending", tally)
            with self._stages.stage("push"):
                question.push(sites)
            with self._stages.stage("train"):
                question.wait(
                    tally, lambda: self._attend(question.header.server_round, tally), is_repeated=known is not None
                )
            if self.config.quorum:
                self._closings.keep(question.digest, [record.site for record in tally.in_state("answered")])
            self.tally = None
        if self._secure.is_on:
            self._progress(question.header.server_round, "unmasking", tally)
            with self._stages.stage("unmask"):
                self._secure.unmask(tally, self.observer.attend)
        return tally, question.bytes_sent

    def _attend(self, server_round: int, tally: Tally) -> None:
        self._progress(server_round, "training", tally)
        self.observer.attend()

    def _arrived(self, arrival: Arrival) -> None:
        """Called by pullers: into the tally, or dropped with a record when it is forged or its round is over."""
        if arrival.is_forged:
            self._forgeries.add(arrival.site, arrival.problem)
            return
        tally = self.tally
        if (tally is None or not tally.arrive(arrival)) and arrival.message is not None:
            log.info("round %d: late reply of %s dropped", arrival.server_round, arrival.site)
            self.metrics.write(
                "late_reply", round=arrival.server_round, site=arrival.site, seconds=round(arrival.seconds, 3)
            )

    def _progress(self, server_round: int, stage: str, tally: Tally) -> None:
        self.observer.progress(server_round, stage, tally.states(), tally.answers())
