"""Where the defaults of `[policy.audit]` come from: scores and copies of real faces under two models.

As in `gate`, T at 32 px: a memoriser that has learned 64 faces by heart, and a model of 4,000 faces, both from one
public start, which is their reference. Each face held out or trained on gets the score of a site's audit and the ratio
of its distances to the samples of model and reference.

* `score_edges`: tenths between which scores of held-out faces lie, thinned to the fewest cells whose AUC is at most
  0.01 below that of the scores themselves.
* `copy_ratio`: the largest twentieth below which at most 1 in 100 faces lie that are no copies.
* power: of models that are mixtures of both with AUC 0.65, at least 90 % must fail at `least_units` faces a side.
"""

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.gate import FEW, OVERRIDES, START, split, train
from benchmarks.measure import not_measured, verdict
from client.answers.audit_counts import BATCH, add_noise, scores_of
from client.answers.audit_power import DETECTED_AUC, POWER, least_units, num_cells
from client.answers.audited_model import Subject
from client.limits import AuditPolicy
from shared.audits.membership_attack import area
from shared.audits.memorisation import Features, nearest_neighbours, pixel_features
from shared.evaluation.generate import load_model, sample_images

SEED = 0
FACES, SAMPLES, STEPS, TRIALS = 250, 250, 700, 1000
LARGEST_LOSS, MOST_FALSE_COPIES = 0.01, 0.01
Numbers = NDArray[np.float64]
Measured = Mapping[str, Numbers]
"""By `<model> <scores or ratios> <trained or held_out>`: one number per face."""
MODELS = ("memoriser", "well-behaved")


def main(arguments: Sequence[str] = ()) -> int:
    """Print what the faces say and the defaults that follow; 0 when those of the policy keep both promises."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=Path, help="Folder or zip, class folders are persons.")
    parser.add_argument(
        "--scores", type=Path, help="File (.npz) of an earlier run, or where to keep those of this one."
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="Optimizer steps of either model, of 16 faces each.")
    options = parser.parse_args(arguments)
    if options.faces is None and not (options.scores and options.scores.is_file()):
        return not_measured("audit defaults", "give --faces ZIP")
    if options.scores and options.scores.is_file():
        measured: Measured = dict(np.load(options.scores))
    else:
        measured = measure(options.faces, options.steps)
        if options.scores:
            np.savez(options.scores, **measured)
    return judge(measured)


def measure(faces: Path, steps: int) -> dict[str, Numbers]:
    """Train both models and look at faces with them; minutes on one core."""
    training, others, _ = split(faces)
    loaded = load_model(START, overrides=(*OVERRIDES, "train.batch=16"))
    experiment, start, found = loaded.experiment, loaded.model, {}
    samples = features(start, experiment)
    for name, images in zip(MODELS, (training[:FEW], training), strict=True):
        model = train(deepcopy(start), experiment, images, steps)
        own = features(model, experiment)
        subject = Subject(name, name, model, experiment, (start,))
        for side, shown in (("trained", images[:FACES]), ("held_out", others[:FACES])):
            parts = torch.split(shown, BATCH)
            found[f"{name} scores {side}"] = np.concatenate([scores_of(subject, part) for part in parts])
            found[f"{name} ratios {side}"] = ratios(shown, own, samples)
        print(f"{name}: trained for {steps} steps on {len(images)} faces", flush=True)
    return found


def features(model: nn.Module, experiment: object) -> Features:
    """Of samples, as the copy test sees them."""
    return pixel_features(sample_images(model, experiment, range(SAMPLES), BATCH, "cpu"))  # type: ignore[arg-type]


def ratios(images: Tensor, own: Features, reference: Features) -> Numbers:
    """Distance of each image to the nearest sample of the model over that to the nearest one of the reference, (N,)."""
    looked_up = pixel_features(images)
    found: Numbers = nearest_neighbours(looked_up, own)[0] / nearest_neighbours(looked_up, reference)[0].astype(float)
    return found


def judge(measured: Measured) -> int:
    """Print the figures and hold the policy's defaults against them."""
    audit = AuditPolicy()
    for name in measured:
        print(
            f"{name}: quantiles 1, 25, 50, 75, 99 %:",
            np.quantile(measured[name], [0.01, 0.25, 0.5, 0.75, 0.99]).round(3),
        )
    for name in MODELS:
        trained, held_out = sides(measured, name)
        in_cells = binned(audit.score_edges, trained, held_out)
        print(f"{name}: AUC {area(trained, held_out):.3f}, in the cells {in_cells:.3f}")
    edges, ratio = derived_edges(measured), derived_ratio(measured)
    print(f"derived: score_edges {edges}, copy_ratio {ratio}")
    lost = largest_loss(audit.score_edges, measured)
    false, copied = (
        false_copies(measured, audit.copy_ratio),
        share_below(measured, "memoriser", "trained", audit.copy_ratio),
    )
    seen = detected(measured, audit)
    text = (
        f"cells lose {lost:.3f} AUC (needs {LARGEST_LOSS}), copy_ratio {audit.copy_ratio:g} calls {false:.3f} of the "
        f"others copies (needs {MOST_FALSE_COPIES}) and {copied:.3f} of the memorised (needs {audit.max_copied}), "
        f"{seen:.3f} of models with AUC {DETECTED_AUC} fail at {least_units(audit)} faces a side (needs {POWER})"
    )
    reached = lost <= LARGEST_LOSS and false <= MOST_FALSE_COPIES and copied > audit.max_copied and seen >= POWER
    return verdict("audit defaults", text, reached=reached)


def sides(measured: Measured, name: str) -> tuple[Numbers, Numbers]:
    """Scores of trained and of held-out faces."""
    return measured[f"{name} scores trained"], measured[f"{name} scores held_out"]


def binned(edges: Sequence[float], trained: Numbers, held_out: Numbers) -> float:
    """AUC when only the cell of each score is known."""
    cells = [np.searchsorted(edges, scores, "right").astype(np.float64) for scores in (trained, held_out)]
    return area(*cells)


def mixed(measured: Measured) -> tuple[Numbers, Numbers, float]:
    """Scores of both models' trained faces, of held-out ones, and the share of memorised faces that gives AUC 0.65."""
    memorised, _ = sides(measured, "memoriser")
    trained, held_out = sides(measured, "well-behaved")
    high, low = area(memorised, held_out), area(trained, held_out)
    return memorised, held_out, float(np.clip((DETECTED_AUC - low) / (high - low), 0, 1))


def largest_loss(edges: Sequence[float], measured: Measured) -> float:
    """AUC that the cells lose, over both models and their mixture."""
    memorised, held_out, share = mixed(measured)
    trained = sides(measured, "well-behaved")[0]
    losses = [area(*pair) - binned(edges, *pair) for pair in (sides(measured, name) for name in MODELS)]
    part = [area(each, held_out) - binned(edges, each, held_out) for each in (memorised, trained)]
    return max(*losses, share * part[0] + (1 - share) * part[1])


def derived_edges(measured: Measured) -> list[float]:
    """The fewest thresholds, of tenths between the outermost scores, that lose little."""
    scores = np.concatenate([side for name in MODELS for side in sides(measured, name)])
    low, high = np.quantile(scores, [0.01, 0.99])
    tenths = (np.arange(np.floor(low * 10), np.ceil(high * 10) + 1) / 10).round(1)
    edges = list(tenths)
    while len(edges) > 1:
        tried = [edges[:place] + edges[place + 1 :] for place in range(len(edges))]
        best = min(tried, key=lambda each: largest_loss(each, measured))
        if largest_loss(best, measured) > LARGEST_LOSS:
            break
        edges = best
    return [float(edge) for edge in edges]


def share_below(measured: Measured, name: str, side: str, ratio: float) -> float:
    """Share of faces that the copy test takes for copied."""
    return float((measured[f"{name} ratios {side}"] < ratio).mean())


def false_copies(measured: Measured, ratio: float) -> float:
    """The largest such share among faces that no model has learned by heart."""
    return (
        max(share_below(measured, *each, ratio) for each in itertools.product(MODELS, ("held_out",))) if ratio else 0.0
    )


def derived_ratio(measured: Measured) -> float:
    """The largest twentieth that takes few others for copies."""
    return (
        max(ratio for ratio in np.arange(1, 20).tolist() if false_copies(measured, ratio / 20) <= MOST_FALSE_COPIES)
        / 20
    )


def detected(measured: Measured, audit: AuditPolicy) -> float:
    """Share of mixtures with AUC 0.65 that fail, each with faces and noise of its own."""
    memorised, held_out, share = mixed(measured)
    trained, rng, count = sides(measured, "well-behaved")[0], np.random.default_rng(SEED), least_units(audit)
    failed = 0
    for _ in range(TRIALS):
        is_memorised = rng.random(count) < share
        members = np.where(is_memorised, rng.choice(memorised, count), rng.choice(trained, count))
        cells = [np.searchsorted(audit.score_edges, side, "right") for side in (members, rng.choice(held_out, count))]
        failed += add_noise(cells[0], cells[1], num_cells(audit), audit.noise_multiplier).auc > audit.max_auc
    return failed / TRIALS


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
