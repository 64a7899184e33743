"""One bad site of nine: nine sites by person, each attack under each rule, three seeds.

    python -m benchmarks.poison [--scale small] [--private FACES --public FACES] [--out FOLDER] [--arms PART]

Every arm is a file in `--out`; those that are there are not run again. Seeds are of everything: start, division,
batches, target. Without image sets synthetic faces stand in. An adversary must reach its rate without defences, or it
is a weak one; with the defaults (bounds, roll-back, doubt) it must not gain a tenth of that nor cost 2 percent
of the held-out loss, or be named; and no honest round may be undone, no honest site named.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.measure import verdict
from benchmarks.poison.arm import Arm, Attack
from benchmarks.poison.scale import NUM_SITES, SCALES, pictures, quiet_threads
from benchmarks.poison.start import start_of
from benchmarks.poison.success import Yardsticks
from benchmarks.poison.summary import DEFENDED, summarise
from client.simulated.adversary import Adversary
from shared.updates.norm_bound import norm_bound

SEED = 0
SEEDS = (0, 1, 2)
OWNS_MEAN = float(NUM_SITES)
"""Strength of one site that makes up the whole mean."""
HIDDEN_SHARE = 0.45
"""Of its length that the careful adversary pushes with: about as much as stays below `max_persistence` unnamed."""
ATTACKS = {
    attack.name: attack
    for attack in (
        Attack("none"),
        Attack("backdoor", Adversary(kind="backdoor", strength=OWNS_MEAN)),
        Attack("implant", Adversary(kind="implant", strength=OWNS_MEAN)),
        Attack("colluding", Adversary(kind="implant", strength=OWNS_MEAN / 2), num_sites=2),
        Attack("careful", Adversary(kind="implant", strength=OWNS_MEAN), hides=HIDDEN_SHARE),
        Attack("sign-flip", Adversary(kind="sign-flip", strength=3 * OWNS_MEAN)),
        Attack("scaled", Adversary(kind="scaled", strength=3 * OWNS_MEAN)),
        Attack("lazy", Adversary(kind="lazy")),
        Attack("stale", Adversary(kind="stale")),
        Attack("foreign", is_foreign=True),
    )
}
RULES = ("mean", "mean-checked", "clipped-checked", "crowd-checked")
"""No defence; the held-out check alone; with the constant norm bound, clipping; with all that is on by default."""
DAMAGING = ("sign-flip", "scaled")
"""Attacks that the check alone is tried on."""


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
    parser.add_argument("--attacks", default=",".join(ATTACKS), help="some of them, with commas")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="fewer than three, where time is short")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    out = options.out / options.scale
    attacks = {name: ATTACKS[name] for name in ("none", *options.attacks.split(",")) if name in ATTACKS}
    jobs = [
        Job(options.scale, rule, attack, seed, options.private, options.public, out)
        for seed in SEEDS[: options.seeds]
        for attack in attacks
        for rule in RULES
        if is_tried(rule, ATTACKS[attack])
    ]
    for job in jobs:
        if options.arms in job.file.name:
            run_job(job)
    if options.arms:
        return 0
    text, is_reached = summarise(
        {job.file.stem: json.loads(job.file.read_text()) for job in jobs}, attacks, SEEDS[: options.seeds]
    )
    what = f"one bad site of {NUM_SITES}, scale {options.scale}, {options.seeds} seeds"
    return verdict(what, text, reached=is_reached)


def is_tried(rule: str, attack: Attack) -> bool:
    """Whether a rule is tried on an attack, or on honest sites: to hide from no defence makes no sense."""
    match rule:
        case "mean":
            return not (attack.hides or attack.is_foreign)
        case "mean-checked":
            return attack.name in DAMAGING
        case "clipped-checked":
            return attack.adversary is not None
        case _:
            return True


def run_job(job: Job) -> None:
    """Run one arm, unless its outcome is there."""
    if job.file.exists():
        return
    quiet_threads()
    began, scale = time.monotonic(), SCALES[job.scale]
    scale.install()
    images = pictures(scale, job.private, job.public, job.seed)
    experiment = scale.experiment(job.seed, **defences(job))
    is_long = job.attack == "none" and job.rule == DEFENDED
    arm = Arm(
        experiment,
        ATTACKS[job.attack],
        images,
        start_of(scale, images, job.seed, job.out),
        is_checked=job.rule.endswith("checked"),
    )
    yardsticks = Yardsticks(experiment, images, job.seed)
    outcome = arm.run(scale.honest_rounds if is_long else scale.rounds, yardsticks, scale.rounds)
    facts = {
        **asdict(outcome),
        "bound": norm_bound(experiment, len(arm.model.weights)),
        "seconds": time.monotonic() - began,
    }
    job.out.mkdir(parents=True, exist_ok=True)
    job.file.write_text(json.dumps(facts) + "\n")
    what = f"rolled back {outcome.rolled_back} {outcome.suspects}, named {outcome.named}"
    print(f"{job.file.stem}: {outcome.after}, {what}", flush=True)


def defences(job: Job) -> dict[str, object]:
    """Settings of the federation under a rule; who knows the bound stays at it, as clipping makes him do."""
    blind = {"max_norm_ratio": 0.0, "max_persistence": 0.0}
    return {
        "mean": {"max_update_norm": 0.0, **blind},
        "clipped": {"update_norm_action": "clip", **blind},
        "crowd": {"update_norm_action": "clip"},
    }[job.rule.removesuffix("-checked")]


if __name__ == "__main__":
    sys.exit(main())
