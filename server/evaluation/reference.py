# ruff: noqa: N806, N815
"""What a checkpoint is compared with: images (folder, zip, cache, synthetic) or files of feature statistics."""

import functools
import hashlib
import operator
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from server.evaluation.other_tools import (
    images_of_array,
    is_array_file,
    read_arrays,
    split_count,
    statistics_of_moments,
)
from shared.data.image_cache import open_images
from shared.data.image_set import ImageCache
from shared.errors import InputError
from shared.evaluation.extractor import Extractor
from shared.evaluation.feature_statistics import (
    FeatureSpace,
    Statistics,
    accumulate,
    check_same_space,
    load_statistics,
    save_statistics,
)
from shared.evaluation.private_statistics import Projection
from shared.paths import given_path
from shared.storage.files import TEMPORARY_PREFIX, file_digest, machine_errors

STATISTICS_SUFFIX = ".safetensors"
MIN_IMAGES = 2
KEPT_FEATURES = 10_000
"""Reference images whose features are kept for KID, precision and recall: evenly spaced over the whole set."""


@dataclass(frozen=True)
class Reference:
    """Statistics of the reference, and what more is known of its images."""

    name: str
    """As the user named it."""
    statistics: Statistics
    sha256: str
    """Of the statistics file, or of all pixels in order."""
    features_ND: NDArray[np.float32] | None = None
    """Features of at most `KEPT_FEATURES` images; None for a statistics file."""
    image_digests: frozenset[bytes] = frozenset()
    """SHA-256 of the pixels of each image."""
    num_unreadable: int = 0
    """Files that did not decode and were left out."""
    ignored: Mapping[str, int] = field(default_factory=dict)
    """Files that are no images by their suffix, by suffix."""


def open_reference(
    path: str, size: int, extractor: Extractor, cache: Path, batch: int = 64, projection: Projection | None = None
) -> Reference:
    """Statistics of a reference, computed once per set of pixels and extractor and kept below `cache`.

    Args:
        path: folder, zip, image cache, `synthetic:...`, an array of images (`.npy`, `.npz`), mean and covariance of
            another tool (`FILE.npz:<number of images>`), or statistics files (`.safetensors`) separated by commas,
            whose sum is the reference.
        size: side that images are brought to, in pixels: that of the generated ones.
        extractor: network of the features.
        cache: folder of kept statistics.
        batch: images per network call.
        projection: public projection that private statistics were made in.

    Raises:
        InputError: no images there, or statistics of another extractor (both digests are named).
    """
    path = given_path(path)
    if path.endswith(STATISTICS_SUFFIX):
        pooled = _pooled(path, projection.projected_space if projection else extractor.space)
        if pooled.statistics.n < MIN_IMAGES:
            raise InputError(f"reference {path}: {pooled.statistics.n:g} image, a distance needs at least {MIN_IMAGES}")
        return pooled
    if projection is not None:
        raise InputError(f"--projection goes with private statistics of sites, not with the images of {path}")
    file, count = split_count(path)
    if is_array_file(str(file)):
        arrays = read_arrays(file)
        if "mu" in arrays:
            statistics = statistics_of_moments(file, arrays, count, extractor.space, extractor.width)
            return Reference(path, statistics, file_digest(file))
        images = images_of_array(file, arrays["images"], size)
    else:
        images = open_images(path, size)
    if len(images) < MIN_IMAGES:
        raise InputError(f"reference {path}: {len(images)} image, a distance needs at least {MIN_IMAGES}")
    digests = image_digests(images)
    sha256 = hashlib.sha256(b"".join(digests)).hexdigest()
    key = hashlib.sha256(f"{sha256} {extractor.space}".encode()).hexdigest()[:32]
    statistics_file, features_file = cache / f"{key}.safetensors", cache / f"{key}.npy"
    kept = _kept(statistics_file, features_file)
    if kept is None:
        _compute(images, path, sha256, extractor, batch, statistics_file, features_file)
        kept = load_statistics(statistics_file), np.load(features_file, allow_pickle=False)
    return Reference(path, *(kept[0], sha256, kept[1]), frozenset(digests), images.num_unreadable, images.ignored)


def image_digests(images: ImageCache) -> list[bytes]:
    """SHA-256 of the pixels of each image, in order."""
    return [hashlib.sha256(row.tobytes()).digest() for row in images.images]


def _kept(statistics_file: Path, features_file: Path) -> tuple[Statistics, NDArray[np.float32]] | None:
    """What an earlier evaluation has kept; None where a file is missing or damaged: both are made again."""
    try:
        return load_statistics(statistics_file), np.load(features_file, allow_pickle=False)
    except (InputError, OSError, ValueError, EOFError):
        return None


def _pooled(path: str, space: FeatureSpace) -> Reference:
    """The sum of statistics files.

    Raises:
        InputError: another feature space, a site twice, or a file that is not one.
    """
    files = [Path(part.strip()) for part in path.split(",")]
    parts = [load_statistics(file) for file in files]
    sites = [part.site for part in parts if part.site]
    if len(set(sites)) < len(sites) or len({file.resolve() for file in files}) < len(files):
        raise InputError(f"reference {path}: a site or a file is in it twice: name each once")
    for part in parts:
        check_same_space(space, part.space)
    pooled = functools.reduce(operator.add, parts)
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return Reference(path, pooled, digest)


def refuse_generated(
    reference: Reference, generated: NDArray[np.uint8], whose: str = "this checkpoint generates"
) -> None:
    """Refuse a reference that holds images which it is compared with: their distance would flatter the model.

    Args:
        reference: with the digests of its images.
        generated: SHA-256 of each generated image, (N, 32).
        whose: who has made them, for the error.

    Raises:
        InputError: at least one image is in both.
    """
    common = sum(row.tobytes() in reference.image_digests for row in generated)
    if common:
        raise InputError(
            f"reference {reference.name} holds {common} images that {whose}: "
            "give images that no model of this run has made"
        )


def kept_rows(count: int) -> NDArray[np.int64]:
    """Which of `count` images `Reference.features_ND` has."""
    return np.unique(np.linspace(0, count - 1, min(count, KEPT_FEATURES)).round().astype(np.int64))


def features_of_images(images: ImageCache, extractor: Extractor, batch: int = 64) -> NDArray[np.float32]:
    """Features (N, D) of all images of a set."""
    return np.concatenate(
        [extractor(_batch(images, start, batch)) for start in range(0, len(images), batch)], dtype=np.float32
    )


def _compute(
    images: ImageCache,
    name: str,
    sha256: str,
    extractor: Extractor,
    batch: int,
    statistics_file: Path,
    features_file: Path,
) -> None:
    cache = statistics_file.parent
    cache.mkdir(parents=True, exist_ok=True)
    rows_kept = kept_rows(len(images))
    kept: list[NDArray[np.float32]] = []

    def stream() -> Iterator[NDArray[np.float32]]:
        for start in range(0, len(images), batch):
            features_BD = extractor(_batch(images, start, batch))
            rows = rows_kept[(rows_kept >= start) & (rows_kept < start + batch)] - start
            kept.append(features_BD[rows])
            yield features_BD

    statistics = accumulate(stream(), extractor.space, source=name)
    facts = {"size": str(images.size), "sha256": sha256}
    # Another evaluation may compute the same beside this one.
    unfinished = cache / f"{TEMPORARY_PREFIX}{os.getpid()}-{features_file.name}"
    try:
        with machine_errors(features_file):
            np.save(unfinished, np.concatenate(kept))
        unfinished.replace(features_file)
    finally:
        unfinished.unlink(missing_ok=True)
    save_statistics(
        Statistics(statistics.space, statistics.n, statistics.total_D, statistics.outer_DD, source=name, images=facts),
        statistics_file,
    )


def _batch(images: ImageCache, start: int, batch: int) -> Tensor:
    return images.batch(range(start, min(len(images), start + batch)))
