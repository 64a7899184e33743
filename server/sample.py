"""`maskfed-server sample`: images of a checkpoint as one grid, a folder of PNGs or a uint8 array."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from server.evaluate import WAIT_SECONDS, pick_device
from shared.checkpoint import resolve_checkpoint
from shared.chunks import Arrays, ChunkedJob, rank_from_environment
from shared.errors import InputError
from shared.files import TEMPORARY_PREFIX
from shared.precision import speed_up_float32
from shared.sampling import Precision, Weights, load_model, sample_images, save_grid

MAX_GRID_IMAGES = 4096


@dataclass(frozen=True)
class SampleOptions:
    """What the user asks for; None or 0 means what the checkpoint's experiment says."""

    num_images: int
    out: Path
    """`.png`: one grid; `.npy`: uint8 (N, 3, H, W); any other name: a folder of `<seed>.png`."""
    seed: int | None = None
    columns: int = 8
    batch: int = 0
    weights: Weights = "ema"
    precision: Precision = "float32"
    overrides: tuple[str, ...] = ()
    device: str = ""
    on_progress: Callable[[int, int], None] = field(default=lambda _done, _total: None, compare=False)
    """Told images done and images in all."""

    @property
    def kind(self) -> Literal["grid", "array", "folder"]:
        """What `out` means by its suffix."""
        return {".png": "grid", ".npy": "array"}.get(self.out.suffix.lower(), "folder")  # type: ignore[return-value]


def sample(path: Path, options: SampleOptions) -> Path:
    """Sample images seed, seed + 1, ... of a checkpoint.

    Image k depends on its seed only. Under torchrun the ranks share the images; an interrupted command, given again,
    goes on where it was.

    Args:
        path: checkpoint folder, or a run directory (its newest checkpoint).
        options: see `SampleOptions`.

    Returns:
        What was written, by the first rank.

    Raises:
        InputError: bad checkpoint or number, or an `out` that holds something else.
    """
    rank = rank_from_environment()
    _check(options)
    device = pick_device(options.device, rank)
    speed_up_float32()
    loaded = load_model(resolve_checkpoint(path), device=device, weights=options.weights, overrides=options.overrides)
    config = loaded.experiment.evaluation
    seed, batch, done = config.seed if options.seed is None else options.seed, options.batch or config.batch, 0
    solver = {name: getattr(config, name) for name in ("sampler", "steps", "eta", "clip_x_0")}
    facts = {"checkpoint": loaded.meta.digest, "weights": loaded.weights, "precision": options.precision, "seed": seed}
    parts = options.out.with_name(f".{options.out.name}.parts")
    job = ChunkedJob(parts, {**facts, **solver}, options.num_images, rank)

    def count(images: int) -> None:
        nonlocal done
        done += images
        options.on_progress(done * rank.count, options.num_images)

    def make(items: range) -> Arrays:
        seeds = [seed + item for item in items]
        images = sample_images(
            loaded.model, loaded.experiment, seeds, batch, device, precision=options.precision, on_batch=count
        )
        return {"images": images.numpy()}

    job.run(make, count)
    if rank.is_first:
        job.wait(WAIT_SECONDS)
        _write(job, options, seed)
        job.remove()
    return options.out


def _check(options: SampleOptions) -> None:
    """Refuse what could not be written at the end, before anything is sampled.

    Raises:
        InputError: naming the option.
    """
    if options.num_images < 1 or options.columns < 1:
        raise InputError(f"--num {options.num_images} --columns {options.columns}: give at least 1 of each")
    if options.kind == "grid" and options.num_images > MAX_GRID_IMAGES:
        raise InputError(
            f"--num {options.num_images} in one grid, at most {MAX_GRID_IMAGES}: give --out FOLDER or --out FILE.npy"
        )
    if options.kind == "folder" and options.out.exists() and (options.out.is_file() or any(options.out.iterdir())):
        raise InputError(f"--out {options.out} exists and is not an empty folder: name a new one")


def _write(job: ChunkedJob, options: SampleOptions, seed: int) -> None:
    out = options.out
    out.parent.mkdir(parents=True, exist_ok=True)
    match options.kind:
        case "grid":
            save_grid(torch.from_numpy(np.concatenate([part["images"] for part in job.parts()])), out, options.columns)
        case "array":
            _write_array(job, out)
        case "folder":
            unfinished = out.with_name(f"{TEMPORARY_PREFIX}{out.name}-{os.getpid()}")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            number = seed
            for part in job.parts():
                for image in part["images"]:
                    Image.fromarray(image.transpose(1, 2, 0)).save(unfinished / f"{number:08d}.png")
                    number += 1
            if out.exists():
                out.rmdir()
            unfinished.rename(out)


def _write_array(job: ChunkedJob, out: Path) -> None:
    """One part in memory at a time."""
    shape = next(job.parts())["images"].shape[1:]
    unfinished = out.with_name(f"{TEMPORARY_PREFIX}{out.name}-{os.getpid()}")
    array = np.lib.format.open_memmap(unfinished, "w+", np.uint8, (job.num_items, *shape))
    start = 0
    for part in job.parts():
        array[start : start + len(part["images"])] = part["images"]
        start += len(part["images"])
    array.flush()
    del array
    unfinished.replace(out)
