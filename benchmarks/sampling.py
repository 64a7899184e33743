"""DPM-Solver++ with 20 network evaluations against DDIM with 250 (eta 0 and 1) on a trained T model, same seeds.

The model is the checkpoint that ships with the project, or one given as argument. The distance is the Frechet distance
of images pooled to 8 x 8 pixels to other synthetic faces of the population that the model was trained on: an Inception
takes longer than the sampling. Its noise is the standard deviation over resamples of the images, the same resamples for
all samplers.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.measure import verdict
from shared.data.synthetic import generate
from shared.evaluation.frechet import frechet
from shared.evaluation.generate import load_model, sample_images
from shared.training.precision import decide_precision

SEED = 0
ROUNDS = 50
NUM_IMAGES = 256
NUM_REFERENCE = 10_000
NEEDED = 12.0
MODELS = Path(__file__).parent.parent / "server" / "models"
SAMPLERS = {
    "DPM-Solver++ 20": ["evaluation.sampler=dpm++", "evaluation.steps=20"],
    "DDIM 250, eta 0": ["evaluation.sampler=ddim", "evaluation.steps=250", "evaluation.eta=0"],
    "DDIM 250, eta 1": ["evaluation.sampler=ddim", "evaluation.steps=250", "evaluation.eta=1"],
}
Features = NDArray[np.float64]


def main(arguments: Sequence[str] = ()) -> int:
    """Print evaluations and distances; 0 when the fewer evaluations are no worse than the better DDIM within noise."""
    checkpoints = [Path(arguments[0])] if arguments else sorted(path.parent for path in MODELS.glob("*/meta.json"))
    if not checkpoints:
        print(f"sampling: not measured: no checkpoint under {MODELS.name}/, give one as argument")
        return 0
    nfe, features = {}, {}
    for name, overrides in SAMPLERS.items():
        loaded = load_model(checkpoints[0], overrides=overrides)
        precision = decide_precision(loaded.experiment, "cpu")
        seeds = range(SEED, SEED + NUM_IMAGES)
        images = sample_images(loaded.model, loaded.experiment, seeds, 64, precision=precision)
        nfe[name], features[name] = loaded.nfe, pooled(images)
    size = loaded.experiment.model.image_size
    reference = pooled(torch.from_numpy(generate(NUM_REFERENCE, size, seed=SEED + 1)[0]))
    draws = np.random.default_rng(SEED).integers(NUM_IMAGES, size=(ROUNDS, NUM_IMAGES))
    distances = {name: distance(reference, own) for name, own in features.items()}
    for name in SAMPLERS:
        print(f"{name}: {nfe[name]} evaluations, distance {distances[name]:.2f}")
    fast, *slow = SAMPLERS
    best = min(slow, key=lambda name: distances[name])
    resampled = [
        distance(reference, features[fast][draw]) - distance(reference, features[best][draw]) for draw in draws
    ]
    gap, noise = distances[fast] - distances[best], float(np.std(resampled))
    fewer = nfe[best] / nfe[fast]
    text = (
        f"{fewer:.1f}x fewer evaluations (needs {NEEDED:.0f}x) at distance {distances[fast]:.2f} against "
        f"{distances[best]:.2f}, noise of the difference {noise:.2f}"
    )
    return verdict("DPM-Solver++ 20 over DDIM 250", text, reached=fewer >= NEEDED and gap <= 2 * noise)


def pooled(images: torch.Tensor) -> Features:
    """(B, 192) means of 8 x 8 fields per channel, 0 to 255, of uint8 images (B, 3, H, W)."""
    fields = torch.nn.functional.adaptive_avg_pool2d(images.float(), 8)
    return fields.flatten(1).numpy().astype(np.float64)


def distance(reference: Features, images: Features) -> float:
    """Frechet distance of two feature sets, per feature."""
    moments = [(part.mean(0), np.cov(part, rowvar=False)) for part in (reference, images)]
    return float(frechet(*moments[0], *moments[1]) / reference.shape[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
