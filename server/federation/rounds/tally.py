"""One round's replies: each is checked, counted and, when good, folded into the sum, as it arrives."""

import hashlib
import threading
from typing import Any

from flwr.app import Message
from numpy.typing import NDArray

from server.federation.acceptance.crowd import Crowd
from server.federation.acceptance.kept_replies import KeptReplies, Reply
from server.federation.messaging.exchange import Arrival
from server.federation.rounds.site_record import MAX_QUESTIONS, Answers, SiteRecord, State
from server.federation.secure.masked_sum import MaskedSum
from server.federation.updates.aggregation import FixedPointSum, UpdateError, check_update, clip_factor, site_weight
from shared.messages.packing import MessageError
from shared.messages.training import ReplyHeader, RequestHeader, TrainReply
from shared.storage.runlog import OUTCOMES
from shared.updates.norm_bound import norm_bound


class Tally:
    """Outcomes of one round. `arrive` is called by pullers, one at a time; the rest by the round loop."""

    def __init__(
        self,
        header: RequestHeader,
        request_digest: str,
        sites: list[SiteRecord],
        kept: KeptReplies | None = None,
        crowd: Crowd | None = None,
    ) -> None:
        self.header, self.request_digest, self._kept, self._crowd = header, request_digest, kept, crowd
        self.sites = {record.site: record for record in sites}
        self.sum = FixedPointSum(header.manifest.num_elements)
        self.masked = None if header.roster is None else MaskedSum.of(header, header.roster)
        """Takes the updates where they are masked, until their sum is open; `problem`: why that could not be."""
        self.problem = ""
        self._bound = norm_bound(header.experiment, header.manifest.num_elements)
        self.bytes_received = 0
        self.is_closed = False
        self._lock = threading.Lock()
        self.changed = threading.Event()

    def arrive(self, arrival: Arrival) -> bool:
        """Take an arrival; false when it comes too late or a second time, and was dropped."""
        with self._lock:
            record = self.sites.get(arrival.site)
            is_current = arrival.server_round == self.header.server_round
            if self.is_closed or not is_current or record is None or not record.is_open:
                return False
            if arrival.message is None:
                self._fail(record, arrival)
            else:
                record.move(*self._outcome(record, arrival.message, arrival.seconds))
            self.changed.set()
            return True

    def waiting(self) -> list[SiteRecord]:
        """Sites whose outcome is open."""
        return [record for record in self.sites.values() if record.is_open]

    def requeue(self, record: SiteRecord, reason: str) -> None:
        """A site's answer will not come; it may be asked again."""
        with self._lock:
            if record.state == "asked":
                record.move("requeued", "", reason)

    def ask_again(self, record: SiteRecord, node_id: int, activated_at: str) -> None:
        """A site has been asked once more."""
        with self._lock:
            if record.move("asked", "", record.reason):
                record.node_id, record.activated_at = node_id, activated_at
                record.questions += 1

    def give_up(self, record: SiteRecord) -> None:
        """A requeued site did not come back."""
        with self._lock:
            if record.state == "requeued":
                record.move("lost", "lost", record.reason)

    def close(self, code: str = "late", reason: str = "no complete reply before the round's deadline") -> None:
        """End the round: nothing more is folded, and whose outcome is open gets `code` and `reason`."""
        with self._lock:
            self.is_closed = True
            for record in self.waiting():
                state: State = "lost" if record.state == "requeued" and code == "late" else "late"
                record.move(state, state if code == "late" else code, record.reason or reason)

    def inputs_digest(self) -> str:
        """SHA-256 of the request and of who is in the sum with which update; the same for the same sum only."""
        lines = [self.request_digest, *(f"{each.site} {each.update_digest}" for each in self.in_state("answered"))]
        lines += ["not unmasked"] if self.problem else []
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def num_needed(self) -> int:
        """Good replies without which the round changes nothing."""
        roster, config = self.header.roster, self.header.experiment.federation
        return config.min_replies if roster is None else max(config.min_replies, roster.threshold)

    def can_reach(self, replies: int) -> bool:
        """Whether there may still be so many good replies."""
        return len(self.in_state("answered")) + len(self.waiting()) >= replies

    def in_state(self, state: State) -> list[SiteRecord]:
        """Sites in one state, by alias."""
        return sorted((record for record in self.sites.values() if record.state == state), key=lambda each: each.site)

    def states(self) -> dict[str, str]:
        """State of each site, by alias."""
        return {site: record.state for site, record in self.sites.items()}

    def answers(self) -> Answers:
        """Seconds and bytes of the answers that came, by alias."""
        came = {site: record.answer for site, record in self.sites.items() if record.answer}
        return {site: {name: answer[name] for name in ("seconds", "bytes")} for site, answer in came.items()}

    def as_json(self) -> dict[str, list[dict[str, Any]]]:
        """Who was asked, and what became of it."""
        lists = {str(state): [record.as_json() for record in self.in_state(state)] for state in OUTCOMES}
        return {"asked": [{"site": site} for site in sorted(self.sites)], **lists}

    def explain(self) -> str:
        """One line: what became of each site that gave nothing."""
        parts = [
            f"{record.site} {record.state} ({record.reason or record.code})"
            for record in sorted(self.sites.values(), key=lambda each: each.site)
            if record.state != "answered"
        ]
        return "; ".join(parts)

    def _fail(self, record: SiteRecord, arrival: Arrival) -> None:
        if not arrival.is_lost:
            record.move("failed", "failed", arrival.problem)
        elif record.questions < MAX_QUESTIONS:
            record.move("requeued", "", arrival.problem)
        else:
            record.move("lost", "lost", arrival.problem)

    def _outcome(self, record: SiteRecord, message: Message, seconds: float) -> tuple[State, str, str]:
        """State, code and reason that a message leads to; a good update has been folded."""
        try:
            reply = self._parse(message)
            if reply.header.refusal is not None:
                # Signed for this very question; a site that could not read the request does not know its digest.
                return self._refusal(record, reply.header)
            if reply.header.request_digest != self.request_digest:
                raise UpdateError("stale", "the reply answers another request")
            record.answer = {**self._fold(record.site, reply), "seconds": round(seconds, 3)}
            if reply.update is not None:
                record.update_digest = hashlib.sha256(reply.update.data).hexdigest()
        except UpdateError as error:
            return "rejected", error.code, str(error)
        except MessageError as error:
            return "rejected", "malformed", str(error)
        return "answered", "", ""

    def _parse(self, message: Message) -> TrainReply:
        try:
            item_bytes = 4 if self.masked is None else self.masked.ring.bits // 8
            return TrainReply.from_record(message.content, self.header.manifest.num_elements, item_bytes)
        except MessageError:
            raise
        except Exception as error:
            # What a hostile reply makes a parser raise (MemoryError at an invented size) costs that reply, not the run.
            raise MessageError(f"the reply cannot be read ({type(error).__name__})") from error

    def _refusal(self, record: SiteRecord, header: ReplyHeader) -> tuple[State, str, str]:
        code, reason = str(header.refusal), header.reason
        if code == "base_missing" and self.header.base_digest and not record.needs_base:
            record.needs_base = True
            return "requeued", code, reason
        return "failed" if code == "failed" else "refused", code, reason

    def _fold(self, site: str, reply: TrainReply) -> dict[str, Any]:
        update, header = reply.update, reply.header
        assert update is not None
        answer: dict[str, Any] = {"weight": 1, "bytes": update.nbytes, "scalars": dict(header.scalars)}
        if self.masked is None:
            answer |= self._fold_open(site, update, header)
        else:
            self.masked.fold(site, update, header.dealing)
        self.bytes_received += update.nbytes
        if header.epsilon is not None or header.is_unbounded:
            answer["epsilon"] = "unbounded" if header.is_unbounded else header.epsilon
            if header.is_unbounded and header.epsilon:
                answer["dp_epsilon"] = header.epsilon
            answer |= {"delta": header.delta, "epsilon_cap": header.epsilon_cap, "unit": header.unit}
        if header.ledger_sequence is not None:
            answer |= {"ledger_sequence": header.ledger_sequence, "ledger_hash": header.ledger_hash}
        return answer

    def _fold_open(self, site: str, update: NDArray[Any], header: ReplyHeader) -> dict[str, Any]:
        """Check an update that is not masked and add it; what the record says of it."""
        config = self.header.experiment.federation
        norm = check_update(update, config.wire_dtype, self.header.manifest)
        factor = clip_factor(norm, self._bound, config)
        weight, share = site_weight(header.num_examples, config), 1.0
        if self._crowd is not None:
            factor, share = min(factor, self._crowd.factor(norm, self.header.server_round)), self._crowd.share(site)
        self.sum.fold(update, config.wire_dtype, weight, factor * share)
        if self._crowd is not None:
            self._crowd.add(site, update, norm, factor)
        if self._kept is not None:
            self._kept.keep(Reply(site, weight, factor * share), update)
        answer: dict[str, Any] = {"weight": weight}
        if not config.central_noise_multiplier:
            # Under client-level DP the norm of one site's update would be a release without noise.
            answer |= {"norm": norm, "clipped_by": factor} if factor < 1 else {"norm": norm}
        return answer | ({"share": share} if share < 1 else {})
