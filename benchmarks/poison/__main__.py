"""One bad site of nine: nine sites by person, each attack under each rule, three seeds.

    python -m benchmarks.poison [--scale small] [--private FACES --public FACES] [--out FOLDER] [--arms PART]

Every arm is a file in `--out`; those that are there are not run again. Seeds are of everything: start, division,
batches, target. Without image sets synthetic faces stand in. An adversary must reach its rate without defences, or it
is a weak one; with the defaults (clipped mean, roll-back) it must not gain a tenth of that nor cost 2 percent of the
held-out loss, or be named; and of the honest rounds none may be undone.
"""

import argparse
import json
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.measure import verdict
from benchmarks.poison.arm import Arm, Attack
from benchmarks.poison.scale import NUM_SITES, SCALES, pictures, quiet_threads
from benchmarks.poison.start import start_of
from benchmarks.poison.success import Yardsticks
from benchmarks.poison.summary import summarise
from client.simulated.adversary import Adversary
from shared.updates.norm_bound import norm_bound

SEED = 0
SEEDS = (0, 1, 2)
OWNS_MEAN = float(NUM_SITES)
"""Strength of one site that makes up the whole mean."""
ATTACKS = {
    attack.name: attack
    for attack in (
        Attack("none"),
        Attack("backdoor", Adversary(kind="backdoor", strength=OWNS_MEAN)),
        Attack("implant", Adversary(kind="implant", strength=OWNS_MEAN)),
        Attack("colluding", Adversary(kind="implant", strength=OWNS_MEAN / 2), num_sites=2),
        Attack("sign-flip", Adversary(kind="sign-flip", strength=3 * OWNS_MEAN)),
        Attack("scaled", Adversary(kind="scaled", strength=3 * OWNS_MEAN)),
        Attack("lazy", Adversary(kind="lazy")),
        Attack("stale", Adversary(kind="stale")),
    )
}
RULES = ("mean-checked", "mean", "clipped-checked", "clipped")
"""Without a round undone a rule comes to the same with the check and without: such an arm is not run twice."""


@dataclass(frozen=True)
class Job:
    """One arm."""

    scale: str
    rule: str
    attack: str
    seed: int
    private: str
    public: str
    out: Path

    @property
    def file(self) -> Path:
        """Where its outcome lies."""
        return self.out / f"{self.rule}.{self.attack}.{self.seed}.json"


def main(arguments: list[str] | None = None) -> int:
    """Run the arms that are missing and print the table; 0 when the goals are reached."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.poison", description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--private", default="", help="images with folders by person")
    parser.add_argument("--public", default="")
    parser.add_argument("--out", type=Path, default=Path("runs/poison"))
    parser.add_argument("--arms", default="", help="run those whose name contains this, and print no verdict")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="fewer than three, where time is short")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    out = options.out / options.scale
    jobs = [
        Job(options.scale, rule, attack, seed, options.private, options.public, out)
        for seed in SEEDS[: options.seeds]
        for attack in ATTACKS
        for rule in RULES
    ]
    for job in jobs:
        if options.arms in job.file.name:
            run_job(job)
    if options.arms:
        return 0
    text, is_reached = summarise(
        {job.file.stem: json.loads(job.file.read_text()) for job in jobs}, ATTACKS, SEEDS[: options.seeds]
    )
    return verdict(f"one bad site of {NUM_SITES}, scale {options.scale}", text, reached=is_reached)


def run_job(job: Job) -> None:
    """Run one arm, unless its outcome is there."""
    same = job.out / f"{job.rule}-checked.{job.attack}.{job.seed}.json"
    if job.file.exists():
        return
    if same.exists() and not json.loads(same.read_text())["rolled_back"]:
        shutil.copyfile(same, job.file)
        return
    quiet_threads()
    began, scale = time.monotonic(), SCALES[job.scale]
    scale.install()
    images = pictures(scale, job.private, job.public, job.seed)
    experiment = scale.experiment(job.seed, **defences(job))
    is_honest_check = job.attack == "none" and job.rule.endswith("checked")
    arm = Arm(
        experiment,
        ATTACKS[job.attack],
        images,
        start_of(scale, images, job.seed, job.out),
        is_checked=job.rule.endswith("checked"),
    )
    yardsticks = Yardsticks(experiment, images, job.seed)
    outcome = arm.run(scale.honest_rounds if is_honest_check else scale.rounds, yardsticks, scale.rounds)
    facts = {
        **asdict(outcome),
        "bound": norm_bound(experiment, len(arm.model.weights)),
        "seconds": time.monotonic() - began,
    }
    job.out.mkdir(parents=True, exist_ok=True)
    job.file.write_text(json.dumps(facts) + "\n")
    print(f"{job.file.stem}: {outcome.after}, rolled back {outcome.rolled_back} {outcome.suspects}", flush=True)


def defences(job: Job) -> dict[str, object]:
    """Settings of the federation under a rule; who knows the bound stays at it, as clipping makes him do."""
    if job.rule.startswith("clipped"):
        return {"update_norm_action": "clip"}
    return {"max_update_norm": 0.0}


if __name__ == "__main__":
    sys.exit(main())
