# ruff: noqa: N803
"""Memorisation: are generated images copies of training images?

A copy lies much closer to some training image than to any image of other people. The test is the ratio of the two
distances, not the distance itself: blurred or average faces are close to everything, copies to one thing only.
A model that trained on mirrored images copies mirrored ones as well, so images may be looked at in both views.
Shapes: G generated, N training, M held-out images, D feature width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import InputError

Features = NDArray[np.float32]
Views = Sequence[Features]
"""Features (B, D) of the same images: as they are and, where training mirrors images, mirrored."""
FALSE_POSITIVE_RATE = 0.001
"""Share of images of held-out persons that the test may call copies."""
TAIL_DEVIATIONS = 3.5
"""With a few hundred held-out images no quantile is that small: the threshold also lies this many deviations below the
mean logarithm of their ratios. Copies lie far below both."""
PIXEL_SIDE = 16
MIN_HELD_OUT = 40
_CHUNK = 512


@dataclass(frozen=True)
class CopyResult:
    """What the test found."""

    copy_rate: float
    """Share of generated images that it calls copies."""
    false_positive_rate: float
    """The same share among images of held-out persons, by which the threshold was set."""
    threshold: float
    """Ratio of distances below which an image counts as a copy."""
    authenticity: float
    """Share of generated images that are not closer to a training image than that is to its nearest training
    neighbour (arXiv 2102.08921)."""
    closest: list[tuple[int, int]]
    """(generated, training) indices of the pairs with the smallest ratio, most suspicious first."""


def pixel_features(images: Tensor) -> Features:
    """Colours on a 16 x 16 grid, (B, 768): enough to tell a copy, and needs no network."""
    small = F.interpolate(images.float(), size=(PIXEL_SIDE, PIXEL_SIDE), mode="area") / 127.5 - 1
    return np.asarray(small.flatten(1).numpy(), np.float32)


def features_of(compute: Callable[[Tensor], Features], images: Tensor, batch: int = 256) -> Features:
    """Features of many images, a batch at a time."""
    return np.concatenate([compute(images[start : start + batch]) for start in range(0, len(images), batch)])


def views_of(compute: Callable[[Tensor], Features], images: Tensor, *, is_mirrored: bool, batch: int = 256) -> Views:
    """Features of many images (B, C, H, W) in one or both views.

    Args:
        compute: features of a batch.
        images: as `compute` takes them.
        is_mirrored: whether the audited model was trained on mirrored images, too (`data.horizontal_flip`).
        batch: images per call of `compute`.
    """
    views = [images, images.flip(-1)] if is_mirrored else [images]
    return [features_of(compute, view, batch) for view in views]


def copies(
    generated: Views,
    training: Views,
    held_out: Views,
    held_out_persons_M: NDArray[np.int64] | None = None,
    *,
    num_closest: int = 16,
) -> CopyResult:
    """Test generated images for copies of training images.

    Half of the held-out persons stand for "anybody else"; the other half's images, which are no copies, set the
    threshold.

    Args:
        generated: (G, D) features of the generated images.
        training: (N, D) features of the images that the model was trained on.
        held_out: (M, D) features of images of other persons.
        held_out_persons_M: person of each held-out image, so that nobody is in both halves; None: each image its own.
        num_closest: pairs to name.

    Raises:
        InputError: too few images to set a threshold.
    """
    sizes = [len(views[0]) for views in (generated, training, held_out)]
    if sizes[0] < 1 or sizes[1] < 2 or sizes[2] < MIN_HELD_OUT:
        raise InputError(
            f"copy test with {sizes[0]} generated, {sizes[1]} training and {sizes[2]} held-out images: at least 1, 2 "
            f"and {MIN_HELD_OUT} are needed"
        )
    is_judge = _halves(held_out_persons_M if held_out_persons_M is not None else np.arange(sizes[2]))
    anybody, judges = held_out[0][~is_judge], [view[is_judge] for view in held_out]
    honest_ratios, _, _ = _ratios(judges, training[0], anybody)
    ratios, nearest, distances = _ratios(generated, training[0], anybody)
    threshold = _threshold(honest_ratios)
    own, _ = _nearest(training, training[0], skip_self=True)
    order = np.argsort(ratios)[:num_closest]
    return CopyResult(
        copy_rate=float((ratios < threshold).mean()),
        false_positive_rate=float((honest_ratios < threshold).mean()),
        threshold=threshold,
        authenticity=float((distances >= own[nearest]).mean()),
        closest=[(int(index), int(nearest[index])) for index in order],
    )


def nearest_neighbours(
    one_ND: Features, other_MD: Features, *, skip_self: bool = False
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Euclidean distance to, and index of, the nearest row of `other` for each row of `one`.

    Args:
        one_ND: rows to look up.
        other_MD: rows to search.
        skip_self: row k of `one` is row k of `other` and does not count.

    Returns:
        (N,) distances and (N,) indices.
    """
    target = torch.from_numpy(other_MD)
    distances: list[NDArray[np.float32]] = []
    indices: list[NDArray[np.int64]] = []
    for start in range(0, len(one_ND), _CHUNK):
        found = torch.cdist(torch.from_numpy(one_ND[start : start + _CHUNK]), target)
        if skip_self:
            rows = torch.arange(len(found))
            found[rows, start + rows] = float("inf")
        values, where = found.min(1)
        distances.append(values.numpy())
        indices.append(where.numpy())
    return np.concatenate(distances, dtype=np.float32), np.concatenate(indices, dtype=np.int64)


def _nearest(
    views: Views, target_MD: Features, *, skip_self: bool = False
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The same in whichever view is closer."""
    found = [nearest_neighbours(view, target_MD, skip_self=skip_self) for view in views]
    distances, indices = (np.stack(parts) for parts in zip(*found, strict=True))
    closer = distances.argmin(0)[None]
    return np.take_along_axis(distances, closer, 0)[0], np.take_along_axis(indices, closer, 0)[0]


def _ratios(
    views: Views, training_ND: Features, anybody: Features
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
    near, index = _nearest(views, training_ND)
    else_, _ = _nearest(views, anybody)
    ratios: NDArray[np.float32] = (near / np.maximum(else_, 1e-12)).astype(np.float32)
    return ratios, index, near


def _threshold(honest_ratios: NDArray[np.float32]) -> float:
    """Ratio that images of held-out persons, which are no copies, hardly ever fall below."""
    allowed = int(FALSE_POSITIVE_RATE * len(honest_ratios))
    logs = np.log(np.maximum(honest_ratios, 1e-12))
    return float(min(np.sort(honest_ratios)[allowed], np.exp(logs.mean() - TAIL_DEVIATIONS * logs.std())))


def _halves(persons_M: NDArray[np.int64]) -> NDArray[np.bool_]:
    """A fixed half of the persons."""
    names = np.unique(persons_M)
    chosen = np.random.default_rng(0).permutation(names)[: len(names) // 2]
    return np.isin(persons_M, chosen)
