# ruff: noqa: N803
"""Figures that compare generated with reference features: Frechet distance, KID, precision and recall.

Shapes: N generated, M reference images, D feature width.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from shared.evaluation.feature_statistics import FeatureSpace, Statistics, statistics_of
from shared.evaluation.frechet import (
    bootstrap_interval,
    frechet_distance,
    jackknife_distances,
    jackknife_groups,
    jackknife_interval,
)
from shared.evaluation.private_statistics import Projection, private_distance, repaired

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBOURS = 3
_NORMAL_95 = 1.96


@dataclass(frozen=True)
class Scores:
    """What `result.json` says of a model's images; every metric is one number."""

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """95 percent intervals of some of the metrics."""
    left_out: list[float] = field(default_factory=list)
    """The Frechet distance without each group of images in turn: with those of another model's images of the same
    seeds, they give the interval of the difference."""
    noise: dict[str, float | bool] = field(default_factory=dict)
    """Of private reference statistics: `bias` of the distance by their noise, `resolution` below which a distance is
    noise, and `is_resolved`."""


def scores(
    features_ND: NDArray[np.floating],
    statistics: Statistics,
    reference: Statistics,
    reference_features_MD: NDArray[np.floating] | None,
    *,
    bootstrap: int = 0,
) -> Scores:
    """All metrics that the reference allows, each distance with its 95 percent interval.

    Args:
        features_ND: generated, (N, D).
        statistics: of the generated features.
        reference: statistics of the reference.
        reference_features_MD: (M, D), or None where only statistics are known: then no KID, precision or recall.
        bootstrap: resamples for the interval of the Frechet distance; 0: by the jackknife.
    """
    name = reference.space.distance_name
    metrics = {name: frechet_distance(statistics, reference)}
    groups = [statistics_of(rows, reference.space) for rows in jackknife_groups(features_ND)]
    left_out = jackknife_distances(groups, lambda each: frechet_distance(each, reference))
    interval = (
        bootstrap_interval(features_ND, reference, resamples=bootstrap)
        if bootstrap
        else jackknife_interval(metrics[name], left_out)
    )
    intervals = _named(name, interval)
    if reference_features_MD is not None and min(len(features_ND), len(reference_features_MD)) > 2 * NEIGHBOURS:
        kernel = kernel_name(reference.space)
        metrics[kernel], intervals[kernel] = kernel_distance(features_ND, reference_features_MD)
        metrics |= precision_recall(features_ND, reference_features_MD)
    return Scores(metrics, intervals, left_out)


def private_scores(features_ND: NDArray[np.floating], projection: Projection, reference: Statistics) -> Scores:
    """Distance to private statistics of sites, its interval over the generated images, and what their noise does."""
    found = private_distance(projection.statistics(features_ND, "generated"), reference)
    noise: dict[str, float | bool] = {
        "bias": found.bias,
        "resolution": found.resolution,
        "is_resolved": found.is_resolved,
    }
    name, mended = reference.space.distance_name, repaired(reference)
    groups = [projection.statistics(rows) for rows in jackknife_groups(features_ND)]
    left_out = jackknife_distances(groups, lambda each: frechet_distance(each, mended))
    interval = jackknife_interval(found.distance, left_out)
    return Scores({name: found.distance}, _named(name, interval), left_out, noise)


def _named(name: str, interval: tuple[float, float] | None) -> dict[str, tuple[float, float]]:
    return {} if interval is None else {name: interval}


def kernel_name(space: FeatureSpace) -> str:
    """`kid` where the Frechet distance is `fid`, else `kd_<extractor>`."""
    return "kid" if space.distance_name == "fid" else space.distance_name.replace("fd_", "kd_", 1)


def kernel_distance(
    features_ND: NDArray[np.floating], reference_MD: NDArray[np.floating]
) -> tuple[float, tuple[float, float]]:
    """KID (arXiv 1801.01401) by torch-fidelity: mean of the unbiased MMD^2 of a cubic kernel over 100 subsets.

    Subsets have 1,000 images, or half of the smaller set. Its interval scales the deviation over subsets to all images:
    the variance of the estimator falls as 1 / N.

    Returns:
        The mean and its interval.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    smaller = min(len(features_ND), len(reference_MD))
    subset = min(KID_SUBSET_SIZE, max(2, smaller // 2))
    found = kid_features_to_metric(
        torch.from_numpy(np.asarray(features_ND, np.float64)),
        torch.from_numpy(np.asarray(reference_MD, np.float64)),
        kid_subsets=KID_SUBSETS,
        kid_subset_size=subset,
        verbose=False,
    )
    mean, half = found[KEY_METRIC_KID_MEAN], _NORMAL_95 * found[KEY_METRIC_KID_STD] * math.sqrt(subset / smaller)
    return mean, (mean - half, mean + half)


def precision_recall(features_ND: NDArray[np.floating], reference_MD: NDArray[np.floating]) -> dict[str, float]:
    """Precision and recall by torch-fidelity (arXiv 1904.06991, 3 neighbours): shares in [0, 1]."""
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    found = prc_features_to_metric(
        torch.from_numpy(np.asarray(features_ND, np.float32)),
        torch.from_numpy(np.asarray(reference_MD, np.float32)),
        prc_neighborhood=NEIGHBOURS,
        save_cpu_ram=True,
        verbose=False,
    )
    return {"precision": found[KEY_METRIC_PRECISION], "recall": found[KEY_METRIC_RECALL]}
