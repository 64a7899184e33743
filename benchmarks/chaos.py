"""Kills at random moments behind a door: ServerApp, SuperLink, superexec, node, a site's tasks and their parent, nginx.

By SIGKILL, by SIGSTOP, which leaves a process that is there and does nothing, by SIGKILL and SIGHUP to a whole side, as
when a machine or a terminal goes, and by a disk that is full for half a minute, for everybody at once. Every run must
finish by itself, with the weights of the undisturbed run, bit for bit, whenever the same replies arrived; no process
may be left over.
`--runs N` runs, one kill each; `--seed` chooses the moments; `--done FILE` keeps what is done and goes on from there.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import psutil

from benchmarks.disks import fill, reason_against
from benchmarks.local import LocalFederation, federation, leftovers, make_experiment, random_checkpoint
from benchmarks.measure import die_with_parent, verdict
from server.runs.run_directory import RunDir
from shared.storage.checkpoint import load_group
from shared.storage.runlog import read_metrics

RUN = "chaos"
SEED = 0
REPLY = "client in reply"
"""The client process while its SuperNode has the head of a reply and waits for the rest."""
MACHINE, SITE = "the coordinator", "a site"
"""Everything of one side at once, as when its machine dies; started again as an init system would."""
WORKER = "nginx worker"
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
DEADLINE_SECONDS = 600.0
DISK_BYTES, FULL_SECONDS = 2**30, 30.0
"""Of the disk that everything lies on, and how long it is full."""
EXPERIMENT = """
[federation]
rounds = 3
local_steps = 2
min_available = 2
round_deadline_seconds = 300.0
server_optimizer = "fedavgm"
[train]
batch = 4
"""


def main(arguments: Sequence[str] = ()) -> int:
    """One line per run, then the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--targets", nargs="*", choices=TARGETS, default=TARGETS)
    parser.add_argument("--jobs", type=int, default=1, help="federations side by side, which share the kills")
    parser.add_argument("--done", type=Path, help="file of outcomes, a line each: those are not run again")
    options = parser.parse_args(arguments)
    if FILL in options.targets and (reason := reason_against()):
        parser.error(f"{reason}: leave out `{FILL}`")
    outcomes = read_outcomes(options.done)
    open_ones = [number for number in range(options.runs) if number not in outcomes]
    shares = [(options.seed, open_ones[job :: options.jobs], options.targets, options.done)
              for job in range(options.jobs)]  # fmt: skip
    counts = Counter(outcomes.values())
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), initializer=die_with_parent) as pool:
        counts = sum(pool.map(series, *zip(*shares, strict=True)), counts)
    figure = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()) if count)
    bad = counts["unfinished"] + counts["DIFFERENT"] + counts["processes left"]
    return verdict(f"chaos, {options.runs} kills", figure, reached=not bad)


def read_outcomes(done: Path | None) -> dict[int, str]:
    """Outcomes by number of earlier calls."""
    lines = done.read_text(encoding="utf-8").splitlines() if done and done.exists() else []
    return {each["number"]: each["outcome"] for each in map(json.loads, lines)}


def series(seed: int, kills: Sequence[int], targets: Sequence[str], done: Path | None) -> Counter[str]:
    """Outcomes of the runs numbered `kills`, one after the other in a federation of their own."""
    counts: Counter[str] = Counter()
    with federation(2, is_behind_door=True, disk_bytes=DISK_BYTES if FILL in targets else 0) as local:
        init = random_checkpoint(local.root / "init", make_experiment(EXPERIMENT))
        remembered = {path: path.read_bytes() for path in memories(local)}
        start = time.monotonic()
        counts["unfinished"] += run_once(local, init, lambda: None) != "completed"
        duration = time.monotonic() - start
        expected = final_weights(local)
        print(f"undisturbed: {duration:.0f} s", flush=True)
        for number in kills:
            clear(local, remembered)
            target = targets[number % len(targets)]
            moment = random.Random(f"{seed} {number}").uniform(0.0, duration)
            outcome, facts = disturbed(local, init, expected, target, moment)
            counts.update([outcome])
            print(f"{number + 1:3d}: {target:25s} after {moment:5.1f} s: {outcome} ({facts})", flush=True)
            if done:
                with done.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"number": number, "target": target, "outcome": outcome}) + "\n")
        local.stop()
        counts["processes left"] = len(leftovers(local.root))
    return counts


def disturbed(local: LocalFederation, init: Path, expected: bytes, target: str, moment: float) -> tuple[str, str]:
    """What became of a run in which `target` was killed `moment` seconds after its start."""
    start = time.monotonic()
    killed: list[bool] = []
    status = run_once(local, init, lambda: killed.append(kill(local, target, moment)))
    events = read_metrics(RunDir(local.home / "runs" / RUN).metrics)
    rounds = [event for event in events if event["kind"] == "round"]
    answers = [len(event["answered"]) for event in rounds]
    again = sum(event["kind"] == "resubmitted" for event in events)
    facts = f"{time.monotonic() - start:.0f} s, {again} resubmissions, replies {answers}"
    if not killed[0]:
        return "not killed", facts
    if status != "completed":
        return "unfinished", f"{facts}: {events[-1].get('reason', status)}"
    if answers != [local.num_sites] * len(answers):
        return "other replies", facts
    return ("same bits" if final_weights(local) == expected else "DIFFERENT"), facts


def run_once(local: LocalFederation, init: Path, disturb: Callable[[], None]) -> str:
    """Submit the run, disturb it, wait for its end; its status."""
    from server.federation.resubmission import Wanted

    experiment = local.root / "chaos.toml"
    experiment.write_text(EXPERIMENT, encoding="utf-8")
    local.call(
        *("maskfed-server", "finetune", str(experiment), "--init", str(init)),
        *("--home", str(local.home), "--run", RUN, "--detach"),
    )
    disturb()
    deadline = time.monotonic() + DEADLINE_SECONDS
    while (entry := Wanted(local.home).runs()[RUN]).status == "running" and time.monotonic() < deadline:
        time.sleep(0.5)
    return entry.status


def kill(local: LocalFederation, target: str, moment: float) -> bool:
    """Do it to one process of a kind, `moment` seconds from now, or as soon as there is one; false: none came."""
    time.sleep(moment)
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
    deadline = time.monotonic() + 60
    while not (found := victims(local, victim)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    found[0].send_signal(MEANS[means])
    return True


def victims(local: LocalFederation, target: str) -> list[psutil.Process]:
    """Running processes of one kind."""
    processes = local.processes()
    if target == REPLY:
        return [process for process in processes.get("flwr-clientapp", []) if is_replying(process)]
    if target in ("nginx", WORKER):
        found = [process for group in processes.values() for process in group if name_of(process) == "nginx"]
        return [process for process in found if is_worker(process) == (target == WORKER)]
    if target != "server superexec":
        return processes.get(target, [])
    below = psutil.Process(local.daemons["coordinator"].pid).children(recursive=True)
    return [process for process in processes.get("flower-superexec", []) if process in below]


def name_of(process: psutil.Process) -> str:
    """The kernel's name of a process; nginx writes titles over its command line."""
    try:
        return str(process.name())
    except psutil.Error:
        return ""


def is_worker(process: psutil.Process) -> bool:
    """Whether nginx's own master has started this process of nginx."""
    try:
        return name_of(psutil.Process(process.ppid())) == "nginx"
    except psutil.Error:
        return False


def is_replying(process: psutil.Process) -> bool:
    """Whether a client process is sending its reply: only then it has a child, which waits for the end of that."""
    try:
        return bool(process.children())
    except psutil.NoSuchProcess:
        return False


def memories(local: LocalFederation) -> list[Path]:
    """Files by which sites remember what they were asked: ledgers, their heads, journals."""
    return [*local.root.glob("site-*/*.jsonl"), *local.root.glob("heads/*.json")]


def clear(local: LocalFederation, remembered: dict[Path, bytes]) -> None:
    """Make room for the next run of the same name: no run directory, and sites that remember nothing of it."""
    shutil.rmtree(local.home / "runs" / RUN)
    deadline = time.monotonic() + 120
    while local.num_online() < local.num_sites or victims(local, "flwr-clientapp"):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the sites are not back: see {local.root}/*.log")
        time.sleep(0.5)
    for path in memories(local):
        path.write_bytes(remembered[path]) if path in remembered else path.unlink()
    for site in range(local.num_sites):
        shutil.rmtree(local.site(site) / "last_reply", ignore_errors=True)


def final_weights(local: LocalFederation) -> bytes:
    """Model, average and server state after the last round, as bytes."""
    newest = RunDir(local.home / "runs" / RUN).latest
    assert newest is not None
    groups = [load_group(newest, group) for group in ("model", "ema", "server")]
    return b"".join(group[name].tobytes() for group in groups for name in sorted(group))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
