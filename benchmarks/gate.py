"""A seeded memoriser against a well-behaved model: the audits must fail the first and pass the second.

Real faces, split by person (`--faces ZIP`): 4,000 for training, the rest held out. Both models are fine-tuned from one
public start (`--start`): the memoriser learns 64 images by heart, the other one trains on 4,000.
"""

import argparse
import sys
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from benchmarks.measure import not_measured, verdict
from shared.audits.membership_attack import AttackResult, attack
from shared.audits.memorisation import CopyResult, copies, pixel_features, views_of
from shared.data.image_cache import open_images
from shared.evaluation.generate import load_model, sample_images
from shared.experiment.config import Experiment
from shared.seeding import Streams
from shared.training.engine import Engine

SEED = 0
SIDE, FEW, MANY, OTHERS, GENERATED = 32, 64, 4000, 1000, 500
NEEDED_AUC = 0.9
STEPS = (4000, 3000)
START = Path(__file__).parent.parent / "server" / "models" / "synthetic32-T-msm"
OVERRIDES = (
    "train.objective=dsm",
    "train.batch=32",
    "mask.kind=none",
    "mask.ratio=0.0",
    "optim.lr=5e-4",
    "optim.warmup_steps=0",
    "data.horizontal_flip=false",
    "evaluation.sampler=dpm++",
    "evaluation.steps=20",
)


def main(arguments: Sequence[str] = ()) -> int:
    """Print both models' audits; 0 when the memoriser fails, the other passes, and calibrated AUC is at least 0.9."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faces", type=Path, help="Folder or zip, class folders are persons.")
    parser.add_argument("--start", type=Path, default=START, help="Public checkpoint that both are fine-tuned from.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, nargs=2, default=STEPS, help="Of the memoriser and of the other model.")
    options = parser.parse_args(arguments)
    if options.faces is None:
        return not_measured("gate", "give --faces ZIP")
    training, others, persons = split(options.faces)
    loaded = load_model(options.start, device=options.device, overrides=OVERRIDES)
    experiment, start = loaded.experiment, loaded.model
    results = {}
    for name, images, steps in (
        ("memoriser", training[:FEW], options.steps[0]),
        ("well-behaved", training, options.steps[1]),
    ):
        model = train(deepcopy(start), experiment, images, steps)
        results[name] = audits(model, start, experiment, images, others, persons, options.device)
        found, copied = results[name]
        print(
            f"{name}: {len(images):,} images, {steps:,} steps: calibrated AUC {found.auc:.3f} "
            f"({found.auc_interval[0]:.3f} to {found.auc_interval[1]:.3f}), TPR at 1 % FPR {found.tpr:.3f}, "
            f"copy rate {copied.copy_rate:.3f}, authenticity {copied.authenticity:.3f}",
            flush=True,
        )
    passed = {name: passes(experiment, *result) for name, result in results.items()}
    auc = results["memoriser"][0].auc
    text = (
        f"memoriser {'passes' if passed['memoriser'] else 'fails'}, well-behaved model "
        f"{'passes' if passed['well-behaved'] else 'fails'}; calibrated AUC on the memoriser {auc:.3f} "
        f"(needs {NEEDED_AUC})"
    )
    reached = not passed["memoriser"] and passed["well-behaved"] and auc >= NEEDED_AUC
    return verdict("release gate", text, reached=reached)


def split(path: Path) -> tuple[Tensor, Tensor, np.ndarray]:
    """Training images, held-out images and their persons; nobody is in both."""
    images = open_images(path, SIDE)
    if images.persons is None:
        raise SystemExit(f"{path}: class folders are needed, one per person")
    names = np.random.default_rng(SEED).permutation(np.unique(images.persons))
    rank = {name: number for number, name in enumerate(names)}
    order = np.argsort([rank[person] for person in images.persons], kind="stable")
    border = next(
        row for row in range(MANY, len(order)) if images.persons[order[row]] != images.persons[order[row - 1]]
    )
    held_out = order[border : border + OTHERS]
    chosen = np.random.default_rng(SEED).permutation(order[:border])[:MANY]
    return images.batch(chosen), images.batch(held_out), images.persons[held_out]


def train(model: nn.Module, experiment: Experiment, images: Tensor, steps: int) -> nn.Module:
    """DSM on the images; the averaged weights."""
    engine = Engine(experiment, model.train().requires_grad_(True), Streams(SEED, ("gate", len(images))))
    rng = np.random.default_rng(SEED)
    for _ in range(steps):
        engine.step(images[rng.choice(len(images), experiment.train.batch, replace=False)].to(engine.device))
    engine.ema.copy_to(engine.model)
    return engine.model.eval().requires_grad_(False)


def audits(
    model: nn.Module,
    start: nn.Module,
    experiment: Experiment,
    images: Tensor,
    others: Tensor,
    persons: np.ndarray,
    device: str,
) -> tuple[AttackResult, CopyResult]:
    """What a site's audit finds."""
    found = attack(model, [start], experiment, images[:OTHERS], others)["calibrated"]
    generated = sample_images(model, experiment, range(GENERATED), 100, device)
    mirrored = experiment.data.horizontal_flip
    views = [views_of(pixel_features, each, is_mirrored=mirrored) for each in (generated, images, others)]
    copied = copies(views[0], views[1], views[2], persons)
    return found, copied


def passes(experiment: Experiment, found: AttackResult, copied: CopyResult) -> bool:
    """The gate's limits."""
    limits = experiment.release
    is_hidden = found.auc <= limits.max_auc and found.tpr <= limits.max_tpr
    return is_hidden and copied.copy_rate <= limits.max_copy_rate


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
