# ruff: noqa: N803, N806
"""Distances of one checkpoint to several sets of images by several extractors, with the images sampled only once.

A distance does not ask whose faces it sees: a model that hands out its training images does well by it. So the share
of copies stands beside each distance, and what the training images themselves would get.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from server.evaluation.drawing import SOLVER
from server.evaluation.measures.held_out_loss import NORMAL_QUANTILE, held_out_loss
from server.evaluation.measures.scores import scores
from server.evaluation.reference import Reference, kept_rows, open_reference
from server.studies.stored_results import HELD_OUT_LOSS
from shared.audits.memorisation import MIN_HELD_OUT, Features, Views, copies, pixel_features, views_of
from shared.data.image_cache import open_images
from shared.data.image_set import ImageCache
from shared.evaluation.extractor import Extractor
from shared.evaluation.feature_statistics import accumulate
from shared.evaluation.generate import load_model, sample_images
from shared.messages.audit import PIXELS
from shared.training.engine import decide_precision

SHOWN_IMAGES, CHUNK = 12, 256


@dataclass(frozen=True)
class Measurement:
    """What was found, and how."""

    metrics: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """By name of the reference, then of the distance: `distance`, `kernel`, `precision`, `recall`, and the ends of
    the 95 percent intervals of the first two, `distance_low`, `distance_high`, `kernel_low`, `kernel_high`."""
    copied: dict[str, float] = field(default_factory=dict)
    """Share of generated images that are copies of training images: by `PIXELS`, and by distance in its features."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Sampler, evaluations, seed, precision, digest of the checkpoint."""
    images: Tensor | None = field(default=None, repr=False)
    """The first `SHOWN_IMAGES` generated ones."""


@dataclass(frozen=True)
class Measure:
    """How checkpoints are measured.

    Attributes:
        extractors: feature networks.
        references: image caches by name; the one called `validation` stands for other persons in the test for copies.
        training: image cache that the model was trained on.
        size: side of the images in pixels.
        kept: folder of the references' statistics.
        num_images: generated for each measurement.
        device: where the model samples.
        on_progress: told images sampled and in all.
        tells_copies: whether copies of training images are looked for, which needs the reference `validation`.
    """

    extractors: Sequence[Extractor]
    references: dict[str, Path]
    training: Path
    size: int
    kept: Path
    num_images: int
    device: torch.device
    on_progress: Callable[[int, int], None]
    tells_copies: bool = True

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
        features = {
            extractor.space.distance_name: np.concatenate(
                list(extractor.batches(torch.split(images_NCHW, config.batch)))
            )
            for extractor in self.extractors
        }
        is_mirrored = loaded.experiment.data.horizontal_flip
        pixels = views_of(pixel_features, images_NCHW, is_mirrored=is_mirrored)
        copied = self._copied(features, pixels) if self.tells_copies else {}
        facts = {
            "num_images": self.num_images,
            "nfe": loaded.nfe,
            **{name: getattr(config, name) for name in SOLVER if name != "steps"},
            "seed": config.seed,
            "precision": precision,
            "weights": loaded.weights,
            "checkpoint": loaded.meta.digest,
        }
        metrics = self._metrics(features)
        if not loaded.experiment.data.wavelet:
            metrics["test"][HELD_OUT_LOSS] = self._held_out_loss(checkpoint)
        return Measurement(metrics, copied, facts, images_NCHW[:SHOWN_IMAGES])

    def of_training_images(self) -> dict[str, dict[str, dict[str, float]]]:
        """The metrics of as many training images in place of generated ones, each as often as any other."""
        features = {}
        for extractor in self.extractors:
            rows_MD = self._features(self.training, extractor)
            places = np.linspace(0, len(rows_MD) - 1, self.num_images).round().astype(np.int64)
            features[extractor.space.distance_name] = rows_MD[places]
        return self._metrics(features)

    def _metrics(self, features: dict[str, np.ndarray[Any, Any]]) -> dict[str, dict[str, dict[str, float]]]:
        return {
            name: {
                extractor.space.distance_name: self._compare(features[extractor.space.distance_name], extractor, cache)
                for extractor in self.extractors
            }
            for name, cache in self.references.items()
        }

    def _held_out_loss(self, checkpoint: Path) -> dict[str, float]:
        """Of v, so that networks which predict other things compare, with its interval over images."""
        found = held_out_loss(checkpoint, str(self.references["test"]), in_v=True)
        half = NORMAL_QUANTILE * found.error
        return {"distance": found.mean, "distance_low": found.mean - half, "distance_high": found.mean + half}

    def _copied(self, features: dict[str, np.ndarray[Any, Any]], pixels: Views) -> dict[str, float]:
        """Nothing with too few images for the test."""
        training, held_out = (
            open_images(str(cache), self.size) for cache in (self.training, self.references["validation"])
        )
        if len(held_out) < MIN_HELD_OUT:
            return {}
        persons = None if held_out.persons is None else held_out.persons[kept_rows(len(held_out))]
        own, others = (_pixels(each, is_mirrored=len(pixels) > 1) for each in (training, held_out))
        found = {PIXELS: copies(pixels, own, others, held_out.persons).copy_rate}
        for extractor in self.extractors:
            # The networks hardly see a difference between a face and its mirror image: one view is enough.
            own, others = (
                [self._features(cache, extractor)] for cache in (self.training, self.references["validation"])
            )
            name = extractor.space.distance_name
            found[name] = copies([features[name]], own, others, persons).copy_rate
        return found

    def _open(self, cache: Path, extractor: Extractor) -> Reference:
        return open_reference(str(cache), self.size, extractor, self.kept)

    def _features(self, cache: Path, extractor: Extractor) -> np.ndarray[Any, Any]:
        features_ND = self._open(cache, extractor).features_ND
        assert features_ND is not None
        return features_ND

    def _compare(self, features_ND: np.ndarray[Any, Any], extractor: Extractor, cache: Path) -> dict[str, float]:
        reference = self._open(cache, extractor)
        statistics = accumulate([features_ND], extractor.space, source="generated")
        found = scores(features_ND, statistics, reference.statistics, reference.features_ND)
        renamed = {name: name if name in ("precision", "recall") else "kernel" for name in found.metrics}
        renamed[extractor.space.distance_name] = "distance"
        values = {renamed[name]: float(value) for name, value in found.metrics.items()}
        for name, (low, high) in found.intervals.items():
            values |= {f"{renamed[name]}_low": float(low), f"{renamed[name]}_high": float(high)}
        return values


def _pixels(images: ImageCache, *, is_mirrored: bool) -> Views:
    """Both views of a set that may be larger than the memory."""
    parts: list[Views] = [
        views_of(pixel_features, images.batch(range(start, min(start + CHUNK, len(images)))), is_mirrored=is_mirrored)
        for start in range(0, len(images), CHUNK)
    ]
    views: list[Features] = [np.concatenate(view) for view in zip(*parts, strict=True)]
    return views


def digests(extractors: Sequence[Extractor]) -> dict[str, str]:
    """Digest of each network's weights, by distance name."""
    return {extractor.space.distance_name: extractor.space.sha256 for extractor in extractors}
