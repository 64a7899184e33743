"""Sites that a run doubts, and those that the operator trusts all the same."""

import json
import logging
from pathlib import Path

from server.runs.run_directory import RunDir
from shared.errors import InputError
from shared.storage.files import write_atomically
from shared.storage.round_records import rounds_of
from shared.storage.runlog import read_metrics

TRUSTED_FILE = "trusted.json"
log = logging.getLogger("maskfed.server")


def trusted(run_folder: Path) -> set[str]:
    """Sites that the operator trusts in this run; nobody where the file is missing or damaged."""
    try:
        stored = json.loads((run_folder / TRUSTED_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return set()
    except (OSError, ValueError):
        log.warning("%s is damaged and not used: `sites trust` writes it anew", run_folder / TRUSTED_FILE)
        return set()
    return {str(site) for site in stored} if isinstance(stored, list) else set()


def trust(run_folder: Path, site: str) -> None:
    """From now on this run neither doubts the site nor shortens its updates for it."""
    stored = sorted(trusted(run_folder) | {site})
    write_atomically(run_folder / TRUSTED_FILE, json.dumps(stored) + "\n")


def doubted_by(run_folder: Path) -> list[str]:
    """Sites that a run doubts now: those of its newest round, without the trusted ones.

    Raises:
        InputError: there is no such run.
    """
    run = RunDir(run_folder)
    if not run.path.is_dir():
        raise InputError(f"run {run_folder.name!r} is unknown: `maskfed-server status` lists the runs")
    rounds = rounds_of(read_metrics(run.metrics), run.checkpoints)
    return sorted(set(rounds[-1].get("doubted", {})) - trusted(run_folder)) if rounds else []
