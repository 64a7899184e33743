"""DPM-Solver++ with 20 network evaluations against DDIM with 250 on a trained T model: how far from DDIM with 1000.

The model is the checkpoint that ships with the project, or one given as argument. All are deterministic and start from
the same noise, so DDIM with 1000 evaluations is the answer that the others approach, and what the model lacks is in no
difference: the error is the mean absolute difference in grey levels, image by image. DDIM with as many evaluations as
DPM-Solver++ is the measure of what its second order is worth: a solver without it would be as far.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.measure import not_measured, verdict
from shared.evaluation.generate import load_model, sample_x_0

SEED = 0
ROUNDS = 16
"""Images."""
NEEDED_FEWER, NEEDED_NEARER = 12.0, 2.0
"""Times fewer evaluations than DDIM 250, and times nearer to DDIM 1000 than DDIM with as many evaluations."""
MODELS = Path(__file__).parent.parent / "server" / "models"
EXACT = "DDIM 1000"
SAMPLERS = {
    EXACT: ["evaluation.sampler=ddim", "evaluation.steps=1000", "evaluation.eta=0"],
    "DPM-Solver++ 20": ["evaluation.sampler=dpm++", "evaluation.steps=20"],
    "DDIM 250": ["evaluation.sampler=ddim", "evaluation.steps=250", "evaluation.eta=0"],
    "DDIM 20": ["evaluation.sampler=ddim", "evaluation.steps=20", "evaluation.eta=0"],
}


def main(arguments: Sequence[str] = ()) -> int:
    """Print evaluations and errors; 0 when the fast solver is near enough."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="?", type=Path, help="default: the shipped model")
    given = parser.parse_args(arguments).checkpoint
    checkpoints = [given] if given else sorted(path.parent for path in MODELS.glob("*/meta.json"))
    if not checkpoints:
        return not_measured("sampling", f"no checkpoint under {MODELS.name}/, give one as argument")
    nfe, images = {}, {}
    for name, overrides in SAMPLERS.items():
        # Clipping inside of the solvers would be a second difference between them.
        loaded = load_model(checkpoints[0], overrides=[*overrides, "evaluation.clip_x_0=false"])
        images[name] = sample_x_0(loaded.model, loaded.experiment, range(SEED, SEED + ROUNDS))
        nfe[name] = loaded.nfe
    errors = {name: levels(images[name], images[EXACT]) for name in SAMPLERS if name != EXACT}
    for name, found in errors.items():
        print(f"{name}: {nfe[name]} evaluations, {statistics.mean(found):.3f} grey levels from {EXACT}")
    fast, many, few = (errors[name] for name in ("DPM-Solver++ 20", "DDIM 250", "DDIM 20"))
    fewer, nearer = nfe["DDIM 250"] / nfe["DPM-Solver++ 20"], statistics.mean(few) / statistics.mean(fast)
    text = (
        f"{fewer:.1f}x fewer evaluations than DDIM 250 (needs {NEEDED_FEWER:.0f}x), {statistics.mean(fast):.2f} grey "
        f"levels from {EXACT} of the same seeds; DDIM 250 {statistics.mean(many):.2f}, DDIM 20 "
        f"{statistics.mean(few):.2f}: {nearer:.1f}x as far (needs {NEEDED_NEARER:.0f}x)"
    )
    return verdict("DPM-Solver++ 20", text, reached=fewer >= NEEDED_FEWER and nearer >= NEEDED_NEARER)


def levels(found: torch.Tensor, exact: torch.Tensor) -> list[float]:
    """Mean absolute difference of each image, in grey levels of 255, of pairs (B, C, H, W) in [-1, 1]."""
    return [float(each) for each in ((found - exact).abs() * 127.5).mean((1, 2, 3))]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
