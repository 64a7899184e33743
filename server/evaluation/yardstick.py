# ruff: noqa: N806
"""What images are measured with: the options, the feature network, the reference and the figures that come of them."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from server.evaluation.drawing import Drawing
from server.evaluation.measures.scores import Scores, private_scores, scores
from server.evaluation.reference import Reference, open_reference, refuse_generated
from shared.evaluation.extractor import Extractor
from shared.evaluation.feature_statistics import check_same_space, statistics_of
from shared.evaluation.networks import load_extractor
from shared.evaluation.private_statistics import Projection, load_projection
from shared.storage.chunks import Arrays, ChunkedJob

FEDERATED = "federated"
GRID_IMAGES = 32


@dataclass(frozen=True)
class Options:
    """What the user asks for; empty or 0 means what the checkpoint's experiment says."""

    reference: str
    extractor: str = ""
    weights_file: Path | None = None
    weights_sha256: str = ""
    num_images: int = 0
    drawing: Drawing = field(default_factory=Drawing)
    bootstrap: int = 0
    home: Path | None = None
    """The coordinator's folder, for the reference `federated`."""
    release: Literal["exact", "dp"] = "exact"
    """What sites are asked for, for the reference `federated`; `dp` needs the projection."""
    noise_multiplier: float = 1.1
    projection: Path | None = None
    """Public projection that the sites' private statistics were made in."""
    name: str = ""
    """Of the evaluation's folder; empty: the checkpoint's and the distance's name."""
    out: Path | None = None
    """The evaluation's folder; default: below the run's `evaluation`."""
    say: Callable[[str], None] = field(default=lambda _line: None, compare=False)
    """Told which sites released statistics."""


@dataclass(frozen=True)
class Yardstick:
    """A feature network, and what images are compared with."""

    extractor: Extractor
    projection: Projection | None
    reference: Reference | None = None
    """None on ranks that only compute features."""

    @property
    def known(self) -> Reference:
        """The reference of the first rank."""
        assert self.reference is not None
        return self.reference

    def against(self, name: str, size: int, folder: Path, batch: int) -> "Yardstick":
        """With a reference; its statistics are kept beside the evaluation's folder.

        Raises:
            InputError: no such reference, or one that does not compare.
        """
        kept = folder.parent / "references"
        return replace(self, reference=open_reference(name, size, self.extractor, kept, batch, self.projection))

    def scores(self, job: ChunkedJob, bootstrap: int, whose: str) -> Scores:
        """Figures of a finished job.

        Args:
            job: its parts hold `features` and `digests`.
            bootstrap: resamples, 0: the jackknife.
            whose: how the images are called where the reference holds some of them.

        Raises:
            InputError: the reference holds images of the job.
        """
        parts = [{name: part[name] for name in ("features", "digests")} for part in job.parts()]
        refuse_generated(self.known, np.concatenate([part["digests"] for part in parts]), whose)
        features_ND = np.concatenate([part["features"] for part in parts])
        if self.projection is not None:
            return private_scores(features_ND, self.projection, self.known.statistics)
        statistics = statistics_of(features_ND, self.extractor.space, source="generated")
        return scores(features_ND, statistics, self.known.statistics, self.known.features_ND, bootstrap=bootstrap)


def open_yardstick(options: Options, default: str, device: torch.device) -> Yardstick:
    """The network and projection that the options ask for, without a reference.

    Args:
        options: see `Options`.
        default: the network where the options name none.
        device: where it computes.

    Raises:
        InputError: unknown network, other weights, or a projection of another network.
    """
    extractor = load_extractor(
        options.extractor or default,
        weights=options.weights_file,
        weights_sha256=options.weights_sha256,
        device=device,
    )
    projection = load_projection(options.projection) if options.projection else None
    if projection is not None:
        check_same_space(extractor.space, projection.space)
    return Yardstick(extractor, projection)


def keep(items: range, images: Tensor, yardstick: Yardstick, batch: int) -> Arrays:
    """What is kept of the images of a part, uint8 (N, 3, H, W): features, digests, and the first ones themselves."""
    arrays: Arrays = {
        "features": np.concatenate(list(yardstick.extractor.batches(torch.split(images, batch)))),
        "digests": np.stack([digest_of(image.numpy()) for image in images]),
    }
    if items.start == 0:
        arrays["images"] = images[:GRID_IMAGES].numpy()
    return arrays


def digest_of(image: np.ndarray) -> np.ndarray:
    """SHA-256 of an image's pixels as uint8 (32)."""
    return np.frombuffer(hashlib.sha256(image.tobytes()).digest(), np.uint8)
