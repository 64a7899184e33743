# ruff: noqa: N806
"""What other programs wrote: mean and covariance of Inception features, arrays and folders of images.

ADM, pytorch-fid, clean-fid and torch-fidelity keep `mu` (D) and `sigma` (D, D) in an `.npz`; samplers of the field
write uint8 images as `.npy`, or as `arr_0` of an `.npz`. Nothing is unpickled.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.data.image_cache import open_images
from shared.data.image_set import CACHE_FILE, SYNTHETIC_PREFIX, ImageCache, open_cache
from shared.data.images import list_images
from shared.data.pixels import UnreadableImageError, stored_size
from shared.errors import InputError
from shared.evaluation.feature_statistics import FeatureSpace, Statistics
from shared.paths import given_path

SUFFIXES = (".npy", ".npz")
_CHANNELS = 3
NEGATIVE_SHARE = 1e-3
"""A covariance of another tool may have eigenvalues this far below zero, as a share of its largest."""


def open_samples(path: str, size: int = 0) -> ImageCache:
    """Images that any model has made.

    Args:
        path: folder, zip, image cache, `synthetic:...`, or an array of images (`.npy`, `.npz`).
        size: side in pixels that pictures are cropped and brought to; 0: their own, which must be one for all.

    Raises:
        InputError: no images there, sides that differ, or another size than that of the array or cache.
    """
    path = given_path(path)
    file, is_made = Path(path), path.startswith(SYNTHETIC_PREFIX)
    if is_made and not size:
        raise InputError(f"samples {path}: drawn at any size: give --size")
    if is_array_file(path):
        arrays = read_arrays(file, "samples")
        if "images" not in arrays:
            raise InputError(f"samples {path}: holds mu and sigma, no images: give them to --reference")
        return images_of_array(file, arrays["images"], size, "samples")
    if not size:
        size = open_cache(file).size if (file / CACHE_FILE).exists() else _side_of_all(file)
    return open_images(path, size)


def _side_of_all(path: Path) -> int:
    """The side of the square pictures of a folder or zip.

    Raises:
        InputError: they are not square, or not of one size.
    """
    source, found = list_images(path), dict[tuple[int, int], str]()
    for name in source.names:
        try:
            found.setdefault(stored_size(source.read(name)), name)
        except UnreadableImageError:
            continue  # It is counted when it is decoded.
        if len(found) > 1:
            break
    (width, height), *others = found or {(0, 0): ""}
    if others or width != height or not width:
        told = ", ".join(f"{name!r} {wide} x {high}" for (wide, high), name in found.items()) or "none can be read"
        raise InputError(f"samples {path}: pictures are not all square and of one size ({told}): give --size")
    return width


def split_count(reference: str) -> tuple[Path, int]:
    """Path and number of images of `FILE.npz:50000`; 0 where none is given."""
    path, colon, count = reference.rpartition(":")
    if colon and Path(path).suffix.lower() in SUFFIXES and count.isascii() and count.isdecimal() and len(count) < 10:
        return Path(path), int(count)
    return Path(reference), 0


def is_array_file(path: str) -> bool:
    """Whether a path names an array file; a folder may be called so, too."""
    file = Path(path)
    return file.suffix.lower() in SUFFIXES and not file.is_dir() and not path.startswith(SYNTHETIC_PREFIX)


def read_arrays(path: Path, role: str = "reference") -> dict[str, NDArray[np.generic]]:
    """The arrays of a file that a distance can need: `mu` and `sigma`, or the images as `images`.

    Args:
        path: the file.
        role: what it is given as, for errors.

    Raises:
        InputError: damaged, or neither.
    """
    try:
        with path.open("rb") as file:
            # Arrays of images are larger than memory: only batches of them are read.
            is_plain = path.suffix.lower() == ".npy" and path.is_file()
            loaded = np.load(path if is_plain else file, mmap_mode="r" if is_plain else None, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {"images": loaded}
            held = list(loaded.files)
            if {"mu", "sigma"} <= set(held):
                return {name: _array(loaded[name], name) for name in ("mu", "sigma")}
            images = [name for name in held if name == "arr_0"] or (held if len(held) == 1 else [])
            if images:
                return {"images": _array(loaded[images[0]], images[0])}
    except Exception as error:  # any failure means the same: no arrays, or damaged ones
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{role} {path}: no array file that can be read ({reason}); give .npy or .npz") from error
    names = ", ".join(repr(name)[:40] for name in held[:5]) or "nothing"
    raise InputError(f"{role} {path}: holds {names}; give mu and sigma, or images as arr_0")


def _array(member: object, name: str) -> NDArray[np.generic]:
    """A member of an archive; numpy hands out the bytes of one that is no array."""
    if not isinstance(member, np.ndarray):
        raise TypeError(f"{name!r} in it is no array")
    return member


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
    for name in ("mu", "sigma"):
        if not np.issubdtype(arrays[name].dtype, np.floating):
            raise InputError(f"reference {path}: {name} holds {arrays[name].dtype}, not floating-point numbers")
    mu_D, sigma_DD = (np.asarray(arrays[name], np.float64) for name in ("mu", "sigma"))
    if mu_D.shape != (width,) or sigma_DD.shape != (width, width):
        raise InputError(
            f"reference {path}: mu {mu_D.shape} and sigma {sigma_DD.shape}, not ({width},) and ({width}, {width})"
        )
    if not np.allclose(sigma_DD, sigma_DD.T, rtol=1e-3, atol=1e-6) or (np.diag(sigma_DD) < 0).any():
        raise InputError(f"reference {path}: sigma is no covariance (not symmetric, or negative): give the file again")
    # What rounding alone makes negative is tiny beside the largest.
    spread_D = np.linalg.eigvalsh(sigma_DD) if np.isfinite(sigma_DD).all() else np.zeros(1)
    if spread_D[0] < -NEGATIVE_SHARE * spread_D[-1]:
        raise InputError(
            f"reference {path}: sigma is no covariance (a variance of {spread_D[0]:g}): give the file again"
        )
    outer_DD = (count - 1) * sigma_DD + count * np.outer(mu_D, mu_D)
    return Statistics(space, float(count), count * mu_D, outer_DD, source=str(path))


def images_of_array(path: Path, array: NDArray[np.generic], size: int, role: str = "reference") -> ImageCache:
    """An array of images as a set.

    Args:
        path: the file, for errors.
        array: uint8, (N, 3, H, W) or (N, H, W, 3).
        size: the side that the evaluation compares, in pixels; 0: the images' own.
        role: what it is given as, for errors.

    Raises:
        InputError: another dtype, shape or size, or not square.
    """
    is_last = array.ndim == 4 and array.shape[3] == _CHANNELS and array.shape[1] != _CHANNELS
    images = array.transpose(0, 3, 1, 2) if is_last else array
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != _CHANNELS or not images.size:
        raise InputError(f"{role} {path}: {array.dtype} {array.shape}: give uint8 images (N, 3, H, W) or (N, H, W, 3)")
    side = size or images.shape[2]
    if images.shape[2:] != (side, side):
        raise InputError(
            f"{role} {path}: {images.shape[2]} x {images.shape[3]} pixels, {side} x {side} are compared; "
            "give a folder or zip of them, which is resized"
        )
    pixels: NDArray[np.uint8] = images.view(np.uint8)
    return ImageCache(lambda: pixels, len(pixels), side)
