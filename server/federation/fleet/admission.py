"""Who may talk to the SuperLink: the registry's active sites and nobody else; and the record of how that changed."""

import contextlib
import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from server.federation.fleet.registry import Registry
from server.federation.fleet.superlink import Control, node_key

log = logging.getLogger("maskfed.server")
RENEW = "`maskfed-client enroll` there gives a line for `maskfed-server sites renew`"


def synchronise(control: Control, registry: Registry) -> None:
    """Make the SuperLink's nodes those of the registry, and record their ids.

    One that keeps its state on disk may still know a site that was removed while it was down, and one that keeps it in
    memory knows nobody after a start.
    """
    active = {node_key(site.public_key): site for site in registry.admitted()}
    for node in control.nodes():
        if node.public_key not in active and node.status != "unregistered":
            control.unregister(node.node_id)
    for site in active.values():
        if not site.signing_key:
            log.warning("site %s has no signing key and is not asked: %s", site.alias, RENEW)
        registry.set_node_id(site.alias, control.register(site))


@contextlib.contextmanager
def recorded(home: Path, event: str) -> Iterator[list[str]]:
    """Leave one line in `logs/admissions.log`: `event` with the aliases that the block collects, or why it was refused.

    Raises:
        ValueError: whatever the block raises, after the line is written.
    """
    aliases: list[str] = []
    try:
        yield aliases
    except ValueError as error:
        _write(home, {"event": f"{event} refused", "reason": str(error)})
        raise
    _write(home, {"event": event, "sites": aliases})


def _write(home: Path, entry: dict[str, object]) -> None:
    (home / "logs").mkdir(exist_ok=True)
    line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), **entry})
    with (home / "logs" / "admissions.log").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
