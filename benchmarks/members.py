"""What one registered site can do to the coordinator and to the others, through real processes; guards on, then off.

A federation of an honest site and a rogue node (`rogue_node`) with a registered key, both behind the door; an
undisturbed round, then one round per attack. With the guards no forged reply counts, the honest site's reply does, no
process is restarted, and SuperLink and ServerApp need at most 50 MB more than in the undisturbed round and for the
expected reply. With `--off` the coordinator runs Flower's own programs (`unguarded`) and each attack must get through,
or a refusal above would say nothing.
"""

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.hostile_answers import (
    FORGED_LOSS,
    Attack,
    expanding_tree,
    forged_source,
    repeated_chunk,
    stored_for_nothing,
    wrong_objects_first,
)
from benchmarks.local import LocalFederation, command, make_experiment, program_of, random_checkpoint, tiny_experiment
from benchmarks.measure import verdict
from benchmarks.rogue_node import RogueNode
from benchmarks.scratch import scratch
from deploy.processes.process import spawn
from server.federation.fleet.superlink import superlink_address, wait_ready
from shared.storage.runlog import read_metrics

ATTACKS: dict[str, Attack] = {
    "forged source": forged_source,
    "repeated chunk": repeated_chunk,
    "stored for nothing": stored_for_nothing,
    "wrong objects first": wrong_objects_first,
    "expanding tree": expanding_tree,
}
"""The last one may have the SuperLink started again where nothing guards it."""
MOST_GROWTH_MB = 50.0
ROUND_SECONDS = 400.0
EXPERIMENT = tiny_experiment(
    image_size=8, rounds=1, local_steps=1, min_available=2, min_replies=1, quorum=1, quorum_grace_seconds=30,
    round_deadline_seconds=240,
)  # fmt: skip
PROGRAMS = ("flower-superlink", "flwr-serverapp")
SEED = 0


@dataclass
class Outcome:
    """Of one round: what was counted, restarts, memory in MB that SuperLink and ServerApp needed at most."""

    forged: int
    is_honest_counted: bool
    restarts: int
    needed_mb: tuple[float, float]

    def growth_mb(self, undisturbed: "Outcome", reply_mb: float) -> float:
        """The larger growth over an undisturbed round and the expected reply."""
        pairs = zip(self.needed_mb, undisturbed.needed_mb, strict=True)
        return max(here - there for here, there in pairs) - reply_mb


def main(arguments: Sequence[str] = ()) -> int:
    """Print a line per attack, then the verdict; names of attacks choose some of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("attacks", nargs="*", help=f"default: all of {', '.join(ATTACKS)}")
    parser.add_argument("--off", action="store_true", help="without guards: every attack must succeed")
    options = parser.parse_args(arguments)
    if unknown := set(options.attacks) - set(ATTACKS):
        parser.error(f"{min(unknown)!r} is no attack: there are {', '.join(ATTACKS)}")
    is_guarded = not options.off
    chosen = {name: ATTACKS[name] for name in options.attacks or ATTACKS}
    with scratch() as folder:
        outcomes, growths = attack_all(folder, chosen, is_guarded=is_guarded)
    for name, outcome in outcomes.items():
        print(f"  {name}: {outcome.forged} forged replies counted, honest reply counted {outcome.is_honest_counted}, "
              f"{outcome.restarts} restarts, growth {growths[name]:.0f} MB")  # fmt: skip
    forged = sum(outcome.forged for outcome in outcomes.values())
    if not is_guarded:
        successes = sum(has_succeeded(outcomes[name], growths[name]) for name in outcomes)
        text = f"{successes} of {len(outcomes)} attacks succeed, {forged} forged replies counted, growth "
        growth = ", ".join(f"{name} {growths[name]:.0f} MB" for name in outcomes)
        return verdict("members, guards off", text + growth, reached=successes == len(outcomes))
    honest = sum(outcome.is_honest_counted for outcome in outcomes.values())
    restarts, growth_mb = sum(outcome.restarts for outcome in outcomes.values()), max(growths.values())
    text = (
        f"{len(outcomes)} attacks: {forged} forged replies counted, {honest} honest ones, {restarts} restarts, "
        f"growth {growth_mb:.0f} MB (at most {MOST_GROWTH_MB:.0f})"
    )
    is_reached = not forged and honest == len(outcomes) and not restarts and growth_mb <= MOST_GROWTH_MB
    return verdict("members", text, reached=is_reached)


def has_succeeded(outcome: Outcome, growth_mb: float) -> bool:
    """Whether an attack did what it is for: a reply in another's name, memory, or the loss of the honest reply."""
    return bool(outcome.forged) or growth_mb > MOST_GROWTH_MB or not outcome.is_honest_counted


def attack_all(
    root: Path, attacks: dict[str, Attack], *, is_guarded: bool
) -> tuple[dict[str, Outcome], dict[str, float]]:
    """A round per attack, in one federation of one honest and one rogue member; outcomes, and growths in MB."""
    local = LocalFederation(root, num_sites=2, image_size=8, num_images=24, is_behind_door=True)
    try:
        local.set_up()
        start(local, is_guarded=is_guarded)
        init = random_checkpoint(root / "init", make_experiment(EXPERIMENT))
        (root / "experiment.toml").write_text(EXPERIMENT, encoding="utf-8")
        node = RogueNode(local.address, local.home / "pki" / "ca.crt", local.site(1) / "node.key",
                         local.site(1) / "site-sign.key")  # fmt: skip
        node.go_online()
        reply_mb = sum(file.stat().st_size for file in init.glob("model.safetensors")) / 1e6
        undisturbed = one_round(local, node, lambda *_: False, "undisturbed")
        outcomes = {name: one_round(local, node, attack, name.replace(" ", "-")) for name, attack in attacks.items()}
        return outcomes, {name: each.growth_mb(undisturbed, reply_mb) for name, each in outcomes.items()}
    finally:
        local.stop()


def start(local: LocalFederation, *, is_guarded: bool) -> None:
    """Coordinator, with or without guards, and the honest site; the other site's key is the rogue's."""
    argv = command("maskfed-server") if is_guarded else [sys.executable, "-m", "benchmarks.unguarded"]
    coordinator = [*argv, "start", "--home", str(local.home)]
    local.daemons["coordinator"] = spawn(coordinator, dict(os.environ), local.root / "coordinator.log")
    wait_ready(superlink_address(local.home), local.home / "pki" / "ca.crt", 120)
    site = command("maskfed-client", "start", "--home", str(local.site(0)))
    ports = ("--port", str(local.ports[2]), "--health-port", str(local.ports[3]))
    local.daemons["site-0"] = spawn([*site, *ports], dict(os.environ), local.root / "site-0.log")
    deadline = time.monotonic() + 120
    while local.num_online() < 1:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the honest site is not online: see {local.root}")
        time.sleep(0.5)


def one_round(local: LocalFederation, node: RogueNode, attack: Attack, run: str) -> Outcome:
    """One run of one round with the attack in it."""
    arguments = ("--init", str(local.root / "init"), "--home", str(local.home), "--run", run, "--json")
    finetune = command("maskfed-server", "finetune", str(local.root / "experiment.toml"), *arguments)
    before, is_taken = num_restarts(local), False
    with Memory(local) as memory, subprocess.Popen(finetune, stdout=subprocess.DEVNULL) as running:
        try:
            is_taken = attack(node, node.question(ROUND_SECONDS))
            with suppress(subprocess.TimeoutExpired):
                running.wait(ROUND_SECONDS)
        finally:
            running.kill()
    events = read_metrics(local.home / "runs" / run / "metrics.jsonl")
    answered = [entry for event in events if event["kind"] == "round" for entry in event["answered"]]
    forged = [entry["site"] for entry in answered if entry["scalars"].get("loss") == FORGED_LOSS]
    honest = any(entry["site"] == "site-0" for entry in answered) and "site-0" not in forged
    outcome = Outcome(len(forged), honest, num_restarts(local) - before, memory.needed_mb())
    print(f"  {run}: upload taken {is_taken}, {outcome}", flush=True)
    return outcome


def num_restarts(local: LocalFederation) -> int:
    """How often a supervisor of the federation had to start something again."""
    logs = (local.root / f"{name}.log" for name in local.daemons)
    return sum(log.read_text(errors="replace").count("starting it again") for log in logs)


class Memory:
    """What SuperLink and ServerApp need within the block, by the kernel's own high-water marks."""

    def __init__(self, local: LocalFederation) -> None:
        self._coordinator = local.daemons["coordinator"].pid
        self._peaks: dict[int, tuple[str, float, float]] = {}
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Memory":
        """Forget the peaks of before."""
        self._look(lambda pid: Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii"))
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Look once more."""
        self._over.set()
        self._watcher.join()
        self._look()

    def needed_mb(self) -> tuple[float, float]:
        """SuperLink: peak over what it had before; ServerApp: peak of its process."""
        grown = [peak - first for name, first, peak in self._peaks.values() if name == PROGRAMS[0]]
        peaks = [peak for name, _, peak in self._peaks.values() if name == PROGRAMS[1]]
        return max(grown, default=0.0), max(peaks, default=0.0)

    def _watch(self) -> None:
        while not self._over.wait(0.25):
            self._look()

    def _look(self, begin: Callable[[int], object] = lambda _: None) -> None:
        for process in psutil.Process(self._coordinator).children(recursive=True):
            name = program_of(process)
            if name not in PROGRAMS:
                continue
            with suppress(OSError, psutil.Error):
                begin(process.pid)
                peak = high_water_mb(process.pid)
                first = self._peaks.get(process.pid, (name, process.memory_info().rss / 1e6, 0.0))[1]
                self._peaks[process.pid] = name, first, peak


def high_water_mb(pid: int) -> float:
    """Peak of the resident memory of a process, MB."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
