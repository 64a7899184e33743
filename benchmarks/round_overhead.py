"""Seconds of a round beside its training, by stage: sites over TLS, a tiny model, one step a round.

The first round of a run loads torch. Beside wall clock stand processor seconds of everything together, which other
work on the machine changes less. Needed, on 2 idle cores and 3 sites: at most 2 s without the sites' own seconds of
training, and at most 8 s for the first round.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import psutil

from benchmarks.local import LocalFederation, command, federation, make_experiment, program_of, random_checkpoint
from benchmarks.measure import verdict
from client.home import Home
from client.records.chain import read_chain
from server.runs.run_directory import RunDir
from shared.storage.runlog import read_metrics

NEEDED_SECONDS, NEEDED_FIRST_SECONDS = 2.0, 8.0
EXPERIMENT = """
[federation]
rounds = {rounds}
local_steps = 1
min_available = {sites}
[train]
batch = 2
"""
LONGEST_SECONDS = 600.0


def main(arguments: Sequence[str] = ()) -> int:
    """Print the stages of the first and of the median round, then the verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2, help="that everything runs on")
    parser.add_argument("--rounds", type=int, default=5, help="beside the first")
    options = parser.parse_args(arguments)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    with federation(options.sites) as local:
        experiment = make_experiment(EXPERIMENT.format(sites=options.sites, rounds=options.rounds + 1))
        init = random_checkpoint(local.root / "init", experiment)
        file = local.root / "overhead.toml"
        file.write_text(experiment.to_toml(), encoding="utf-8")
        run = ("--init", str(init), "--home", str(local.home), "--run", "overhead", "--json")
        with subprocess.Popen(
            command("maskfed-server", "finetune", str(file), *run), stdout=subprocess.DEVNULL
        ) as following:
            rounds = watch(local, options.rounds + 1)
            following.wait(LONGEST_SECONDS)
    first, later = rounds[0], rounds[1:]
    middle = {name: statistics.median(each.get(name, 0.0) for each in later) for name in first}
    print(f"{'seconds':42s} first  later (median of {options.rounds})")
    for name in first:
        print(f"  {name:40s} {first[name]:5.2f}  {middle[name]:5.2f}")
    overhead = statistics.median(each["total"] - each["site: training"] for each in later)
    reached = overhead <= NEEDED_SECONDS and first["total"] <= NEEDED_FIRST_SECONDS
    figures = f"{overhead:.1f} s (limit {NEEDED_SECONDS:g}), first round {first['total']:.1f} s"
    return verdict(
        f"round overhead, {options.sites} sites, {options.cores} cores",
        f"{figures} (limit {NEEDED_FIRST_SECONDS:g})",
        reached=reached,
    )


def watch(local: LocalFederation, num_rounds: int) -> list[dict[str, float]]:
    """The stages of each round of the run, and the processor seconds up to the moment that its record appeared."""
    metrics, found, before = RunDir(local.home / "runs" / "overhead").metrics, list[dict[str, float]](), {}
    end = time.monotonic() + LONGEST_SECONDS
    while len(found) < num_rounds:
        if time.monotonic() > end:
            raise TimeoutError(f"{len(found)} of {num_rounds} rounds in {LONGEST_SECONDS:g} s: see {metrics}")
        time.sleep(0.2)
        records = [event for event in read_metrics(metrics) if event["kind"] == "round"] if metrics.exists() else []
        before = before or processor_seconds(local)
        for record in records[len(found) :]:
            after = processor_seconds(local)
            used = {f"processor: {name}": after[name] - before.get(name, 0.0) for name in after}
            found.append(stages(local, record) | used)
            before = after
    return found


def stages(local: LocalFederation, record: dict[str, Any]) -> dict[str, float]:
    """Seconds of a round, as the coordinator logs them, and the median site's part of it."""
    ended = datetime.fromisoformat(record["time"]).timestamp()
    asked = ended - sum(record["seconds"].get(name, 0.0) for name in ("train", "aggregate", "checkpoint"))
    parts = [_site_parts(local, index, record["round"], asked) for index in range(local.num_sites)]
    median = {name: statistics.median(each[name] for each in parts) for name in parts[0]}
    answered = statistics.median(each["seconds"] for each in record["answered"])
    trained = statistics.median(each["scalars"]["seconds"] for each in record["answered"])
    return {
        **record["seconds"],
        "site: picked up, process started": median["taken"],
        "site: policy, ledger, torch, model": median["worked"] - trained,
        "site: training": trained,
        "site: reply, fetched": max(0.0, answered - sum(median.values())),
    }


def _site_parts(local: LocalFederation, index: int, server_round: int, asked: float) -> dict[str, float]:
    """From the coordinator's question to the site's process having read it, and from there to its answer."""
    entries = read_chain(Home(local.site(index)).journal)
    request = next(
        each for each in entries if each.kind == "request" and each.fields.get("server_round") == server_round
    )
    digest = request.fields["request_digest"]
    release = next(each for each in entries if each.kind == "release" and each.fields["request_digest"] == digest)
    taken = request.time.timestamp()
    return {"taken": max(0.0, taken - asked), "worked": release.time.timestamp() - taken}


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
