"""What one registered site can do to the coordinator and to the others, through real processes; guards on, then off.

A federation of an honest site and a rogue node (`rogue_node`) with a registered key, one round per attack. With the
guards nothing of an attack is taken, the honest site's reply counts, no process is restarted, and SuperLink and
ServerApp grow by at most 50 MB beyond what the two replies are. With `--off` the coordinator runs Flower's own programs
(`unguarded`), and each attack must get through, or a refusal above would say nothing.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.local import LocalFederation, command, make_experiment, program_of, random_checkpoint, tiny_experiment
from benchmarks.measure import verdict
from benchmarks.rogue_node import (
    Attack,
    RogueNode,
    expanding_tree,
    forged_source,
    repeated_chunk,
    stored_for_nothing,
)
from deploy.processes.process import spawn
from server.federation.fleet.superlink import superlink_address, wait_ready
from shared.storage.runlog import read_metrics

ATTACKS: dict[str, Attack] = {
    "forged source": forged_source,
    "expanding tree": expanding_tree,
    "repeated chunk": repeated_chunk,
    "stored for nothing": stored_for_nothing,
}
MOST_GROWTH_MB = 50.0
ROUND_SECONDS = 240
EXPERIMENT = tiny_experiment(
    image_size=8, rounds=1, local_steps=1, min_available=2, min_replies=1, round_deadline_seconds=40
)
SEED = 0


@dataclass
class Outcome:
    """Of one attack: taken or not, whether the honest reply counted, growth in MB beyond two replies."""

    is_taken: bool
    is_honest_counted: bool
    growth_mb: float


def main(arguments: Sequence[str] = ()) -> int:
    """Print a line per attack, then the verdict."""
    is_guarded = "--off" not in arguments
    chosen = {name: attack for name, attack in ATTACKS.items() if name in arguments} or ATTACKS
    with tempfile.TemporaryDirectory(prefix="maskfed-") as folder:
        outcomes = attack_all(Path(folder), chosen, is_guarded=is_guarded)
    for name, outcome in outcomes.items():
        print(f"  {name}: taken {outcome.is_taken}, honest reply counted {outcome.is_honest_counted}, "
              f"growth {outcome.growth_mb:.0f} MB")  # fmt: skip
    taken = sum(outcome.is_taken for outcome in outcomes.values())
    if not is_guarded:
        return verdict(
            "members, guards off", f"{taken} of {len(outcomes)} attacks taken", reached=taken == len(outcomes)
        )
    honest = sum(outcome.is_honest_counted for outcome in outcomes.values())
    growth = max(outcome.growth_mb for outcome in outcomes.values())
    text = f"{taken} of {len(outcomes)} attacks taken, {honest} honest replies counted, growth {growth:.0f} MB"
    # A repeated chunk is uploaded within the allowance and dropped before it is joined: its growth is what counts.
    is_kept_out = all(not outcome.is_taken for name, outcome in outcomes.items() if name != "repeated chunk")
    is_reached = is_kept_out and honest == len(outcomes) and growth <= MOST_GROWTH_MB
    return verdict("members", text, reached=is_reached)


def attack_all(root: Path, attacks: dict[str, Attack], *, is_guarded: bool) -> dict[str, Outcome]:
    """A round per attack, in one federation of one honest and one rogue member."""
    local = LocalFederation(root, num_sites=2, image_size=8, num_images=24)
    try:
        local.set_up()
        start(local, is_guarded=is_guarded)
        experiment = make_experiment(EXPERIMENT)
        init = random_checkpoint(root / "init", experiment)
        (root / "experiment.toml").write_text(EXPERIMENT, encoding="utf-8")
        address = superlink_address(local.home)
        node = RogueNode(address, local.home / "pki" / "ca.crt", local.site(1) / "node.key")
        node.go_online()
        reply_mb = sum(file.stat().st_size for file in init.glob("model.safetensors")) / 1e6
        return {
            name: one_round(local, node, attack, name.replace(" ", "-"), 2 * reply_mb)
            for name, attack in attacks.items()
        }
    finally:
        local.stop()


def start(local: LocalFederation, *, is_guarded: bool) -> None:
    """Coordinator, with or without guards, and the honest site; the other site's key is the rogue's."""
    argv = command("maskfed-server") if is_guarded else [sys.executable, "-m", "benchmarks.unguarded"]
    coordinator = [*argv, "start", "--home", str(local.home)]
    local.daemons["coordinator"] = spawn(coordinator, dict(os.environ), local.root / "coordinator.log")
    wait_ready(superlink_address(local.home), local.home / "pki" / "ca.crt", 120)
    site = command("maskfed-client", "start", "--home", str(local.site(0)))
    local.daemons["site-0"] = spawn(site, dict(os.environ), local.root / "site-0.log")
    deadline = time.monotonic() + 120
    while local.num_online() < 1:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the honest site is not online: see {local.root}")
        time.sleep(0.5)


def one_round(local: LocalFederation, node: RogueNode, attack: Attack, run: str, replies_mb: float) -> Outcome:
    """One run of one round with the attack in it."""
    arguments = ("--init", str(local.root / "init"), "--home", str(local.home), "--run", run, "--json")
    before, peak, over = rss_mb(local, "flower-superlink"), [0.0, 0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            for index, program in enumerate(("flower-superlink", "flwr-serverapp")):
                peak[index] = max(peak[index], rss_mb(local, program))

    watcher = threading.Thread(target=watch)
    watcher.start()
    file = str(local.root / "experiment.toml")
    with subprocess.Popen(
        command("maskfed-server", "finetune", file, *arguments), stdout=subprocess.DEVNULL
    ) as running:
        try:
            is_taken = attack(node, node.question(ROUND_SECONDS))
            running.wait(ROUND_SECONDS)
        finally:
            running.kill()
            over.set()
            watcher.join()
    events = read_metrics(local.home / "runs" / run / "metrics.jsonl")
    answered = [entry["site"] for event in events if event["kind"] == "round" for entry in event["answered"]]
    serverapp = max(0.0, peak[1] - SERVERAPP_MB)
    return Outcome(is_taken, "site-0" in answered, max(peak[0] - before, serverapp) - replies_mb)


SERVERAPP_MB = 260.0
"""Peak of a ServerApp in an undisturbed round of this size; above it counts as growth."""


def rss_mb(local: LocalFederation, program: str) -> float:
    """Resident memory of a program's largest process, MB; 0 while there is none."""
    sizes = [0.0]
    for process in psutil.Process(local.daemons["coordinator"].pid).children(recursive=True):
        try:
            if program_of(process) == program:
                sizes.append(process.memory_info().rss / 1e6)
        except psutil.Error:
            continue
    return max(sizes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
