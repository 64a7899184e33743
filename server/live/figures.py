"""A run's log added up as it grows: what a page shows of it, in memory that follows rounds and sites, not the log."""

from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from shared.storage.round_records import dp_epsilon, named_text
from shared.storage.runlog import OUTCOMES, RunLogReader, damage_text

CHUNK_BYTES = 4 * 2**20
"""Of a log, read at one look; a long one is caught up with over several."""
MATRIX_ROUNDS = 20
NEWEST_PROBLEMS = 50
OFFER = ("status", "unit", "epsilon_round", "epsilon_run", "epsilon_cap", "reason")
"""Fields of an answer to an offer that are shown."""


class RoundFigures(NamedTuple):
    """One round, as curves and tables show it."""

    number: int
    outcomes: tuple[int, ...]
    """How many sites, in the order of `OUTCOMES`."""
    loss: float | None
    """Mean of what sites have released."""
    update_norm: float
    bytes: int
    seconds: float
    epsilon: float | None
    """Largest of the sites', of releases with DP."""
    is_changed: bool
    reason: str


@dataclass
class SiteInRun:
    """One site in one run."""

    asked: int = 0
    answered: int = 0
    refused: int = 0
    state: str = ""
    """Outcome of the newest round it was asked in."""
    round: int = 0
    reason: str = ""
    last_answer: str = ""
    """ISO 8601, UTC."""
    seconds: float | None = None
    bytes: int | None = None
    spent: dict[str, Any] = field(default_factory=dict)
    """Epsilon, delta, cap and unit of its newest answer."""
    curve: dict[int, float] = field(default_factory=dict)
    """Epsilon with DP by round."""


class RunFigures:
    """What the log of one run comes to; call `catch_up` again and again."""

    def __init__(self, path: Path) -> None:
        self._log = RunLogReader(path)
        self._clear()

    def _clear(self) -> None:
        self._file = self._log.num_files
        self.rounds: dict[int, RoundFigures] = {}
        self.matrix: dict[int, dict[str, tuple[str, str]]] = {}
        """Of the newest rounds: each site's outcome and why."""
        self.sites: dict[str, SiteInRun] = {}
        self.offers: dict[str, dict[str, Any]] = {}
        self.distances: dict[str, dict[int, float]] = {}
        """By metric, by round."""
        self.problems: deque[str] = deque(maxlen=NEWEST_PROBLEMS)
        self.resubmissions = 0
        self.status = ""

    @property
    def read_bytes(self) -> int:
        """How much of the log is in the figures."""
        return self._log.read_bytes

    @property
    def progress_text(self) -> str:
        """How much of the log is still to be read, or which lines are damaged; empty when all is well."""
        if (left := self._log.unread_bytes) >= CHUNK_BYTES:
            return f"{left / 1e6:.0f} MB of the log are still to be read"
        return f"metrics.jsonl: {damage_text(self._log.damaged)}" if self._log.damaged else ""

    def catch_up(self, most_bytes: int = CHUNK_BYTES) -> int:
        """Read what is new, about `most_bytes` at most; how many bytes that were."""
        before = self._log.read_bytes
        events = self._log.read_new(most_bytes)
        if self._log.num_files != self._file:
            self._clear()
        for event in events:
            self._take(event)
        return max(0, self._log.read_bytes - before)

    def _take(self, event: dict[str, Any]) -> None:
        match event["kind"]:
            case "round":
                self._take_round(event)
            case "evaluation" if isinstance(event["round"], int):
                for name, value in event["metrics"].items():
                    if isinstance(value, int | float) and (name == "fid" or name.startswith("fd_")):
                        self.distances.setdefault(name, {})[event["round"]] = float(value)
            case "offer":
                self.offers[event["site"]] = {name: event.get(name) for name in OFFER}
            case "round_failed":
                self.problems.append(f"round {event['round']} gave no usable reply and was started again")
            case "evaluation_failed":
                self.problems.append(f"evaluation of round {event.get('round')} failed: {event.get('reason', '')}")
            case "resubmitted":
                self.resubmissions += 1
                self.problems.append(f"submitted again: {event.get('reason', '')}")
            case "start" | "end":
                self.status = str(event.get("status", "running")) if event["kind"] == "end" else "running"

    def _take_round(self, event: dict[str, Any]) -> None:
        number, answered = event["round"], event["answered"]
        losses = [each["scalars"]["loss"] for each in answered if "loss" in each.get("scalars", {})]
        spent = [value for each in answered if (value := dp_epsilon(each)) is not None]
        seconds = event["seconds"]
        self.rounds[number] = RoundFigures(
            number,
            tuple(len(event[state]) for state in OUTCOMES),
            sum(losses) / len(losses) if losses else None,
            event["update_norm"],
            event["bytes_sent"] + event["bytes_received"],
            seconds.get("total", sum(seconds.values())),
            max(spent, default=None),
            event["weights_changed"],
            str(event.get("reason", "")),
        )
        self.matrix[number] = {}
        for entry in event["asked"]:
            self.sites.setdefault(str(entry["site"]), SiteInRun()).asked += 1
        for state in OUTCOMES:
            for entry in event[state]:
                self._take_outcome(number, state, entry, event["time"])
        for old in sorted(self.matrix)[:-MATRIX_ROUNDS]:
            del self.matrix[old]
        if "forged" in event:
            self.problems.append(f"round {number}: forged messages were dropped")
        for named in event.get("named", []):
            self.problems.append(f"round {number}: {named_text(named, event)}")
        if not event["weights_changed"]:
            self.problems.append(f"round {number}: weights unchanged, {event.get('reason', '')}")

    def _take_outcome(self, number: int, state: str, entry: dict[str, Any], time: str) -> None:
        name = str(entry["site"])
        site = self.sites.setdefault(name, SiteInRun())
        reason = str(entry.get("reason") or entry.get("code") or "")
        site.state, site.round, site.reason = state, number, reason
        self.matrix[number][name] = (state, reason)
        if state == "refused":
            site.refused += 1
        if state != "answered":
            self.problems.append(f"round {number}: {name} {state}{f': {reason}' if reason else ''}")
            return
        site.answered += 1
        site.last_answer, site.seconds, site.bytes = time, entry.get("seconds"), entry.get("bytes")
        if "epsilon" in entry:
            kept = ("epsilon", "dp_epsilon", "delta", "epsilon_cap", "unit")
            site.spent = {key: entry[key] for key in kept if key in entry}
        if (epsilon := dp_epsilon(entry)) is not None:
            site.curve[number] = epsilon
