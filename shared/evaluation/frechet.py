"""The Frechet distance between two sets of images, from feature statistics in float64.

Shapes: D feature width, N images.
"""

# ruff: noqa: N803, N806 (shape suffixes are part of the names)
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from shared.errors import InputError
from shared.evaluation.feature_statistics import Float64, Statistics, check_same_space, statistics_of
from shared.student import STUDENT_95


def _factor(covariance_DD: Float64, is_full_rank: bool) -> Float64:
    """F with F F^T = covariance: Cholesky, or the eigendecomposition (clamped at 0) when it has no full rank."""
    if is_full_rank:
        try:
            return np.asarray(np.linalg.cholesky(covariance_DD), dtype=np.float64)
        except np.linalg.LinAlgError:
            pass  # Full rank by count only, e.g. a feature that is constant: take the general route.
    values_D, vectors_DD = np.linalg.eigh(covariance_DD)
    root: Float64 = vectors_DD * np.sqrt(values_D.clip(min=0))
    return root


def frechet(
    mean_1_D: Float64,
    covariance_1_DD: Float64,
    mean_2_D: Float64,
    covariance_2_DD: Float64,
    *,
    is_full_rank: bool = True,
) -> float:
    """Frechet distance of two Gaussians: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    With C1 = F F^T the eigenvalues of C1 C2 are those of the symmetric F^T C2 F, so no matrix square root is needed
    (Dowson and Landau 1982 for the distance, Heusel et al. 2017, arXiv 1706.08500, for its use on Inception features).

    Args:
        mean_1_D: mean of the first, (D).
        covariance_1_DD: covariance of the first, (D, D); this one is factored.
        mean_2_D: mean of the second, (D).
        covariance_2_DD: covariance of the second, (D, D).
        is_full_rank: whether the first has more samples than D, so that Cholesky may work.

    Returns:
        The distance, at least 0 up to rounding.

    Raises:
        InputError: it is not finite.
    """
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            factor_DD = _factor(covariance_1_DD, is_full_rank)
            values_D = np.linalg.eigvalsh(factor_DD.T @ covariance_2_DD @ factor_DD)
            cross = np.sqrt(values_D.clip(min=0)).sum()
            apart, spread = np.square(mean_1_D - mean_2_D).sum(), np.trace(covariance_1_DD) + np.trace(covariance_2_DD)
            distance = float(apart + spread - 2 * cross)
    except np.linalg.LinAlgError:
        distance = float("nan")
    if not np.isfinite(distance):
        raise InputError("the distance is not finite: statistics with values so large are no features of images")
    return distance


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """Frechet distance between two sets of images by their statistics.

    Raises:
        InputError: different feature spaces (both digests named), or fewer than two images in one of them.
    """
    check_same_space(one.space, other.space)
    if other.n > one.n:
        one, other = other, one  # The distance is symmetric; the larger set is the one more likely of full rank.
    mean_1_D, covariance_1_DD = one.moments()
    mean_2_D, covariance_2_DD = other.moments()
    is_full_rank = one.n > len(mean_1_D)
    return frechet(mean_1_D, covariance_1_DD, mean_2_D, covariance_2_DD, is_full_rank=is_full_rank)


def bootstrap_interval(
    features_ND: NDArray[np.floating],
    reference: Statistics,
    *,
    resamples: int = 100,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Interval of the distance over the draw of the generated images; the reference is held fixed.

    Resampling N of N adds a bias of its own, so the spread of the resampled distances around their mean is placed
    around the distance itself.

    Args:
        features_ND: features of the generated images, (N, D).
        reference: statistics of the reference.
        resamples: number of bootstrap draws.
        level: coverage in (0, 1).
        seed: of the resampling.

    Returns:
        Lower and upper bound.
    """
    rng = np.random.default_rng(seed)
    features_ND = np.asarray(features_ND, dtype=np.float64)
    estimate = frechet_distance(statistics_of(features_ND, reference.space), reference)
    drawn = np.empty(resamples)
    for index in range(resamples):
        rows = rng.integers(len(features_ND), size=len(features_ND))
        drawn[index] = frechet_distance(statistics_of(features_ND[rows], reference.space), reference)
    tail = (1 - level) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail]) - drawn.mean() + estimate
    return float(low), float(high)


JACKKNIFE_GROUPS = 20


def jackknife_distances(groups: Sequence[Statistics], distance: Callable[[Statistics], float]) -> list[float]:
    """The distance without each of the groups in turn; statistics add up, so no image is looked at twice.

    Args:
        groups: statistics of disjoint groups of near equal size, at most `JACKKNIFE_GROUPS`.
        distance: of statistics to the reference.

    Returns:
        As many distances as groups; none with fewer than three groups, which say nothing.
    """
    if len(groups) < 3:
        return []
    whole = groups[0]
    for group in groups[1:]:
        whole = whole + group
    return [distance(_without(whole, group)) for group in groups]


def jackknife_interval(estimate: float, left_out: Sequence[float]) -> tuple[float, float] | None:
    """95 percent interval of a figure over the draw of the generated images, by leaving out one group at a time.

    As many distances as groups, where a bootstrap needs hundreds. With g groups the variance is (g - 1) / g times the
    sum of squared deviations of the g figures (Efron and Stein 1981), whatever the bias that all of them share. For two
    models whose images have the same seeds, the figures may be differences: what images of a seed have in common
    falls out.

    Args:
        estimate: the figure on all images.
        left_out: the figure without each of at most `JACKKNIFE_GROUPS` groups.

    Returns:
        Lower and upper bound; None with fewer than three groups.
    """
    if len(left_out) < 3:
        return None
    drawn = np.array(left_out, np.float64)
    deviation = np.sqrt(np.square(drawn - drawn.mean()).sum() * (len(drawn) - 1) / len(drawn))
    half = STUDENT_95[len(drawn) - 2] * float(deviation)
    return estimate - half, estimate + half


def jackknife_groups(features_ND: NDArray[np.floating]) -> list[NDArray[np.floating]]:
    """Rows in at most `JACKKNIFE_GROUPS` groups of near equal size, in order."""
    return list(np.array_split(features_ND, min(JACKKNIFE_GROUPS, len(features_ND))))


def _without(whole: Statistics, part: Statistics) -> Statistics:
    total_D, outer_DD = whole.total_D - part.total_D, whole.outer_DD - part.outer_DD
    return replace(whole, n=whole.n - part.n, total_D=total_D, outer_DD=outer_DD)
