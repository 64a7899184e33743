"""Drawing images of a checkpoint, for `sample` and `evaluate`: which weights, on which device, shared among ranks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from shared.evaluation.generate import LoadedModel, Precision, Weights, load_model, sample_images
from shared.storage.chunks import Arrays, ChunkedJob, Rank
from shared.training.precision import speed_up_float32
from shared.training.processes import named_device

WAIT_SECONDS = 24 * 3600.0
"""How long the first rank waits for the others' parts."""

SOLVER = ("sampler", "steps", "eta", "clip_x_0", "rederive_eps", "ddim_grid")
"""Settings of `evaluation` that decide how noise becomes an image."""


@dataclass(frozen=True)
class Drawing:
    """How images are drawn; empty or 0 means what the checkpoint's experiment says."""

    batch: int = 0
    weights: Weights = "ema"
    precision: Precision = "float32"
    overrides: tuple[str, ...] = ()
    device: str = ""
    on_progress: Callable[[int, int], None] = field(default=lambda _done, _total: None, compare=False)
    """Told images done and images in all."""

    def open(self, checkpoint: Path, rank: Rank) -> "SamplingModel":
        """Load the checkpoint on this rank's device.

        Raises:
            InputError: no such device, damaged checkpoint, no such weights, bad override.
        """
        device = pick_device(self.device, rank)
        speed_up_float32()
        loaded = load_model(checkpoint, device=device, weights=self.weights, overrides=self.overrides)
        return SamplingModel(loaded, device, self.batch or loaded.experiment.evaluation.batch, self)


@dataclass(frozen=True)
class SamplingModel:
    """A model that images come from."""

    loaded: LoadedModel
    device: torch.device
    batch: int
    drawing: Drawing

    def facts(self, seed: int) -> dict[str, object]:
        """Everything that decides the images whose first seed is `seed`: parts of other images do not mix with them."""
        config = self.loaded.experiment.evaluation
        solver = {name: getattr(config, name) for name in SOLVER}
        model = {"checkpoint": self.loaded.meta.digest, "weights": self.loaded.weights}
        return {**model, **solver, "precision": self.drawing.precision, "seed": seed}

    def draw(self, job: ChunkedJob, seed: int, keep: Callable[[range, Tensor], Arrays]) -> int:
        """Draw the parts of `job` that are this rank's and not there yet.

        Args:
            job: its item k is the image of seed + k.
            seed: of the first image.
            keep: what is stored of the given items' images, uint8 (N, 3, H, W).

        Returns:
            Number of images drawn now.
        """
        done, drawn = 0, 0

        def count(images: int) -> None:
            nonlocal done
            done += images
            self.drawing.on_progress(done * job.rank.count, job.num_items)

        def make(items: range) -> Arrays:
            nonlocal drawn
            drawn += len(items)
            seeds = [seed + item for item in items]
            model, experiment, precision = self.loaded.model, self.loaded.experiment, self.drawing.precision
            return keep(
                items,
                sample_images(model, experiment, seeds, self.batch, self.device, precision=precision, on_batch=count),
            )

        job.run(make, count)
        return drawn


def pick_device(name: str, rank: Rank) -> torch.device:
    """The device that `name` means; empty: this rank's GPU, or the CPU.

    Raises:
        InputError: no such device here.
    """
    if name:
        return named_device(name)
    return torch.device("cuda", rank.local_index) if torch.cuda.is_available() else torch.device("cpu")
