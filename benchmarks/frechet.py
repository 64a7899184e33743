"""Arithmetic of the Frechet distance at D = 2048 against torch-fidelity's: process CPU time on one thread."""
# ruff: noqa: E402 - the number of threads is read when numpy is imported

import os
import sys

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import numpy as np

from benchmarks.measure import cpu_seconds, medians, paired_ratio, verdict, without_options
from shared.evaluation.frechet import frechet

SEED = 0
ROUNDS = 3
WIDTH, IMAGES = 2048, 3000
NEEDED, ALLOWED = 2.0, 1e-6


def main() -> int:
    """Print speed-up and difference; 0 when 2x faster at a relative difference of at most 1e-6."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    rng = np.random.default_rng(SEED)
    scale = np.linspace(1, 0.05, WIDTH)
    features = [rng.standard_normal((IMAGES, WIDTH)) * scale + shift for shift in (0.0, 0.02)]
    moments = [(part.mean(0), np.cov(part, rowvar=False)) for part in features]
    theirs = [{"mu": mean, "sigma": covariance} for mean, covariance in moments]
    found: dict[str, float] = {}

    def ours() -> None:
        found["ours"] = frechet(*moments[0], *moments[1])

    def fidelity() -> None:
        found["torch-fidelity"] = fid_statistics_to_metric(*theirs, verbose=False)[KEY_METRIC_FID]

    times = cpu_seconds({"ours": ours, "torch-fidelity": fidelity}, ROUNDS)
    for name, seconds in medians(times).items():
        print(f"{name}: {seconds:.2f} s, distance {found[name]:.9g}")
    ratio = paired_ratio(times, "torch-fidelity", "ours")
    difference = abs(found["ours"] - found["torch-fidelity"]) / found["torch-fidelity"]
    text = f"{ratio:.2f}x faster (needs {NEEDED:.0f}x), relative difference {difference:.1e} (at most {ALLOWED:.0e})"
    return verdict("Frechet distance, D 2048", text, reached=ratio >= NEEDED and difference <= ALLOWED)


if __name__ == "__main__":
    sys.exit(without_options(main, __doc__))
