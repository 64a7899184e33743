"""A question to sites outside of the rounds: push it, take the answers until a deadline, note one outcome per site.

`submit` runs in the operator's command and waits for the run; `collect` runs in the ServerApp of that run. No torch.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

from flwr.app import Message, RecordDict

from server.federation.fleet.registry import Registry
from server.federation.messaging.exchange import Arrival, Exchange
from server.federation.messaging.sender import Forgeries
from server.federation.messaging.transport import Grid, Timing
from shared.errors import InputError
from shared.experiment.config import Experiment
from shared.messages.text import one_line
from shared.storage.files import remove_folder
from shared.storage.room import SPARE_BYTES, patiently
from shared.storage.runlog import RunLog, read_metrics

OVERDUE_SECONDS = 600.0
"""What a question may last beyond the deadline of its answers: for the start of the ServerApp and the uploads."""

T = TypeVar("T")
log = logging.getLogger("maskfed.server")
Take = Callable[[Message, str], tuple[str, str]]
"""Checks and keeps the answer of a site, by alias; gives its outcome (`released`, `refused`, ...) and the reason.

What it raises is that answer's `rejected`; the question goes on. After a full disk it is called again with the same.
"""


def submit(
    home: Path,
    experiment: Experiment,
    run: str,
    kind: str,
    say: Callable[[str], None],
    *,
    poll_seconds: float,
    deadline_seconds: float,
) -> list[dict[str, Any]]:
    """Submit the run `run` of the coordinator's `home` and wait for its end.

    Args:
        home: the coordinator's folder, with a running SuperLink.
        experiment: as in the run's folder.
        run: name of the run.
        kind: of the events in the run's log that tell the outcomes.
        say: told each outcome.
        poll_seconds: between two looks at the run.
        deadline_seconds: of the answers; the run is stopped when it has not ended `OVERDUE_SECONDS` after it.

    Returns:
        The outcomes: `site`, `status`, `reason`.

    Raises:
        ControlError: the SuperLink cannot be reached, or the run did not end in time.
    """
    from server.federation.fleet.superlink import connect
    from server.federation.fleet.superlink_types import ControlError

    folder, is_asked = home / "runs" / run, False
    try:
        with connect(home) as control:
            run_id = control.submit(experiment, run)
            is_asked = True
            end = time.monotonic() + deadline_seconds + OVERDUE_SECONDS
            while not control.run_state(run_id).is_finished:
                if time.monotonic() > end:
                    control.stop(run_id)
                    raise ControlError(
                        f"run {run} had not ended {OVERDUE_SECONDS:g} s after its deadline of {deadline_seconds:g} s "
                        f"and was stopped: see why with `maskfed-server logs {run}`, then ask again"
                    )
                time.sleep(poll_seconds)
    finally:
        if not is_asked:
            remove_folder(folder)
    outcomes = [event for event in read_metrics(folder / "metrics.jsonl") if event["kind"] == kind]
    for event in outcomes:
        say(f"{event['site']}: {event['status']}{': ' + event['reason'] if event['reason'] else ''}")
    return outcomes


def reasons(outcomes: list[dict[str, Any]]) -> str:
    """Why nothing came, in one line."""
    return "; ".join(f"{event['site']} {event['reason']}" for event in outcomes) or "no site was online"


class _Outcomes:
    """One event per site: what arrived, or that nothing did."""

    def __init__(self, sites: Collection[str], take: Take, metrics: RunLog, kind: str, room_bytes: int) -> None:
        self.waiting = set(sites)
        self._room_bytes = room_bytes
        self.forgeries = Forgeries()
        self.changed = threading.Event()
        self._take, self._metrics, self._kind = take, metrics, kind
        self._lock = threading.Lock()

    def arrived(self, arrival: Arrival) -> None:
        """Note the outcome of a site, once; runs in a puller's thread."""
        if arrival.is_forged:
            self.forgeries.add(arrival.site, arrival.problem)
            return
        with self._lock:
            if arrival.site not in self.waiting:
                return
            status, reason = "failed", arrival.problem
            if arrival.message is not None:
                status, reason = self._checked(arrival.message, arrival.site)
            self.note(arrival.site, status, reason)
            self.waiting.discard(arrival.site)
            self.changed.set()

    def note(self, site: str, status: str, reason: str) -> None:
        """Write the outcome; its reason may be the site's own words."""
        self.keep(lambda: self._metrics.write(self._kind, site=site, status=status, reason=one_line(reason)))

    def keep(self, write: Callable[[], T]) -> T:
        """Write, when there is room: a site was charged for what it said, and nobody may have to ask it again."""
        return patiently(write, self._metrics.path.parent, self._room_bytes, log.warning)

    def _checked(self, message: Message, site: str) -> tuple[str, str]:
        try:
            return self.keep(lambda: self._take(message, site))
        except InputError as error:
            return "rejected", str(error)
        except Exception as error:  # whatever one answer makes a parser raise costs that answer, not the question
            return "rejected", f"the answer cannot be read ({type(error).__name__})"

    def close(self, reason: str) -> None:
        """Whoever has not answered is late; an answer that comes now is dropped."""
        with self._lock:
            for site in sorted(self.waiting):
                self.note(site, "late", reason)
            self.waiting.clear()


def collect(
    grid: Grid,
    home: Path,
    record: RecordDict,
    message_type: str,
    take: Take,
    metrics: RunLog,
    kind: str,
    *,
    only: Collection[str] = (),
    timing: Timing | None = None,
    deadline_seconds: float,
    reply_bytes: int = 0,
) -> None:
    """Ask every registered site that is online, and take what comes; one event of `kind` per site.

    Answers are fetched one by one, so that one is in memory at a time, and one that cannot be read costs itself only.

    Args:
        grid: Flower's.
        home: the coordinator's folder.
        record: the question, shared by all messages, so that it is uploaded once.
        message_type: decides which of a site's handlers answers.
        take: see `Take`.
        metrics: log of the run.
        kind: of the events.
        only: aliases to ask; empty: everybody. One of them that is not online is noted as `offline`.
        timing: seconds between pulls, deadlines of calls.
        deadline_seconds: for the answers.
        reply_bytes: the most that the arrays of an answer may have.

    Raises:
        ExchangeError: the SuperLink does not answer, or does not take the question.
    """
    timing = timing or Timing()
    active = {site.alias: site.node_id for site in Registry(home / "sites.json").active()}
    outcomes = _Outcomes((), take, metrics, kind, reply_bytes + SPARE_BYTES)
    exchange = Exchange(grid, outcomes.arrived, timing)
    grid.allow(reply_bytes)
    try:
        online = exchange.online()
        asked = {
            alias: node_id
            for alias, node_id in active.items()
            if node_id is not None and node_id in online and (not only or alias in only)
        }
        for absent in sorted(set(only) - set(asked)):
            outcomes.note(absent, "offline", "not online, or no longer registered")
        outcomes.waiting |= set(asked)
        deadline = time.monotonic() + deadline_seconds
        exchange.push(record, asked, 0, deadline, message_type)
        while outcomes.waiting and time.monotonic() < deadline:
            exchange.raise_fatal()
            outcomes.changed.wait(timing.poll_seconds)
            outcomes.changed.clear()
        outcomes.close(f"no answer within {deadline_seconds:g} s")
    finally:
        exchange.close()
    exchange.raise_fatal()
    forged = outcomes.forgeries.take()
    outcomes.keep(lambda: metrics.write_durably("end", status="completed", **forged))
