"""What the coordinator exposes to Prometheus, read from the runs' own logs: nothing that a site did not release."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from server.federation.fleet.registry import Registry
from shared.storage.round_records import rounds_of
from shared.storage.runlog import OUTCOMES, read_metrics

Gauge = tuple[str, str, str, dict[str, str], float]
"""Name, kind, help, labels, value."""


def coordinator_gauges(home: Path) -> Iterator[Gauge]:
    """Registered sites, and for each run rounds, participants by state, bytes, seconds by stage, distance, epsilon."""
    registered = len(Registry(home / "sites.json").active())
    yield "maskfed_sites", "gauge", "Registered sites.", {}, registered
    for folder in sorted((home / "runs").glob("*")):
        events = read_metrics(folder / "metrics.jsonl")
        yield from _of_run({"run": folder.name}, rounds_of(events, folder / "checkpoints"), events)


def _of_run(run: dict[str, str], rounds: list[dict[str, Any]], events: list[dict[str, Any]]) -> Iterator[Gauge]:
    yield "maskfed_rounds_total", "counter", "Rounds done.", run, len(rounds)
    kept = sum(not event["weights_changed"] for event in rounds)
    yield "maskfed_rounds_without_change_total", "counter", "Rounds that kept the old weights.", run, kept
    states = Counter({state: sum(len(event[state]) for event in rounds) for state in OUTCOMES})
    for state, number in states.items():
        yield "maskfed_participations_total", "counter", "Sites in rounds by outcome.", {**run, "state": state}, number
    for way in ("sent", "received"):
        number = sum(event[f"bytes_{way}"] for event in rounds)
        yield "maskfed_bytes_total", "counter", "Payload of the rounds.", {**run, "direction": way}, number
    stages: Counter[str] = Counter()
    for event in rounds:
        stages.update({name: seconds for name, seconds in event["seconds"].items() if name != "total"})
    for stage, seconds in stages.items():
        yield "maskfed_stage_seconds_total", "counter", "Wall time by stage.", {**run, "stage": stage}, seconds
    ends = [event for event in events if event["kind"] in ("start", "resubmitted", "end")]
    given_up = bool(ends) and ends[-1].get("status") == "failed" and bool(ends[-1].get("is_final"))
    yield "maskfed_run_given_up", "gauge", "1 where nobody tries the run again.", run, given_up
    yield from _released(run, rounds, events)


def _released(run: dict[str, str], rounds: list[dict[str, Any]], events: list[dict[str, Any]]) -> Iterator[Gauge]:
    measured = [event["metrics"] for event in events if event["kind"] == "evaluation" and event.get("metrics")]
    for name, value in (measured[-1] if measured else {}).items():
        if isinstance(value, float):
            yield "maskfed_distance", "gauge", "Newest evaluation.", {**run, "metric": name}, value
    epsilon = {reply["site"]: reply.get("epsilon") for event in rounds for reply in event["answered"]}
    for site, value in epsilon.items():
        # `unbounded` after a release without DP.
        spent = float(value) if isinstance(value, int | float) else float("inf")
        if value is not None:
            yield "maskfed_site_epsilon", "gauge", "Epsilon as the site reports it.", {**run, "site": site}, spent
    caps = {reply["site"]: reply["epsilon_cap"] for event in rounds for reply in event["answered"] if _has_cap(reply)}
    for site, value in caps.items():
        yield "maskfed_site_epsilon_cap", "gauge", "The site's cap, as it reports it.", {**run, "site": site}, value
    private = {
        reply["site"]: reply["dp_epsilon"] for event in rounds for reply in event["answered"] if "dp_epsilon" in reply
    }
    for site, value in private.items():
        text = "Epsilon of the part with DP, where the whole is infinite."
        yield "maskfed_site_dp_epsilon", "gauge", text, {**run, "site": site}, value


def _has_cap(reply: dict[str, Any]) -> bool:
    return isinstance(reply.get("epsilon_cap"), int | float)
