"""100 virtual sites on 2 cores: 5 rounds of the T model through `maskfed-server simulate`; seconds per round."""

import argparse
import subprocess
import sys
from collections.abc import Sequence

from benchmarks.local import command, make_experiment, random_checkpoint
from benchmarks.measure import verdict
from benchmarks.scratch import scratch
from shared.storage.runlog import read_metrics

EXPERIMENT = "[federation]\nrounds = {rounds}\nlocal_steps = 1\nmin_available = {sites}\n[train]\nbatch = 4\n"


def main(arguments: Sequence[str] = ()) -> int:
    """Print the rounds' seconds, then the verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpus", type=int, default=2)
    options = parser.parse_args(arguments)
    with scratch() as root:
        experiment = make_experiment(EXPERIMENT.format(rounds=options.rounds, sites=options.sites))
        (root / "simulation.toml").write_text(experiment.to_toml(), encoding="utf-8")
        init = random_checkpoint(root / "init", experiment)
        out = root / "out"
        done = subprocess.run(
            command("maskfed-server", "simulate", str(root / "simulation.toml"), "--sites", str(options.sites),
                    "--data", "synthetic:8", "--init", str(init), "--out", str(out), "--cpus", str(options.cpus)),
            check=False,
        )  # fmt: skip
        events = read_metrics(out / "runs" / "simulation" / "metrics.jsonl")
    rounds = [event for event in events if event["kind"] == "round"]
    seconds = [event["seconds"]["total"] for event in rounds]
    answered = [len(event["answered"]) for event in rounds]
    reached = done.returncode == 0 and answered == [options.sites] * options.rounds
    figure = f"rounds of {seconds} s, {answered} replies"
    return verdict(f"simulation, {options.sites} sites, {options.cpus} cores", figure, reached=reached)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
