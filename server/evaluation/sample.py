"""`maskfed-server sample`: images of a checkpoint as one grid, a folder of PNGs or a uint8 array."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from server.evaluation.drawing import WAIT_SECONDS, Drawing
from shared.errors import InputError
from shared.evaluation.generate import save_grid
from shared.storage.checkpoint import resolve_checkpoint
from shared.storage.chunks import ChunkedJob, open_job, rank_from_environment
from shared.storage.files import TEMPORARY_PREFIX, with_name
from shared.storage.synthetic_mark import SyntheticMark, marked_png, read_mark, seed_range, write_array_mark

MAX_GRID_IMAGES = 4096


@dataclass(frozen=True)
class SampleOptions:
    """What the user asks for; None or 0 means what the checkpoint's experiment says."""

    num_images: int
    out: Path
    """`.png`: one grid; `.npy`: uint8 (N, 3, H, W); any other name: a folder of `<seed>.png`. All say what they are."""
    seed: int | None = None
    columns: int = 8
    drawing: Drawing = field(default_factory=Drawing)

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
    options = replace(options, out=with_name(options.out))
    _check(options)
    source = options.drawing.open(resolve_checkpoint(path), rank)
    seed = source.loaded.experiment.evaluation.seed if options.seed is None else options.seed
    parts = options.out.with_name(f".{options.out.name}.parts")
    with open_job(parts, source.facts(seed), options.num_images, rank) as job:
        source.draw(job, seed, lambda _items, images: {"images": images.numpy()})
        if rank.is_first:
            job.wait(WAIT_SECONDS)
            _write(job, options, seed, source.loaded.meta.digest)
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
    if options.kind != "folder" and options.out.exists() and _is_foreign(options.out):
        raise InputError(f"--out {options.out} exists and is no picture or array that `sample` made: name a new file")
    if options.kind == "folder" and options.out.exists() and (options.out.is_file() or any(options.out.iterdir())):
        raise InputError(f"--out {options.out} exists and is not an empty folder: name a new one")


def _is_foreign(out: Path) -> bool:
    """Whether a file that would be replaced is somebody's own."""
    try:
        return read_mark(out) is None
    except InputError:
        return True


def _write(job: ChunkedJob, options: SampleOptions, seed: int, model: str) -> None:
    out, mark = options.out, SyntheticMark(model, seed_range(seed, options.num_images))
    out.parent.mkdir(parents=True, exist_ok=True)
    match options.kind:
        case "grid":
            save_grid(np.concatenate([part["images"] for part in job.parts()]), out, options.columns, mark)
        case "array":
            _write_array(job, out)
            write_array_mark(out, mark)
        case "folder":
            _write_folder(job, out, seed, lambda number: SyntheticMark(model, str(number)))


def _write_folder(job: ChunkedJob, out: Path, seed: int, mark_of: Callable[[int], SyntheticMark]) -> None:
    unfinished = out.with_name(f"{TEMPORARY_PREFIX}{out.name}-{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    number = seed
    try:
        for part in job.parts():
            for image in part["images"]:
                file = unfinished / f"{number:08d}.png"
                file.write_bytes(marked_png(image.transpose(1, 2, 0), mark_of(number)))
                number += 1
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_array(job: ChunkedJob, out: Path) -> None:
    """One part in memory at a time."""
    shape = next(job.parts())["images"].shape[1:]
    unfinished = out.with_name(f"{TEMPORARY_PREFIX}{out.name}-{os.getpid()}")
    header = {"descr": "|u1", "fortran_order": False, "shape": (job.num_items, *shape)}
    try:
        # Written, not mapped: on a full disk a map ends the process without a word.
        with unfinished.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for part in job.parts():
                file.write(np.ascontiguousarray(part["images"]).data)
        unfinished.replace(out)
    finally:
        unfinished.unlink(missing_ok=True)
