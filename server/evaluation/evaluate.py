"""Evaluation of a checkpoint: N samples, their features, their distance to a reference, one `result.json`."""

import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from server.evaluation.drawing import SOLVER, WAIT_SECONDS, pick_device
from server.evaluation.federated_reference import ask_sites, question_for
from server.evaluation.other_tools import open_samples
from server.evaluation.reference import image_digests, refuse_generated
from server.evaluation.results import (
    PARTS_FOLDER,
    RESULT_FILE,
    facts_of,
    folder_name,
    owned_folder,
    refuse_other_result,
    run_of,
    write_result,
)
from server.evaluation.yardstick import FEDERATED, Options, keep, open_yardstick
from server.runs.run_directory import RunDir
from shared.errors import InputError
from shared.evaluation.extractor import Extractor
from shared.evaluation.generate import LoadedModel, save_grid
from shared.evaluation.networks import INCEPTION
from shared.storage.checkpoint import list_checkpoints, load_meta, resolve_checkpoint
from shared.storage.chunks import Arrays, ChunkedJob, open_job, rank_from_environment
from shared.storage.files import with_name
from shared.storage.runlog import RunLog
from shared.storage.synthetic_mark import SyntheticMark, seed_range

GRID_COLUMNS = 8
SAMPLES_BATCH = 64
"""Images per network call where no experiment says another number."""


def evaluate_run(path: Path, options: Options) -> list[Path]:
    """Evaluate every checkpoint of a run directory, oldest first: the points of a distance-against-steps curve.

    Weights that an earlier checkpoint has are not measured again.

    Raises:
        InputError: no checkpoint there, or any problem of `evaluate`.
    """
    checkpoints = list_checkpoints(RunDir(path).checkpoints)
    if not checkpoints:
        raise InputError(f"run {path}: no checkpoint to evaluate")
    files: list[Path] = []
    group, measured = f"{options.drawing.weights}.safetensors", set[str]()
    for checkpoint in checkpoints:
        digest = load_meta(checkpoint).sha256.get(group, str(checkpoint))
        if digest in measured:
            continue
        measured.add(digest)
        files.append(evaluate(checkpoint, options))
        # Sites are asked once, whatever the number of checkpoints: each answer costs them.
        if options.reference == FEDERATED and files[0].exists():
            pooled = json.loads(files[0].read_text(encoding="utf-8"))["reference"]["name"]
            options = replace(options, reference=pooled, release="exact")
    return files


def evaluate(path: Path, options: Options) -> Path:
    """Evaluate one checkpoint and write `result.json`.

    Under torchrun the ranks share the images; interrupted, the same command goes on where it was.

    Args:
        path: checkpoint folder, or a run directory (its newest checkpoint).
        options: see `Options`.

    Returns:
        The result file; written by the first rank.

    Raises:
        InputError: bad checkpoint, reference, extractor or number, or a folder that holds another evaluation.
    """
    started, rank = time.monotonic(), rank_from_environment()
    checkpoint = resolve_checkpoint(path)
    source = options.drawing.open(checkpoint, rank)
    loaded, config = source.loaded, source.loaded.experiment.evaluation
    num_images = options.num_images or config.num_images
    if options.release == "dp" and options.reference != FEDERATED:
        raise InputError(f"--private asks sites, and the reference is {options.reference}: give --reference federated")
    if num_images < 2:
        raise InputError(f"--num {num_images}: a distance needs at least 2 images")
    yardstick = open_yardstick(options, config.extractor, source.device)
    space, facts = yardstick.extractor.space, source.facts(config.seed)
    name = options.name or folder_name(checkpoint.name, space, options.reference, {**facts, "num": num_images})
    run = run_of(checkpoint)
    folder = options.out or (run.evaluation(name) if run else Path("evaluation") / name)
    network = {"extractor": space.sha256, "layer": space.layer}
    with owned_folder(folder):
        if rank.is_first:
            reference = _ask(options, loaded, yardstick.extractor) if options.reference == FEDERATED else ""
            yardstick = yardstick.against(
                reference or options.reference, loaded.experiment.model.image_size, folder, source.batch
            )
            told = {**facts_of(space, yardstick.known, num_images), **_describe(loaded, checkpoint, options)}
            refuse_other_result(folder, told)
        with open_job(folder / PARTS_FOLDER, {**facts, **network}, num_images, rank) as job:
            done = source.draw(job, config.seed, lambda items, images: keep(items, images, yardstick, source.batch))
            if not rank.is_first:
                return folder / RESULT_FILE
            job.wait(WAIT_SECONDS)
            found = yardstick.scores(job, options.bootstrap, "this checkpoint generates")
            if run is not None:
                _save_grid(job, run.samples / f"{checkpoint.name}.png", loaded)
            told |= {"batch": source.batch, "wall_seconds": round(time.monotonic() - started, 2), "sampled_now": done}
            result_file = write_result(folder, found, told)
            job.remove()
    if run is not None:
        place = {"step": loaded.meta.step, "round": loaded.meta.round}
        fields = {"reference": yardstick.known.name, "num_images": num_images, "weights": loaded.weights}
        RunLog(run.metrics).write("evaluation", **place, name=folder.name, metrics=found.metrics, **fields)
    return result_file


def evaluate_samples(path: str, options: Options, size: int = 0) -> Path:
    """Measure images that any model has made, without a checkpoint, and write `result.json`.

    Args:
        path: folder, zip, image cache or array of images (`.npy`, `.npz`).
        options: see `Options`; nothing in them that draws images counts, nor the number of images: all are measured.
        size: side in pixels that samples and reference are brought to; 0: the samples' own.

    Returns:
        The result file; written by the first rank.

    Raises:
        InputError: bad samples, reference or extractor, or a folder that holds another evaluation.
    """
    started, rank = time.monotonic(), rank_from_environment()
    if options.reference == FEDERATED:
        raise InputError("--samples with --reference federated: ask for a checkpoint once, then name the pooled file")
    device = pick_device(options.drawing.device, rank)
    images, batch = open_samples(path, size), options.drawing.batch or SAMPLES_BATCH
    if len(images) < 2:
        raise InputError(f"samples {path}: {len(images)} image, a distance needs at least 2")
    yardstick = open_yardstick(options, INCEPTION, device)
    digests = b"".join(image_digests(images))
    digest = hashlib.sha256(digests).hexdigest()
    space, samples = yardstick.extractor.space, {"name": path, "sha256": digest, "size": images.size}
    name = options.name or folder_name(with_name(Path(path)).name, space, options.reference, samples)
    folder = options.out or Path("evaluation") / name
    facts = {"samples": digest, "extractor": space.sha256, "layer": space.layer}

    def make(items: range) -> Arrays:
        return keep(items, images.batch(items), yardstick, batch)

    with owned_folder(folder):
        if rank.is_first:
            yardstick = yardstick.against(options.reference, images.size, folder, batch)
            # Before a feature is computed: the same command would end here again, beside parts that nobody needs.
            refuse_generated(yardstick.known, np.frombuffer(digests, np.uint8).reshape(-1, 32), "are among the samples")
            left_out = {"unreadable": images.num_unreadable, "ignored": images.ignored}
            told = {**facts_of(space, yardstick.known, len(images)), "samples": {**samples, **left_out}}
            refuse_other_result(folder, told)
        with open_job(folder / PARTS_FOLDER, facts, len(images), rank) as job:
            job.run(make)
            if not rank.is_first:
                return folder / RESULT_FILE
            job.wait(WAIT_SECONDS)
            found = yardstick.scores(job, options.bootstrap, "are among the samples")
            told |= {"batch": batch, "wall_seconds": round(time.monotonic() - started, 2)}
            result_file = write_result(folder, found, told)
            job.remove()
    return result_file


def _ask(options: Options, loaded: LoadedModel, extractor: Extractor) -> str:
    """The statistics that the sites release at this moment, as a file that later evaluations can name."""
    question = question_for(
        options.release, options.noise_multiplier, options.projection, extractor.space, extractor.width
    )
    pooled = ask_sites(options.home, loaded.experiment, question, options.say)
    options.say(f"kept for later evaluations: --reference {pooled}")
    return str(pooled)


def _save_grid(job: ChunkedJob, path: Path, loaded: LoadedModel) -> None:
    if not path.exists():
        images = next(job.parts())["images"]
        seeds = seed_range(loaded.experiment.evaluation.seed, len(images))
        save_grid(images, path, GRID_COLUMNS, SyntheticMark(loaded.meta.digest, seeds))


def _describe(loaded: LoadedModel, checkpoint: Path, options: Options) -> dict[str, Any]:
    config = loaded.experiment.evaluation
    return {
        **{name: getattr(config, name) for name in SOLVER},
        "nfe": loaded.nfe,
        "seed": config.seed,
        "precision": options.drawing.precision,
        "weights": loaded.weights,
        "checkpoint": {
            "name": checkpoint.name,
            "digest": loaded.meta.digest,
            "weights_sha256": loaded.meta.sha256[f"{loaded.weights}.safetensors"],
            "step": loaded.meta.step,
            "round": loaded.meta.round,
        },
    }
