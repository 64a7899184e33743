# ruff: noqa: N803, N806, N815
"""Differentially private feature statistics: few public directions, clipped, with Gaussian noise.

The projection comes from PUBLIC images: mean, principal directions and the median norm R of projected features. With
u = z / R clipped to the unit ball one image changes (n, sum u, sum u u^T) by at most sqrt(3) in L2 norm; Gaussian noise
of deviation noise_multiplier * sqrt(3) on all of them is one step of the Gaussian mechanism at q = 1. R only scales the
result back, so no projection switches clipping or noise off, and an image whose features overflow counts with u = 0.

Shapes: N images, D feature width, P projected width.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from shared.errors import InputError
from shared.evaluation.feature_statistics import FeatureSpace, Float64, Statistics, statistics_of
from shared.evaluation.frechet import frechet_distance
from shared.storage.files import write_atomically

DEFAULT_DIMENSIONS = 64
SIMULATIONS = 20
MOST_DIMENSIONS = 1024
ORTHONORMAL_TOLERANCE = 1e-6
LARGEST_MEAN = 1e6
RADIUS = (1e-6, 1e6)  # range of R that a projection may have at all; a site's policy has a narrower one
_SENSITIVITY = math.sqrt(3)
Noise = Callable[[Float64, float], Float64]  # values (d,) with Gaussian noise of a deviation on each


@dataclass(frozen=True)
class Projection:
    """Public affine map of features to P dimensions, with the norm that projected features are clipped to."""

    space: FeatureSpace
    """Of the features that go in."""
    mean_D: Float64
    basis_DP: Float64  # orthonormal columns, the public principal directions
    radius: float  # R: public median norm of projected features

    @property
    def projected_space(self) -> FeatureSpace:
        """Of what comes out; its digest covers the map and the radius."""
        content = self.mean_D.tobytes() + self.basis_DP.tobytes() + repr((self.radius, self.space)).encode()
        name = f"{self.space.distance_name.removeprefix('fd_')}_pca{self.basis_DP.shape[1]}"
        return FeatureSpace(name, "", hashlib.sha256(content).hexdigest())

    def __call__(self, features_ND: NDArray[np.floating]) -> Float64:
        """Centre, project and clip: (N, D) to (N, P), no row longer than R."""
        return self.radius * self.unit_ball(features_ND)

    def unit_ball(self, features_ND: NDArray[np.floating]) -> Float64:
        """Projected features over R, (N, P), no row longer than 1; a row that is not finite becomes 0."""
        with np.errstate(over="ignore", invalid="ignore"):
            z_NP: Float64 = (np.asarray(features_ND, np.float64) - self.mean_D) @ self.basis_DP / self.radius
        # The largest entry first: squares of huge or tiny entries would overflow or vanish.
        largest_N1 = np.abs(z_NP).max(axis=1, keepdims=True, initial=0.0)
        is_usable_N1 = np.isfinite(largest_N1) & (largest_N1 > 0)
        scaled_NP = np.where(is_usable_N1, z_NP, 0.0) / np.where(is_usable_N1, largest_N1, 1.0)
        norms_N1 = np.linalg.norm(scaled_NP, axis=1, keepdims=True)
        longest_N1 = np.where(is_usable_N1, np.minimum(largest_N1, 1 / np.maximum(norms_N1, 1.0)), 0.0)
        clipped: Float64 = scaled_NP * longest_N1
        return clipped

    def statistics(self, features_ND: NDArray[np.floating], source: str = "") -> Statistics:
        """Statistics of projected features without noise: of the evaluator's own images.

        Raises:
            InputError: a feature is not finite.
        """
        return statistics_of(self(features_ND), self.projected_space, source)


def make_projection(
    public_ND: NDArray[np.floating], space: FeatureSpace, dimensions: int = DEFAULT_DIMENSIONS
) -> Projection:
    """The first principal directions of public features, and the median norm in them.

    Raises:
        InputError: fewer images than dimensions, or more dimensions than features.
    """
    public_ND = np.asarray(public_ND, np.float64)
    if not 0 < dimensions <= min(public_ND.shape[1], len(public_ND) - 1):
        raise InputError(
            f"projection to {dimensions} dimensions of {len(public_ND)} images with {public_ND.shape[1]} features: "
            "give more public images or fewer dimensions"
        )
    mean_D, covariance_DD = statistics_of(public_ND, space).moments()
    _, vectors_DD = np.linalg.eigh(covariance_DD)
    basis_DP: Float64 = np.ascontiguousarray(vectors_DD[:, ::-1][:, :dimensions])
    radius = float(np.median(np.linalg.norm((public_ND - mean_D) @ basis_DP, axis=1)))
    return Projection(space, mean_D, basis_DP, radius)


def check_projection(projection: Projection) -> None:
    """Refuse a map whose sensitivity would not be what is charged.

    Raises:
        InputError: not finite, columns not orthonormal, too wide, or an insane mean or radius.
    """
    mean_D, basis_DP, radius = projection.mean_D, projection.basis_DP, projection.radius
    if mean_D.ndim != 1 or basis_DP.ndim != 2 or len(mean_D) != len(basis_DP):
        raise InputError(f"projection of shapes {mean_D.shape} and {basis_DP.shape}: give (D,) and (D, P)")
    width = basis_DP.shape[1]
    if not 0 < width <= min(len(basis_DP), MOST_DIMENSIONS):
        raise InputError(f"projection to {width} dimensions: give 1 to {min(len(basis_DP), MOST_DIMENSIONS)}")
    if not RADIUS[0] <= radius <= RADIUS[1]:
        raise InputError(f"projection with radius {radius:g}: give one from {RADIUS[0]:g} to {RADIUS[1]:g}")
    # Entries of orthonormal columns are at most 1; checked before the product, which could overflow.
    is_small = bool((np.abs(basis_DP) <= 2).all() and (np.abs(mean_D) <= LARGEST_MEAN).all())
    if not is_small or np.abs(basis_DP.T @ basis_DP - np.eye(width)).max() > ORTHONORMAL_TOLERANCE:
        raise InputError("projection with columns that are not orthonormal, or a mean that is not finite: make it anew")


def private_statistics(
    projection: Projection, features_ND: NDArray[np.floating], noise_multiplier: float, noise: Noise
) -> Statistics:
    """Noisy statistics of a site's images; the caller charges (noise_multiplier, q = 1, one step) before.

    Args:
        projection: public; the result is in its space. Covariances of it may have negative eigenvalues.
        features_ND: features of the site's images, (N, D); a row that is not finite counts as the public mean.
        noise_multiplier: sigma: noise deviation over sensitivity. N is noised, too.
        noise: secret, never of a shared seed.

    Raises:
        InputError: noise multiplier not above 0, or a projection that is none.
    """
    if not 0 < noise_multiplier < math.inf:
        raise InputError(f"noise multiplier {noise_multiplier:g}: give a finite one above 0")
    check_projection(projection)
    return add_noise(projection.statistics(features_ND), projection.radius, noise_multiplier, noise)


def add_noise(plain: Statistics, radius: float, noise_multiplier: float, noise: Noise) -> Statistics:
    """Gaussian noise on (n, sum u, sum u u^T) of rows u = z / R, symmetric in the last; scaled back by R."""
    width = len(plain.total_D)
    rows, columns = np.tril_indices(width)
    # In an orthonormal basis of symmetric matrices entries off the diagonal count sqrt(2) times.
    weights = np.where(rows == columns, 1.0, math.sqrt(2))
    values = [np.array([plain.n]), plain.total_D / radius, plain.outer_DD[rows, columns] * (weights / radius**2)]
    noised = noise(np.concatenate(values).astype(np.float64), noise_multiplier * _SENSITIVITY)
    outer_DD = np.empty((width, width))
    outer_DD[rows, columns] = outer_DD[columns, rows] = noised[1 + width :] * (radius**2 / weights)
    images = {**plain.images, **noise_facts(radius, noise_multiplier), "parts": "1"}
    return replace(
        plain,
        n=float(noised[0]),
        total_D=radius * noised[1 : 1 + width],
        outer_DD=outer_DD,
        release="dp",
        images=images,
    )


def simulated(rng: np.random.Generator) -> Noise:
    """Noise that protects nobody: for studies of what noise does."""
    return lambda values, deviation: values + rng.normal(0, deviation, len(values))


def noise_facts(radius: float, noise_multiplier: float) -> dict[str, str]:
    """What releases must have in common to be added up: the size of their noise, as `Statistics.images` carries it."""
    return {"radius": repr(radius), "noise_multiplier": repr(noise_multiplier)}


def repaired(statistics: Statistics) -> Statistics:
    """The same statistics with a covariance that is one: negative eigenvalues, which noise makes, become 0.

    Raises:
        InputError: noise has left no image.
    """
    if statistics.n < 2:
        raise InputError(
            f"private statistics of {statistics.n:.0f} images after noise: more images or more epsilon are needed"
        )
    mean_D, covariance_DD = statistics.moments()
    values_D, vectors_DD = np.linalg.eigh(covariance_DD)
    covariance_DD = (vectors_DD * values_D.clip(min=0)) @ vectors_DD.T
    outer_DD = covariance_DD * (statistics.n - 1) + np.outer(statistics.total_D, mean_D)
    return replace(statistics, outer_DD=outer_DD)


@dataclass(frozen=True)
class PrivateDistance:
    """A distance to private statistics, and what their noise does to it."""

    distance: float
    bias: float  # mean change of the distance when noise of the same size is added once more
    resolution: float  # mean distance between the statistics and themselves with it: smaller distances tell nothing

    @property
    def is_resolved(self) -> bool:
        """Whether the distance is above what noise alone makes."""
        return self.distance > self.resolution


def private_distance(generated: Statistics, pooled: Statistics, seed: int = 0) -> PrivateDistance:
    """Frechet distance to pooled private statistics; bias and resolution by simulation, at no privacy cost.

    Raises:
        InputError: different spaces, or statistics without their noise facts.
    """
    try:
        radius = float(pooled.images["radius"])
        noise_multiplier = float(pooled.images["noise_multiplier"]) * math.sqrt(float(pooled.images["parts"]))
    except KeyError as error:
        raise InputError(f"private statistics without {error}: give files that sites have written") from error
    reference = repaired(pooled)
    distance = frechet_distance(generated, reference)
    noise = simulated(np.random.default_rng(seed))
    again = [repaired(add_noise(reference, radius, noise_multiplier, noise)) for _ in range(SIMULATIONS)]
    bias = float(np.mean([frechet_distance(generated, each) for each in again])) - distance
    resolution = float(np.mean([frechet_distance(reference, each) for each in again]))
    return PrivateDistance(distance, bias, resolution)


def save_projection(projection: Projection, path: Path) -> None:
    """One safetensors file: `mean`, `basis`, `radius` and where the features come from."""
    space = projection.space
    metadata = {"extractor": space.extractor, "layer": space.layer, "extractor_sha256": space.sha256, "schema": "1"}
    tensors = {"mean": projection.mean_D, "basis": projection.basis_DP, "radius": np.array([projection.radius])}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save(tensors, metadata))


def load_projection(path: Path) -> Projection:
    """Read a projection file.

    Raises:
        InputError: not one, or one that `check_projection` refuses.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            facts = file.metadata() or {}
            mean_D, basis_DP, radius = (file.get_tensor(name) for name in ("mean", "basis", "radius"))
            space = FeatureSpace(facts["extractor"], facts["layer"], facts["extractor_sha256"])
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a projection file ({error}); `maskfed-server projection` writes one") from error
    if radius.size != 1 or not all(np.issubdtype(each.dtype, np.floating) for each in (mean_D, basis_DP, radius)):
        raise InputError(f"{path}: not a projection file (other tensors); `maskfed-server projection` writes one")
    projection = Projection(space, mean_D, basis_DP, float(radius.reshape(-1)[0]))
    check_projection(projection)
    return projection
