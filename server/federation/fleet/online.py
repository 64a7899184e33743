"""Who is online and since when: `run/online.json`, written by `start`, read by whoever only looks.

The SuperLink says who is online now and forgets the past; sites themselves are asked for nothing.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from server.federation.fleet.registry import write_json
from server.federation.fleet.superlink_types import Node

ONLINE_FILE = "run/online.json"
NOTE_SECONDS = 10.0
STALE_SECONDS = 60.0
"""What was noted longer ago says nothing of now."""


def is_due(home: Path, now: float) -> bool:
    """Whether the SuperLink should be asked again; a clock that was set back asks at once."""
    return not 0 <= now - read_online(home)["noted"] < NOTE_SECONDS


def note_online(home: Path, nodes: Iterable[Node], now: float) -> None:
    """Write down which registered sites are online.

    Args:
        home: the coordinator's folder.
        nodes: as the SuperLink lists them.
        now: Unix time.
    """
    before = read_online(home)["sites"]
    sites = {}
    for node in nodes:
        if node.status in ("online", "offline"):
            is_online = node.status == "online"
            old = before.get(node.alias, {})
            since = old.get("since") if old.get("is_online") is is_online else now
            sites[node.alias] = {"is_online": is_online, "since": since}
    path = home / ONLINE_FILE
    path.parent.mkdir(exist_ok=True, mode=0o700)
    write_json(path, {"noted": now, "sites": sites})


def read_online(home: Path) -> dict[str, Any]:
    """`noted` (Unix time, 0 where nothing was) and `sites`: by alias `is_online` and since when, Unix time."""
    try:
        found = json.loads((home / ONLINE_FILE).read_text(encoding="utf-8"))
        return {"noted": float(found["noted"]), "sites": dict(found["sites"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"noted": 0.0, "sites": {}}
