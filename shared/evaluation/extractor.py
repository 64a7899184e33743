# ruff: noqa: N803, N806
"""A feature network with a name and a digest, so that distances never mix two of them.

Shapes: B images, H W pixels, D feature width. Input is uint8 (B, 3, H, W) RGB, output float32 (B, D).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import InputError
from shared.evaluation.feature_statistics import FeatureSpace
from shared.storage.files import file_digest


@dataclass(frozen=True)
class Extractor:
    """A feature network, ready to call."""

    space: FeatureSpace
    width: int
    """D."""
    compute: Callable[[Tensor], Tensor]

    def __call__(self, images_BCHW: Tensor) -> NDArray[np.float32]:
        """Features float32 (B, D) of uint8 images (B, 3, H, W).

        Raises:
            InputError: images of another type or shape.
        """
        if images_BCHW.dtype != torch.uint8 or images_BCHW.ndim != 4 or images_BCHW.shape[1] != 3:
            raise InputError(
                f"images of {images_BCHW.dtype}, shape {tuple(images_BCHW.shape)}: features need uint8 (B, 3, H, W)"
            )
        if not len(images_BCHW):
            return np.empty((0, self.width), np.float32)
        with torch.inference_mode():
            return np.asarray(self.compute(images_BCHW).float().cpu().numpy(), dtype=np.float32)

    def batches(self, images: Iterable[Tensor]) -> Iterator[NDArray[np.float32]]:
        """Features of a stream of batches, one batch in memory at a time."""
        for images_BCHW in images:
            yield self(images_BCHW)


def check_digest(path: Path, expected: str, remedy: str) -> str:
    """SHA-256 of a file.

    Raises:
        InputError: the file is not there, or `expected` is not empty and the digest is another one.
    """
    if not path.is_file():
        raise InputError(f"weights {path}: no such file: give the path of the weights file")
    found = file_digest(path)
    if expected and found != expected.lower():
        raise InputError(f"weights {path}: sha256 is {found}, expected {expected.lower()}: {remedy}")
    return found


def exact_convolutions() -> Any:  # noqa: ANN401  # torch's own context manager
    """Convolutions in true float32: on a GPU they would use TF32 otherwise, which no published FID does."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
