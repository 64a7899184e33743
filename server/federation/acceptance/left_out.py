"""Sites that a run has named and asks no more, until the operator takes them back."""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from server.runs.run_directory import RunDir
from shared.errors import InputError
from shared.storage.files import write_atomically
from shared.storage.round_records import rounds_of
from shared.storage.runlog import read_metrics

T = TypeVar("T")
READMITTED_FILE = "readmitted.json"
log = logging.getLogger("maskfed.server")


class LeftOut:
    """Of one run. The state travels in the round's record, and so in the checkpoint; the operator speaks by a file."""

    def __init__(self, run_folder: Path, state: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self.run_folder = run_folder
        self.state = {site: dict(entry) for site, entry in (state or {}).items()}

    def sites(self) -> set[str]:
        """Who is not asked now."""
        return self.state.keys() - readmitted(self.run_folder)

    def as_json(self) -> dict[str, dict[str, Any]]:
        """What the round's record says: who is left out, since which round and why."""
        return {site: self.state[site] for site in sorted(self.sites())}

    def others(self, here: Mapping[str, T]) -> dict[str, T]:
        """Those of `here` that are asked."""
        out = self.sites()
        return {site: each for site, each in here.items() if site not in out}

    def name(self, found: Mapping[str, float], server_round: int, num_sites: int) -> list[str]:
        """Leave these out from the next round on, those with the highest figures first, but never half of all sites.

        Whom the operator took back once stays: what is found of that site is known.

        Args:
            found: their persistence.
            server_round: in which it was found.
            num_sites: sites that were compared.

        Returns:
            Sites that are left out now and were not before.
        """
        known, out = readmitted(self.run_folder), self.sites()
        room = math.ceil((num_sites + len(out)) / 2) - 1 - len(out)
        order = sorted((site for site in found if site not in known | out), key=lambda site: (-found[site], site))
        for site in order[: max(0, room)]:
            self.state[site] = {"round": server_round, "persistence": found[site]}
            log.warning("round %d: site %s is left out from here on: it pulls its own way", server_round, site)
        return order[: max(0, room)]


def readmitted(run_folder: Path) -> set[str]:
    """Sites that the operator has taken back in this run; nobody where the file is missing or damaged."""
    try:
        stored = json.loads((run_folder / READMITTED_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return set()
    except (OSError, ValueError):
        log.warning("%s is damaged and not used: `sites readmit` writes it anew", run_folder / READMITTED_FILE)
        return set()
    return {str(site) for site in stored} if isinstance(stored, list) else set()


def left_out_of(run_folder: Path) -> list[str]:
    """Sites that a run leaves out now, by its newest round.

    Raises:
        InputError: there is no such run.
    """
    run = RunDir(run_folder)
    if not run.path.is_dir():
        raise InputError(f"run {run_folder.name!r} is unknown: `maskfed-server status` lists the runs")
    rounds = rounds_of(read_metrics(run.metrics), run.checkpoints)
    return sorted(LeftOut(run_folder, rounds[-1].get("left_out")).sites()) if rounds else []


def readmit(run_folder: Path, site: str) -> None:
    """Take a site back: it is asked again from the next round on, and is not left out a second time in this run."""
    stored = sorted(readmitted(run_folder) | {site})
    write_atomically(run_folder / READMITTED_FILE, json.dumps(stored) + "\n")
