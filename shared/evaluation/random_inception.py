# ruff: noqa: N803
"""Inception v3 up to layer 192 with fixed random filters: a feature network for places without any download.

Its distance is `fd_random_inception_192`, never FID; it ranks models of one run, and means nothing elsewhere.
Shapes: B images, C channels, H W pixels.
"""

import hashlib

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from shared.evaluation.extractor import Extractor, exact_convolutions
from shared.evaluation.feature_statistics import FeatureSpace

RANDOM_SIDE = 128
"""Pixels that images are resized to. With random filters 299 has no meaning of its own; at 128 a feature sees 10 x 10
pixels of a 32 px face instead of 4 x 4, so patches that do not fit each other cost more, and it is 11 times as fast."""

_SEED = 192
_SHAPES = ((32, 3, 3), (32, 32, 3), (64, 32, 3), (80, 64, 1), (192, 80, 3))  # outputs, inputs, side


def random_inception(device: torch.device) -> Extractor:
    """The extractor; its digest covers the filters and the size that images are resized to."""
    drawn = random_filters()
    digest = hashlib.sha256(
        b"".join(weight.numpy().tobytes() for weight in drawn) + f"{RANDOM_SIDE}".encode()
    ).hexdigest()
    filters = [weight.to(device, memory_format=torch.channels_last) for weight in drawn]

    def compute(images_BCHW: Tensor) -> Tensor:
        x = images_BCHW.to(device).float()
        x = F.interpolate(x, size=(RANDOM_SIDE, RANDOM_SIDE), mode="bilinear", align_corners=False)
        with exact_convolutions():
            return stem_features(filters, ((x - 128) / 128).contiguous(memory_format=torch.channels_last))

    return Extractor(FeatureSpace("random_inception", "192", digest), 192, compute)


def random_filters() -> list[Tensor]:
    """The five convolutions up to layer 192, He-initialised from a fixed seed; each (out, in, k, k) float32."""
    generator = torch.Generator().manual_seed(_SEED)
    return [
        torch.randn(out, inputs, side, side, generator=generator) * (2 / (inputs * side**2)) ** 0.5
        for out, inputs, side in _SHAPES
    ]


def stem_features(filters: list[Tensor], x_BCHW: Tensor) -> Tensor:
    """Layer 192 (batch normalisation at its initial statistics) of pixels scaled to [-1, 1]; (B, 192)."""
    scale = (1 + 1e-3) ** -0.5  # Batch normalisation of running mean 0 and variance 1, epsilon 1e-3.
    x = F.relu(F.conv2d(x_BCHW, filters[0], stride=2) * scale)
    x = F.relu(F.conv2d(x, filters[1]) * scale)
    x = F.relu(F.conv2d(x, filters[2], padding=1) * scale)
    x = F.max_pool2d(x, 3, 2)
    x = F.relu(F.conv2d(x, filters[3]) * scale)
    x = F.relu(F.conv2d(x, filters[4]) * scale)
    return F.max_pool2d(x, 3, 2).mean((2, 3))
