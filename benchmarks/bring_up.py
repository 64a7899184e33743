"""From clean folders on three hosts to the first round: how many commands, how long.

Server and two sites are network namespaces; sites reach only nginx. Images and the checkpoint to start from lie there
before, as they would. The clock runs from the first command to the end of round 1, without the seconds of training.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.hosts import Host, hosts, not_measured, reason_against
from benchmarks.local import make_experiment, random_checkpoint
from shared.runlog import read_metrics
from shared.synthetic import write_folder

MOST_COMMANDS, MOST_SECONDS = 8, 180.0
PORT = 443
EXPERIMENT = """
[train]
objective = "dsm"
batch = 8
precision = "float32"
[model]
size = "T"
image_size = 16
patch_size = 4
[federation]
rounds = 1
local_steps = 5
min_available = 2
min_replies = 2
available_deadline_seconds = 120
"""


def main() -> int:
    """Measure once."""
    if reason := reason_against():
        return not_measured(reason)
    with tempfile.TemporaryDirectory(prefix="maskfed-") as folder, hosts(Path(folder), ("s", "a", "b")) as machines:
        commands, seconds, training = bring_up(*machines)
    print(
        f"{commands} commands, {seconds:.0f} s from nothing to the end of round 1 besides {training:.0f} s of training"
    )
    return int(commands > MOST_COMMANDS or seconds > MOST_SECONDS)


def bring_up(server: Host, *sites: Host) -> tuple[int, float, float]:
    """Set everything up by the operators' commands; commands, seconds without training, seconds of training."""
    prepare(server, sites)
    begun = time.monotonic()
    commands = set_up(server, *sites)
    server.run("maskfed-server", "finetune", "round.toml", "--init", "init", "--run", "first")
    seconds = time.monotonic() - begun
    (record,) = rounds(server, "first")
    training = max(reply["scalars"]["seconds"] for reply in record["answered"])
    return commands + 1, seconds - training, training


def prepare(server: Host, sites: tuple[Host, ...], experiment: str = EXPERIMENT) -> None:
    """What the operators have before they begin: images at the sites, a checkpoint and an experiment at the server."""
    resolved = make_experiment(experiment)
    (server.folder / "round.toml").write_text(experiment)
    random_checkpoint(server.folder / "init", resolved)
    for number, site in enumerate(sites):
        write_folder(site.folder / "images", 48, resolved.model.image_size, 0, site=f"site{number}")


def set_up(server: Host, *sites: Host) -> int:
    """From nothing to all processes running; the number of commands typed."""
    server.run("maskfed-server", "init", "--address", f"{server.address}:{PORT}")
    server.start("maskfed-server", "start")
    requests = [site.run("maskfed-client", "enroll", f"site-{n}").strip() for n, site in enumerate(sites)]
    server.run("maskfed-server", "sites", "add", *requests)
    for number, site in enumerate(sites):
        bundle = f"site-{number}.join.json"
        (site.folder / bundle).write_bytes((server.folder / bundle).read_bytes())
        released = ("--release", "loss", "--release", "seconds", "--head-file", "head.json")
        allowed = ("--allow-non-private", "--allow-any-experiment", "--max-steps", "100000", "--threads", "1")
        size = str(make_experiment((server.folder / "round.toml").read_text()).model.image_size)
        join = ("maskfed-client", "join", bundle, "--data", "images", "--image-size", size, *released, *allowed)
        site.start(*join, "--device", "cpu", "--start")
    return 3 + 2 * len(sites)


def rounds(server: Host, run: str) -> list[dict[str, Any]]:
    """Records of the rounds that are done."""
    events = read_metrics(server.folder / "coordinator" / "runs" / run / "metrics.jsonl")
    return [event for event in events if event["kind"] == "round"]


if __name__ == "__main__":
    sys.exit(main())
