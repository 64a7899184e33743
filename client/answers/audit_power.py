"""How many held-out units an audit needs before its verdict says something, at the site's own constants. No torch."""

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from client.data.dataset import Dataset
from client.limits import AuditPolicy
from client.settings import Unit

DETECTED_AUC, POWER = 0.65, 0.9
"""A model whose members are found with this AUC must fail with this probability."""
MOST_UNITS = 1_000_000
Rows = NDArray[np.int64]


def least_units(audit: AuditPolicy, *, has_noise: bool = True) -> int:
    """Units that must be held out, and as many trained on, for the stated power; by bisection.

    Args:
        audit: gives the limit on the AUC, the noise and the number of counts.
        has_noise: off for the operator's own look, from which nothing leaves.
    """
    allowed = (DETECTED_AUC - audit.max_auc) / NormalDist().inv_cdf(POWER)
    sigma = audit.noise_multiplier if has_noise else 0.0
    low, high = 1, MOST_UNITS
    while low < high:
        middle = (low + high) // 2
        is_enough = _variance(middle, sigma, num_cells(audit)) <= allowed**2
        low, high = (low, middle) if is_enough else (middle + 1, high)
    return low


def num_cells(audit: AuditPolicy) -> int:
    """Counts of each side: one between any two thresholds, one beyond either end, one of copied units."""
    return len(audit.score_edges) + 2


def too_few(data: Dataset, unit: Unit, audit: AuditPolicy, *, has_noise: bool = True) -> str:
    """For the operator: why an audit of this data set would say nothing; empty when it would say something."""
    least = least_units(audit, has_noise=has_noise)
    if unit == "person" and data.persons is None:
        return "policy.unit is `person`, and the images are not sorted by person"
    trained, held_out = len(data.units(unit)), len(units_of(data, data.held_out, unit))
    if min(trained, held_out) >= least:
        return ""
    return (
        f"{held_out} held-out {unit}s and {trained} trained on, an audit needs {least} of each for {POWER:.0%} power "
        f"at AUC {DETECTED_AUC:g}: before the first round, raise held_out_ratio and `data scan --new`"
    )


def foreseen(units: int, held_out_ratio: float, unit: Unit, audit: AuditPolicy) -> str:
    """For the operator, before anything is scanned: why audits would say nothing, and what would help; else empty.

    Args:
        units: of the folder, as they are counted there; duplicates are not known yet.
        held_out_ratio: share that will be set aside.
        unit: image or person.
        audit: the site's constants.
    """
    least, held_out = least_units(audit), int(units * held_out_ratio)
    if min(held_out, units - held_out) >= least:
        return ""
    if units < 2 * least:
        return f"about {units} {unit}s are here, and audits need {2 * least}: they will be refused"
    share = -(-least * 100 // units) / 100
    return (
        f"about {held_out} of {units} {unit}s would be set aside, and audits need {least}: set held_out_ratio = "
        f"{min(share, 0.5):g} in site.toml before `data scan`, after the first round it stays"
    )


def units_of(data: Dataset, rows: Rows, unit: Unit) -> list[Rows]:
    """The rows of each unit of privacy among `rows`."""
    if unit == "image" or data.persons is None:
        return list(rows.reshape(-1, 1))
    ordered = rows[np.argsort(data.persons[rows], kind="stable")]
    borders = np.flatnonzero(np.diff(data.persons[ordered])) + 1
    return [group for group in np.split(ordered, borders) if len(group)]


def _variance(units: int, sigma: float, cells: int) -> float:
    """Of the AUC at `DETECTED_AUC` with so many units on either side.

    Sampling as in Hanley and McNeil (Radiology 143, 1982); noise of deviation sigma on each of 2 `cells` counts moves
    the AUC by at most DETECTED_AUC / units each, whatever the scores are.
    """
    auc = DETECTED_AUC
    q_1, q_2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    sampling = (auc * (1 - auc) + (units - 1) * (q_1 + q_2 - 2 * auc**2)) / units**2
    return sampling + 2 * cells * (sigma * auc / units) ** 2
