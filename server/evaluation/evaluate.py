"""Evaluation of a checkpoint: N samples, their features, their distance to a reference, one `result.json`."""

import hashlib
import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from server.evaluation.drawing import WAIT_SECONDS, Drawing, Source
from server.evaluation.federated_reference import ask_sites, question_for
from server.evaluation.reference import Reference, open_reference, refuse_generated
from server.evaluation.scores import Scores, private_scores, scores
from server.runs.run_directory import RunDir
from shared.errors import InputError
from shared.evaluation.extractor import Extractor
from shared.evaluation.feature_statistics import accumulate, check_same_space
from shared.evaluation.generate import LoadedModel, save_grid
from shared.evaluation.networks import load_extractor
from shared.evaluation.private_statistics import Projection, load_projection
from shared.storage.checkpoint import list_checkpoints, resolve_checkpoint
from shared.storage.chunks import Arrays, ChunkedJob, rank_from_environment
from shared.storage.files import write_atomically
from shared.storage.runlog import RunLog
from shared.storage.synthetic_mark import SyntheticMark, seed_range
from shared.storage.versions import git_commit, installed_versions

RESULT_FILE = "result.json"
FEDERATED = "federated"
GRID_IMAGES, GRID_COLUMNS = 32, 8


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


def evaluate_run(path: Path, options: Options) -> list[Path]:
    """Evaluate every checkpoint of a run directory, oldest first: the points of a distance-against-steps curve.

    Raises:
        InputError: no checkpoint there, or any problem of `evaluate`.
    """
    checkpoints = list_checkpoints(RunDir(path).checkpoints)
    if not checkpoints:
        raise InputError(f"run {path}: no checkpoint to evaluate")
    files = []
    for checkpoint in checkpoints:
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
        InputError: bad checkpoint, reference, extractor or number.
    """
    started, rank = time.monotonic(), rank_from_environment()
    checkpoint = resolve_checkpoint(path)
    source = options.drawing.open(checkpoint, rank)
    loaded, batch = source.loaded, source.batch
    config = loaded.experiment.evaluation
    num_images = options.num_images or config.num_images
    if options.release == "dp" and options.reference != FEDERATED:
        raise InputError(f"--private asks sites, and the reference is {options.reference}: give --reference federated")
    if num_images < 2:
        raise InputError(f"--num {num_images}: a distance needs at least 2 images")
    spec = options.extractor or config.extractor
    extractor = load_extractor(
        spec, weights=options.weights_file, weights_sha256=options.weights_sha256, device=source.device
    )
    folder = options.out or _folder(checkpoint, options.name or f"{checkpoint.name}-{extractor.space.distance_name}")
    size = loaded.experiment.model.image_size
    kept = folder.parent / "references"
    projection = load_projection(options.projection) if options.projection else None
    if projection is not None:
        check_same_space(extractor.space, projection.space)
    reference = None
    if rank.is_first:
        name = _ask(options, loaded, extractor) if options.reference == FEDERATED else options.reference
        reference = open_reference(name, size, extractor, kept, batch, projection)
    space = {"extractor": extractor.space.sha256, "layer": extractor.space.layer}
    job = ChunkedJob(folder / "parts", {**source.facts(config.seed), **space}, num_images, rank)
    done = _generate(job, source, extractor)
    result_file = folder / RESULT_FILE
    if reference is None:
        return result_file
    job.wait(WAIT_SECONDS)
    found = _compare(job, extractor, reference, projection, options.bootstrap)
    run = _run_of(checkpoint)
    if run is not None:
        _save_grid(job, run.samples / f"{checkpoint.name}.png", loaded)
    seconds = time.monotonic() - started
    result = {
        "metrics": found.metrics,
        "intervals": found.intervals,
        "noise": found.noise,
        **_describe(loaded, checkpoint, extractor, reference, options),
        "num_images": num_images,
        "batch": batch,
        "wall_seconds": round(seconds, 2),
        "sampled_now": done,
    }
    write_atomically(result_file, json.dumps(result, indent=2) + "\n")
    job.remove()
    if run is not None:
        place = {"step": loaded.meta.step, "round": loaded.meta.round}
        fields = {"reference": reference.name, "num_images": num_images, "weights": loaded.weights}
        RunLog(run.metrics).write("evaluation", **place, name=folder.name, metrics=found.metrics, **fields)
    return result_file


def _ask(options: Options, loaded: LoadedModel, extractor: Extractor) -> str:
    """The statistics that the sites release at this moment, as a file that later evaluations can name."""
    question = question_for(
        options.release, options.noise_multiplier, options.projection, extractor.space, extractor.width
    )
    pooled = ask_sites(options.home, loaded.experiment, question, options.say)
    options.say(f"kept for later evaluations: --reference {pooled}")
    return str(pooled)


def _generate(job: ChunkedJob, source: Source, extractor: Extractor) -> int:
    """Features and digests of this rank's parts; the number of images sampled now (the rest was there already)."""

    def keep(items: range, images: Tensor) -> Arrays:
        digests = [np.frombuffer(hashlib.sha256(image.numpy().tobytes()).digest(), np.uint8) for image in images]
        arrays: Arrays = {
            "features": np.concatenate(list(extractor.batches(torch.split(images, source.batch)))),
            "digests": np.stack(digests),
        }
        if items.start == 0:
            arrays["images"] = images[:GRID_IMAGES].numpy()
        return arrays

    return source.draw(job, source.loaded.experiment.evaluation.seed, keep)


def _compare(
    job: ChunkedJob, extractor: Extractor, reference: Reference, projection: Projection | None, bootstrap: int
) -> Scores:
    refuse_generated(reference, np.concatenate([part["digests"] for part in job.parts()]))
    if projection is not None:
        features = np.concatenate([part["features"] for part in job.parts()])
        return private_scores(projection.statistics(features, "generated"), reference.statistics)
    statistics = accumulate((part["features"] for part in job.parts()), extractor.space, source="generated")
    if reference.features_ND is None and not bootstrap:
        return scores(None, statistics, reference.statistics, None)
    features = np.concatenate([part["features"] for part in job.parts()])
    return scores(features, statistics, reference.statistics, reference.features_ND, bootstrap=bootstrap)


def _save_grid(job: ChunkedJob, path: Path, loaded: LoadedModel) -> None:
    if not path.exists():
        images = next(job.parts())["images"]
        seeds = seed_range(loaded.experiment.evaluation.seed, len(images))
        save_grid(images, path, GRID_COLUMNS, SyntheticMark(loaded.meta.digest, seeds))


def _describe(
    loaded: LoadedModel, checkpoint: Path, extractor: Extractor, reference: Reference, options: Options
) -> dict[str, Any]:
    config, statistics = loaded.experiment.evaluation, reference.statistics
    return {
        "extractor": vars(extractor.space),
        "reference": {
            "name": reference.name,
            "n": statistics.n,
            "sha256": reference.sha256,
            "release": statistics.release,
            "epsilon": statistics.epsilon,
            "delta": statistics.delta,
            "sites": statistics.site,
        },
        "sampler": config.sampler,
        "steps": config.steps,
        "eta": config.eta,
        "nfe": loaded.nfe,
        "clip_x_0": config.clip_x_0,
        "seed": config.seed,
        "precision": options.drawing.precision,
        "weights": loaded.weights,
        "checkpoint": {
            "name": checkpoint.name,
            "digest": loaded.meta.digest,
            "step": loaded.meta.step,
            "round": loaded.meta.round,
        },
        "versions": installed_versions(),
        "commit": git_commit(),
        "command": shlex.join(["maskfed-server", *sys.argv[1:]]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _run_of(checkpoint: Path) -> RunDir | None:
    """The run that a checkpoint folder lies in."""
    folder = checkpoint.resolve().parent
    run = RunDir(folder.parent)
    return run if folder.name == "checkpoints" and run.experiment_file.exists() else None


def _folder(checkpoint: Path, name: str) -> Path:
    run = _run_of(checkpoint)
    name = name.replace("/", "-").replace(":", "-")
    return run.evaluation(name) if run else Path("evaluation") / name
