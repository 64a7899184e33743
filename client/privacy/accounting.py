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

from client.records.spending import Spending, merged
from shared.errors import InputError

ERRORS = (0.01, 0.1, 1.0)
"""What the numerical error may add to epsilon; the larger ones where a huge epsilon leaves no memory for the first."""
DELTA_SHARE = 1e-3
"""Share of delta that the numerical error may take, as in Opacus."""
SMALL_DELTA = 1e-8
"""Numerical error in delta where no epsilon at a delta is asked for."""
ORDERS = [1.1, 1.2, 1.3, 1.5, 1.7, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 18, 20, 24, 28, 32, 40, 48, 56, 63]
"""Of Renyi divergences: about a sixth of Opacus', over the same range."""
MEAN_ERROR = 1e-12
"""Largest doubt about the mean loss of a step: a million steps make it a millionth of epsilon."""
LEAST_NOISE = 0.05
"""Noise multiplier below which no epsilon is computed: the exponential of one step's loss leaves float64 (at 709), and
what lies beyond would count as 709."""
FARTHEST = 13.0
"""Standard deviations beyond which noise is not looked at: a tail of 1e-38."""
LARGEST_GRID = 2**25
"""Points of the privacy loss distribution: about 2 GB."""


def epsilon(history: Sequence[Spending], delta: float) -> float:
    """Total epsilon of all steps of a data set at `delta`, an upper bound.

    Numerical composition of privacy random variables (Gopi et al., arXiv 2106.02848) for the Poisson-subsampled
    Gaussian mechanism under add/remove neighbours.

    Returns:
        0 for no steps; infinity where no bound can be computed, as below a noise multiplier of `LEAST_NOISE`.
    """
    rows = merged(list(history))
    if not rows:
        return 0.0
    if any(row.noise_multiplier < LEAST_NOISE for row in rows):
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
    """Largest privacy loss that the grid has to hold (arXiv 2106.02848, remark 5.6), as Opacus computes it, or more.

    Renyi divergences take long, and they are the same at every number of steps: here they are computed once for each
    mechanism, and at fewer orders. Each order gives a bound, so fewer of them never make the grid too short.
    """
    of_one = [_divergences(rate, sigma) for sigma, rate, _ in history]
    counts = [steps for _, _, steps in history]
    total = np.sum([steps * each for steps, each in zip(counts, of_one, strict=True)], axis=0)
    reach = _renyi_epsilon(total, delta_error / 4)
    return max(reach, eps_error, *(_renyi_epsilon(each, delta_error / (8 * sum(counts))) for each in of_one)) + 3


def _renyi_epsilon(divergences: NDArray[np.float64], delta: float) -> float:
    return float(renyi.get_privacy_spent(orders=ORDERS, rdp=divergences, delta=delta)[0])


@lru_cache(maxsize=1024)
def _divergences(rate: float, sigma: float) -> NDArray[np.float64]:
    """Renyi divergence of one step, at each of `ORDERS`."""
    return np.asarray(renyi.compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=ORDERS), np.float64)


def _discretized(prv: PoissonSubsampledGaussianPRV, domain: Domain) -> tuple[NDArray[np.float64], float]:
    """Probabilities on the grid, and the shift that gives them the mean of the continuous variable."""
    sigma, rate = prv.noise_multiplier, prv.sample_rate
    if sigma < LEAST_NOISE:
        raise RuntimeError("too little noise for float64")
    edges = np.linspace(domain.t_min - domain.dt / 2, domain.t_max + domain.dt / 2, domain.size + 1)
    # Above this both tails are below 1e-19: the distribution function is 1 in float64 and need not be computed.
    top = np.log1p(rate * np.expm1((6.5 * 2 * np.sqrt(2) * sigma + 1) / (2 * sigma**2)))
    first, last = np.searchsorted(edges, [np.log1p(-rate), top])
    cdf = np.zeros(domain.size + 1)
    cdf[first:last], cdf[last:] = prv.cdf(edges[first:last]), 1.0
    below, up_to_the_end = prv.cdf(np.array([domain.t_min, domain.t_max]))
    pmf = np.diff(cdf) / (up_to_the_end - below)
    shift = truncated_mean(prv, domain.t_min, domain.t_max) - float(np.dot(domain.ts, pmf))
    if not abs(shift) < domain.dt / 2:
        raise RuntimeError("the grid is too coarse for this plan")
    return pmf, shift


def truncated_mean(prv: PoissonSubsampledGaussianPRV, least: float, most: float) -> float:
    """Mean of the privacy loss of one step, given that it lies between `least` and `most`.

    The loss is t(x) = log(1 - q + q exp((2 x - 1) / (2 sigma^2))) of x drawn from (1 - q) N(0, sigma^2) + q N(1,
    sigma^2), so the mean is one integral over x of a function that is analytic nearer to the real axis than pi sigma^2
    (there the argument of the logarithm is 0). Gauss-Legendre rules on panels of at most a third of that each side lose
    a factor of more than 30 per node. Opacus integrates the distribution function, point by point in Python, which was
    most of the time of an epsilon; where two orders of the rule here do not agree, that is what is taken.
    """
    rough, fine = (_mean_by_rule(prv, least, most, nodes) for nodes in (12, 18))
    if abs(rough - fine) <= MEAN_ERROR:
        return fine
    return float(TruncatedPrivacyRandomVariable(prv, least, most).mean())


def _mean_by_rule(prv: PoissonSubsampledGaussianPRV, least: float, most: float, nodes: int) -> float:
    """As `truncated_mean`, with so many nodes on each panel; x is in units of sigma here."""
    sigma, rate = prv.noise_multiplier, prv.sample_rate

    def place_of(loss: float) -> float:
        # Below the loss's own least value the logarithm does not exist: every x counts from there.
        share = math.expm1(min(loss, 700.0)) / rate
        return sigma * math.log1p(share) + 1 / (2 * sigma) if share > -1 else -math.inf

    first, last = max(-FARTHEST, place_of(least)), min(1 / sigma + FARTHEST, place_of(most))
    edges = np.linspace(first, last, 2 + int((last - first) / min(1.0, 2 * sigma)))
    place, weight = np.polynomial.legendre.leggauss(nodes)
    half, middle = np.diff(edges)[:, None] / 2, (edges[:-1] + edges[1:])[:, None] / 2
    x = middle + half * place
    density = (1 - rate) * np.exp(-(x**2) / 2) + rate * np.exp(-((x - 1 / sigma) ** 2) / 2)
    loss = x / sigma - 1 / (2 * sigma**2)
    loss = np.log1p(rate * np.expm1(loss)) if rate < 1 else loss
    share = half * weight * density
    return float((share * loss).sum() / share.sum())


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
