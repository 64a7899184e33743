# ruff: noqa: N806
"""Pooled Frechet distance of 8 unequal sites against torch-fidelity's on the union of the same features."""

import functools
import operator
import sys

import numpy as np
import torch

from benchmarks.measure import verdict, without_options
from shared.evaluation.feature_statistics import FeatureSpace, statistics_of
from shared.evaluation.frechet import frechet_distance

SEED = 0
WIDTH = 2048
SITE_IMAGES = (60, 150, 210, 280, 350, 450, 600, 900)
GENERATED = 3000
ALLOWED = 1e-6


def main() -> int:
    """Print the relative difference; 0 when it is at most 1e-6."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    rng, space = np.random.default_rng(SEED), FeatureSpace("random numbers", "", "")
    scale = rng.uniform(0.05, 1, WIDTH)
    parts = [rng.standard_normal((n, WIDTH)) * scale + rng.normal(0, 0.1, WIDTH) for n in SITE_IMAGES]
    generated = rng.standard_normal((GENERATED, WIDTH)) * scale + 0.05
    pooled = functools.reduce(operator.add, (statistics_of(part, space) for part in parts))
    ours = frechet_distance(statistics_of(generated, space), pooled)
    union_ND = np.concatenate(parts)
    theirs = [fid_features_to_statistics(torch.from_numpy(features)) for features in (generated, union_ND)]
    expected = fid_statistics_to_metric(*theirs, verbose=False)[KEY_METRIC_FID]
    difference = abs(ours - expected) / expected
    text = (
        f"{len(SITE_IMAGES)} sites of {min(SITE_IMAGES)} to {max(SITE_IMAGES)} images, D {WIDTH}: relative difference "
        f"{difference:.1e} (at most {ALLOWED:.0e})"
    )
    return verdict("pooled distance against torch-fidelity on the union", text, reached=difference <= ALLOWED)


if __name__ == "__main__":
    sys.exit(without_options(main, __doc__))
