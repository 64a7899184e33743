# ruff: noqa: N803
"""Figures that compare generated with reference features: Frechet distance, KID, precision and recall.

Shapes: N generated, M reference images, D feature width.
"""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shared.frechet import bootstrap_interval, frechet_distance
from shared.statistics import FeatureSpace, Statistics, statistics_of

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBOURS = 3
_NORMAL_95 = 1.96


def scores(
    features_ND: NDArray[np.floating],
    statistics: Statistics,
    reference: Statistics,
    reference_features_MD: NDArray[np.floating] | None,
    *,
    bootstrap: int = 0,
) -> dict[str, Any]:
    """All metrics that the reference allows, by the names of `result.json`.

    Args:
        features_ND: generated, (N, D).
        statistics: of the generated features.
        reference: statistics of the reference.
        reference_features_MD: (M, D), or None where only statistics are known: then no KID, precision or recall.
        bootstrap: resamples for the interval of the distance; 0: none.

    Returns:
        Metric name to value; intervals are `<name>_interval`, pairs of bounds at 95 percent.
    """
    name = reference.space.distance_name
    found: dict[str, Any] = {name: frechet_distance(statistics, reference)}
    if bootstrap:
        found[f"{name}_interval"] = bootstrap_interval(features_ND, reference, resamples=bootstrap)
    if reference_features_MD is not None and min(len(features_ND), len(reference_features_MD)) > 2 * NEIGHBOURS:
        found |= kernel_distance(features_ND, reference_features_MD, kernel_name(reference.space))
        found |= precision_recall(features_ND, reference_features_MD)
    return found


def kernel_name(space: FeatureSpace) -> str:
    """`kid` where the Frechet distance is `fid`, else `kd_<extractor>`."""
    return "kid" if space.distance_name == "fid" else space.distance_name.replace("fd_", "kd_", 1)


def kernel_distance(features_ND: NDArray[np.floating], reference_MD: NDArray[np.floating], name: str) -> dict[str, Any]:
    """KID (arXiv 1801.01401) by torch-fidelity: mean of the unbiased MMD^2 of a cubic kernel over 100 subsets.

    Subsets have 1,000 images, or half of the smaller set. Its interval scales the deviation over subsets to all images:
    the variance of the estimator falls as 1 / N.

    Returns:
        `<name>` and `<name>_interval`.
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
    return {name: mean, f"{name}_interval": (mean - half, mean + half)}


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


def statistics_of_features(features_ND: NDArray[np.floating], space: FeatureSpace) -> Statistics:
    """Statistics of generated features."""
    return statistics_of(features_ND, space, source="generated")
