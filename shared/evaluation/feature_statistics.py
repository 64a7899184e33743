"""Feature statistics that add up, in float64, and their file.

Statistics of images are (n, sum of features, sum of outer products): statistics of a union are the sums of the parts',
so organisations can compute a pooled distance without pooling an image. Shapes: D feature width, N images.
"""

# ruff: noqa: N803, N806, N815 (shape suffixes are part of the names)
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from shared.errors import InputError
from shared.storage.files import write_atomically

SCHEMA_VERSION = 1
_STORED_AS_IS = ("site", "release", "epsilon", "delta", "source", "images")
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class FeatureSpace:
    """Which network, up to which layer, made the features; statistics of different spaces never mix."""

    extractor: str
    layer: str
    sha256: str
    """Of the weights file, or of the tensors where they are generated."""

    @property
    def distance_name(self) -> str:
        """`fid` for the Inception-2015 weights alone, `fd_<extractor>_<layer>` for everything else."""
        if self.sha256 == INCEPTION_2015_SHA256 and self.layer == "2048":
            return "fid"
        return f"fd_{self.extractor}_{self.layer}" if self.layer.isdigit() else f"fd_{self.extractor}"


INCEPTION_2015_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""`weights-inception-2015-12-05-6726825d.pth` of torch-fidelity, the same bytes as pytorch-fid's file."""


@dataclass(frozen=True)
class Statistics:
    """Sufficient statistics of N feature vectors: `total_D` = sum f, `outer_DD` = sum f f^T, float64."""

    space: FeatureSpace
    n: float
    """Number of images; a real number because a differentially private release may add noise to it."""
    total_D: Float64
    outer_DD: Float64
    site: str = ""
    """Who released them; empty: the evaluator's own."""
    release: Literal["own", "exact", "dp"] = "own"
    epsilon: float | None = None
    """Of a `dp` release, at `delta`."""
    delta: float | None = None
    source: str = ""
    """Human-readable name of the images behind them."""
    images: dict[str, str] = field(default_factory=dict)
    """Facts of the images that a later user must know, e.g. `size`."""

    def __post_init__(self) -> None:
        """Check shapes and finiteness.

        Raises:
            InputError: shapes disagree or a number is not finite.
        """
        width = len(self.total_D)
        if self.total_D.shape != (width,) or self.outer_DD.shape != (width, width):
            raise InputError(
                f"feature statistics: total {self.total_D.shape} and outer {self.outer_DD.shape} do not agree: "
                "give total (D) and outer (D, D)"
            )
        if not (np.isfinite(self.total_D).all() and np.isfinite(self.outer_DD).all() and np.isfinite(self.n)):
            raise InputError("feature statistics: a value is not finite: compute them again from finite features")

    def __add__(self, other: "Statistics") -> "Statistics":
        """Statistics of the union of two disjoint sets of images.

        Raises:
            InputError: the two come from different feature spaces; the line names both digests.
        """
        check_same_space(self.space, other.space)
        kinds = {self.release, other.release} - {"own"}
        # Where a part was released as it is, no epsilon holds for the union.
        release: Literal["own", "exact", "dp"] = "exact" if "exact" in kinds else "dp" if kinds else "own"
        private = [part for part in (self, other) if release == "dp"]
        epsilons = [part.epsilon for part in private if part.epsilon is not None]
        deltas = [part.delta for part in private if part.delta is not None]
        return Statistics(
            space=self.space,
            n=self.n + other.n,
            total_D=self.total_D + other.total_D,
            outer_DD=self.outer_DD + other.outer_DD,
            site="+".join(name for name in (self.site, other.site) if name),
            release=release,
            epsilon=max(epsilons, default=None),
            delta=max(deltas, default=None),
            source=" + ".join(dict.fromkeys(name for name in (self.source, other.source) if name)),
            images=_add_facts(self.images, other.images),
        )

    def moments(self) -> tuple[Float64, Float64]:
        """Mean (D) and unbiased covariance (D, D).

        Raises:
            InputError: fewer than two images.
        """
        if self.n < 2:
            raise InputError(f"feature statistics of {self.n:g} image: a covariance needs at least 2 images")
        with np.errstate(over="ignore", invalid="ignore"):  # The distance says when it is not finite.
            mean_D = self.total_D / self.n
            covariance_DD = (self.outer_DD - np.outer(self.total_D, mean_D)) / (self.n - 1)
            return mean_D, (covariance_DD + covariance_DD.T) / 2


def _add_facts(one: dict[str, str], other: dict[str, str]) -> dict[str, str]:
    """Facts of a union: those of the parts; `parts` counts the private releases in it.

    Raises:
        InputError: private releases with noise of different sizes, whose sum nobody could describe.
    """
    for key in ("radius", "noise_multiplier"):
        if key in one and key in other and one[key] != other[key]:
            raise InputError(f"private statistics with {key} {one[key]} and {other[key]}: ask all sites for the same")
    parts = int(one.get("parts", 0)) + int(other.get("parts", 0))
    return {**one, **other, **({"parts": str(parts)} if parts else {})}


def check_same_space(one: FeatureSpace, other: FeatureSpace) -> None:
    """Refuse two feature spaces that differ.

    Raises:
        InputError: naming both extractors, layers and digests.
    """
    if one != other:
        raise InputError(
            f"feature statistics do not compare: {one.extractor} layer {one.layer} sha256 {one.sha256[:16]} against "
            f"{other.extractor} layer {other.layer} sha256 {other.sha256[:16]}: compute both with one extractor"
        )


def statistics_of(features_ND: NDArray[np.floating], space: FeatureSpace, source: str = "") -> Statistics:
    """Statistics of a feature matrix (N, D), accumulated in float64 whatever its dtype.

    Raises:
        InputError: a feature is NaN or infinite.
    """
    features_ND = np.asarray(features_ND, dtype=np.float64)
    if not np.isfinite(features_ND).all():
        bad = int((~np.isfinite(features_ND)).any(axis=1).sum())
        raise InputError(
            f"features of {bad} of {len(features_ND)} images are not finite: check the images or the network"
        )
    return Statistics(
        space=space,
        n=len(features_ND),
        total_D=features_ND.sum(axis=0),
        outer_DD=features_ND.T @ features_ND,
        source=source,
    )


def accumulate(batches: Iterable[NDArray[np.floating]], space: FeatureSpace, source: str = "") -> Statistics:
    """Statistics of a stream of feature batches (B, D); memory does not grow with the number of images.

    Raises:
        InputError: no batch at all, or a feature that is not finite.
    """
    n, total_D, outer_DD = 0, None, None
    for features_BD in batches:
        part = statistics_of(features_BD, space)
        if total_D is None or outer_DD is None:
            total_D, outer_DD = part.total_D, part.outer_DD
        else:
            total_D += part.total_D
            outer_DD += part.outer_DD
        n += len(features_BD)
    if total_D is None or outer_DD is None:
        raise InputError("feature statistics of 0 images: give at least 2 images")
    return Statistics(space=space, n=n, total_D=total_D, outer_DD=outer_DD, source=source)


def statistics_bytes(statistics: Statistics) -> bytes:
    """One safetensors file: float64 `total` and `outer`, and metadata as JSON texts."""
    known = {
        "schema": SCHEMA_VERSION,
        "n": statistics.n,
        "extractor": statistics.space.extractor,
        "layer": statistics.space.layer,
        "extractor_sha256": statistics.space.sha256,
        **{name: getattr(statistics, name) for name in _STORED_AS_IS},
    }
    metadata = {key: json.dumps(value) for key, value in known.items()}
    return save({"total": statistics.total_D, "outer": np.ascontiguousarray(statistics.outer_DD)}, metadata)


def parse_statistics(data: bytes, name: str) -> Statistics:
    """Read `statistics_bytes`; `name` stands before an error.

    Raises:
        InputError: something else, another schema, or numbers that are not finite.
    """
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = {key: json.loads(value) for key, value in header.get("__metadata__", {}).items()}
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{name}: not a feature statistics file ({error}): give one that `evaluate` wrote") from error
    if metadata.get("schema") != SCHEMA_VERSION:
        raise InputError(f"{name}: statistics schema {metadata.get('schema')}, this version reads {SCHEMA_VERSION}")
    try:
        return Statistics(
            space=FeatureSpace(metadata["extractor"], metadata["layer"], metadata["extractor_sha256"]),
            n=float(metadata["n"]),
            total_D=tensors["total"].astype(np.float64),
            outer_DD=tensors["outer"].astype(np.float64),
            **{name: metadata[name] for name in _STORED_AS_IS},
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise InputError(f"{name}: {error}") from error
        raise InputError(f"{name}: statistics without {error}: give a file that `evaluate` wrote") from error


def save_statistics(statistics: Statistics, path: Path) -> None:
    """Write the statistics as a file, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, statistics_bytes(statistics))


def load_statistics(path: Path) -> Statistics:
    """Read a statistics file.

    Raises:
        InputError: not a statistics file, another schema, or numbers that are not finite.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: not a feature statistics file ({error.strerror}): give its path") from error
    return parse_statistics(data, str(path))
