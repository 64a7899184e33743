"""Distances to private reference statistics against exact ones: 64 public directions, epsilon 4, real faces.

`--public ZIP` gives the projection, `--faces ZIP` the private images. Compared are other sets of images, from slightly
to heavily changed faces, at distances of 30 times the distance of real to real and more.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.measure import not_measured, verdict
from client.privacy.planning import noise_that_fits
from shared.data.image_cache import open_images
from shared.evaluation.frechet import frechet_distance
from shared.evaluation.networks import load_extractor
from shared.evaluation.private_statistics import make_projection, private_distance, private_statistics, simulated

SEED = 0
ROUNDS = 5
SIDE, EPSILON, DELTA, DIMENSIONS = 64, 4.0, 1e-5, 64
FLOORS, ALLOWED = 30.0, 1.5


def main(arguments: Sequence[str] = ()) -> int:
    """Print exact and private distances; 0 when all from 30 floors on are within 1.5x."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faces", type=Path, help="Folder or zip of private faces.")
    parser.add_argument("--public", help="Folder or zip of public faces, or synthetic:public:N.")
    parser.add_argument("--extractor", default="random-inception")
    options = parser.parse_args(arguments)
    if options.faces is None or options.public is None:
        return not_measured("private reference", "give --faces ZIP --public ZIP")
    extractor = load_extractor(options.extractor)
    private, public = (load(path) for path in (options.faces, options.public))
    features = features_of(extractor, private)
    projection = make_projection(features_of(extractor, public), extractor.space, DIMENSIONS)
    sigma = noise_that_fits([], 1.0, 1, DELTA, EPSILON)
    exact = projection.statistics(features)
    print(f"n {len(private):,}, {extractor.space.extractor}, epsilon {EPSILON:g}: noise multiplier {sigma:.3f}")
    order = np.random.default_rng(SEED).permutation(len(features))
    halves = [projection.statistics(features[part]) for part in np.array_split(order, 2)]
    floor = frechet_distance(*halves)
    ratios = []
    for name, images in changed(private[torch.from_numpy(order[:1000])], public[:1000]).items():
        generated = projection.statistics(features_of(extractor, images))
        true = frechet_distance(generated, exact)
        noises = [simulated(np.random.default_rng(SEED + number)) for number in range(ROUNDS)]
        found = [
            private_distance(generated, private_statistics(projection, features, sigma, noise)) for noise in noises
        ]
        noisy = [each.distance for each in found]
        ratio = max(max(value / true, true / value) for value in noisy)
        counts = true >= FLOORS * floor
        ratios += [ratio] if counts else []
        shown = f"{true / floor:8.1f} floors, exact {true:.4g}, private {np.mean(noisy):.4g}, worst ratio {ratio:.2f}"
        print(f"{name:16} {shown}, resolution {found[0].resolution:.3g}{'' if counts else ' (below 30 floors)'}")
    text = (
        f"worst ratio {max(ratios, default=float('nan')):.2f} over {len(ratios)} sets of images at 30 floors and more "
        f"(at most {ALLOWED:g}), n {len(private):,}"
    )
    reached = bool(ratios) and max(ratios) <= ALLOWED
    return verdict(f"private reference, {DIMENSIONS}-d, epsilon {EPSILON:g}", text, reached=reached)


def load(path: str | Path) -> Tensor:
    """All images of a set."""
    images = open_images(path, SIDE)
    return images.batch(range(len(images)))


def features_of(extractor: object, images: Tensor) -> NDArray[np.float32]:
    """Features of all images."""
    assert callable(extractor)
    return np.concatenate([extractor(part) for part in images.split(64)])


def changed(images: Tensor, public: Tensor) -> dict[str, Tensor]:
    """Sets of images at growing distances."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(SEED))
    floats = images.float()

    def back(x: Tensor) -> Tensor:
        return x.round().clamp(0, 255).to(torch.uint8)

    return {
        "public faces": public,
        "blur 3": back(F.avg_pool2d(floats, 3, 1, 1)),
        "blur 7": back(F.avg_pool2d(floats, 7, 1, 3)),
        "noise 10": back(floats + 10 * noise),
        "noise 30": back(floats + 30 * noise),
        "half contrast": back(floats / 2 + 64),
        "patches mixed": mixed(images),
        "uniform noise": torch.randint_like(images, 0, 256),
    }


def mixed(images: Tensor, side: int = 8) -> Tensor:
    """Each patch from another image: faces whose parts do not fit."""
    parts = images.unfold(2, side, side).unfold(3, side, side).clone()
    generator = torch.Generator().manual_seed(SEED)
    for row in range(parts.shape[2]):
        for column in range(parts.shape[3]):
            parts[:, :, row, column] = parts[torch.randperm(len(images), generator=generator), :, row, column]
    return parts.permute(0, 1, 2, 4, 3, 5).reshape(images.shape)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
