"""Student's t: how sure a mean of few values is."""

import statistics
from collections.abc import Sequence

STUDENT_95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
              2.120, 2.110, 2.101, 2.093)  # fmt: skip
"""97.5 percent points for 1 to 19 degrees of freedom; with more the last one is a little too careful."""


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of independent values, and the bounds of its 95 percent interval.

    Raises:
        ValueError: fewer than two values, of which nothing can be said.
    """
    if len(values) < 2:
        raise ValueError(f"{len(values)} values: at least two are needed")
    point = STUDENT_95[min(len(values) - 1, len(STUDENT_95)) - 1]
    mean, half = statistics.fmean(values), point * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half
