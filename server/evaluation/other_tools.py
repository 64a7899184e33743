# ruff: noqa: N806
"""References that other programs wrote: mean and covariance of Inception features, and arrays of images.

ADM, pytorch-fid, clean-fid and torch-fidelity keep `mu` (D) and `sigma` (D, D) in an `.npz`; samplers of the field
write uint8 images as `.npy`, or as `arr_0` of an `.npz`. Nothing is unpickled.
"""

import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.data.image_set import ImageCache
from shared.errors import InputError
from shared.evaluation.feature_statistics import FeatureSpace, Statistics

SUFFIXES = (".npy", ".npz")
_CHANNELS, _DAMAGE = 3, (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError)


def split_count(reference: str) -> tuple[Path, int]:
    """Path and number of images of `FILE.npz:50000`; 0 where none is given."""
    path, colon, count = reference.rpartition(":")
    if colon and Path(path).suffix.lower() in SUFFIXES and count.isascii() and count.isdecimal() and len(count) < 10:
        return Path(path), int(count)
    return Path(reference), 0


def read_arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    """The arrays of a file that a reference can need: `mu` and `sigma`, or the images as `images`.

    Raises:
        InputError: damaged, or neither.
    """
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {"images": loaded}
            held = list(loaded.files)
            if {"mu", "sigma"} <= set(held):
                return {name: loaded[name] for name in ("mu", "sigma")}
            images = [name for name in held if name == "arr_0"] or (held if len(held) == 1 else [])
            if images:
                return {"images": loaded[images[0]]}
    except _DAMAGE as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"reference {path}: no array file that can be read ({reason}); give .npy or .npz") from error
    names = ", ".join(repr(name)[:40] for name in held[:5]) or "nothing"
    raise InputError(f"reference {path}: holds {names}; give mu and sigma, or images as arr_0")


def statistics_of_moments(
    path: Path, arrays: dict[str, NDArray[np.generic]], count: int, space: FeatureSpace, width: int
) -> Statistics:
    """Statistics with the mean and the covariance of a file.

    Args:
        path: the file, for errors.
        arrays: `mu` (D) and `sigma` (D, D, unbiased).
        count: number of images behind them, which such files do not tell.
        space: of the evaluation.
        width: D of the extractor.

    Raises:
        InputError: another feature space than FID's, other shapes, numbers that are no covariance, or no count.
    """
    if space.distance_name != "fid":
        raise InputError(
            f"reference {path}: mu and sigma of other tools are of Inception features, not of {space.extractor}: give "
            "--extractor inception-v3-compat"
        )
    if count < 2:
        raise InputError(f"reference {path}: does not tell of how many images: give --reference {path}:<number>")
    mu_D, sigma_DD = (np.asarray(arrays[name], np.float64) for name in ("mu", "sigma"))
    if mu_D.shape != (width,) or sigma_DD.shape != (width, width):
        raise InputError(
            f"reference {path}: mu {mu_D.shape} and sigma {sigma_DD.shape}, not ({width},) and ({width}, {width})"
        )
    if not np.allclose(sigma_DD, sigma_DD.T, rtol=1e-3, atol=1e-6) or (np.diag(sigma_DD) < 0).any():
        raise InputError(f"reference {path}: sigma is no covariance (not symmetric, or negative): give the file again")
    outer_DD = (count - 1) * sigma_DD + count * np.outer(mu_D, mu_D)
    return Statistics(space, float(count), count * mu_D, outer_DD, source=str(path))


def images_of_array(path: Path, array: NDArray[np.generic], size: int) -> ImageCache:
    """An array of images as a set.

    Args:
        path: the file, for errors.
        array: uint8, (N, 3, H, W) or (N, H, W, 3).
        size: the side that the evaluation compares, in pixels.

    Raises:
        InputError: another dtype, shape or size.
    """
    is_last = array.ndim == 4 and array.shape[3] == _CHANNELS and array.shape[1] != _CHANNELS
    images = array.transpose(0, 3, 1, 2) if is_last else array
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != _CHANNELS:
        raise InputError(
            f"reference {path}: {array.dtype} {array.shape}: give uint8 images (N, 3, H, W) or (N, H, W, 3)"
        )
    if images.shape[2:] != (size, size):
        raise InputError(
            f"reference {path}: {images.shape[2]} x {images.shape[3]} pixels, the model draws {size} x {size}; "
            "give a folder or zip of them, which is resized"
        )
    pixels = np.ascontiguousarray(images)
    return ImageCache(lambda: pixels, len(pixels), size)
