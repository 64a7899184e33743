"""The rounds of a run: from its log, and where that is damaged, from the checkpoints."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shared.errors import InputError
from shared.storage.checkpoint import checkpoint_number, list_checkpoints, load_meta


def rounds_of(events: Iterable[dict[str, Any]], checkpoints: Path) -> list[dict[str, Any]]:
    """The last record of each round, in order: a resumed run may have repeated one.

    Each checkpoint carries the record of its round, so a round that the log has lost is still told while its
    checkpoint is kept.

    Args:
        events: of the run's log.
        checkpoints: folder of its checkpoints.
    """
    found = {event["round"]: event for event in events if event["kind"] == "round"}
    for folder in list_checkpoints(checkpoints):
        number = checkpoint_number(folder)
        if folder.name.startswith("round-") and number and number not in found and (record := _record(folder)):
            found[number] = record
    return [found[number] for number in sorted(found)]


def dp_epsilon(entry: Mapping[str, Any]) -> float | None:
    """Epsilon of a site's releases with DP, from its record in a round; None where it released none."""
    value = entry.get("dp_epsilon", entry.get("epsilon"))
    return float(value) if isinstance(value, int | float) else None


def named_text(site: str, event: Mapping[str, Any]) -> str:
    """Why a round named a site, which counts less from then on."""
    doubt = event.get("doubted", {}).get(site, {})
    persistence, share = (doubt.get(name, math.nan) for name in ("persistence", "share"))
    middle = event.get("persistence", {}).get("median", math.nan)
    return (
        f"{site} is doubted: what sets its updates apart from the others' is the same in every round (persistence "
        f"{persistence:.2f}, median of all sites {middle:.2f}), so they count {share:.0%} from here on"
    )


def _record(folder: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = load_meta(folder).provenance.get("federation", {}).get("record", {})
    except InputError:
        return {}
    return {"kind": "round", "time": "", **record} if "round" in record else {}
