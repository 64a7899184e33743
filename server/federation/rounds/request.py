"""What a round asks: the request, built once, sent to all sites, and sent again to a site that was lost."""

import logging
import time
from collections.abc import Sequence

from flwr.app import RecordDict

from server.federation.messaging.exchange import Exchange
from server.federation.rounds.global_model import GlobalModel
from server.federation.rounds.tally import MAX_QUESTIONS, SiteRecord, Tally
from shared.experiment.config import Experiment
from shared.messages.packing import Manifest, array_digest, decode, encode
from shared.messages.training import RequestHeader, TrainRequest

log = logging.getLogger("maskfed.server")


class Question:
    """One round's request; its digest is the same however often it is asked, so a site can re-send its reply."""

    def __init__(
        self, exchange: Exchange, model: GlobalModel, experiment: Experiment, run: str, deadline: float
    ) -> None:
        self.exchange, self.deadline = exchange, deadline
        self._model, self._dtype = model, experiment.federation.wire_dtype
        has_base = bool(model.base_manifest.tensors)
        self.header = RequestHeader(
            run=run,
            server_round=model.server_round + 1,
            experiment=experiment,
            precision="bfloat16" if experiment.train.precision == "bfloat16" else "float32",
            manifest=model.manifest,
            base_manifest=model.base_manifest if has_base else Manifest(tensors=()),
            base_digest=array_digest(model.base) if has_base else "",
        )
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


def _payload_bytes(record: RecordDict) -> int:
    return sum(len(array.data) for array in record.array_records["arrays"].values())
