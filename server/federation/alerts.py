"""What a coordinator's runs give reason to tell: sites that refuse, are lost or doubted, caps, runs given up."""

import datetime as dt
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.storage.round_records import dp_epsilon
from shared.storage.runlog import RunLogReader

CHUNK_BYTES = 4 << 20
CAP_SHARE = 0.8
LOST = {"lost": "was lost", "late": "came too late", "failed": "failed", "rejected": "sent what was rejected"}
"""Outcomes of a site in a round, as told."""
Told = tuple[str, str, str]
"""Kind, key and text of an alert."""


class RunAlerts:
    """Follows the logs of all runs of a coordinator's home; only what is new is read."""

    def __init__(self, home: Path) -> None:
        self._runs = home / "runs"
        self._readers: dict[Path, RunLogReader] = {}
        self._found: dict[str, Told] = {}
        """What was found, by key: a message that could not be sent is handed out again."""

    def __call__(self, since: float) -> list[Told]:
        """Everything to tell that happened since a Unix time."""
        for path in sorted(self._runs.glob("*/metrics.jsonl")):
            if path.stat().st_mtime >= since:
                self._catch_up(path, since)
        return list(self._found.values())

    def _catch_up(self, path: Path, since: float) -> None:
        reader = self._readers.setdefault(path, RunLogReader(path))
        while events := reader.read_new(CHUNK_BYTES):
            for event in events:
                if _unix(event["time"]) >= since:
                    self._found.update({told[1]: told for told in _told(path.parent.name, event)})


def _told(run: str, event: dict[str, Any]) -> Iterator[Told]:
    if event["kind"] == "end" and event.get("is_final") and event.get("status") == "failed":
        yield "given_up", f"given_up {run} {event['time']}", f"run {run} was given up: `status {run}` says why"
    if event["kind"] != "round":
        return
    # Once for each site of a run: reasons are texts of the site's, and not repeated.
    for site in _names(event["refused"]):
        yield "refused", f"refused {run} {site}", f"site {site} refuses run {run}: `status {run}` says why"
    for state, text in LOST.items():
        for site in _names(event[state]):
            yield "lost", f"{state} {run} {site}", f"site {site} {text} in run {run}"
    for site in map(str, event.get("named", [])):
        yield "named", f"named {run} {site}", f"run {run} doubts site {site}, which counts less: `report` says why"
    for entry in event["answered"]:
        cap, spent = entry.get("epsilon_cap"), dp_epsilon(entry)
        if isinstance(cap, int | float) and spent is not None and spent >= CAP_SHARE * cap > 0:
            site = str(entry["site"])
            text = f"site {site} has spent {CAP_SHARE:.0%} of its cap or more: few rounds are left"
            yield "cap", f"cap {site} {cap}", text


def _names(entries: list[dict[str, Any]]) -> list[str]:
    return [str(entry["site"]) for entry in entries]


def _unix(time: str) -> float:
    try:
        return dt.datetime.fromisoformat(time).timestamp()
    except ValueError:
        return 0.0
