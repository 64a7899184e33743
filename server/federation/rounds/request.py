"""What a round asks: the request, built once, sent to all sites, sent again to a site that was lost; and its end."""

import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from flwr.app import RecordDict

from server.federation.messaging.exchange import Exchange
from server.federation.rounds.site_record import MAX_QUESTIONS, SiteRecord
from server.federation.rounds.tally import Tally
from server.federation.updates.global_model import GlobalModel
from shared.experiment.config import Experiment
from shared.experiment.federation import FederationConfig
from shared.messages.packing import Manifest, array_digest, decode, encode
from shared.messages.training import RequestHeader, TrainRequest
from shared.secure_aggregation.roster import Roster
from shared.storage.files import write_atomically

CLOSING_FILE = "closing.json"
log = logging.getLogger("maskfed.server")


class Question:
    """One round's request; its digest is the same however often it is asked, so a site can re-send its reply."""

    def __init__(
        self,
        exchange: Exchange,
        model: GlobalModel,
        experiment: Experiment,
        run: str,
        deadline: float,
        roster: Roster | None = None,
    ) -> None:
        self.exchange, self.deadline = exchange, deadline
        self._model, self._dtype = model, experiment.federation.weights_dtype
        self.header = header_of(model, experiment, run, roster)
        self.digest = self._request(with_base=False).digest
        self.bytes_sent = 0
        self._next_look = 0.0

    def push(self, sites: Sequence[SiteRecord]) -> None:
        """Ask `sites`; the record is freed when it has been uploaded."""
        for with_base in (False, True):
            nodes = {record.site: record.node_id for record in sites if record.needs_base is with_base}
            if nodes:
                record = self._request(with_base).to_record()
                self.bytes_sent += len(nodes) * _payload_bytes(record)
                self.exchange.push(record, nodes, self.header.server_round, self.deadline)

    def wait(self, tally: Tally, attend: Callable[[], None], *, is_repeated: bool) -> None:
        """Until every site's outcome is known, the deadline has come, or the round may end before it.

        Args:
            tally: of this question.
            attend: called again and again; must not block.
            is_repeated: this very round was closed before with these sites; so it waits for all of them.
        """
        timing, end = self.exchange.timing, _End(self.header.experiment.federation, self.deadline, is_repeated)
        next_report = time.monotonic() + timing.report_seconds
        while waiting := tally.waiting():
            self.exchange.raise_fatal()
            now = time.monotonic()
            if (reason := end.reason(tally, now)) is not None:
                log.info("round %d: %s", self.header.server_round, reason)
                tally.close("closed", reason) if reason else tally.close()
                return
            self.revive(tally)
            if now >= next_report:
                names = ", ".join(sorted(record.site for record in waiting))
                left = self.deadline - now
                log.info("round %d: waiting for %s, %.0f s left", self.header.server_round, names, left)
                next_report = now + timing.report_seconds
            attend()
            tally.changed.wait(min(timing.poll_seconds, max(0.01, self.deadline - now)))
            tally.changed.clear()
        tally.close()

    def revive(self, tally: Tally) -> None:
        """Find sites whose answer will not come, ask those again that are back, give up those that stay away."""
        timing, now = self.exchange.timing, time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + 2 * timing.poll_seconds
        online = self.exchange.online()
        for record in tally.waiting():
            activated_at = online.get(record.node_id)
            if record.state == "asked" and activated_at not in (None, record.activated_at):
                tally.requeue(record, "the site's node was restarted")
            if record.state != "requeued":
                continue
            if activated_at is not None and record.questions < MAX_QUESTIONS:
                log.info("round %d: asking %s again (%s)", self.header.server_round, record.site, record.reason)
                self.exchange.forget(record.site)
                self.push([record])
                tally.ask_again(record, record.node_id, activated_at)
            elif now - record.lost_at > timing.lost_seconds or record.questions >= MAX_QUESTIONS:
                log.warning("round %d: %s is lost (%s)", self.header.server_round, record.site, record.reason)
                tally.give_up(record)

    def _request(self, with_base: bool) -> TrainRequest:
        weights = self._model.weights
        if self._dtype == "bfloat16":
            # The digest is of what the site will read, and the update is relative to it.
            weights = decode(encode(weights, "bfloat16"), "bfloat16")
        return TrainRequest(self.header, weights, self._model.base if with_base else None)


def header_of(model: GlobalModel, experiment: Experiment, run: str, roster: Roster | None = None) -> RequestHeader:
    """What the next round asks, besides the tensors; the offer of it is this very header, without a roster."""
    has_base = bool(model.base_manifest.tensors)
    return RequestHeader(
        run=run,
        server_round=model.server_round + 1,
        experiment=experiment,
        precision="bfloat16" if experiment.train.precision == "bfloat16" else "float32",
        manifest=model.manifest,
        base_manifest=model.base_manifest if has_base else Manifest(tensors=()),
        base_digest=array_digest(model.base) if has_base else "",
        roster=roster,
    )


class _End:
    """When a round ends before all have answered.

    Under client-level DP by its deadline only: nothing may depend on who answers.
    """

    def __init__(self, config: FederationConfig, deadline: float, is_repeated: bool) -> None:
        self.config, self.deadline, self.is_repeated = config, deadline, is_repeated
        self.quorum_at: float | None = None

    def reason(self, tally: Tally, now: float) -> str | None:
        """Why the round ends now; empty: its deadline; None: it does not."""
        config = self.config
        if now >= self.deadline:
            return ""
        if config.central_noise_multiplier:
            return None
        if not tally.can_reach(tally.num_needed):
            what = "the roster's threshold" if tally.num_needed > config.min_replies else "federation.min_replies"
            return f"the round ended: {what} {tally.num_needed} cannot be reached any more"
        if not config.quorum or self.is_repeated or len(tally.in_state("answered")) < config.quorum:
            return None
        self.quorum_at = now if self.quorum_at is None else self.quorum_at
        if now - self.quorum_at < config.quorum_grace_seconds:
            return None
        return f"the round ended {config.quorum_grace_seconds:g} s after federation.quorum {config.quorum} was reached"


class Closings:
    """Who closed the newest round of a run by quorum: kept so that the same round, repeated, has the same bits."""

    def __init__(self, run_folder: Path) -> None:
        self.path = run_folder / CLOSING_FILE

    def known(self, request_digest: str) -> list[str] | None:
        """Sites whose replies the round of this request had; None where it was not closed by quorum."""
        try:
            closing = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            log.warning("%s is damaged and not used", self.path)
            return None
        return list(closing["sites"]) if closing.get("request_digest") == request_digest else None

    def keep(self, request_digest: str, sites: Sequence[str]) -> None:
        """Write down who is in the sum, before it is used."""
        text = json.dumps({"request_digest": request_digest, "sites": sorted(sites)})
        write_atomically(self.path, text + "\n")


def _payload_bytes(record: RecordDict) -> int:
    return sum(len(array.data) for array in record.array_records["arrays"].values())
