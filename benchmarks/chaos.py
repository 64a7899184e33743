"""Kills at random moments behind a door: ServerApp, SuperLink, superexec, node, a site's tasks and their parent, nginx.

By SIGKILL, by SIGSTOP, which leaves a process that is there and does nothing, by SIGKILL and SIGHUP to a whole side, as
when a machine or a terminal goes, and by a disk that is full for half a minute, for everybody at once. A run is hit
several times. It must finish by itself; every round's weights must be, bit for bit, the sum of the sites that answered
it, computed a second time in this process, and those of the undisturbed run whenever the same replies arrived; no
process may be left over.
`--kills N` in all, `--per-run` of them in one run; `--seed` chooses the moments; `--done FILE` keeps what is done and
goes on from there. `--secure` does it to five sites with masked updates, and loses some at each stage of a round.
"""

import argparse
import json
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from benchmarks.disks import reason_against
from benchmarks.disturbances import FILL, LOSSES, MOST_LOST, NUM_SITES, OFFERING, TARGETS, disturb
from benchmarks.forgetting import clear, memories
from benchmarks.local import LocalFederation, federation, leftovers, make_experiment, random_checkpoint
from benchmarks.measure import die_with_parent, verdict
from benchmarks.recount import Recount
from client.home import Home
from server.runs.run_directory import RunDir
from shared.storage.checkpoint import load_group
from shared.storage.runlog import read_metrics

RUN = "chaos"
SEED = 0
Kill = tuple[int, str]
"""Number and target."""
DEADLINE_SECONDS = 900.0
DISK_BYTES = 2**30
"""Of the disk that everything lies on."""
BAD = ("runs unfinished", "runs DIFFERENT", "runs with a WRONG SUM")
SECURE = """secure = true
available_deadline_seconds = 60.0
"""


def experiment_text(kills: int, *, is_secure: bool) -> str:
    """TOML of a run that is hit so many times: a round more than that, none forgotten."""
    return f"""
[federation]
rounds = {kills + 1}
local_steps = 2
min_available = 2
round_deadline_seconds = 300.0
server_optimizer = "fedavgm"
{SECURE if is_secure else ""}[train]
batch = 4
keep_last = {kills + 2}
"""


def main(arguments: Sequence[str] = ()) -> int:
    """A line per kill and one per run, then the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--per-run", type=int, default=5, help="kills that one run is hit by")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--secure", action="store_true", help="five sites with masked updates")
    parser.add_argument("--targets", nargs="*", choices=(*TARGETS, *LOSSES), help="of what is done; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="federations side by side, which share the runs")
    parser.add_argument("--keep", type=Path, help="folder that runs which went wrong are kept in, with all logs")
    parser.add_argument("--done", type=Path, help="file of outcomes, a line per run: those are not run again")
    options = parser.parse_args(arguments)
    targets = tuple(options.targets or (*(LOSSES if options.secure else ()), *TARGETS))
    if not options.secure and set(targets) & set(LOSSES):
        parser.error("sites are lost with --secure only: without masks every run needs all of its two")
    if FILL in targets and (reason := reason_against()):
        parser.error(f"{reason}: leave out `{FILL}`")
    runs = plan(options.kills, options.per_run, targets)
    counts = read_outcomes(options.done)
    open_runs = [(number, kills) for number, kills in runs.items() if number not in counts]
    shares = [(options.seed, open_runs[job :: options.jobs], options.done, options.keep, options.secure)
              for job in range(options.jobs)]  # fmt: skip
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), initializer=die_with_parent) as pool:
        total = sum(pool.map(series, *zip(*shares, strict=True)), sum(counts.values(), Counter()))
    figure = ", ".join(f"{count} {name}" for name, count in sorted(total.items()) if count)
    bad = sum(total[name] for name in (*BAD, "processes left"))
    name = "chaos, masked updates" if options.secure else "chaos"
    return verdict(f"{name}, {options.kills} kills", figure, reached=not bad)


def plan(kills: int, per_run: int, targets: Sequence[str]) -> dict[int, list[Kill]]:
    """Numbers and targets of each run's kills; what can only be done at a run's start comes first in it."""
    numbered: list[Kill] = [(number, targets[number % len(targets)]) for number in range(kills)]
    early = [each for each in numbered if each[1].endswith(OFFERING)]
    late = [each for each in numbered if not each[1].endswith(OFFERING)]
    runs: dict[int, list[Kill]] = {}
    while early or late:
        first = [early.pop(0)] if early else []
        runs[len(runs)] = first + [late.pop(0) for _ in range(min(len(late), per_run - len(first)))]
    return runs


def read_outcomes(done: Path | None) -> dict[int, Counter[str]]:
    """Counts of the runs of earlier calls, by number."""
    lines = done.read_text(encoding="utf-8").splitlines() if done and done.exists() else []
    return {each["run"]: Counter(each["counts"]) for each in map(json.loads, lines)}


def series(
    seed: int, runs: Sequence[tuple[int, list[Kill]]], done: Path | None, keep: Path | None, is_secure: bool
) -> Counter[str]:
    """Counts of `runs`, one after the other in a federation of their own."""
    counts: Counter[str] = Counter()
    with federation(NUM_SITES if is_secure else 2, is_behind_door=True, disk_bytes=DISK_BYTES) as local:
        chaos = Chaos(local, seed, is_secure=is_secure)
        for number, kills in runs:
            outcome = chaos.outcome(kills, keep / f"run-{number}" if keep else None)
            counts.update(outcome)
            if done:
                with done.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"run": number, "counts": dict(outcome)}) + "\n")
        local.stop()
        counts["processes left"] = len(leftovers(local.root))
    return counts


class Chaos:
    """Runs of one name in a federation, which forgets each of them."""

    def __init__(self, local: LocalFederation, seed: int, *, is_secure: bool) -> None:
        self._local, self._seed, self._is_secure = local, seed, is_secure
        if is_secure:
            trust_all(local)
        experiment = make_experiment(experiment_text(1, is_secure=is_secure))
        self._init = random_checkpoint(local.root / "init", experiment)
        self._remembered = {path: path.read_bytes() for path in memories(local)}
        self._recount = Recount(local)
        self._undisturbed: dict[int, tuple[float, bytes]] = {}

    def outcome(self, kills: Sequence[Kill], keep: Path | None) -> Counter[str]:
        """Kills that were done or could not be, and what became of the run, which is printed too."""
        seconds, expected = self._of_undisturbed(len(kills))
        self._begin(len(kills))
        outcome, start = Counter[str](), time.monotonic()
        for index, (number, target) in enumerate(kills):
            # Each in a stretch of its own of an undisturbed run's time, or later where one before took longer.
            moment = (index + random.Random(f"{self._seed} {number}").uniform(0.0, 1.0)) / len(kills)
            moment = 0.0 if target.endswith(OFFERING) else moment * seconds
            time.sleep(max(0.0, start + moment - time.monotonic()))
            since = time.monotonic() - start
            is_done = self._status() == "running" and disturb(self._local, RUN, target, f"{self._seed} {number}")
            outcome["kills" if is_done else "not done"] += 1
            print(f"{number + 1:3d}: {target:28s} after {since:5.1f} s{'' if is_done else ': not done'}", flush=True)
        end, facts = self._judge(expected, [target for _, target in kills])
        print(f"     run of {time.monotonic() - start:.0f} s: {end}, {facts}", flush=True)
        if end in BAD:
            self._keep(keep)
        if self._status() == "running":
            self._local.call("maskfed-server", "stop", RUN, "--home", str(self._local.home))
        try:
            clear(self._local, RUN, self._remembered)
        except TimeoutError:
            self._keep(keep)
            raise
        return outcome + Counter([end])

    def _keep(self, folder: Path | None) -> None:
        """All that there is to read, and what runs."""
        if folder is None:
            return
        kept = shutil.ignore_patterns("images", "*.sock")
        shutil.copytree(self._local.root, folder, ignore=kept, dirs_exist_ok=True)
        running = (str(each.as_dict(["pid", "name", "status", "cmdline"])) for each in leftovers(self._local.root))
        (folder / "processes.txt").write_text("\n".join(running), encoding="utf-8")

    def _of_undisturbed(self, num_kills: int) -> tuple[float, bytes]:
        """Seconds and last weights of a run of so many rounds that nothing happens to."""
        if num_kills not in self._undisturbed:
            start = time.monotonic()
            self._begin(num_kills)
            if (status := self._wait()) != "completed":
                raise RuntimeError(f"the undisturbed run is {status}: see {self._local.root}/*.log")
            self._undisturbed[num_kills] = time.monotonic() - start, final_weights(self._local)
            print(f"undisturbed, {num_kills + 1} rounds: {time.monotonic() - start:.0f} s", flush=True)
            clear(self._local, RUN, self._remembered)
        return self._undisturbed[num_kills]

    def _begin(self, num_kills: int) -> None:
        experiment = self._local.root / "chaos.toml"
        experiment.write_text(experiment_text(num_kills, is_secure=self._is_secure), encoding="utf-8")
        self._local.call(
            *("maskfed-server", "finetune", str(experiment), "--init", str(self._init)),
            *("--home", str(self._local.home), "--run", RUN, "--detach"),
        )

    def _judge(self, expected: bytes, targets: Sequence[str]) -> tuple[str, str]:
        status = self._wait()
        events = read_metrics(RunDir(self._local.home / "runs" / RUN).metrics)
        answers = [len(event["answered"]) for event in events if event["kind"] == "round"]
        again = sum(event["kind"] == "resubmitted" for event in events)
        facts = f"{again} resubmissions, replies {answers}"
        if status != "completed":
            return "runs unfinished", f"{facts}: {events[-1].get('reason', status)}"
        may_give_up = any(target.startswith(f"lose {MOST_LOST + 1}") for target in targets)
        if problem := self._recount.problem(RUN, may_give_up=may_give_up):
            return "runs with a WRONG SUM", f"{facts}: {problem}"
        if answers != [self._local.num_sites] * len(answers):
            return "runs with fewer replies, right sums", facts
        return ("runs of the same bits" if final_weights(self._local) == expected else "runs DIFFERENT"), facts

    def _wait(self) -> str:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while (status := self._status()) == "running" and time.monotonic() < deadline:
            time.sleep(0.5)
        return status

    def _status(self) -> str:
        from server.federation.resubmission import Wanted

        return Wanted(self._local.home).runs()[RUN].status


def trust_all(local: LocalFederation) -> None:
    """Let every site take up the rosters that the coordinator names: approvals are tried elsewhere."""
    for index in range(local.num_sites):
        file = Home(local.site(index)).settings
        file.write_text(file.read_text(encoding="utf-8").replace('rosters = "approved"', 'rosters = "any"'))


def final_weights(local: LocalFederation) -> bytes:
    """Model, average and server state after the last round, as bytes."""
    newest = RunDir(local.home / "runs" / RUN).latest
    assert newest is not None
    groups = [load_group(newest, group) for group in ("model", "ema", "server")]
    return b"".join(group[name].tobytes() for group in groups for name in sorted(group))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
