"""One round of a run as `status` tells it: as JSON types, and in words."""

from typing import Any

from shared.storage.round_records import dp_epsilon
from shared.storage.runlog import OUTCOMES


def round_facts(event: dict[str, Any], evaluation: dict[str, Any] | None) -> dict[str, Any]:
    """One round as JSON types: numbers are numbers, and None where there is none."""
    answered = event["answered"]
    losses = [entry["scalars"]["loss"] for entry in answered if "loss" in entry.get("scalars", {})]
    return {
        "round": event["round"],
        "forged": event["forged"]["count"] if "forged" in event else 0,
        **{state: [entry["site"] for entry in event[state]] for state in OUTCOMES},
        "loss": sum(losses) / len(losses) if losses else None,
        **{key: event[key] for key in ("update_norm", "weights_changed", "bytes_sent", "bytes_received")},
        "doubted": sorted(event.get("doubted", {})),
        **{"undone": event.get("rolled_back"), "reason": event.get("reason", "")},
        "seconds": event["seconds"]["total"] if "total" in event["seconds"] else sum(event["seconds"].values()),
        **_epsilon(event),
        "metrics": (evaluation or {}).get("metrics") or {},
    }


def sites_text(line: dict[str, Any]) -> str:
    """How many sites by outcome."""
    parts = [f"{len(line[state])} {state}" for state in OUTCOMES if line[state]]
    more = (("forged", line["forged"]), ("doubted", len(line["doubted"])))
    return ", ".join([*parts, *(f"{count} {what}" for what, count in more if count)])


def _epsilon(event: dict[str, Any]) -> dict[str, Any]:
    """The largest epsilon with DP that a site released, and that of client-level DP, each with what it protects."""
    released = [entry for entry in event["answered"] if "epsilon" in entry]
    # Where something is unbounded, the part with DP is that of the sites it is unbounded at.
    unbounded = [entry for entry in released if entry["epsilon"] == "unbounded"]
    told = unbounded or released
    private = [(value, entry.get("unit")) for entry in told if (value := dp_epsilon(entry)) is not None]
    epsilon, unit = max(private, key=lambda each: each[0], default=(None, None))
    return {
        "epsilon": epsilon,
        "epsilon_unit": unit,
        "is_unbounded": bool(unbounded),
        "central_epsilon": event.get("central_epsilon"),
        "central_unit": event.get("central_unit"),
    }


def epsilon_text(line: dict[str, Any]) -> str:
    """Each epsilon with what it protects."""
    part = "" if line["epsilon"] is None else f"{line['epsilon']:.3g} per {line['epsilon_unit']}"
    if line["is_unbounded"]:
        part = f"unbounded (DP part {part})" if part else "unbounded"
    central = line["central_epsilon"]
    return ", ".join(filter(None, [part, "" if central is None else f"{central:.3g} per {line['central_unit']}"]))


def distance_text(metrics: dict[str, Any]) -> str:
    """The distances of an evaluation."""
    found = {name: value for name, value in metrics.items() if name == "fid" or name.startswith("fd_")}
    return " ".join(f"{name} {value:.4g}" for name, value in found.items() if isinstance(value, float))


def number_text(value: float | None) -> str:
    """Four significant digits; empty where there is no number."""
    return "" if value is None else f"{value:.4g}"
