"""What is done to a running federation: processes killed, stopped and hung up, a full disk, sites lost at a stage."""

import json
import random
import signal
import time
from collections.abc import Callable
from typing import Any

import psutil

from benchmarks.disks import fill
from benchmarks.local import LocalFederation
from benchmarks.victims import REPLY, WORKER, victims
from server.runs.run_directory import RunDir
from shared.secure_aggregation.roster import threshold_for

MACHINE, SITE = "the coordinator", "a site"
"""Everything of one side at once, as when its machine dies; started again as an init system would."""
PROCESSES = (
    *("flwr-serverapp", "flower-superlink", "server superexec", "flower-supernode", "flwr-clientapp", "maskfed-warm"),
    *("nginx", WORKER, REPLY),
)
MEANS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "hang up": signal.SIGHUP}
FILL = "fill the disk"
TARGETS = (
    *(f"kill {name}" for name in (*PROCESSES, MACHINE, SITE)),
    *(f"stop {name}" for name in PROCESSES),
    *(f"hang up {name}" for name in (MACHINE, SITE)),
    FILL,
)
"""What is done to what."""
NUM_SITES = 5
"""With masked updates."""
MOST_LOST = NUM_SITES - threshold_for(NUM_SITES, 0)
OFFERING = "offering the plan"
STAGES = (OFFERING, "training", "unmasking")
"""As a run's progress names them; keys for masks are asked for in the first."""
LOSSES = tuple(f"lose {count} at {stage}" for stage in STAGES for count in range(1, MOST_LOST + 2))
FULL_SECONDS = 30.0
VICTIM_SECONDS, STAGE_SECONDS = 30.0, 60.0
"""How long a process of a kind, and a stage of a round, are waited for."""
AWAY_SECONDS = 90.0
"""How long more sites are away than a sum stands."""


def disturb(local: LocalFederation, run: str, target: str, seed: str) -> bool:
    """Do one of `TARGETS` or `LOSSES` now, or as soon as it can be done; false: it never could."""
    if target in LOSSES:
        return _lose(local, run, target, seed)
    if target == FILL:
        fill(local.root, FULL_SECONDS)
        return True
    means = next(each for each in MEANS if target.startswith(each))
    victim = target.removeprefix(f"{means} ")
    if victim in (MACHINE, SITE):
        name = "coordinator" if victim == MACHINE else "site-0"
        local.daemons[name].send_signal(MEANS[means])
        local.daemons[name].wait()
        local.start()
        return True
    deadline = time.monotonic() + VICTIM_SECONDS
    while not (found := victims(local, victim)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    found[0].send_signal(MEANS[means])
    return True


def _lose(local: LocalFederation, run: str, target: str, seed: str) -> bool:
    """End some sites with all of their processes when the run comes to a stage; false: it never did.

    As many as a sum stands stay away until the round has been closed; more come back, for without them nothing ends.
    """
    count, stage = int(target.split()[1]), target.partition(" at ")[2]
    folder = RunDir(local.home / "runs" / run)
    if not _wait_for(folder, lambda progress: progress["stage"] == stage, STAGE_SECONDS):
        return False
    before = _progress(folder).get("round", 0)
    for number in random.Random(seed).sample(range(local.num_sites), count):
        site = psutil.Process(local.daemons.pop(f"site-{number}").pid)
        for process in [*site.children(recursive=True), site]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
    if count > MOST_LOST:
        time.sleep(AWAY_SECONDS)
    else:
        _wait_for(folder, lambda progress: progress["round"] > before, AWAY_SECONDS)
    local.start()
    return True


def _wait_for(run: RunDir, is_so: Callable[[dict[str, Any]], bool], seconds: float) -> bool:
    """Whether a run's progress comes to be so."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (progress := _progress(run)) and is_so(progress):
            return True
        time.sleep(0.01)
    return False


def _progress(run: RunDir) -> dict[str, Any]:
    """What a run tells of itself; empty before it does."""
    try:
        progress: dict[str, Any] = json.loads(run.progress.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return progress
