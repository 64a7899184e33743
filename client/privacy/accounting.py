"""What DP-SGD costs: epsilon of a history of steps, by Opacus' numerical accountant.

Numerical composition of privacy random variables (Gopi et al., arXiv 2106.02848), all in the Fourier domain.
"""

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from opacus.accountants.analysis import rdp as renyi
from opacus.accountants.analysis.prv import DiscretePRV, Domain, PoissonSubsampledGaussianPRV
from opacus.accountants.analysis.prv.prvs import TruncatedPrivacyRandomVariable

from client.privacy.divergences import ORDERS, divergences
from client.records.spending import Spending, merged
from shared.errors import InputError

ERRORS = (0.01, 0.1, 1.0)
"""What the numerical error may add to epsilon; the larger ones where a huge epsilon leaves no memory for the first."""
DELTA_SHARE = 1e-3
"""Share of delta that the numerical error may take, as in Opacus."""
SMALL_DELTA = 1e-8
"""Numerical error in delta where no epsilon at a delta is asked for."""
LARGEST_GRID = 2**25
"""Points of the privacy loss distribution: about 2 GB."""


def epsilon(history: Sequence[Spending], delta: float) -> float:
    """Total epsilon of all steps of a data set at `delta`, an upper bound.

    Numerical composition of privacy random variables (Gopi et al., arXiv 2106.02848) for the Poisson-subsampled
    Gaussian mechanism under add/remove neighbours.

    Returns:
        0 for no steps; infinity where no bound can be computed.
    """
    rows = merged(list(history))
    if not rows:
        return 0.0
    if any(row.noise_multiplier <= 0 for row in rows):
        return math.inf
    with np.errstate(all="ignore"), warnings.catch_warnings():
        # Opacus sizes its grid by RDP, which warns at large noise; the grid only gets wider than it has to be.
        warnings.simplefilter("ignore")
        for error in ERRORS:
            try:
                return _upper_epsilon(tuple(rows), delta, error)
            except _GridError:
                continue
            except (ValueError, RuntimeError, OverflowError, MemoryError):
                break
    return math.inf


@lru_cache(maxsize=1024)
def _upper_epsilon(rows: tuple[Spending, ...], delta: float, error: float) -> float:
    """Asked for more than once in a round: when the request is reviewed, and when it is answered."""
    loss = _privacy_loss(rows, error, delta * DELTA_SHARE)
    return float(loss.compute_epsilon(delta, delta * DELTA_SHARE, error)[2])


def guess_success(row: Spending) -> float:
    """Largest probability to guess right, from all releases, whether one unit was in, if a fair coin decided that.

    It is (1 + delta(0)) / 2, half the total variation distance above chance; numerical errors stay below 0.001.

    Raises:
        InputError: a plan of so little noise that its privacy loss needs more memory than there is.
    """
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loss = _privacy_loss([row], ERRORS[0], SMALL_DELTA)
            return float(min(1.0, (1 + loss.compute_delta_estimate(0.0)) / 2))
        except (ValueError, RuntimeError, OverflowError, MemoryError) as error:
            raise InputError(
                f"a plan of noise multiplier {row.noise_multiplier:g}, rate {row.sample_rate:g} and {row.steps} steps "
                "cannot be audited: its privacy loss needs too much memory; give more noise or fewer steps"
            ) from error


class _GridError(RuntimeError):
    """The distribution of the privacy loss needs more points than fit into memory at this precision."""


def _privacy_loss(history: Sequence[Spending], eps_error: float, delta_error: float) -> DiscretePRV:
    """The privacy loss of all steps on a grid: a product of powers in the Fourier domain, one inverse transform.

    Point j of the grid stands for the loss (j - z) dt, z being the place of loss 0. The transform adds places modulo
    the length: n steps at j_1, ..., j_n come to lie at J = j_1 + ... + j_n, and have the loss (J - n z) dt. That loss
    belongs at place J - (n - 1) z.
    """
    mesh = eps_error / math.sqrt(sum(row.steps for row in history) * math.log(12 / delta_error) / 2)
    reach = safe_reach(history, eps_error, delta_error)
    safe = Domain.create_aligned(-reach, reach, mesh)
    if safe.size > LARGEST_GRID:
        raise _GridError
    size = fast_length(safe.size)
    z = size // 2 - 1
    domain = Domain(-z * safe.dt, size // 2 * safe.dt, size)
    spectrum, shift, steps = np.ones(size // 2 + 1, np.complex128), 0.0, 0
    for row in history:
        pmf, shift_of_one = _discretized(PoissonSubsampledGaussianPRV(row.sample_rate, row.noise_multiplier), domain)
        spectrum *= power(np.fft.rfft(pmf), row.steps)
        shift += row.steps * shift_of_one
        steps += row.steps
    pmf = np.roll(np.fft.irfft(spectrum, size), -(steps - 1) * z)
    return DiscretePRV(pmf, domain.shift_right(shift))


def safe_reach(history: Sequence[tuple[float, float, int]], eps_error: float, delta_error: float) -> float:
    """Largest privacy loss that the grid has to hold (arXiv 2106.02848, remark 5.6), as Opacus computes it.

    Renyi divergences are most of the time that an epsilon takes, and they are the same at every number of steps: here
    they are computed once for each mechanism.
    """
    of_one = [divergences(rate, sigma) for sigma, rate, _ in history]
    counts = [steps for _, _, steps in history]
    total = np.sum([steps * each for steps, each in zip(counts, of_one, strict=True)], axis=0)
    reach = _renyi_epsilon(total, delta_error / 4)
    return max(reach, eps_error, *(_renyi_epsilon(each, delta_error / (8 * sum(counts))) for each in of_one)) + 3


def _renyi_epsilon(of_orders: NDArray[np.float64], delta: float) -> float:
    return float(renyi.get_privacy_spent(orders=list(ORDERS), rdp=of_orders, delta=delta)[0])


def _discretized(prv: PoissonSubsampledGaussianPRV, domain: Domain) -> tuple[NDArray[np.float64], float]:
    """Probabilities on the grid, and the shift that gives them the mean of the continuous variable."""
    sigma, rate = prv.noise_multiplier, prv.sample_rate
    edges = np.linspace(domain.t_min - domain.dt / 2, domain.t_max + domain.dt / 2, domain.size + 1)
    # Above this both tails are below 1e-19: the distribution function is 1 in float64 and need not be computed.
    top = np.log1p(rate * np.expm1((6.5 * 2 * np.sqrt(2) * sigma + 1) / (2 * sigma**2)))
    first, last = np.searchsorted(edges, [np.log1p(-rate), top])
    cdf = np.zeros(domain.size + 1)
    cdf[first:last], cdf[last:] = prv.cdf(edges[first:last]), 1.0
    below, up_to_the_end = prv.cdf(np.array([domain.t_min, domain.t_max]))
    pmf = np.diff(cdf) / (up_to_the_end - below)
    shift = float(TruncatedPrivacyRandomVariable(prv, domain.t_min, domain.t_max).mean() - np.dot(domain.ts, pmf))
    if not abs(shift) < domain.dt / 2:
        raise RuntimeError("the grid is too coarse for this plan")
    return pmf, shift


def fast_length(size: int) -> int:
    """Smallest even number from `size` on without prime factors above 5."""
    odd = [3**a * 5**b for a in range(8) for b in range(6)]
    return min(int(factor * 2 ** max(1, math.ceil(math.log2(size / factor)))) for factor in odd)


def power(base: NDArray[np.complex128], exponent: int) -> NDArray[np.complex128]:
    """`base` to a positive integer power by squaring; much faster than the complex power function."""
    result = np.ones_like(base)
    while exponent:
        if exponent % 2:
            result *= base
        exponent //= 2
        base = base * base if exponent else base
    return result
