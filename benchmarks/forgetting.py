"""A federation made to forget a run, so that the next one of the same name draws the same images and noise."""

import shutil
import time
from pathlib import Path

from benchmarks.local import LocalFederation
from benchmarks.victims import victims
from client.home import Home
from client.secure.run_state import ROUND_FILE, witnesses


def memories(local: LocalFederation) -> list[Path]:
    """Files by which sites remember what they were asked: ledgers, their heads, journals, the registry of charges."""
    registry = (path for path in (local.root / "registry").rglob("*") if path.is_file())
    return [*local.root.glob("site-*/*.jsonl"), *local.root.glob("heads/*.json"), *registry]


def clear(local: LocalFederation, run: str, remembered: dict[Path, bytes]) -> None:
    """Make room for the next run of the same name: no run directory, and sites that remember nothing of it."""
    shutil.rmtree(local.home / "runs" / run)
    local.start()
    deadline = time.monotonic() + 120
    while local.num_online() < local.num_sites or victims(local, "flwr-clientapp"):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the sites are not back: see {local.root}/*.log")
        time.sleep(0.5)
    for path in memories(local):
        path.write_bytes(remembered[path]) if path in remembered else path.unlink()
    for site in range(local.num_sites):
        home = Home(local.site(site))
        shutil.rmtree(home.replies, ignore_errors=True)
        for file in (home.secure_sums / run / ROUND_FILE, witnesses(home) / run):
            file.unlink(missing_ok=True)
