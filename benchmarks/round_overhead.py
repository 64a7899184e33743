"""Seconds of a round without training, by stage: sites over TLS, tiny model, sites that re-send the reply they stored.

The same run is asked for again under the same name, so each site answers from its store: processes start, messages
travel, replies are folded, a checkpoint is written, but nothing is trained. The first round trains one step and loads
torch. Beside wall clock stand processor seconds of everything together, which another load of the machine changes less.
Needed, on 2 idle cores and 3 sites: at most 2 s, and at most 8 s for the first round.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import psutil

from benchmarks.local import LocalFederation, federation, make_experiment, program_of, random_checkpoint
from benchmarks.measure import verdict
from client.records.chain import read_chain
from client.settings import Home
from server.runs.run_directory import RunDir
from shared.storage.runlog import read_metrics

NEEDED_SECONDS, NEEDED_FIRST_SECONDS = 2.0, 8.0
EXPERIMENT = "[federation]\nrounds = 1\nlocal_steps = 1\nmin_available = {sites}\n[train]\nbatch = 2\n"


def main(arguments: Sequence[str] = ()) -> int:
    """Print the stages of the first and of the median round, then the verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2, help="that everything runs on")
    parser.add_argument("--rounds", type=int, default=5, help="beside the first")
    options = parser.parse_args(arguments)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    with federation(options.sites) as local:
        experiment = make_experiment(EXPERIMENT.format(sites=options.sites))
        init = random_checkpoint(local.root / "init", experiment)
        rounds = []
        for index in range(options.rounds + 1):
            before = processor_seconds(local)
            local.finetune(init, experiment, "overhead")
            time.sleep(1.0)  # processes that end count once they have
            after = processor_seconds(local)
            used = {name: seconds - before.get(name, 0.0) for name, seconds in after.items()}
            rounds.append(stages(local) | {f"processor: {name}": seconds for name, seconds in used.items()})
            run = local.home / "runs" / "overhead"
            run.rename(run.with_name(f"overhead-{index}"))
    first, later = rounds[0], rounds[1:]
    middle = {name: statistics.median(each.get(name, 0.0) for each in later) for name in first}
    print(f"{'seconds':42s} first  later (median of {options.rounds})")
    for name in first:
        print(f"  {name:40s} {first[name]:5.2f}  {middle[name]:5.2f}")
    reached = middle["total"] <= NEEDED_SECONDS and first["total"] <= NEEDED_FIRST_SECONDS
    figures = f"{middle['total']:.1f} s (limit {NEEDED_SECONDS:g}), first {first['total']:.1f} s"
    return verdict(
        f"round overhead, {options.sites} sites, {options.cores} cores",
        f"{figures} (limit {NEEDED_FIRST_SECONDS:g})",
        reached=reached,
    )


def stages(local: LocalFederation) -> dict[str, float]:
    """Seconds of the last round, as the coordinator logs them, and the median site's part of it."""
    events = read_metrics(RunDir(local.home / "runs" / "overhead").metrics)
    (record,) = [event for event in events if event["kind"] == "round"]
    ended = datetime.fromisoformat(record["time"]).timestamp()
    asked = ended - sum(record["seconds"].get(name, 0.0) for name in ("train", "aggregate", "checkpoint"))
    parts = [_site_parts(local, index, asked) for index in range(local.num_sites)]
    median = {name: statistics.median(each[name] for each in parts) for name in parts[0]}
    answered = statistics.median(each["seconds"] for each in record["answered"])
    return {
        **record["seconds"],
        **{f"site: {name}": seconds for name, seconds in median.items()},
        "site: reply, fetched": max(0.0, answered - sum(median.values())),
    }


def _site_parts(local: LocalFederation, index: int, asked: float) -> dict[str, float]:
    """From the coordinator's question to the site's process having read it, and from there to its answer."""
    entries = read_chain(Home(local.site(index)).journal)
    requests = [entry for entry in entries if entry.kind == "request" and entry.fields.get("task") == "train"]
    replies = [entry for entry in entries if entry.kind in ("resent", "release")]
    taken, answered = requests[-1].time.timestamp(), replies[-1].time.timestamp()
    return {"picked up, process started": max(0.0, taken - asked), "policy, ledger, training": answered - taken}


def processor_seconds(local: LocalFederation) -> dict[str, float]:
    """What the federation's processes have used, by program; what a program has waited for counts as its own."""
    used: dict[str, Any] = {"all": 0.0}
    for processes in local.processes().values():
        for process in processes:
            try:
                name, times = program_of(process), process.cpu_times()
            except psutil.Error:
                continue
            seconds = times.user + times.system + times.children_user + times.children_system
            used[name] = used.get(name, 0.0) + seconds
            used["all"] += seconds
    return used


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
