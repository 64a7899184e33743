"""A question to sites outside of the rounds: push it, take the answers until a deadline, note one outcome per site.

`submit` runs in the operator's command and waits for the run; `collect` runs in the ServerApp of that run. No torch.
"""

import logging
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Message, RecordDict

from server.registry import Registry
from server.transport import Grid, Timing, is_transient, persist
from shared.config import Experiment
from shared.files import remove_folder
from shared.runlog import RunLog, read_metrics

log = logging.getLogger("maskfed.server")

Take = Callable[[Message, str], tuple[str, str]]
"""Checks and keeps the answer of a site, by alias; gives its outcome (`released`, `refused`, ...) and the reason."""


def submit(
    home: Path, experiment: Experiment, run: str, kind: str, poll_seconds: float, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Submit the run `run` of the coordinator's `home` and wait for its end.

    Args:
        home: the coordinator's folder, with a running SuperLink.
        experiment: as in the run's folder.
        run: name of the run.
        kind: of the events in the run's log that tell the outcomes.
        poll_seconds: between two looks at the run.
        say: told each outcome.

    Returns:
        The outcomes: `site`, `status`, `reason`.

    Raises:
        ControlError: the SuperLink cannot be reached.
    """
    from server.control import connect

    folder, is_asked = home / "runs" / run, False
    try:
        with connect(home) as control:
            run_id = control.submit(experiment, run)
            is_asked = True
            while not control.run_state(run_id).is_finished:
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
) -> None:
    """Ask every registered site that is online, and take what comes; one event of `kind` per site.

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
    """
    timing = timing or Timing()
    nodes = persist(lambda: list(grid.get_nodes()), "looking for sites", timing)
    online = {node.node_id for node in nodes}
    active = [site for site in Registry(home / "sites.json").active() if not only or site.alias in only]
    sites = [site for site in active if site.node_id in online]
    for absent in sorted(set(only) - {site.alias for site in sites}):
        metrics.write(kind, site=absent, status="offline", reason="not online, or no longer registered")
    messages = [
        Message(record, site.node_id, message_type, ttl=deadline_seconds) for site in sites if site.node_id is not None
    ]
    pushed = persist(lambda: list(grid.push_messages(messages)), "asking the sites", timing, deadline_seconds)
    waiting = {message_id: site.alias for message_id, site in zip(pushed, sites, strict=True)}
    end = time.monotonic() + deadline_seconds
    while waiting and time.monotonic() < end:
        for message in _pull(grid, list(waiting)):
            alias = waiting.pop(str(message.metadata.reply_to_message_id), None)
            if alias is None:
                continue
            failure = str(message.error.reason)[:500] if message.has_error() else ""
            status, reason = ("failed", failure) if message.has_error() else take(message, alias)
            metrics.write(kind, site=alias, status=status, reason=reason)
        time.sleep(timing.poll_seconds if waiting else 0)
    for silent in waiting.values():
        metrics.write(kind, site=silent, status="late", reason=f"no answer within {deadline_seconds:g} s")
    metrics.write("end", status="completed")


def _pull(grid: Grid, ids: list[str]) -> list[Message]:
    """Replies that are there; a connection that was lost is tried again at the next turn."""
    try:
        return list(grid.pull_messages(ids))
    except httpx.HTTPError as error:
        if not is_transient(error):
            raise
        log.warning("pulling answers: %s", error)
        return []
