"""Does masking lower the risk of leakage (the paper's remark on privacy), by how much, and at which quality?

    python -m benchmarks.leakage --faces FACES [--arms NAMES] [--seeds N]

Target and shadow are trained on 32 faces each at mask ratios 0, 0.5 and 0.9 with equal operations, and then fine-tuned
on others. The product's own attacks ask for the 32 after both stages: membership (calibrated by the shadow), copies;
and an image is recovered from an update. Every arm ends as a line of `results.jsonl`; those there are not run again.
Without `--faces` nothing runs and the table of what is there is printed.
"""

import argparse
import datetime
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.leakage.inversion import invert
from benchmarks.leakage.table import table
from benchmarks.leakage.training import (
    RATIOS,
    SIZE,
    STAGE_FLOPS,
    TUNING_FLOPS,
    Images,
    divide,
    experiment,
    fine_tuned,
    first_stage,
)
from benchmarks.measure import hardware, not_measured, verdict
from shared.audits.membership_attack import attack
from shared.audits.memorisation import copies, pixel_features, views_of
from shared.data.image_cache import open_images
from shared.diffusion.losses import draw_noise, per_image_loss
from shared.diffusion.schedule import make_schedule
from shared.evaluation.generate import sample_images
from shared.experiment.config import Experiment
from shared.planning.speed_probe import images_per_second
from shared.planning.workload import duration
from shared.seeding import Streams
from shared.storage.versions import git_commit
from shared.training.flops import train_flops

SEED = 0
RESULTS = Path(__file__).parent / "results.jsonl"
GENERATED, INVERTED = 100, 2
ATTACKS_FLOPS = 18e12
"""Of one arm beside its trainings, about."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the arms that are missing and print the table; 0 when masking lowers the risk."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.leakage", description=__doc__.splitlines()[0])
    parser.add_argument("--faces", default="", help="real faces, in folders by person")
    parser.add_argument("--arms", default=",".join(RATIOS), help="run these, by name, with commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(sys.argv[1:] if arguments is None else list(arguments))
    if options.faces:
        torch.set_num_threads(1)
        run_missing(options.arms.split(","), range(SEED, SEED + options.seeds), options.faces, options.results)
    rows = read(options.results)
    if not rows:
        return not_measured("leakage", "give --faces ZIP")
    text, is_lower = table(rows)
    return verdict("leakage by masking", text, reached=is_lower)


def read(results: Path) -> list[dict[str, Any]]:
    """What is there."""
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()] if results.exists() else []


def run_missing(names: Sequence[str], seeds: Sequence[int], faces: str, results: Path) -> None:
    """Run what has no line yet, all ratios of a seed first, after saying how long it takes."""
    done = {(row["arm"], row["seed"]) for row in read(results)}
    missing = [(name, seed) for seed in seeds for name in names if (name, seed) not in done]
    if not missing:
        return
    images, plan = open_images(faces, SIZE), experiment(0.0, SEED)
    rate = images_per_second(plan, 2.0) * train_flops(plan)
    each = (2 * (STAGE_FLOPS + TUNING_FLOPS) + ATTACKS_FLOPS) / rate
    print(f"{len(missing)} arms: about {duration(each)} each, {duration(each * len(missing))} in all", flush=True)
    for name, seed in missing:
        facts = run(name, seed, divide(images, seed))
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")


def run(name: str, seed: int, images: Images) -> dict[str, Any]:
    """One arm with its attacks, as a line of the results."""
    begin, ratio = time.process_time(), RATIOS[name]
    target, shadow = (first_stage(ratio, part, seed) for part in (images.members, images.shadow))
    scores = {"pre-trained": attacked(target, shadow, images, seed)}
    plan = experiment(ratio, seed)
    inversion = invert(target, plan, images.tuning[:INVERTED], images.others, seed)
    tuned = [fine_tuned(model, images.tuning, seed) for model in (target, shadow)]
    scores["fine-tuned"] = attacked(tuned[0], tuned[1], images, seed)
    seconds = round(time.process_time() - begin, 1)
    print(f"{name}, seed {seed}: {scores}, {inversion}, {seconds} s", flush=True)
    return {
        "arm": name,
        "seed": seed,
        "hidden": 1 - plan.num_visible / plan.grid_size**2,
        "scores": scores,
        "inversion": asdict(inversion),
        "seconds": seconds,
        "commit": git_commit(),
        "hardware": hardware(),
        "date": datetime.date.today().isoformat(),
    }


def attacked(target: nn.Module, shadow: nn.Module, images: Images, seed: int) -> dict[str, float]:
    """What the audits find of the first stage's images, and how good the model is on images it never saw."""
    plan = experiment(0.0, seed)
    found = attack(target, [shadow], plan, images.members, images.others)
    generated = sample_images(target, plan, range(GENERATED), 50)
    views = [views_of(pixel_features, each, is_mirrored=False) for each in (generated, images.members, images.others)]
    copied = copies(views[0], views[1], views[2], images.persons)
    return {
        **{f"auc_{kind}": result.auc for kind, result in found.items()},
        "tpr": found["calibrated"].tpr,
        "copied": copied.copy_rate,
        "unseen_loss": unseen_loss(target, plan, images.others),
    }


@torch.no_grad()
def unseen_loss(model: nn.Module, plan: Experiment, images: Tensor) -> float:
    """Mean denoising loss on images that were never seen, with the same times and noise for every model."""
    draw = draw_noise(plan, len(images), Streams(SEED, ("leakage", "unseen")).generator("noise"))
    draw = draw._replace(t_B=((torch.arange(len(images)) + 0.5) * plan.diffusion.timesteps / len(images)).long())
    schedule = make_schedule(plan.diffusion.schedule, plan.diffusion.timesteps)
    return float(per_image_loss(model, schedule, plan, images, *draw).mean())


if __name__ == "__main__":
    sys.exit(main())
