"""What makes public images similar to a site's: scale, shift and a smooth difference, from two mean images. No torch.

All three are linear in the pixels but for the last rounding, so the mean of the moved public images is the moved mean
image, and the fit needs no image but the two means. Everything is separable: rows and columns are moved and smoothed by
one matrix each, with reflected borders.

Shapes: N images, S pixels of a side; images are (N, 3, S, S) or (3, S, S) on the scale from -1 to 1.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
SCALES = tuple(round(0.6 + 0.025 * step, 3) for step in range(33))
LARGEST_SHIFT = 0.25
"""Of the side, up, down, left and right."""
FIT_SIZE = 32
"""Scale and shift are searched for on means of at most about this side."""
STRUCTURE_WIDTH = 1 / 16
"""Deviation of the smoothing before means are compared, as a share of the side: noise must not decide."""
LEAST_GAIN = 0.3
"""Share of the squared difference that moving must explain; else images stay in place, since moving takes away two
thirds of what is finest in them."""
SMOOTHING_WIDTHS = (0.0, 1 / 64, 1 / 48, 1 / 32, 1 / 24, 1 / 16, 1 / 12, 1 / 8, 1 / 5, 1 / 3)
"""Deviations of the smoothing of the difference to choose from, as shares of the side."""


@dataclass(frozen=True)
class Alignment:
    """How public images become similar to a site's."""

    scale: float
    """Larger than 1: faces become larger."""
    down: float
    """Shift in shares of the side; negative: up."""
    right: float
    width: float
    """Deviation of the smoothing of `difference`, as a share of the side."""
    difference: Float64
    """(3, S, S), added to the moved image."""

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The aligned images, bytes (N, 3, S, S) to bytes."""
        x = move(images.astype(np.float64) * (2 / 255) - 1, self.scale, self.down, self.right) + self.difference
        aligned: NDArray[np.uint8] = np.rint((x.clip(-1, 1) + 1) * 127.5).astype(np.uint8)
        return aligned


def fit(public_mean: Float64, site_mean: Float64, deviation: float) -> Alignment:
    """Fit scale and shift, then the difference that is left, smoothed as much as its noise asks for.

    Args:
        public_mean: (3, S, S).
        site_mean: (3, S, S), with noise.
        deviation: of the noise of each value of `site_mean`.
    """
    scale, down, right = _fit_move(public_mean, site_mean)
    left = site_mean - move(public_mean, scale, down, right)
    width = min(SMOOTHING_WIDTHS, key=lambda width: _risk(left, width, deviation))
    return Alignment(scale, down, right, width, smooth(left, width))


def move(images: Float64, scale: float, down: float, right: float) -> Float64:
    """Scale about the centre, then shift by shares of the side; bilinear, borders reflected."""
    if (scale, down, right) == (1.0, 0.0, 0.0):
        return images
    size = images.shape[-1]
    return _apply(images, _moving(size, scale, down), _moving(size, scale, right))


def smooth(images: Float64, width: float) -> Float64:
    """Convolve with a Gaussian of deviation `width` times the side, borders reflected."""
    matrix = _smoothing(images.shape[-1], width)
    return _apply(images, matrix, matrix)


def _fit_move(public_mean: Float64, site_mean: Float64) -> tuple[float, float, float]:
    """The move after which the structure of both means, whatever their colours, differs least."""
    public, site = (smooth(_small(each), STRUCTURE_WIDTH) for each in (public_mean, site_mean))
    public, site = (each - each.mean(axis=(1, 2), keepdims=True) for each in (public, site))
    size = public.shape[-1]
    shifts = [step / size for step in range(-int(LARGEST_SHIFT * size), int(LARGEST_SHIFT * size) + 1)]
    best, least = (1.0, 0.0, 0.0), (1 - LEAST_GAIN) * float(np.square(site - public).sum())
    for scale in SCALES:
        matrices = np.stack([_moving(size, scale, shift) for shift in shifts])
        squares, totals = (matrices.transpose(0, 2, 1) @ matrices).reshape(len(shifts), -1), matrices.sum(axis=1)
        for down, matrix in zip(shifts, matrices, strict=True):
            # |X N'|^2 = <N'N, X'X> and <site, X N'> = <N, site' X>: no image is moved to the right N by itself.
            rows = matrix @ public
            means = rows.sum(axis=1) @ totals.T / size**2
            lengths = squares @ (rows.transpose(0, 2, 1) @ rows).sum(axis=0).ravel()
            products = matrices.reshape(len(shifts), -1) @ (site.transpose(0, 2, 1) @ rows).sum(axis=0).ravel()
            # The site's structure has mean 0, so that the mean of the moved image counts once.
            errors = lengths - size**2 * np.square(means).sum(axis=0) - 2 * products + np.square(site).sum()
            if errors.min() < least:
                best, least = (scale, down, shifts[int(errors.argmin())]), float(errors.min())
    return best


def _risk(noisy: Float64, width: float, deviation: float) -> float:
    """Stein's unbiased estimate of the squared error of smoothing, but for a constant (Stein 1981)."""
    matrix = _smoothing(noisy.shape[-1], width)
    trace = len(noisy) * float(np.trace(matrix)) ** 2
    return float(np.square(_apply(noisy, matrix, matrix) - noisy).sum()) + 2 * deviation**2 * trace


def _small(image: Float64) -> Float64:
    """Means of blocks, so that the side is at most about `FIT_SIZE`; the rest of the last block is left out."""
    factor = max(1, image.shape[-1] // FIT_SIZE)
    side = image.shape[-1] // factor
    cut = image[:, : side * factor, : side * factor]
    small: Float64 = cut.reshape(3, side, factor, side, factor).mean(axis=(2, 4))
    return small


def _apply(images: Float64, rows: Float64, columns: Float64) -> Float64:
    applied: Float64 = rows @ images @ columns.T
    return applied


def _moving(size: int, scale: float, shift: float) -> Float64:
    """(S, S): row i reads the source at the place that moves to i."""
    centre = (size - 1) / 2
    places = centre + (np.arange(size) - centre - shift * size) / scale
    low = np.floor(places).astype(np.int64)
    matrix = np.zeros((size, size))
    for offset, weight in ((0, 1 - (places - low)), (1, places - low)):
        np.add.at(matrix, (np.arange(size), _reflected(low + offset, size)), weight)
    return matrix


def _smoothing(size: int, width: float) -> Float64:
    if width == 0:
        return np.eye(size)
    reach = math.ceil(4 * width * size)
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (offsets / (width * size)) ** 2)
    matrix = np.zeros((size, size))
    for offset, weight in zip(offsets, weights / weights.sum(), strict=True):
        np.add.at(matrix, (np.arange(size), _reflected(np.arange(size) + offset, size)), weight)
    return matrix


def _reflected(places: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Places beyond the border as their mirror images, the border pixel being shown twice."""
    within = places % (2 * size)
    return np.where(within < size, within, 2 * size - 1 - within)
