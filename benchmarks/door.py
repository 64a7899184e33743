"""Strangers in front of the door while honest rounds run: 560 connections an address, or 8 MB again and again.

From one address and from eight, each a network namespace of its own; `--minutes` for each. Needed: every round that
ends meanwhile has the answers of all sites, and SuperLink and nginx together grow by at most 50 MB over an undisturbed
round. With `--off` strangers are let in without limits and Flower runs without its guards: both attacks must succeed.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from benchmarks.hosts import Host, hosts, not_measured, num_online, prepare, reason_against, rounds, set_up, wait_for
from benchmarks.local import ONLINE_SECONDS, tiny_experiment
from benchmarks.measure import verdict
from benchmarks.scratch import scratch

CONNECTIONS = {"connections": 560, "bodies": 8}
"""Of each address."""
ADDRESSES = (1, 8)
MOST_GROWTH_MB = 50.0
RUN = "honest"
ROUNDS = 1000
PATIENCE_SECONDS = 600.0
PORT = 443


def main(arguments: Sequence[str] = ()) -> int:
    """One line for each attack, then the verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--kinds", nargs="*", choices=tuple(CONNECTIONS), default=tuple(CONNECTIONS))
    parser.add_argument("--addresses", nargs="*", type=int, default=ADDRESSES)
    parser.add_argument("--off", action="store_true", help="without limits, certificates and guards")
    options = parser.parse_args(arguments)
    if reason := reason_against():
        return not_measured(reason)
    # In the hosts' folders `benchmarks` would be another package's.
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    names = ("s", "a", "b", *(f"x{number}" for number in range(max(options.addresses))))
    with scratch() as folder, hosts(folder, names) as machines:
        server, sites, strangers = machines[0], machines[1:3], machines[3:]
        usual = bring_up(server, sites, is_open=options.off)
        results = [
            attacked(server, strangers[:number], kind, options.minutes * 60, usual)
            for kind in options.kinds
            for number in options.addresses
        ]
    held = [is_held for is_held, _ in results]
    text = "; ".join(text for _, text in results)
    if options.off:
        return verdict("door, limits off", text, reached=not any(held))
    return verdict("door", text, reached=all(held))


def bring_up(server: Host, sites: Sequence[Host], *, is_open: bool) -> float:
    """A run with rounds without end, the first two of them undisturbed; peak memory of the second in MB."""
    experiment = tiny_experiment(image_size=16, rounds=ROUNDS, local_steps=1, round_deadline_seconds=120)
    prepare(server, sites, experiment)
    starter = ("python", "-m", "benchmarks.open_door") if is_open else ("maskfed-server",)
    set_up(server, *sites, starter=starter)
    wait_for(lambda: num_online(server) == len(sites), ONLINE_SECONDS, "all sites online")
    server.run("maskfed-server", "finetune", "round.toml", "--init", "init", "--run", RUN, "--detach")
    wait_for(lambda: len(rounds(server, RUN)) >= 1, 300, "round 1")
    peak = 0.0
    while len(rounds(server, RUN)) < 3:
        peak = max(peak, memory(server))
        time.sleep(0.5)
    print(f"undisturbed: {peak:.0f} MB", flush=True)
    return peak


def attacked(server: Host, strangers: Sequence[Host], kind: str, seconds: float, usual: float) -> tuple[bool, str]:
    """One attack, for `seconds` and until a round has ended; whether the door held, and what was seen."""
    before, begun, peak = len(rounds(server, RUN)), time.monotonic(), 0.0
    address = f"{server.address}:{PORT}"
    called = ("python", "-m", "benchmarks.stranger", kind, address, str(CONNECTIONS[kind]))
    processes = [each.start(*called) for each in strangers]
    end = begun + seconds
    while time.monotonic() < end or (len(rounds(server, RUN)) == before and time.monotonic() < end + PATIENCE_SECONDS):
        peak = max(peak, memory(server))
        time.sleep(0.5)
    ended = rounds(server, RUN)[before:]
    took = (time.monotonic() - begun) / 60
    for process in processes:
        process.kill()
        process.wait()
    for each in strangers:
        each.processes.clear()
    whole = sum(len(record["answered"]) == 2 for record in ended)
    growth = peak - usual
    text = (
        f"{kind} from {len(strangers)} address{'es' if len(strangers) > 1 else ''}, {took:.1f} min: {whole} of "
        f"{len(ended)} rounds whole, {growth:+.0f} MB"
    )
    said = (strangers[0].folder / f"{strangers[0].name}.log").read_text(errors="replace").splitlines()
    print(f"{text} (the first: {said[-1] if said else 'nothing'})", flush=True)
    return bool(ended) and whole == len(ended) and growth <= MOST_GROWTH_MB, text


def memory(server: Host) -> float:
    """Resident memory of SuperLink and nginx in MB."""
    total = 0
    for leader in server.processes:
        for process in psutil.Process(leader.pid).children(recursive=True):
            try:
                line = " ".join(process.cmdline())
                if "superlink" in line or line.startswith("nginx"):
                    total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
    return total / 1e6


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
