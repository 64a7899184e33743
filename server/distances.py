# ruff: noqa: N803, N806
"""Distances of one checkpoint to several sets of images by several extractors, with the images sampled only once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from server.reference import open_reference
from server.scores import scores
from shared.engine import decide_precision
from shared.extractor import Extractor
from shared.sampling import load_model, sample_images
from shared.statistics import accumulate


@dataclass(frozen=True)
class Measurement:
    """What was found, and how."""

    metrics: dict[str, dict[str, dict[str, float]]]
    """By name of the reference, then of the distance: `distance`, `kernel`, `precision`, `recall`."""
    facts: dict[str, Any]
    """Sampler, evaluations, seed, precision, digest of the checkpoint."""


@dataclass(frozen=True)
class Measure:
    """How checkpoints are measured.

    Attributes:
        extractors: feature networks.
        references: image caches by name.
        kept: folder of the references' statistics.
        num_images: generated for each measurement.
        device: where the model samples.
        on_progress: told images sampled and in all.
    """

    extractors: Sequence[Extractor]
    references: dict[str, Path]
    kept: Path
    num_images: int
    device: torch.device
    on_progress: Callable[[int, int], None]

    def __call__(self, checkpoint: Path) -> Measurement:
        """Sample the moving average of `checkpoint` and compare; image k is a function of the seed and k."""
        loaded = load_model(checkpoint, device=self.device)
        config = loaded.experiment.evaluation
        precision, done = decide_precision(loaded.experiment, self.device), 0

        def count(images: int) -> None:
            nonlocal done
            done += images
            self.on_progress(done, self.num_images)

        seeds = [config.seed + number for number in range(self.num_images)]
        images_NCHW = sample_images(
            loaded.model, loaded.experiment, seeds, config.batch, self.device, precision=precision, on_batch=count
        )
        metrics: dict[str, dict[str, dict[str, float]]] = {name: {} for name in self.references}
        for extractor in self.extractors:
            features_ND = np.concatenate(list(extractor.batches(torch.split(images_NCHW, config.batch))))
            for name, cache in self.references.items():
                found = self._compare(features_ND, extractor, cache, loaded.experiment.model.image_size)
                metrics[name][extractor.space.distance_name] = found
        facts = {
            "num_images": self.num_images,
            "sampler": config.sampler,
            "nfe": loaded.nfe,
            "eta": config.eta,
            "seed": config.seed,
            "precision": precision,
            "weights": loaded.weights,
            "checkpoint": loaded.meta.digest,
        }
        return Measurement(metrics, facts)

    def _compare(
        self, features_ND: np.ndarray[Any, Any], extractor: Extractor, cache: Path, size: int
    ) -> dict[str, float]:
        reference = open_reference(str(cache), size, extractor, self.kept)
        statistics = accumulate([features_ND], extractor.space, source="generated")
        found = scores(features_ND, statistics, reference.statistics, reference.features_ND)
        renamed = {name: name if name in ("precision", "recall") else "kernel" for name in found.metrics}
        renamed[extractor.space.distance_name] = "distance"
        return {renamed[name]: float(value) for name, value in found.metrics.items()}
