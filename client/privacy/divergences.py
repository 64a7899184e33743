"""Renyi divergences of the Poisson-subsampled Gaussian mechanism (Mironov et al., arXiv 1908.10530, section 3.3).

The numbers are those of Opacus, which adds up one term of one order after the other; here all orders share arrays of
terms, which takes a tenth of the time.
"""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from opacus.accountants import RDPAccountant
from opacus.accountants.analysis import rdp as renyi
from scipy.special import gammaln, log_ndtr, logsumexp

ORDERS = np.asarray(RDPAccountant.DEFAULT_ALPHAS, np.float64)
NEGLIGIBLE = -30.0
"""Logarithm of a term after which the series of a Renyi divergence ends, as in Opacus."""
FEWEST_TERMS, TERMS_AT_ONCE, MOST_TERMS = 2**6, 2**15, 2**20
"""Of such a series, which an order of 1.1 makes thousands of terms long."""
PRECISION = 1e-3
"""Largest error of the logarithm of a term: at less noise than that takes, the series says nothing."""


@lru_cache(maxsize=1024)
def divergences(rate: float, sigma: float) -> NDArray[np.float64]:
    """Renyi divergence of one DP-SGD step at each of `ORDERS`, (151,).

    Args:
        rate: probability with which a unit is in the step.
        sigma: noise multiplier.

    Raises:
        ValueError: so little noise that float64 cannot hold the terms.
    """
    if not (0 < rate < 1 and sigma > 0):
        return np.asarray(renyi.compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=list(ORDERS)), np.float64)
    is_whole, found = ORDERS % 1 == 0, np.empty(len(ORDERS))
    found[is_whole] = _whole_moments(rate, sigma, ORDERS[is_whole])
    found[~is_whole] = _fractional_moments(rate, sigma, ORDERS[~is_whole])
    return found / (ORDERS - 1)


def _whole_moments(rate: float, sigma: float, orders: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logarithms of the moments of whole orders: finite sums."""
    i = np.arange(orders.max() + 1)
    rest = orders[:, None] - i
    terms = _log_binomial(orders, i) + i * np.log(rate) + rest * np.log1p(-rate) + (i * i - i) / (2 * sigma**2)
    return np.asarray(logsumexp(np.where(rest < 0, -np.inf, terms), axis=1), np.float64)


def _fractional_moments(rate: float, sigma: float, orders: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same of other orders: two series, of which each order takes as many terms as it needs.

    Raises:
        ValueError: so little noise that float64 cannot hold the terms.
    """
    sums, signs = np.full((2, len(orders)), -np.inf), np.ones((2, len(orders)))
    open_, first, count = np.arange(len(orders)), 0, FEWEST_TERMS
    while len(open_):
        if first > MOST_TERMS:
            raise ValueError("the series of a Renyi divergence does not end")
        terms, weights, is_over = _terms(rate, sigma, orders[open_], np.arange(first, first + count, dtype=np.float64))
        so_far = [each[:, open_, None] for each in (sums, signs)]
        sums[:, open_], signs[:, open_] = logsumexp(
            np.concatenate([so_far[0], terms], 2), b=np.concatenate([so_far[1], weights], 2), axis=2, return_sign=True
        )
        open_, first, count = open_[~is_over], first + count, min(4 * count, TERMS_AT_ONCE)
    moments, sign = logsumexp(sums, b=signs, axis=0, return_sign=True)
    if not (sign > 0).all():
        raise ValueError("a moment is not above 0")
    return np.asarray(moments, np.float64)


def _terms(
    rate: float, sigma: float, orders: NDArray[np.float64], i: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Terms `i` of the integrals below and above the loss of 0.

    Returns:
        Logarithms of their sizes and their weights, both (2, orders, i), and which orders need no more, (orders,).
    """
    if not max(i[-1], orders.max()) ** 2 / (2 * sigma**2) * np.finfo(np.float64).eps < PRECISION:
        raise ValueError("too little noise for the series of a Renyi divergence")
    log_in, log_out, j = math.log(rate), math.log1p(-rate), orders[:, None] - i
    z = sigma**2 * math.log(1 / rate - 1) + 0.5
    below = i * log_in + j * log_out + (i * i - i) / (2 * sigma**2) + log_ndtr((z - i) / sigma)
    above = j * log_in + i * log_out + (j * j - j) / (2 * sigma**2) + log_ndtr((j - z) / sigma)
    terms = _log_binomial(orders, i) + np.stack([below, above])
    # The first negligible term counts, those after it do not.
    is_negligible = terms.max(0) < NEGLIGIBLE
    signs = np.where(np.maximum(0, i - np.ceil(orders[:, None])) % 2, -1.0, 1.0)
    weights = np.where(np.cumsum(is_negligible, 1) - is_negligible > 0, 0.0, signs)
    return terms, np.broadcast_to(weights, terms.shape), is_negligible.any(1)


def _log_binomial(orders: NDArray[np.float64], i: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logarithms of the sizes of generalised binomial coefficients, (orders, i)."""
    return np.asarray(gammaln(orders + 1)[:, None] - gammaln(i + 1) - gammaln(orders[:, None] - i + 1), np.float64)
