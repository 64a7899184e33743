# ruff: noqa: N803, N806
"""Images from a checkpoint: image k depends on seed k only, whatever the batch size, the ranks or the restarts.

x_T and the noise of every step of an image come from one generator of its own, and the network sees no other image.
Shapes: N images, B images of one batch, C channels, H W pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shared.diffusion.dwt import from_network
from shared.diffusion.samplers import time_grid
from shared.diffusion.sampling import draw_start, sample
from shared.diffusion.schedule import make_schedule
from shared.diffusion.uvit import build_model
from shared.errors import InputError
from shared.experiment.config import Experiment, parse_experiment
from shared.seeding import derive_seed, generator
from shared.storage.checkpoint import CheckpointMeta, check_files, load_group
from shared.storage.files import write_atomically
from shared.storage.synthetic_mark import SyntheticMark, marked_png

Weights = Literal["ema", "model"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class LoadedModel:
    """A network ready for sampling, and where it came from."""

    model: nn.Module
    experiment: Experiment
    meta: CheckpointMeta
    weights: Weights
    """`ema` (moving average, the default everywhere) or `model` (the last step's raw weights)."""

    @property
    def nfe(self) -> int:
        """Network evaluations per image."""
        options, diffusion = self.experiment.evaluation, self.experiment.diffusion
        schedule = make_schedule(diffusion.schedule, diffusion.timesteps)
        return len(time_grid(schedule, options.sampler, options.steps))


def load_model(
    checkpoint: Path, *, device: torch.device | str = "cpu", weights: Weights = "ema", overrides: Sequence[str] = ()
) -> LoadedModel:
    """Network of a checkpoint folder, digests checked, in evaluation mode.

    Args:
        checkpoint: folder with `meta.json`.
        device: where the network goes.
        weights: which group.
        overrides: `section.key=value` changes to the checkpoint's experiment, for example another sampler.

    Raises:
        InputError: damaged or foreign checkpoint, no such weights in it, bad override.
    """
    meta = check_files(checkpoint)
    if f"{weights}.safetensors" not in meta.sha256:
        raise InputError(
            f"checkpoint {checkpoint} has no {'EMA' if weights == 'ema' else 'raw'} weights: "
            f"{'give another one, or sample the raw weights with --raw' if weights == 'ema' else 'leave out --raw'}"
        )
    experiment = override(meta.experiment, overrides)
    model = build_model(experiment)
    tensors = {name: torch.from_numpy(array) for name, array in load_group(checkpoint, weights).items()}
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise InputError(f"checkpoint {checkpoint}: weights do not fit its experiment ({first})") from error
    return LoadedModel(model.to(device).eval().requires_grad_(False), experiment, meta, weights)


def override(experiment: Experiment, overrides: Sequence[str]) -> Experiment:
    """The experiment with `section.key=value` overrides applied and checked again.

    Raises:
        InputError: bad override.
    """
    return parse_experiment(experiment.to_toml(), list(overrides)) if overrides else experiment


def sample_images(
    model: nn.Module,
    experiment: Experiment,
    seeds: Sequence[int],
    batch: int,
    device: torch.device | str = "cpu",
    *,
    precision: Precision = "float32",
    on_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """Images of the given seeds.

    Args:
        model: the network, on `device`.
        experiment: gives sampler, steps, eta, schedule, geometry and wavelet.
        seeds: one for each image, in [0, 2^63).
        batch: images per network call; changes speed and memory, not the images (1e-5 in float32).
        device: where the network is.
        precision: what the network computes in; the solver's state is float32 always.
        on_batch: called with the number of images of each batch when it is done.

    Returns:
        uint8 (N, 3, H, W) on the CPU.
    """
    parts = [torch.empty(0, 3, experiment.model.image_size, experiment.model.image_size, dtype=torch.uint8)]
    for images_BCHW in sample_batches(model, experiment, seeds, batch, device, precision=precision):
        parts.append(images_BCHW)
        if on_batch is not None:
            on_batch(len(images_BCHW))
    return torch.cat(parts)


def sample_batches(
    model: nn.Module,
    experiment: Experiment,
    seeds: Sequence[int],
    batch: int,
    device: torch.device | str = "cpu",
    *,
    precision: Precision = "float32",
) -> Iterator[Tensor]:
    """Like `sample_images`, one uint8 batch (B, 3, H, W) at a time, so that memory does not grow with N.

    Raises:
        InputError: a batch below 1, or a network whose output is not finite.
    """
    if batch < 1:
        raise InputError(f"batch {batch} is below 1: give the number of images per network call")
    for start in range(0, len(seeds), batch):
        x_0_BCHW = sample_x_0(model, experiment, seeds[start : start + batch], device, precision=precision)
        yield to_uint8(x_0_BCHW).cpu()


def sample_x_0(
    model: nn.Module,
    experiment: Experiment,
    seeds: Sequence[int],
    device: torch.device | str = "cpu",
    *,
    precision: Precision = "float32",
) -> Tensor:
    """One batch of samples before rounding: float32 (B, 3, H, W), nominally in [-1, 1], wavelet undone.

    Raises:
        InputError: the network's output is not finite.
    """
    device = torch.device(device)
    schedule = make_schedule(experiment.diffusion.schedule, experiment.diffusion.timesteps)
    generators = [generator(derive_seed(seed, "sample"), device) for seed in seeds]
    is_low = precision == "bfloat16"
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16) if is_low else nullcontext():
        x_T_BCHW = draw_start(experiment, generators)
        x_0_BCHW = from_network(sample(model, schedule, experiment, x_T_BCHW, generators), experiment.data)
    if not bool(torch.isfinite(x_0_BCHW).all()):
        raise InputError("samples are not finite: the checkpoint's network has diverged; take an earlier checkpoint")
    return x_0_BCHW


def to_uint8(x_0_BCHW: Tensor) -> Tensor:
    """[-1, 1] to 0..255, rounded to the nearest, clipped."""
    return ((x_0_BCHW + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def grid_png(images_NCHW: Tensor | NDArray[np.uint8], columns: int, mark: SyntheticMark, gap: int = 2) -> bytes:
    """PNG of a grid of uint8 images (N, 3, H, W), row-major, `gap` white pixels between them, with its mark.

    Raises:
        InputError: no image, or fewer than one column.
    """
    images = np.asarray(images_NCHW)
    if not len(images) or columns < 1:
        raise InputError(f"grid of {len(images)} images in {columns} columns: give at least one of each")
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    return marked_png(canvas, mark)


def save_grid(images_NCHW: Tensor | NDArray[np.uint8], path: Path, columns: int, mark: SyntheticMark) -> None:
    """Write `grid_png` under a temporary name and rename it; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, grid_png(images_NCHW, columns, mark))
